"""The command-line flags that programs and commands share, in groups, with their ranges and their help.

A training program's `parse_args` adds the groups it wants, then flags of its own, and ends in `Parser.parse`. Names
and defaults are those of Diffusers' consistency-distillation examples, so that their command lines run unchanged. The
commands that draw with finished models have a `CommandParser`, `add_model_flags` and `add_device_flags`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from diffusers.optimization import SchedulerType

from lcm_distill.data.preparation import INTERPOLATIONS
from lcm_distill.distributed.compiling import MODES


class CommandParser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line instead of sixty flags.

    `prog` is what a user types, such as "python -m lcm_distill.sample" (None: the file's name); `usage` is one line
    with the flags that matter (None: "[flags]" alone).
    """

    def __init__(self, prog: str | None, description: str | None, usage: str | None = None):
        super().__init__(
            prog=prog,
            usage=usage or "%(prog)s [flags]",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists every flag)\n")


class Parser(CommandParser):
    """The parser of a training program."""

    def __init__(self, description: str):
        super().__init__(
            None, description, "%(prog)s --pretrained_teacher_model TEACHER --train_shards_path_or_url SHARDS [flags]"
        )

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parses `argv` (None: the shell's) and checks what no single flag can."""
        args = self.parse_args(argv)
        if argv is None and args.hub_token:  # trackers write sys.argv down
            sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
        if args.w_min > args.w_max:
            self.error(f"argument --w_min: {args.w_min:g} is above --w_max {args.w_max:g}; give w_min <= w_max")
        for flag in ("validation_teacher_steps", "num_validation_images"):
            if args.keep_best and not vars(args)[flag]:
                self.error(
                    f"argument --keep_best: it goes by the distance to the teacher, which --{flag} 0 does not measure"
                )
        return args


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, unless that says it or there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or "(default:" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


def number(
    kind: type, low: float | None = None, high: float | None = None, *, open_low: bool = False
) -> Callable[[str], Any]:
    """An argparse type: `kind` within [low, high], or (low, high] with `open_low`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        ok = value == value and (low is None or (value > low if open_low else value >= low))
        if not ok or (high is not None and value > high):
            above = "" if low is None else f" above {low:g}" if open_low else f" of at least {low:g}"
            below = "" if high is None else f"{' and' if above else ''} at most {high:g}"
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}{above}{below}")
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 0, open_low=True)
non_negative = number(float, 0)
fraction = number(float, 0, 1)
below_one = number(float, 0, 1 - 2**-24)


def duration(text: str) -> float:
    """Seconds of a time as people and clusters write it: 11.5h, 90m, 3600s or 3600, 11:30:00, 1-12:00:00."""
    seconds = 0.0
    if match := re.fullmatch(r"(\d+(?:\.\d*)?)\s*([hms]?)", text.strip().lower()):
        seconds = float(match[1]) * {"h": 3600, "m": 60}.get(match[2], 1)
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip()):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write 11.5h, 90m, 3600s or 11:30:00")
    return float(seconds)


def _switch(group: Any, name: str, help: str, default: bool = False) -> None:
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_model_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_teacher_model",
        type=str,
        required=True,
        help="the teacher: a Diffusers pipeline folder, a Hub id, or a single .safetensors checkpoint",
    )
    group.add_argument(
        "--teacher_config",
        type=str,
        default=None,
        help="for a single-file teacher: the Diffusers folder or Hub id with its configs (default: told from the file)",
    )
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        type=str,
        default=None,
        help="another autoencoder than the teacher's own: a folder with its config.json, or a Hub id",
    )
    group.add_argument("--teacher_revision", type=str, default=None, help="branch, tag or commit of a Hub teacher")
    group.add_argument(
        "--revision",
        type=str,
        default=None,
        help="branch, tag or commit of the separate autoencoder (--pretrained_vae_model_name_or_path)",
    )
    group.add_argument("--variant", type=str, default=None, help="file variant of the teacher's weights, such as fp16")
    group.add_argument("--cache_dir", type=str, default=None, help="where models from the Hub are kept")


def add_device_flags(parser: CommandParser, *, dtype: str | None = None) -> None:
    """Where, and in what precision, finished models draw; `runtime.drawing_device` makes of it what torch needs.

    `dtype` is the default of --dtype; None for what is fastest.
    """
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        type=str,
        default=None,
        help="cuda, cuda:1, mps or cpu (default: the first of cuda, mps and cpu that is there)",
    )
    group.add_argument(
        "--dtype",
        type=str,
        default=dtype,
        choices=["fp16", "bf16", "fp32"],
        help="precision of the networks; SDXL's VAE stays in fp32 unless its config says that half is safe for it "
        f"(default: {dtype or 'fp16 on a GPU, fp32 on a CPU'})",
    )


def add_preparation_flags(parser: CommandParser, *, resolution: int | None) -> None:
    """How a sample becomes pixels and words. Without a default `resolution` that must be given."""
    group = parser.add_argument_group("pictures and captions")
    group.add_argument(
        "--caption_column",
        type=str,
        default=None,
        help="where the captions are: the extension of a file in the samples (txt, blip.txt) or a key of their JSON "
        "(top_caption, meta.caption); a list there holds several captions, of which each epoch draws one "
        "(default: .txt, .text or .caption, else the JSON's caption or text)",
    )
    group.add_argument(
        "--resolution",
        type=positive_int,
        default=resolution,
        required=resolution is None,
        help="pictures are resized (shorter side) and cropped to this many pixels; a multiple of the VAE's factor, 8",
    )
    group.add_argument(
        "--interpolation_type",
        type=str,
        default="bilinear",
        choices=sorted(INTERPOLATIONS),
        help="filter of the resize",
    )
    _switch(group, "--center_crop", "crop the middle instead of a random place")
    _switch(group, "--random_flip", "mirror half of the pictures left to right")
    group.add_argument(
        "--min_image_size",
        type=count,
        default=0,
        metavar="PIXELS",
        help="leave out pictures whose shorter side is shorter than this (default: 0, none)",
    )
    group.add_argument(
        "--max_pwatermark",
        type=number(float),
        default=None,
        help="leave out pictures whose JSON gives a higher pwatermark; a missing key never rejects",
    )
    group.add_argument(
        "--min_aesthetic",
        type=number(float),
        default=None,
        help="leave out pictures whose JSON gives a lower aesthetic (or aesthetic_score, AESTHETIC_SCORE)",
    )
    group.add_argument(
        "--filter",
        type=str,
        nargs="+",
        default=None,
        metavar="CONDITION",
        help="leave out pictures whose JSON does not satisfy this: a key, one of >= <= > < = !=, and a number or a "
        "word, in quotes, such as 'punsafe<0.2' 'meta.language=en'",
    )


def add_data_flags(parser: Parser, *, resolution: int) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train_shards_path_or_url",
        type=str,
        default=None,
        help="WebDataset shards: a tar, a folder of tars, a pattern such as data/{00000..00099}.tar, a .txt file with "
        "one of these on each line, a URL (https, s3, hf, …) or 'pipe:COMMAND'; several are joined by '::'",
    )
    group.add_argument(
        "--proportion_empty_prompts", type=fraction, default=0, help="share of the captions replaced by the empty one"
    )
    group.add_argument(
        "--max_bad_fraction",
        type=fraction,
        default=0.5,
        help="stop when more than this share of the samples (of at least 500) cannot be used; filters do not count",
    )
    group.add_argument(
        "--shuffle_window",
        type=positive_int,
        default=1000,
        help="samples that each worker shuffles among themselves (at most 256 MiB); shards are shuffled in any case",
    )
    _switch(group, "--resampled_shards", "draw shards with replacement, instead of each once an epoch")
    group.add_argument(
        "--dataloader_num_workers", type=count, default=0, help="processes that load data; 0 loads in the main one"
    )
    group.add_argument("--train_batch_size", type=positive_int, default=16, help="pictures per device and batch")
    group.add_argument(
        "--max_train_samples",
        type=positive_int,
        default=None,
        help="pictures that count as one epoch (default: all; local shards are counted)",
    )
    add_preparation_flags(parser, resolution=resolution)


def add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=None,
        help="seed of every random draw (default: drawn, and printed)",
    )
    group.add_argument(
        "--num_train_epochs", type=positive_int, default=100, help="epochs to train, unless --max_train_steps is given"
    )
    group.add_argument("--max_train_steps", type=positive_int, default=None, help="optimizer steps to train")
    group.add_argument("--learning_rate", type=non_negative, default=1e-4, help="peak learning rate")
    _switch(
        group,
        "--scale_lr",
        "multiply the learning rate by devices × --train_batch_size × --gradient_accumulation_steps",
    )
    group.add_argument(
        "--lr_scheduler",
        type=str,
        default="constant",
        help="course of the learning rate",
        choices=[s.value for s in SchedulerType if s not in (SchedulerType.PIECEWISE_CONSTANT,)],
    )
    group.add_argument(
        "--lr_warmup_steps",
        type=count,
        default=500,
        help="optimizer steps of rising learning rate, in the courses that warm up ('constant' does not)",
    )
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="batches per optimizer step")
    _switch(group, "--use_8bit_adam", "AdamW with 8-bit state (bitsandbytes)")
    group.add_argument("--adam_beta1", type=below_one, default=0.9, help="AdamW's β1")
    group.add_argument("--adam_beta2", type=below_one, default=0.999, help="AdamW's β2")
    group.add_argument("--adam_weight_decay", type=non_negative, default=1e-2, help="AdamW's weight decay")
    group.add_argument("--adam_epsilon", type=positive, default=1e-8, help="AdamW's ε")
    group.add_argument("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")


def add_distillation_flags(parser: Parser, *, w_min: float, vae_encode_batch_size: int) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--w_min",
        type=non_negative,
        default=w_min,
        help="least guidance w trained; w is the LCM paper's, cond + w·(cond − uncond), "
        "so the pipelines' guidance_scale is w + 1",
    )
    group.add_argument("--w_max", type=non_negative, default=15.0, help="greatest guidance w trained")
    group.add_argument(
        "--num_ddim_timesteps",
        type=positive_int,
        default=50,
        help="points of the solver's grid; the paper's skipping step k is 1000 / this",
    )
    group.add_argument("--loss_type", type=str, default="l2", choices=["l2", "huber"], help="l2, or pseudo-Huber")
    group.add_argument("--huber_c", type=positive, default=0.001, help="c of the pseudo-Huber loss √(d²+c²) − c")
    group.add_argument(
        "--timestep_scaling_factor",
        type=positive,
        default=10.0,
        help="scales the timestep in the boundary scalings c_skip and c_out; goes into the saved scheduler",
    )
    group.add_argument(
        "--vae_encode_batch_size",
        type=positive_int,
        default=vae_encode_batch_size,
        help="pictures that the VAE encodes at once; less saves memory",
    )


def add_full_student_flags(parser: Parser) -> None:
    group = parser.add_argument_group("student and target")
    group.add_argument(
        "--unet_time_cond_proj_dim", type=number(int, 4), default=256, help="width of the guidance embedding"
    )
    group.add_argument(
        "--ema_decay",
        type=fraction,
        default=0.95,
        help="decay μ of the target network, θ⁻ ← μ·θ⁻ + (1−μ)·θ: 0 copies the student at every step",
    )


def add_lora_flags(parser: Parser) -> None:
    group = parser.add_argument_group("student and target")
    group.add_argument("--lora_rank", type=positive_int, default=64, help="rank of the adapter")
    group.add_argument(
        "--lora_alpha", type=positive_int, default=64, help="the adapter's change is scaled by this / --lora_rank"
    )
    group.add_argument(
        "--lora_dropout", type=below_one, default=0.0, help="dropout in front of the adapter, in the student's pass"
    )
    group.add_argument(
        "--lora_target_modules",
        type=str,
        default=None,
        help="modules that get an adapter, joined by commas (default: LCM-LoRA's fourteen kinds: "
        "attention, feed-forward, convolutions and time embeddings)",
    )
    group.add_argument(
        "--ema_decay",
        type=fraction,
        default=0.0,
        help="decay μ of a target adapter, θ⁻ ← μ·θ⁻ + (1−μ)·θ; 0: the target is the student itself, as LCM-LoRA's",
    )


def add_sdxl_flags(parser: Parser) -> None:
    group = parser.add_argument_group("SDXL's size conditioning")
    _switch(
        group,
        "--use_fix_crop_and_size",
        "tell the networks that every picture is --resolution pixels large and uncropped, not its true size and crop",
    )


def add_speed_flags(parser: Parser) -> None:
    group = parser.add_argument_group("precision, speed and memory")
    group.add_argument(
        "--mixed_precision",
        type=str,
        default=None,
        choices=["no", "fp16", "bf16"],
        help="precision of the networks' arithmetic (default: as `accelerate config` says); what trains, the "
        "schedule, the solver and the loss stay float32",
    )
    _switch(group, "--allow_tf32", "TF32 matrix products and convolutions where float32 is asked for (Ampere or newer)")
    _switch(
        group,
        "--cast_teacher_unet",
        "keep the teacher's U-Net, which is also what is under a LoRA, in the mixed precision instead of float32",
        default=True,
    )
    group.add_argument(
        "--teacher_batch_size",
        type=positive_int,
        default=None,
        help="rows that the teacher sees at once, of 2 × --train_batch_size (with guidance and without); less saves "
        "memory (default: all)",
    )
    group.add_argument(
        "--compile",
        type=str,
        nargs="?",
        const="regional",
        default=None,
        choices=MODES,
        help="compile the U-Nets: their repeated blocks (regional, what --compile alone means), or each in one piece "
        "(whole: slower to begin); the first steps take minutes, in later runs much less",
    )
    _switch(
        group,
        "--enable_xformers_memory_efficient_attention",
        "xformers' attention where it works; PyTorch's own, as fast on today's GPUs, otherwise",
    )
    _switch(group, "--gradient_checkpointing", "recompute activations in the backward pass: less memory, slower")
    group.add_argument(
        "--local_rank", type=int, default=-1, help="this process's device, for launchers that do not set LOCAL_RANK"
    )


def add_run_flags(parser: Parser, *, guidance_default: str) -> None:
    """`guidance_default` says in words what --validation_guidance_scale is when it is not given."""
    group = parser.add_argument_group("output, checkpoints and logging")
    group.add_argument("--output_dir", type=str, default="lcm-xl-distilled", help="everything the run writes goes here")
    group.add_argument("--logging_dir", type=str, default="logs", help="the trackers' folder, inside --output_dir")
    group.add_argument(
        "--report_to",
        type=str,
        default="tensorboard",
        help="trackers, joined by commas: tensorboard, wandb, comet_ml, …; 'all' installed ones, or 'none'",
    )
    group.add_argument(
        "--tracker_project_name", type=str, default="text2image-fine-tune", help="the project's name in the trackers"
    )
    group.add_argument(
        "--logging_steps", type=positive_int, default=10, help="optimizer steps between two logged values"
    )
    group.add_argument(
        "--checkpointing_steps",
        type=positive_int,
        default=500,
        help="optimizer steps between two checkpoints; one is always saved at the end",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=positive_int,
        default=None,
        help="how many checkpoints to keep; older ones go after a new one is complete (default: keep all)",
    )
    _switch(
        group,
        "--keep_best",
        "also keep the checkpoint that came closest to the teacher by the distance that validation measures: one is "
        "saved whenever that is less than ever before, and goes when the next one is",
    )
    group.add_argument(
        "--max_train_time",
        type=duration,
        default=None,
        metavar="TIME",
        help="save a checkpoint and end when training has taken this long: 11.5h, 90m, 11:30:00 (default: no limit)",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        type=str,
        default=None,
        help="'latest', 'best' (with --keep_best), or the folder of a checkpoint: the run continues exactly there",
    )
    _switch(
        group,
        "--dry_run",
        "check shards, models and memory with one training step and one picture, then stop; writes nothing",
    )
    group = parser.add_argument_group("validation pictures")
    group.add_argument(
        "--validation_steps", type=positive_int, default=200, help="optimizer steps between two drawings"
    )
    group.add_argument(
        "--validation_prompts",
        type=str,
        nargs="+",
        default=None,
        metavar="PROMPT",
        help="what to draw: prompts, or .txt files with a prompt on each line (default: four captions of the first "
        "shard)",
    )
    group.add_argument("--num_validation_images", type=count, default=4, help="pictures per prompt; 0: draw none")
    group.add_argument(
        "--validation_inference_steps",
        type=positive_int,
        nargs="+",
        default=[4],
        metavar="STEPS",
        help="sampling steps of the pictures; with several numbers, such as 1 2 4, a row of pictures for each "
        "(default: 4)",
    )
    group.add_argument(
        "--validation_guidance_scale",
        type=non_negative,
        default=None,
        help=f"the pipelines' guidance_scale of the pictures (default: {guidance_default})",
    )
    group.add_argument(
        "--validation_teacher_steps",
        type=count,
        default=50,
        metavar="STEPS",
        help="DDIM steps of the teacher's row, drawn once; the distance between its pictures and the student's in one "
        "step, in latents, is logged as distance/student; 0: neither",
    )
    group = parser.add_argument_group("Hub")
    _switch(group, "--push_to_hub", "upload the finished model to the Hub")
    group.add_argument(
        "--hub_token", type=str, default=None, help="Hub token (default: HF_TOKEN, or that of `hf auth login`)"
    )
    group.add_argument(
        "--hub_model_id", type=str, default=None, help="Hub repository (default: the output folder's name)"
    )
