"""Full students split over two gloo ranks (FSDP2), and the shipped configurations of Accelerate."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from diffusers import UNet2DConditionModel
from PIL import Image
from processes import start_ranks, wait
from small_teachers import TOY
from test_programs import drawn, result, same, weights

from lcm_distill.distributed.fsdp import configure_engine, prepare_for_training
from lcm_distill.errors import UsageError
from lcm_distill.flags import MatchingFlags
from lcm_distill.run import matching
from lcm_distill.run.matching import check_matching
from toy.make_shards import make_shards

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# All runs in one launch, since warming up takes longest. (folder, engine, program, steps, other flags);
# "kept" is `fsdp_reshard_after_forward: false`, the engine "zero" is for test_zero.py.
TWICE = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "checkpointing_steps": 1}
LAST = {"channels_last": True}  # which FSDP does not keep
Runs = list[tuple[str, str, str, int, dict]]
RUNS: Runs = [
    ("ddp", "ddp", "sd", 2, TWICE),
    ("fsdp", "fsdp", "sd", 2, TWICE | {"validation_steps": 1}),
    ("halves", "fsdp", "sd", 2, TWICE | {"resume_from_checkpoint": "fsdp/checkpoint-1"}),
    ("last", "ddp", "sd", 2, TWICE | LAST),
    ("to-ddp", "ddp", "sd", 2, TWICE | LAST | {"resume_from_checkpoint": "fsdp/checkpoint-1"}),
    ("to-fsdp", "fsdp, kept", "sd", 2, TWICE | {"resume_from_checkpoint": "last/checkpoint-1", "validation_steps": 1}),
    ("ddp-bf16", "ddp", "sd", 2, {"mixed_precision": "bf16"}),
    ("fsdp-bf16", "fsdp", "sd", 2, {"mixed_precision": "bf16", "cast_teacher_unet": True}),
    ("ddp-sdxl", "ddp", "sdxl", 1, {}),
    ("fsdp-sdxl", "fsdp", "sdxl", 1, {}),
]

SCRIPT = """
import importlib, json, os, sys
sys.path.insert(0, {root!r})
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor import DTensor
from lcm_distill.distributed import fsdp
from lcm_distill.run.progress import Progress
from lcm_distill.distributed.zero import ZeroAccelerator

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")  # one for all runs: destroying one and starting another is a race
PartialState.destroy_process_group = AcceleratorState.destroy_process_group = lambda *_, **__: None
networks, seen, log, close = [], {{}}, Progress.log, Progress.close

def share(tensors, total):
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors) / total

def logging(self, step, lr_scheduler):
    values = log(self, step, lr_scheduler)
    seen["losses"].append(values["loss"])
    seen["grad_norms"].append(values["grad_norm"])
    return values

def closing(self, *rest):
    seen["world"] = torch.distributed.get_world_size()
    zero = isinstance(self._accelerator, ZeroAccelerator)
    seen["engine"] = "ZERO" if zero else str(self._accelerator.distributed_type.value)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    seen["shares"] = [share(network.parameters(), size) for network, size in zip(networks, sizes)]
    seen["dtypes"] = [sorted({{str(p.dtype) for p in network.parameters()}}) for network in networks]
    if "optimizer" in seen:
        states = list(seen.pop("optimizer").optimizer.state.values())
        seen["shares"] += [share([state[name] for state in states], sizes[0]) for name in ("exp_avg", "exp_avg_sq")]
    close(self, *rest)

