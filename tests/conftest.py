"""Shared fixtures: toy and small teachers, toy shards, a short command line, a program run in this process."""

import functools
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may look for anything on the Hub
os.environ.setdefault("WANDB_MODE", "offline")

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from hostile import COLLECTED
from processes import end_all
from safetensors.torch import load_file, save_file
from small_teachers import TOY, make_small_teacher

from lcm_distill.run.stopping import SIGNALS
from toy.make_shards import make_shards

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"


# The files that take longest, in this order before all others: none is left for one process alone at the end.
LONGEST = (
    "test_programs", "test_orphans", "test_many_processes", "test_fsdp", "test_matching_runs", "test_hub",
    "test_benchmarks", "test_kills", "test_zero", "test_compiling", "test_lora", "test_waiting", "test_wiring",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -k and -m leave some out
def pytest_collection_modifyitems(config, items):
    named = {arg.partition("::")[0] for arg in config.args if "::" in arg}
    whole = {item.path.relative_to(TESTS).as_posix() for item in items if TESTS in item.path.parents}
    config.stash[COLLECTED] = {name for name in whole if not any(one.endswith(name) for one in named)}, list(items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))  # the order within a file stays


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_level():
    """A run sets the level of the package's logger; the next test must not inherit it."""
    logger = logging.getLogger("lcm_distill")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    end_all()


@pytest.fixture(scope="session")
def teachers() -> dict[str, str]:
    """The toy's own, which have learned to draw."""
    return {family: str(TOY / family) for family in ("sd", "sdxl")}


@pytest.fixture(scope="session")
def teacher(teachers) -> str:
    return teachers["sd"]


@pytest.fixture(scope="session")
def small_teachers(tmp_path_factory) -> dict[str, str]:
    """Random ones for runs of the programs, whose time is mostly that of building and saving networks."""
    return {family: str(make_small_teacher(family, tmp_path_factory.mktemp("small"))) for family in ("sd", "sdxl")}


@pytest.fixture(scope="session")
def small_teacher(small_teachers) -> str:
    return small_teachers["sd"]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    """Two shards of 24 captioned pictures."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, shards=2, samples_per_shard=24, seed=3)
    return str(folder)


@pytest.fixture(scope="session")
def pruned_teacher(tmp_path_factory) -> str:
    """An SDXL teacher whose U-Net has SSD-1B's layout, random and small."""
    folder = tmp_path_factory.mktemp("ssd") / "teacher"
    shutil.copytree(TOY / "sdxl", folder, ignore=shutil.ignore_patterns("unet"))
    torch.manual_seed(0)
    config = dict(UNet2DConditionModel.load_config(TOY / "sdxl", subfolder="unet")) | {
        "block_out_channels": (16, 32, 32),
        "attention_head_dim": (2, 4, 4),
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    }
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return str(folder)


def _rename(folder: Path, names: dict[str, str], more: dict[str, torch.Tensor] | None = None) -> None:
    """Gives whole components of the names of the tensors in `folder` other names."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for old, new in names.items():
            pattern = rf"(^|(?<=\.)){re.escape(old)}(?=\.)"
            tensors = {re.sub(pattern, new, name, count=1): tensor for name, tensor in tensors.items()}
        assert more or tensors.keys() != load_file(file).keys()
        save_file(tensors | (more or {}), file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def old_teachers(tmp_path_factory, small_teachers) -> dict[str, str]:
    """The small teachers as early libraries wrote them, SD 1.5 on the Hub among those: configs leave out what is a
    default, and some tensors have other names."""
    folders = {family: tmp_path_factory.mktemp("old") / family for family in small_teachers}
    for family, folder in folders.items():
        shutil.copytree(small_teachers[family], folder)
        for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
            config = json.loads((folder / name).read_text())
            signature = inspect.signature(getattr(diffusers, config["_class_name"])).parameters
            defaults = {key: signature[key].default for key in config if key in signature}
            defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
            short = {key: value for key, value in config.items() if key not in defaults or value != defaults[key]}
            assert len(short) < len(config)
            (folder / name).write_text(json.dumps(short))
        _rename(folder / "vae", {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"})
        positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        _rename(folder / "text_encoder", {}, positions)
    return {family: str(folder) for family, folder in folders.items()}


@pytest.fixture()
def command(shards, small_teachers, tmp_path):
    """The shortest command line of a program: `command(steps=2, **more)` as an argument list."""

    def build(output="out", steps=2, *, family="sd", **more) -> list[str]:
        chosen = {
            "pretrained_teacher_model": small_teachers[family],
            "train_shards_path_or_url": shards,
            "output_dir": str(tmp_path / output),
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": steps,
            "checkpointing_steps": 1000,
            "validation_steps": 1000,
            "num_validation_images": 1,
            "validation_prompts": ["a small red circle on a black background"],
            "validation_inference_steps": 1,
            "validation_teacher_steps": 2,
            "logging_steps": 1,
            "report_to": "none",
            "seed": 7,
        } | more
        argv: list[str] = []
        for name, value in chosen.items():
            if value is None or value is False:
                continue
            argv.append(f"--{name}")
            if value is not True:
                argv += [str(item) for item in value] if isinstance(value, list) else [str(value)]
        return argv

    return build


@pytest.fixture()
def run():
    """Runs a program's main in this process: `run(program, argv)`."""

    def call(program: str, argv: list[str]) -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            importlib.import_module(program).main(argv)
        except BaseException:  # a run that fails keeps its handlers; one that ends well must not
            for number, handler in before.items():
                signal.signal(number, handler)
            raise

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Output folders of distillations, and a style LoRA, of the toy teachers: `finished("full", "sd")`."""
    import finished_students as made

    folder = tmp_path_factory.mktemp("finished")
    makers = {"full": made.full_student, "lora": made.lora_student, "style": made.style_lora}

    @functools.cache
    def get(kind: str, family: str) -> str:
        return makers[kind](folder / f"{kind}_{family}", str(TOY / family), family)

    return get
