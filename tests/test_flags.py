"""The flags: their names, types and defaults are an interface; none is declared and unread."""

import ast
import difflib
import re
import shlex
from pathlib import Path

import pytest

import train_lcm_distill_lora_sd_wds
import train_lcm_distill_lora_sdxl_wds
import train_lcm_distill_sd_wds
import train_lcm_distill_sdxl_wds
from lcm_distill import flags

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "sd": train_lcm_distill_sd_wds,
    "sdxl": train_lcm_distill_sdxl_wds,
    "lora_sd": train_lcm_distill_lora_sd_wds,
    "lora_sdxl": train_lcm_distill_lora_sdxl_wds,
}

# Name → (type, default), as public command lines expect them: first those of the SD program. Two have
# another default than there: --cast_teacher_unet, since what is frozen is in the low precision, and
# --dataloader_num_workers, since one process does not feed a GPU.
SD_FLAGS = {
    "pretrained_vae_model_name_or_path": (str, None), "teacher_revision": (str, None), "revision": (str, None),
    "output_dir": (str, "lcm-xl-distilled"), "cache_dir": (str, None), "seed": (int, None),
    "logging_dir": (str, "logs"), "report_to": (str, "tensorboard"), "checkpointing_steps": (int, 500),
    "checkpoints_total_limit": (int, None), "resume_from_checkpoint": (str, None),
    "train_shards_path_or_url": (str, None), "resolution": (int, 512), "interpolation_type": (str, "bilinear"),
    "center_crop": (bool, False), "random_flip": (bool, False), "dataloader_num_workers": (int, None),
    "train_batch_size": (int, 16), "num_train_epochs": (int, 100), "max_train_steps": (int, None),
    "max_train_samples": (int, None), "learning_rate": (float, 1e-4), "scale_lr": (bool, False),
    "lr_scheduler": (str, "constant"), "lr_warmup_steps": (int, 500), "gradient_accumulation_steps": (int, 1),
    "use_8bit_adam": (bool, False), "adam_beta1": (float, 0.9), "adam_beta2": (float, 0.999),
    "adam_weight_decay": (float, 1e-2), "adam_epsilon": (float, 1e-8), "max_grad_norm": (float, 1.0),
    "proportion_empty_prompts": (float, 0), "w_min": (float, 5.0), "w_max": (float, 15.0),
    "num_ddim_timesteps": (int, 50), "loss_type": (str, "l2"), "huber_c": (float, 0.001),
    "unet_time_cond_proj_dim": (int, 256), "vae_encode_batch_size": (int, 32),
    "timestep_scaling_factor": (float, 10.0), "ema_decay": (float, 0.95), "mixed_precision": (str, None),
    "allow_tf32": (bool, False), "cast_teacher_unet": (bool, True),
    "enable_xformers_memory_efficient_attention": (bool, False), "gradient_checkpointing": (bool, False),
    "local_rank": (int, -1), "validation_steps": (int, 200), "push_to_hub": (bool, False), "hub_token": (str, None),
    "hub_model_id": (str, None), "tracker_project_name": (str, "text2image-fine-tune"),
}  # fmt: skip

_SDXL = {"resolution": (int, 1024), "w_min": (float, 3.0), "vae_encode_batch_size": (int, 8)}
_SDXL |= {"use_fix_crop_and_size": (bool, False)}
_FULL_ONLY = ("unet_time_cond_proj_dim", "ema_decay")
_LORA = {name: value for name, value in SD_FLAGS.items() if name not in _FULL_ONLY} | {
    "lora_rank": (int, 64), "lora_alpha": (int, 64), "lora_dropout": (float, 0.0), "lora_target_modules": (str, None),
}  # fmt: skip
FLAGS = {"sd": SD_FLAGS, "sdxl": SD_FLAGS | _SDXL, "lora_sd": _LORA, "lora_sdxl": _LORA | _SDXL}
EACH_FLAG = [(program, name) for program, chosen in FLAGS.items() for name in chosen]

