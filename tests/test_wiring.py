"""Every flag of the training programs is followed to where its value acts.

A program runs once with a value of its own for each flag, none of them a default, no two alike where they could be
swapped. Spies note what constructors and calls receive. `FOLLOWED` says for each flag what must have arrived where; a
flag without an entry fails. `python -m tests.miswired` plants faults to see that these tests find them.
"""

import importlib
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder
from test_programs import FULL_PROGRAMS, LORA_PROGRAMS, ONE_OF_EACH, PROGRAMS, SDXL_PROGRAMS, family

from lcm_distill.models import fake_score, frozen, lora, teacher, unets
from lcm_distill.models.norms import Norm
from lcm_distill.objective import consistency, matching
from lcm_distill.run import accelerator as accelerator_module
from lcm_distill.run import checkpoint, optim, progress, run, stopping, validation
from toy.make_shards import make_shards

# Every flag with a value that is not its default. `OUT` and `SHARDS` are filled in.
VALUES: dict[str, Any] = {
    "pretrained_teacher_model": "the-teacher", "teacher_config": "its-configs", "variant": "its-variant",
    "pretrained_vae_model_name_or_path": "the-vae", "teacher_revision": "of-the-teacher", "revision": "of-the-vae",
    "cache_dir": "the-cache",
    "train_shards_path_or_url": "SHARDS", "max_bad_fraction": 0.25, "shuffle_window": 7, "resampled_shards": True,
    "allow_pipe_in_lists": True, "dataloader_num_workers": 1, "train_batch_size": 2,
    "caption_column": "txt", "resolution": 64, "interpolation_type": "hamming", "center_crop": True,
    "random_flip": True, "min_image_size": 5, "max_decode_mb": 77, "max_pwatermark": 0.75, "min_aesthetic": 1.5,
    "filter": ["width>=2"], "proportion_empty_prompts": 0.125,
    "num_train_epochs": 3, "max_train_steps": None, "max_train_samples": 4,  # 3 · ⌈4 / 4⌉ = 3 steps
    "learning_rate": 3e-4, "scale_lr": True, "lr_scheduler": "linear", "lr_warmup_steps": 13, "use_8bit_adam": False,
    "adam_beta1": 0.8, "adam_beta2": 0.97, "adam_weight_decay": 0.03, "adam_epsilon": 2e-7, "max_grad_norm": 0.7,
    "w_min": 2.0, "w_max": 4.0, "num_ddim_timesteps": 40, "loss_type": "huber", "huber_c": 0.02,
    "timestep_scaling_factor": 8.0, "top_timestep": 799,
    "top_timestep_probability": 0.35,
    "dm_weight": 0.625, "dm_consistency_weight": 0.375, "dm_start_step": 1, "dm_steps": 2, "dm_learning_rate": 7e-4,
    "dm_rank": 5, "dm_guidance_w": 6.5, "dm_timesteps": [0.25, 0.75],
    "cast_teacher_unet": False, "channels_last": True, "float32_norms": True, "teacher_batch_size": 3,
    "vae_encode_batch_size": 6, "compile": "whole",
    "enable_xformers_memory_efficient_attention": True, "gradient_checkpointing": True,
    "seed": 99, "mixed_precision": "bf16", "allow_tf32": True, "gradient_accumulation_steps": 2, "local_rank": 4,
    "dry_run": False, "output_dir": "OUT", "logging_dir": "the-logs", "report_to": "wandb,tensorboard",
    "tracker_project_name": "the-project", "logging_steps": 1, "checkpointing_steps": 2, "checkpoints_total_limit": 5,
    "keep_best": True, "max_train_time": 3600.0, "resume_from_checkpoint": "latest", "push_to_hub": True,
    "hub_token": "the-token", "hub_model_id": "the-model",
    "validation_steps": 2, "validation_prompts": ["a small red circle", "a blue star"], "num_validation_images": 1,
    "validation_inference_steps": [1, 2], "validation_guidance_scale": 1.75, "validation_teacher_steps": 3,
    "init_student": "the-student", "unet_time_cond_proj_dim": 32, "ema_decay": 0.6,
    "lora_rank": 3, "lora_alpha": 6, "lora_dropout": 0.25, "lora_target_modules": "to_q,conv1",
    "use_fix_crop_and_size": True,
}  # fmt: skip