Progress.log, Progress.close = logging, closing
for number, (engine, program, argv) in enumerate(json.loads(open(sys.argv[1]).read())):
    os.environ["ACCELERATE_USE_FSDP"] = "true" if engine.startswith("fsdp") else "false"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if engine == "zero" else "false"
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    if engine == "zero":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on first use, on CPUs only
        # DeepSpeed asks whether autocast is on without naming a device, which means a GPU; here it has to be the CPU.
        torch.is_autocast_enabled = lambda device="cpu", original=torch.is_autocast_enabled: original(device)
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"  # the launcher's default, whatever the flag
    os.environ |= {{"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false" if "kept" in engine else "true"}}
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # Accelerate's default: the programs must switch it off
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    networks.clear(), seen.clear()
    seen |= {{"losses": [], "grad_norms": []}}
    module = importlib.import_module(f"train_lcm_distill_{{program}}_wds")
    def splitting(accelerator, *given):
        networks.extend(given)
        fsdp.split(accelerator, *given)
    def preparing(accelerator, network, optimizer):
        network, optimizer = fsdp.prepare_for_training(accelerator, network, optimizer)
        if fsdp.all_ranks_save(accelerator):
            seen["optimizer"] = optimizer
        return network, optimizer
    assert {{"split", "prepare_for_training"}} <= vars(module).keys()
    module.split, module.prepare_for_training = splitting, preparing
    torch.distributed.barrier()
    module.main(argv)
    open(f"{{sys.argv[1]}}-{{number}}-{{os.environ['RANK']}}", "w").write(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> SimpleNamespace:
    return train(RUNS, tmp_path_factory.mktemp("ranks"))


def train(runs: Runs, folder: Path) -> SimpleNamespace:
    """Runs all `runs` on two ranks; returns the folder of their outputs, and what was recorded, by (run, rank)."""
    make_shards(folder / "shards", shards=2, samples_per_shard=24, seed=3)
    jobs: list[tuple[str, str, list[str]]] = []
    for name, engine, program, steps, more in runs:
        flags = {
            "pretrained_teacher_model": TOY / program, "train_shards_path_or_url": folder / "shards",
            "output_dir": folder / name, "resolution": 64, "train_batch_size": 2, "max_train_steps": steps,
            "checkpointing_steps": 1000, "validation_steps": 1000, "num_validation_images": 1, "logging_steps": 1,
            "validation_prompts": "a small red circle on a black background", "validation_inference_steps": 1,
            "validation_teacher_steps": 2,
            "report_to": "none", "seed": 7, "learning_rate": 1e-3, "ema_decay": 0.9, "lr_scheduler": "cosine",
            "lr_warmup_steps": 0,
        } | more  # fmt: skip
        argv = []
        for flag, value in flags.items():
            argv += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        jobs.append((engine, program, argv))
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    (folder / "jobs").write_text(json.dumps(jobs))
    log = folder / "log.txt"
    codes = wait(start_ranks(folder / "script.py", [str(folder / "jobs")], log), log, seconds=900)
    assert codes == [0, 0], log.read_text()[-20000:]
    seen = {
        (number, rank): json.loads((folder / f"jobs-{number}-{rank}").read_text())
        for number in range(len(runs))
        for rank in (0, 1)
    }
    return SimpleNamespace(folder=folder, seen=seen)


def close(a: Path, b: Path, tolerance: float = 1e-4) -> None:
    """The networks in the two folders are equal up to rounding; a step changes most weights by about 1e-3."""
    assert max(float(difference.abs().max()) for difference in differences(a, b)) < tolerance


def differences(a: Path, b: Path) -> list[torch.Tensor]:
    first, second = result(a), result(b)
    full = {name for name, weight in first.items() if weight.dtype == torch.float32}
    assert first.keys() == second.keys() and full
    return [first[name] - second[name] for name in full]


def test_both_ranks_hold_half_of_every_network_and_of_the_optimizer_s_state(runs):
    for (number, rank), seen in runs.seen.items():
        name, engine, *_ = RUNS[number]
        assert seen["world"] == 2
        if engine == "ddp":
            assert seen["engine"] == "MULTI_CPU" and seen["shares"] == [1, 1, 1]
            continue
        assert seen["engine"] == "FSDP"
        # Student, target, teacher, first and second moments. Weights of odd length are not quite halved.
        assert len(seen["shares"]) == 5 and all(0.45 < share < 0.55 for share in seen["shares"]), (name, rank)
        halves = [runs.seen[number, other]["shares"] for other in (0, 1)]
        assert np.allclose(np.sum(halves, axis=0), 1)
        teacher = "torch.bfloat16" if name == "fsdp-bf16" else "torch.float32"
        assert seen["dtypes"] == [["torch.float32"], ["torch.float32"], [teacher]]


def test_training_equals_ddp(runs):
    """With accumulated gradients and gradient checkpointing; student, target, losses, norms of gradients."""
    close(runs.folder / "ddp", runs.folder / "fsdp")
    before = UNet2DConditionModel.from_pretrained(TOY / "sd", subfolder="unet").float().state_dict()
    student = weights(runs.folder / "fsdp")
    assert min(float((student[name] - before[name]).abs().max()) for name in before) > 5e-4
    for name in ("losses", "grad_norms"):
        ddp, fsdp = (runs.seen[number, 0][name] for number in (0, 1))
        assert len(ddp) == 2 and ddp == pytest.approx(fsdp, rel=1e-4)
    assert runs.seen[0, 1]["grad_norms"] == pytest.approx(runs.seen[1, 1]["grad_norms"], rel=1e-4)


def test_sdxl_trains_as_with_ddp(runs):
    close(runs.folder / "ddp-sdxl", runs.folder / "fsdp-sdxl")


def test_one_plus_one_resumed_steps_equal_two_bit_for_bit(runs):
    assert same(result(runs.folder / "fsdp"), result(runs.folder / "halves"))
    states = [
        torch.load(runs.folder / name / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
        for name in ("fsdp", "halves")
    ]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])