# The launch commands of Diffusers' two guides, every flag of them.
_SHARED = """
    --output_dir=out --mixed_precision=fp16 --loss_type=huber --adam_weight_decay=0.0 --max_train_steps=1000
    --max_train_samples=4000000 --dataloader_num_workers=8
    --train_shards_path_or_url="pipe:curl -L -s https://host/data/{00000..01099}.tar?download=true"
    --validation_steps=200 --checkpointing_steps=200 --checkpoints_total_limit=10 --train_batch_size=12
    --gradient_checkpointing --enable_xformers_memory_efficient_attention --gradient_accumulation_steps=1
    --use_8bit_adam --resume_from_checkpoint=latest --report_to=wandb --seed=453645634 --push_to_hub
"""
_TEACHER = {
    "sd": "--pretrained_teacher_model=runwayml/stable-diffusion-v1-5 --resolution=512 ",
    "sdxl": "--pretrained_teacher_model=stabilityai/stable-diffusion-xl-base-1.0 --resolution=1024 "
    "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --use_fix_crop_and_size ",
}
PUBLIC_COMMANDS = {
    "sd": _TEACHER["sd"] + "--learning_rate=1e-6 --ema_decay=0.95" + _SHARED,
    "sdxl": _TEACHER["sdxl"] + "--learning_rate=1e-6 --ema_decay=0.95" + _SHARED,
    "lora_sd": _TEACHER["sd"] + "--learning_rate=1e-4 --lora_rank=64" + _SHARED,
    "lora_sdxl": _TEACHER["sdxl"] + "--learning_rate=1e-4 --lora_rank=64" + _SHARED,
}


def parse(*argv, program="sd"):
    return PROGRAMS[program].parse_args(["--pretrained_teacher_model", "teacher", *argv])


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_public_flag_has_its_default(program):
    args = parse(program=program).flat()
    expected = {name: default for name, (_, default) in FLAGS[program].items()}
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("program, name", EACH_FLAG)
def test_every_public_flag_takes_its_type(program, name):
    kind, default = FLAGS[program][name]
    if kind is bool:
        assert parse(f"--{name}", program=program).flat()[name] is True
        assert parse(f"--no-{name}", program=program).flat()[name] is False
        return
    choices = {
        "loss_type": "huber",
        "lr_scheduler": "cosine",
        "interpolation_type": "lanczos",
        "mixed_precision": "bf16",
    }
    text = choices.get(name, {int: "7", float: "0.5", str: "x"}[kind])
    other = ["--w_min", "0"] if name == "w_max" else []
    assert parse(f"--{name}", text, *other, program=program).flat()[name] == kind(text)


def test_channels_last_is_refused_where_bitsandbytes_undoes_it(capsys):
    with pytest.raises(SystemExit):
        parse("--channels_last", "--use_8bit_adam")
    assert "leave out one of the two" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_teacher_is_required(program, capsys):
    with pytest.raises(SystemExit):
        PROGRAMS[program].parse_args([])
    assert "--pretrained_teacher_model" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_public_command_line_parses(program):
    args = PROGRAMS[program].parse_args(shlex.split(PUBLIC_COMMANDS[program]))
    assert args.distillation.loss_type == "huber" and args.optimization.use_8bit_adam
    assert args.streaming.train_batch_size == 12 and args.launch.resume_from_checkpoint == "latest"


def commands_in(text: str) -> list[list[str]]:
    """The arguments of each `accelerate launch train_….py` in a text."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [shlex.split(found) for found in re.findall(r"accelerate launch (train_\w+\.py .*)", joined)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_documented_commands_parse_and_recompute_nothing_needlessly(program):
    """They passed --gradient_checkpointing on every card: the student's pass was computed twice for nothing."""
    script = f"{PROGRAMS[program].PROGRAM}.py"
    documented = commands_in(PROGRAMS[program].__doc__)
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/reference.md")]
    documented += [argv for page in pages for argv in commands_in(page) if argv[0] == script]
    assert len(documented) == {"sd": 2, "lora_sd": 3}.get(program, 1)  # LoRA: a dry run, too
    for name, *argv in documented:
        args = PROGRAMS[program].parse_args(argv)
        assert name == script and args.launch.mixed_precision == "bf16"
        assert not args.speed.gradient_checkpointing
        assert args.streaming.train_batch_size * args.launch.gradient_accumulation_steps in (12, 16)