class Seen(defaultdict):
    """What spies noted: a name to the list of (positional arguments, keyword arguments) of each call."""

    def __init__(self):
        super().__init__(list)

    def last(self, name: str, argument: int | str) -> Any:
        args, kwargs = self[name][-1]
        return kwargs[argument] if isinstance(argument, str) else args[argument]

    def first(self, name: str, argument: int | str) -> Any:
        return self.all(name, argument)[0]

    def all(self, name: str, argument: int | str) -> list[Any]:
        return [kwargs[argument] if isinstance(argument, str) else args[argument] for args, kwargs in self[name]]


def spy(patch: pytest.MonkeyPatch, seen: Seen, owner: Any, attribute: str, name: str, instead: Any = None) -> None:
    """Notes the calls of `owner.attribute` under `name`, then makes them, or calls `instead`.

    What they return is noted under `name` with " →".
    """
    original = getattr(owner, attribute)

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen[name].append((args, kwargs))
        result = (instead or original)(*args, **kwargs)
        seen[f"{name} →"].append(((result,), {}))
        return result

    patch.setattr(owner, attribute, noting)


def argv_of(program: str, values: dict[str, Any]) -> list[str]:
    known = importlib.import_module(program).parse_args(["--pretrained_teacher_model", "x"]).flat()
    argv: list[str] = []
    for name, value in values.items():
        if name not in known or value is None:
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def run_with_spies(program: str, values: dict[str, Any], call: Any, patch: pytest.MonkeyPatch, folder: str) -> Seen:
    """Runs `program` with these flags on the teacher in `folder`, whatever teacher they name."""
    seen, module = Seen(), importlib.import_module(program)

    def small_teacher(flags: Any) -> teacher.Teacher:
        seen["teacher"].append(((from_flags(flags),), {}))
        return teacher.Teacher(folder)

    from_flags = teacher.Teacher.from_flags
    patch.setattr(teacher.Teacher, "from_flags", small_teacher)
    environment = dict(os.environ)  # in which LOCAL_RANK reaches no library: there is one process
    seen["environ"].append(((environment,), {}))
    patch.setattr(accelerator_module, "os", SimpleNamespace(environ=environment))

    spy(patch, seen, torch.optim.AdamW, "__init__", "adamw")
    spy(patch, seen, optim, "get_scheduler", "lr_scheduler")
    spy(patch, seen, accelerator_module, "Accelerator", "accelerator")
    spy(patch, seen, accelerator_module, "set_seed", "set_seed")
    loader = importlib.import_module("lcm_distill.data.loader")
    spy(patch, seen, loader.ShardStream, "__init__", "stream")
    spy(patch, seen, loader.ShardLoader, "__init__", "loader")
    spy(patch, seen, frozen, "encode_pixels", "encode_pixels")
    # the objective, under the names by which the programs call it
    for name in ("guided_prediction", "consistency_loss", "update_ema", "draw_guidance", "guidance_embedding"):
        spy(patch, seen, consistency, name, name)
    spy(patch, seen, consistency.ConsistencyFunction, "__init__", "consistency_function")
    for name in ("draw_timesteps", "matching_loss", "denoising_loss"):
        spy(patch, seen, matching, name, name)
    spy(patch, seen, fake_score.FakeScore, "__init__", "fake_score")
    spy(patch, seen, fake_score, "LoraConfig", "fake_score_lora")
    spy(patch, seen, module, "expand_shards", "expand_shards")
    spy(patch, seen, module.DDIMSolver, "__init__", "solver")
    spy(patch, seen, module.DDIMSolver, "draw_index", "draw_index")
    spy(patch, seen, module, "build_lcm_scheduler", "lcm_scheduler")
    spy(patch, seen, module, "read_configs", "read_configs")
    spy(patch, seen, module.family, "load_frozen", "load_frozen")
    spy(patch, seen, unets, "student_from_teacher", "student")
    spy(patch, seen, module.InitialStudent, "find", "initial", instead=lambda *_: None)
    spy(patch, seen, unets, "compile_networks", "compile", instead=lambda mode, *networks: None)
    spy(patch, seen, frozen, "compile_networks", "compile_vae", instead=lambda mode, *networks: None)
    spy(patch, seen, unets, "enable_xformers", "xformers", instead=lambda *unets: None)
    spy(patch, seen, lora, "LoraConfig", "lora")
    spy(patch, seen, checkpoint.Checkpoints, "__init__", "checkpoints")
    spy(patch, seen, checkpoint.Checkpoints, "save", "save")
    spy(patch, seen, checkpoint.Checkpoints, "keep_if_best", "keep_if_best")
    spy(patch, seen, run, "find_run", "find_run")
    spy(patch, seen, run, "start_accelerator", "start_accelerator")
    spy(patch, seen, run, "open_hub", "hub", instead=lambda *_: None)
    spy(patch, seen, run.BatchGenerators, "__init__", "generators")
    spy(patch, seen, progress.Progress, "log", "log")
    spy(patch, seen, stopping.Stopping, "__init__", "stopping")
    spy(patch, seen, validation.Validation, "__call__", "validate")
    spy(patch, seen, validation, "generate_latents", "generate")
    real_accelerator = importlib.import_module("accelerate").Accelerator
    spy(patch, seen, real_accelerator, "clip_grad_norm_", "clip")
    spy(patch, seen, torch.nn.utils, "clip_grad_norm_", "clip_in_pytorch")
    spy(patch, seen, real_accelerator, "backward", "backward")
    spy(patch, seen, real_accelerator, "init_trackers", "trackers", instead=lambda *a, **k: None)
    call(program, argv_of(program, values))
    return seen