def test_a_checkpoint_resumes_with_or_without_fsdp(runs):
    """Its tensors are complete: the same files and shapes as without FSDP, each network as Diffusers saves it.

    Without FSDP the moments are channels-last here. Taken in the wrong order they are off by about their own size. By
    root mean squares: where a gradient is all rounding, another memory format can turn the direction of Adam's step.
    """
    moments = {}
    for name in ("ddp", "to-ddp", "to-fsdp"):
        changes = differences(runs.folder / "ddp", runs.folder / name)
        assert max(float(change.square().mean().sqrt()) for change in changes) < 5e-5
        state = torch.load(runs.folder / name / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
        moments[name] = {i: values["exp_avg"] for i, values in state.items() if values["exp_avg"].dim() == 4}
    formats = [moments[name][0].is_contiguous(memory_format=torch.channels_last) for name in ("to-ddp", "to-fsdp")]
    assert formats == [True, False] and len(moments["ddp"]) > 20
    for name in ("to-ddp", "to-fsdp"):
        for index, expected in moments["ddp"].items():
            assert (moments[name][index] - expected).norm() < 0.02 * expected.norm() + 1e-8, (name, index)
    written = [runs.folder / name / "checkpoint-2" for name in ("ddp", "fsdp")]
    assert sorted(p.name for p in written[0].iterdir()) == sorted(p.name for p in written[1].iterdir())
    states = [torch.load(path / "optimizer.bin", weights_only=True) for path in written]
    assert states[0].keys() == states[1].keys() and states[0]["state"].keys() == states[1]["state"].keys()
    for index, values in states[0]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(value, states[1]["state"][index][name], rtol=1e-2, atol=1e-4)


def test_bf16_trains_float32_weights(runs):
    number = [name for name, *_ in RUNS].index("fsdp-bf16")
    ddp, fsdp = (runs.seen[n, 0]["losses"] for n in (number - 1, number))
    assert ddp[0] == pytest.approx(fsdp[0], rel=0.1) and ddp != fsdp  # only the first: Adam's first steps are large
    before = UNet2DConditionModel.from_pretrained(TOY / "sd", subfolder="unet").float().state_dict()
    student = {engine: weights(runs.folder / f"{engine}-bf16" / "unet") for engine in ("ddp", "fsdp")}
    assert {weight.dtype for weight in student["fsdp"].values()} == {torch.float32}
    moved = [torch.cat([(student[e][k] - before[k]).flatten() for k in before]) for e in ("ddp", "fsdp")]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9


def test_the_export_loads_and_generates(runs):
    from diffusers import DiffusionPipeline

    out = runs.folder / "fsdp"
    unet = UNet2DConditionModel.from_pretrained(out)
    assert same(dict(unet.state_dict()), weights(out / "unet")) and type(unet) is UNet2DConditionModel
    assert json.loads((out / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    UNet2DConditionModel.from_pretrained(out, variant="fp16", torch_dtype=torch.float16)
    drawn(DiffusionPipeline.from_pretrained(TOY / "sd", unet=unet, torch_dtype=torch.float32), out, guidance_scale=4.0)


def test_validation_generates_what_ddp_generates(runs):
    assert sorted(p.name for p in (runs.folder / "fsdp" / "validation").iterdir()) == [
        "step-000001.png",
        "step-000002.png",
    ]
    ddp, fsdp = (
        np.asarray(Image.open(runs.folder / name / "validation" / "step-000002.png")).astype(int)
        for name in ("ddp", "fsdp")
    )
    assert ddp.shape == fsdp.shape and np.abs(ddp - fsdp).max() <= 2


def engine(kind=DistributedType.FSDP, precision="no", **plugin) -> SimpleNamespace:
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | plugin))
    return SimpleNamespace(distributed_type=kind, state=state, mixed_precision=precision)


@pytest.mark.parametrize(
    "accelerator, can_split, message",
    [
        (engine(), False, "only the full students.*--multi_gpu"),
        (engine(precision="fp16"), True, "--mixed_precision fp16.*bf16"),
        (engine(fsdp_version=1), True, "fsdp_version.*set it to 2"),
        (engine(cpu_offload=True), True, "fsdp_offload_params"),
        (engine(activation_checkpointing=True), True, "--gradient_checkpointing"),
    ],
)
def test_unsupported_settings_are_refused(accelerator, can_split, message, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with pytest.raises(UsageError, match=message):
        configure_engine(accelerator, can_split=can_split)


def test_8_bit_adam_is_refused():
    """It does not support DTensors: it would fail in the first step, with an error of PyTorch's dispatcher."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UsageError, match="--use_8bit_adam is not supported with FSDP"):
        prepare_for_training(engine(), torch.nn.Linear(1, 1), optimizer)


def test_distribution_matching_is_refused():
    """The fake score, an adapter of the teacher, would be split with it."""
    with pytest.raises(UsageError, match="--dm_weight is not supported with FSDP.*--multi_gpu or configs/zero2.yaml"):
        check_matching(MatchingFlags(dm_weight=0.5), engine())
    check_matching(MatchingFlags(), engine())
    check_matching(MatchingFlags(dm_weight=0.5), engine(kind=DistributedType.MULTI_GPU))


@pytest.mark.parametrize("program", ["sd", "sdxl"])
def test_the_full_students_programs_refuse_it_before_any_model_is_loaded(program, command, run, monkeypatch):
    monkeypatch.setattr(matching, "is_split", lambda accelerator: True)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="--dm_weight is not supported with FSDP"):
        run(f"train_lcm_distill_{program}_wds", command(family=program, dm_weight=1))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_shipped_configurations(path, monkeypatch):
    """With its own loader, which refuses unknown keys, and its own launcher; FSDP's settings reach its plugin."""
    config, splits, zero = load_config_from_file(str(path)), path.stem == "fsdp2", path.stem == "zero2"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    several = config.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP)
    assert (args.multi_gpu or args.use_fsdp) is several and args.num_processes == config.num_processes
    assert args.use_deepspeed is zero
    monkeypatch.setattr(os, "environ", dict(os.environ))
    if zero:
        args.deepspeed_fields_from_accelerate_config = []  # the launcher's own bookkeeping
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
    assert (
        environment["ACCELERATE_MIXED_PRECISION"] == config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    )
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") is splits
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") is zero
    assert (environment.get("ACCELERATE_USE_CPU") == "True") is (path.stem == "cpu")
    if splits:
        settings = {name: value for name, value in environment.items() if name.startswith("FSDP_")}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
        accelerator = engine()
        accelerator.state.fsdp_plugin = plugin
        configure_engine(accelerator, can_split=True)


def test_the_shipped_configurations_are_those_of_the_readme():
    assert {path.stem for path in CONFIGS} == {"cpu", "one_gpu", "many_gpus", "several_machines", "fsdp2", "zero2"}