@pytest.mark.parametrize(
    "argv",
    ["--w_min 9 --w_max 5", "--resolution 0", "--train_batch_size -1", "--learning_rate x", "--ema_decay 1.5",
     "--proportion_empty_prompts 2", "--max_train_steps 0", "--loss_type l1", "--seed -1", "--learning_rate nan",
     "--huber_c 0", "--num_ddim_timesteps 0", "--lr_scheduler never", "--gradient_accumulation_steps 0",
     "--top_timestep_probability 1.1", "--top_timestep 0", "--dm_weight -1", "--dm_consistency_weight -0.5",
     "--dm_start_step -1",
     "--dm_steps 0", "--dm_learning_rate -1e-4", "--dm_rank 0", "--dm_guidance_w -2", "--dm_timesteps 0.5",
     "--dm_timesteps 0.6 0.4", "--dm_timesteps 0.5 0.5", "--dm_timesteps 20 980"],
)  # fmt: skip
def test_values_out_of_range_are_refused_in_one_line_that_names_the_flag(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and argv.split()[0] in error and len(error.splitlines()) <= 2


def test_no_function_but_parse_args_and_main_stands_in_two_programs():
    seen: dict[str, str] = {}
    for path in sorted(ROOT.glob("train_lcm_distill_*_wds.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("parse_args", "main"):
                assert node.name not in seen, f"{node.name} stands in {seen[node.name]} and in {path.name}"
                seen[node.name] = path.name


def test_args_never_cross_into_the_package():
    """A part of the package takes the group of flags that belongs to it, never all of them."""
    commands = {"pack_shards", "encode_shards", "sample", "evaluate", "bench_inference", "export_model", "report"}
    for path in (ROOT / "lcm_distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                assert "args" not in {a.arg for a in arguments}, f"{path.name}: {node.name} takes args"
                kinds = {ast.unparse(a.annotation) for a in arguments if a.annotation}
                assert not any("ProgramFlags" in kind or "Namespace" in kind for kind in kinds) or (
                    path.stem in ("flags", *commands)
                ), f"{path.name}: {node.name} takes all flags"


@pytest.mark.parametrize("kind", ["sd", "lora_sd"])
def test_a_pair_of_programs_differs_in_its_flags_and_its_family_alone(kind):
    """Below their docstrings; and each is short enough to be read in a sitting."""
    below = []
    for name in (kind, f"{kind}xl"):
        text = (ROOT / f"train_lcm_distill_{name}_wds.py").read_text()
        tree = ast.parse(text)
        (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
        assert len(text.splitlines()) <= 220 and main.end_lineno - main.lineno < 160
        below.append(text.splitlines()[tree.body[0].end_lineno :])
    matching = difflib.SequenceMatcher(None, *below, autojunk=False)
    changed = [max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matching.get_opcodes() if tag != "equal"]
    assert sum(changed) <= 15


def test_names_of_what_libraries_offer_are_theirs():
    """They stand in flags.py, which imports no library."""
    from diffusers.optimization import SchedulerType

    from lcm_distill.data.preparation import Preparation
    from lcm_distill.sampling.generate import build_teacher_sampler

    assert set(flags.LR_SCHEDULES) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}
    for name in flags.INTERPOLATIONS:
        Preparation(resolution=8, interpolation=name)
    assert len({type(build_teacher_sampler({}, name)) for name in flags.SAMPLERS}) == len(flags.SAMPLERS)


def test_a_group_is_taken_with_its_own_flags_and_defaults_are_the_fields():
    parser = flags.CommandParser("x", None)
    for group in (flags.OptimizationFlags, flags.DeviceFlags):
        flags.add_group(parser, group)
    parsed = parser.parse_args(["--adam_beta1", "0.5", "--device", "cpu"])
    assert flags.take(flags.OptimizationFlags, parsed) == flags.OptimizationFlags(adam_beta1=0.5)
    assert flags.take(flags.DeviceFlags, parsed) == flags.DeviceFlags(device="cpu")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_every_flag_under_a_heading_with_its_default(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[program].parse_args(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "(default: 0.999)" in text and "\noptimizer and learning rate:" in text
    for name in parse(program=program).flat():
        assert re.search(rf"^  --{name}\b", text, re.MULTILINE), name