@pytest.fixture(scope="module")
def followed(tmp_path_factory, small_teachers):
    """`followed(program)`: what the spies noted while it ran with `VALUES`; it runs once."""
    found: dict[str, Any] = {}
    shards = tmp_path_factory.mktemp("wiring-shards")
    make_shards(shards, shards=2, samples_per_shard=12, seed=3)

    def get(program: str, call: Any) -> tuple[Seen, Path, Path]:
        if program not in found:
            out = tmp_path_factory.mktemp("wiring") / "out"
            values = VALUES | {"output_dir": str(out), "train_shards_path_or_url": str(shards)}
            with pytest.MonkeyPatch.context() as patch:
                try:
                    folder = small_teachers[family(program)]
                    found[program] = run_with_spies(program, values, call, patch, folder), out, shards
                except BaseException as error:  # once is enough
                    found[program] = error
        if isinstance(found[program], BaseException):
            raise RuntimeError(f"the run of {program} failed") from found[program]
        return found[program]

    return get


def _preparation(name: str) -> Any:
    return lambda seen, out, shards: getattr(seen.last("stream", "preparation"), name)


def _teacher(name: str) -> Any:
    return lambda seen, out, shards: getattr(seen.last("teacher", 0), name)


def _filters(seen: Seen) -> dict[str, Any]:
    return {condition.flag.split()[0]: condition for condition in seen.last("stream", "preparation").filters}


def _grids(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "validation").iterdir())


def _rows(seen: Seen) -> list[tuple[int, float]]:
    """(steps, guidance_scale) of what was generated."""
    return [(kwargs["inference_steps"], kwargs["guidance_scale"]) for _, kwargs in seen["generate"]]


def _guidance(seen: Seen) -> tuple[torch.Tensor, set[float]]:
    """The w that are drawn for the steps, and the floats by which the real score is guided in distribution matching."""
    given = seen.all("guided_prediction", 6)
    return torch.cat([w for w in given if isinstance(w, torch.Tensor)]), {w for w in given if isinstance(w, float)}


def _loss_weights(seen: Seen) -> list[float]:
    """What the consistency and the matching loss of the last four batches were multiplied by."""
    both = [
        [float(x.detach()) for x in seen.all(f"{name} →", 0)[-4:]] for name in ("consistency_loss", "matching_loss")
    ]
    total = [float(loss.detach()) for loss in seen.all("backward", 1)[-4:]]
    return torch.linalg.lstsq(torch.tensor(both).double().T, torch.tensor(total).double()).solution.tolist()


def _fake_score_s_lr(out: Path) -> float:
    """Its learning rate at the end of the run."""
    state = torch.load(out / "checkpoint-3" / "fake_score" / "training.pt", weights_only=True)
    return state["optimizer"]["param_groups"][0]["lr"]


# Flag → (what acted, what it must be). The mean of w is 3, so a LoRA's teacher is guided at 4.
FOLLOWED: dict[str, tuple[Any, Any]] = {
    "pretrained_teacher_model": (_teacher("model"), "the-teacher"),
    "teacher_config": (_teacher("config"), "its-configs"),
    "variant": (_teacher("variant"), "its-variant"),
    "pretrained_vae_model_name_or_path": (_teacher("vae"), "the-vae"),
    "teacher_revision": (_teacher("revision"), "of-the-teacher"),
    "revision": (_teacher("vae_revision"), "of-the-vae"),
    "cache_dir": (_teacher("cache_dir"), "the-cache"),
    "train_shards_path_or_url": (
        lambda seen, out, shards: [Path(shard).parent for shard in seen.last("stream", "shards")] == [shards] * 2,
        True,
    ),
    "max_bad_fraction": (lambda seen, *_: seen.last("stream", "max_bad_fraction"), 0.25),
    "shuffle_window": (lambda seen, *_: seen.last("stream", "shuffle_window"), 7),
    "allow_pipe_in_lists": (lambda seen, *_: seen.last("expand_shards", 1), True),
    "resampled_shards": (lambda seen, *_: seen.last("stream", "resampled"), True),
    "dataloader_num_workers": (lambda seen, *_: seen.last("loader", "num_workers"), 1),
    "train_batch_size": (
        lambda seen, *_: (seen.last("stream", "batch_size"), {len(batch) for batch in seen.all("encode_pixels", 1)}),
        (2, {2}),
    ),
    "caption_column": (_preparation("caption_column"), "txt"),
    "resolution": (
        lambda seen, *_: (
            seen.last("stream", "preparation").resolution,
            seen.last("read_configs", "resolution"),
            set(seen.all("generate", "resolution")),
        ),
        (64, 64, {64}),
    ),
    "interpolation_type": (_preparation("interpolation"), "hamming"),
    "center_crop": (_preparation("center_crop"), True),
    "random_flip": (_preparation("random_flip"), True),
    "min_image_size": (_preparation("min_image_size"), 5),
    "max_decode_mb": (_preparation("max_decode_mb"), 77),
    "max_pwatermark": (lambda seen, *_: _filters(seen)["--max_pwatermark"].value, 0.75),
    "min_aesthetic": (lambda seen, *_: _filters(seen)["--min_aesthetic"].value, 1.5),
    "filter": (
        lambda seen, *_: [(c.keys, c.comparison, c.value) for n, c in _filters(seen).items() if n == "--filter"],
        [(("width",), ">=", 2.0)],
    ),
    "proportion_empty_prompts": (_preparation("proportion_empty_prompts"), 0.125),
    "num_train_epochs": (lambda seen, *_: len(seen["clip"]), 3),
    "max_train_samples": (lambda seen, *_: seen.last("lr_scheduler", "num_training_steps"), 3),
    "learning_rate": (lambda seen, *_: seen.first("adamw", "lr"), pytest.approx(3e-4 * 4, rel=1e-12)),
    "scale_lr": (lambda seen, *_: seen.first("adamw", "lr") > 3e-4, True),
    "lr_scheduler": (lambda seen, *_: seen.last("lr_scheduler", 0), "linear"),
    "lr_warmup_steps": (lambda seen, *_: seen.last("lr_scheduler", "num_warmup_steps"), 13),
    "adam_beta1": (lambda seen, *_: [betas[0] for betas in seen.all("adamw", "betas")], [0.8] * 2),
    "adam_beta2": (lambda seen, *_: [betas[1] for betas in seen.all("adamw", "betas")], [0.97] * 2),
    "adam_weight_decay": (lambda seen, *_: seen.all("adamw", "weight_decay"), [0.03] * 2),
    "adam_epsilon": (lambda seen, *_: seen.all("adamw", "eps"), [2e-7] * 2),
    "max_grad_norm": (  # the student's, three times, and the fake score's, four times
        lambda seen, *_: (set(seen.all("clip", 2)), [args[1] for args, _ in seen["clip_in_pytorch"]]),
        ({0.7}, [0.7] * 7),
    ),
    "num_ddim_timesteps": (
        lambda seen, out, _: (
            seen.last("solver", 2),
            seen.last("read_configs", "num_ddim_timesteps"),
            seen.last("lcm_scheduler", 1),
            json.loads((out / "scheduler_config.json").read_text())["original_inference_steps"],
        ),
        (40, 40, 40, 40),
    ),
    "loss_type": (lambda seen, *_: set(seen.all("consistency_loss", 2)), {"huber"}),
    "huber_c": (lambda seen, *_: set(seen.all("consistency_loss", 3)), {0.02}),
    "timestep_scaling_factor": (
        lambda seen, out, _: (
            seen.last("consistency_function", 2),
            json.loads((out / "scheduler_config.json").read_text())["timestep_scaling"],
        ),
        (8.0, 8.0),
    ),
    "top_timestep": (
        lambda seen, out, _: (
            seen.last("solver", 3),
            seen.last("lcm_scheduler", 3),
            json.loads((out / "scheduler_config.json").read_text())["num_train_timesteps"],
        ),
        (799, 799, 800),
    ),
    "top_timestep_probability": (lambda seen, *_: seen.all("draw_index", 2), [0.35] * 6),
    "dm_weight": (lambda seen, *_: _loss_weights(seen)[1], pytest.approx(0.625, rel=1e-3)),
    "dm_consistency_weight": (lambda seen, *_: _loss_weights(seen)[0], pytest.approx(0.375, rel=1e-3)),
    "dm_start_step": (lambda seen, *_: len(seen["matching_loss"]), 4),  # two steps of two batches
    "dm_steps": (lambda seen, *_: len(seen["denoising_loss"]), 4 * 2),
    "dm_learning_rate": (lambda seen, out, _: (seen.last("adamw", "lr"), _fake_score_s_lr(out)), (7e-4, 7e-4)),
    "dm_rank": (
        lambda seen, *_: (seen.last("fake_score_lora", "r"), seen.last("fake_score_lora", "lora_alpha")),
        (5, 5),
    ),
    "dm_guidance_w": (lambda seen, *_: _guidance(seen)[1], {6.5}),
    "dm_timesteps": (  # those of the matching loss; the fake score trains at all
        lambda seen, *_: list(zip(seen.all("draw_timesteps", 0), seen.all("draw_timesteps", 1), strict=True)),
        [(0.25, 0.75), (0, 1), (0, 1)] * 4,
    ),
    "cast_teacher_unet": (lambda seen, *_: set(seen.all("guided_prediction", "dtype")), {torch.float32}),
    "channels_last": (
        lambda seen, *_: {
            unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
            for unet in seen["compile"][-1][0][1:]
        },
        {True},
    ),
    "float32_norms": (
        lambda seen, *_: {
            m.low_precision for u in seen["compile"][-1][0][1:] for m in u.modules() if isinstance(m, Norm)
        },
        {False},
    ),
    "teacher_batch_size": (lambda seen, *_: set(seen.all("guided_prediction", "batch_size")), {3}),
    "vae_encode_batch_size": (lambda seen, *_: set(seen.all("encode_pixels", 2)), {6}),
    "compile": (
        lambda seen, *_: (seen.last("compile", 0), seen.last("compile_vae", 0), type(seen.last("compile_vae", 1))),
        ("whole", "whole", Encoder),
    ),
    "enable_xformers_memory_efficient_attention": (lambda seen, *_: len(seen["xformers"]), 1),
    "gradient_checkpointing": (
        lambda seen, *_: [
            unet.is_gradient_checkpointing for unet in (seen.last("compile", 1), seen.last("fake_score", 1))
        ],
        [True, True],
    ),
    "seed": (
        lambda seen, *_: (
            seen.last("set_seed", 0),
            seen.last("stream", "seed"),
            seen.last("generators", 1),
            list(seen.last("generate", 2)),
        ),
        (99, 99, 99, [99, 100]),
    ),
    "mixed_precision": (lambda seen, *_: seen.last("accelerator", "mixed_precision"), "bf16"),
    "allow_tf32": (lambda seen, *_: seen.last("start_accelerator", 0).allow_tf32, True),  # bf16 has TF32 in any case
    "gradient_accumulation_steps": (
        lambda seen, *_: (seen.last("accelerator", "gradient_accumulation_steps"), len(seen["encode_pixels"])),
        (2, 6),
    ),
    "local_rank": (lambda seen, *_: seen.last("environ", 0)["LOCAL_RANK"], "4"),
    "output_dir": (lambda seen, out, _: (out / "scheduler_config.json").is_file(), True),
    "logging_dir": (
        lambda seen, out, _: seen.last("accelerator", "project_config").logging_dir == str(out / "the-logs"),
        True,
    ),
    "report_to": (lambda seen, *_: seen.last("accelerator", "log_with"), ["wandb", "tensorboard"]),
    "tracker_project_name": (lambda seen, *_: seen.last("trackers", 1), "the-project"),
    "logging_steps": (lambda seen, *_: seen.all("log", 1), [1, 2, 3]),
    "checkpointing_steps": (lambda seen, *_: seen.all("save", 1), [2, 3]),
    "checkpoints_total_limit": (lambda seen, *_: seen.last("checkpoints", 4), 5),
    "keep_best": (lambda seen, *_: seen.all("keep_if_best", 2), [2, 3]),
    "max_train_time": (lambda seen, *_: seen.last("stopping", 2), 3600.0),
    "resume_from_checkpoint": (lambda seen, *_: seen.last("find_run", 0), "latest"),
    "push_to_hub": (lambda seen, *_: len(seen["hub"]), 1),
    "hub_token": (lambda seen, *_: seen.last("hub", 2), "the-token"),
    "hub_model_id": (lambda seen, *_: seen.last("hub", 1), "the-model"),
    "validation_steps": (
        lambda seen, out, _: (seen.all("validate", 1), _grids(out)),
        ([2, 3], ["step-000002.png", "step-000003.png"]),
    ),
    "validation_prompts": (lambda seen, *_: set(seen.last("generate", 1)), {"a small red circle", "a blue star"}),
    "num_validation_images": (lambda seen, *_: len(seen.last("generate", 1)), 2),
    "validation_inference_steps": (lambda seen, *_: {1, 2} == {steps for steps, _ in _rows(seen)} - {3}, True),
    "validation_guidance_scale": (lambda seen, *_: {guidance for steps, guidance in _rows(seen) if steps != 3}, {1.75}),
    "validation_teacher_steps": (lambda seen, *_: _rows(seen)[0][0], 3),
    "init_student": (lambda seen, *_: seen.last("initial", 0).init_student, "the-student"),
    "unet_time_cond_proj_dim": (
        lambda seen, *_: (
            seen.last("student", 1),
            set(seen.all("guidance_embedding", 1)),
            seen.last("fake_score", "time_cond_proj_dim"),
        ),
        (32, {32}, 32),
    ),
    "ema_decay": (lambda seen, *_: seen.all("update_ema", 2), [0.6] * 3),
    "lora_rank": (lambda seen, *_: seen.last("lora", "r"), 3),
    "lora_alpha": (lambda seen, *_: seen.last("lora", "lora_alpha"), 6),
    "lora_dropout": (lambda seen, *_: seen.last("lora", "lora_dropout"), 0.25),
    "lora_target_modules": (
        lambda seen, *_: [seen.last(name, "target_modules") for name in ("lora", "fake_score_lora")],
        [["conv1", "to_q"]] * 2,
    ),
    "use_fix_crop_and_size": (_preparation("fixed_size"), True),
}
# Those that a test of their own follows: they exclude others, or both kinds of student take them otherwise.
ELSEWHERE = {"max_train_steps", "use_8bit_adam", "dry_run", "w_min", "w_max"}


def flags_of(program: str) -> list[str]:
    return list(importlib.import_module(program).parse_args(["--pretrained_teacher_model", "x"]).flat())


CASES = [(program, name) for program in PROGRAMS for name in flags_of(program)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_followed_with_a_value_that_is_not_its_default(program):
    defaults = importlib.import_module(program).parse_args(["--pretrained_teacher_model", "x"]).flat()
    assert set(defaults) <= set(FOLLOWED) | ELSEWHERE
    alike = {name for name, value in defaults.items() if VALUES[name] == value and name not in ELSEWHERE}
    assert not alike, f"these would be followed with their defaults: {alike}"


@pytest.mark.parametrize("program, name", [case for case in CASES if case[1] not in ELSEWHERE])
def test_a_flag_s_value_arrives_where_it_acts(program, name, followed, run):
    seen, out, shards = followed(program, run)
    acted, expected = FOLLOWED[name]
    assert acted(seen, out, shards) == expected


@pytest.mark.parametrize("program", FULL_PROGRAMS)
def test_a_full_student_learns_all_of_w_s_range_and_is_compared_at_one_guidance(program, followed, run):
    seen, _, _ = followed(program, run)
    w, _ = _guidance(seen)
    assert torch.equal(w, torch.cat(seen.all("guidance_embedding", 0)))  # what the teacher is guided by is embedded
    assert 2 <= w.min() < 2.7 and 3.3 < w.max() <= 4  # of 12
    assert {guidance for steps, guidance in _rows(seen) if steps == 3} == {1.75}  # the teacher's


@pytest.mark.parametrize("program", LORA_PROGRAMS)
def test_a_lora_s_teacher_is_guided_in_w_s_range_and_drawn_at_its_mean(program, followed, run):
    """Its guidance is in its weights: it generates at 1, or what the flag says; the teacher's row is guided."""
    seen, _, _ = followed(program, run)
    assert set(zip(seen.all("draw_guidance", 0), seen.all("draw_guidance", 1), strict=True)) == {(2.0, 4.0)}
    w, _ = _guidance(seen)
    assert 2 <= w.min() < 2.7 and 3.3 < w.max() <= 4
    assert {guidance for steps, guidance in _rows(seen) if steps == 3} == {1 + (2 + 4) / 2}


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_without_a_validation_guidance_a_full_student_has_8_brought_into_range_and_a_lora_1(
    program, command, run, monkeypatch
):
    seen = Seen()
    spy(monkeypatch, seen, validation, "generate_latents", "generate")
    options = {"w_min": 2, "w_max": 4} | ({"lora_rank": 2} if "lora" in program else {})
    run(program, command(steps=1, family=family(program), validation_inference_steps=3, **options))
    teacher_scale, student_scale = (4.0, 1.0) if "lora" in program else (5.0, 5.0)
    rows = {steps: guidance for steps, guidance in _rows(seen)}
    assert rows[2] == teacher_scale and rows[3] == rows[1] == student_scale


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_max_train_steps_dry_run_and_8_bit_adam(program, command, run, monkeypatch, tmp_path):
    seen = Seen()
    bitsandbytes = pytest.importorskip("bitsandbytes")
    spy(monkeypatch, seen, bitsandbytes.optim.AdamW8bit, "__init__", "adam8")
    spy(monkeypatch, seen, importlib.import_module("accelerate").Accelerator, "clip_grad_norm_", "clip")
    options = dict(
        family=family(program), use_8bit_adam=True, adam_beta1=0.8, adam_beta2=0.97, adam_weight_decay=0.03,
        adam_epsilon=2e-7, learning_rate=3e-4, **({"lora_rank": 2} if "lora" in program else {}),
    )  # fmt: skip
    run(program, command(steps=3, dry_run=True, **options))
    assert len(seen["clip"]) == 1 and not (tmp_path / "out").exists()
    run(program, command(steps=3, **options))
    assert len(seen["clip"]) == 1 + 3
    _, kwargs = seen["adam8"][-1]
    assert kwargs == {"lr": 3e-4, "betas": (0.8, 0.97), "weight_decay": 0.03, "eps": 2e-7}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_resumed_run_trains_with_the_flags_of_its_own_launch(program, command, run, monkeypatch):
    """A checkpoint holds learning rate, betas, ε and weight decay too: they came back, whatever the flags said."""
    lora_options = {"lora_rank": 2} if "lora" in program else {}
    first = dict(learning_rate=1e-3, adam_beta1=0.9, adam_weight_decay=0.01, adam_epsilon=1e-8)
    run(program, command(steps=1, family=family(program), **first, **lora_options))
    used = []
    step = torch.optim.AdamW.step

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.extend({key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    second = dict(learning_rate=3e-4, adam_beta1=0.8, adam_beta2=0.97, adam_weight_decay=0.03, adam_epsilon=2e-7)
    again = dict(resume_from_checkpoint="latest", family=family(program), **second, **lora_options)
    run(program, command(steps=2, **again))
    assert used == [{"lr": 3e-4, "betas": (0.8, 0.97), "eps": 2e-7, "weight_decay": 0.03}]


@pytest.mark.parametrize("program", SDXL_PROGRAMS)
def test_sizes_are_the_pictures_own_unless_fixed(program, followed, run):
    seen, _, _ = followed(program, run)
    ids = [call[0][4]["added_cond_kwargs"]["time_ids"] for call in seen["guided_prediction"]]
    assert {tuple(row.tolist()) for batch in ids for row in batch} == {(64, 64, 0, 0, 64, 64)}


def test_the_faults_of_miswired_have_their_places():
    """`python -m tests.miswired` takes minutes; that what it plants is still there to be planted is cheap to see."""
    from tests.miswired import FAULTS, ROOT

    for fault in FAULTS:
        places = [path for path in ROOT.glob(fault.files) if re.search(fault.pattern, path.read_text())]
        assert len(places) == len(list(ROOT.glob(fault.files))) > 0, fault.name
