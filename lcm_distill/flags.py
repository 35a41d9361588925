"""The flags of the training programs, and those that commands share: typed groups, frozen dataclasses of flags.

    args = parse(__doc__, argv, defaults=SDXL, student=FullStudentFlags)        # a training program
    args.optimization.adam_beta1                                             # the value of --adam_beta1
    args.flat()                                                              # all flags by name, to write down

A part of the package takes the group that belongs to it. A flag is declared once, where its name, type, range, default
and help stand, so that it cannot be wired to another. Names and defaults are those of Diffusers'
consistency-distillation examples, so that their command lines run unchanged. Commands have a `CommandParser`, to which
`add_group` adds a group and from whose result `take` builds it.

Nothing heavy is imported here: --help, --version and a mistyped flag are answered at once.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Generic, NoReturn, TypeVar

from lcm_distill import __version__
from lcm_distill.redaction import mask

# Flags that messages name, for the parts of the package that explain what is wrong with their values.
SHARDS_FLAG = "--train_shards_path_or_url"
TEACHER_FLAG = "--pretrained_teacher_model"
VAE_FLAG = "--pretrained_vae_model_name_or_path"

# What libraries offer, by name: tests compare these with Pillow and Diffusers.
INTERPOLATIONS = ("bilinear", "bicubic", "box", "hamming", "lanczos", "nearest", "nearest_exact")
LR_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
COMPILE_MODES = ("regional", "whole")
SAMPLERS = ("DDIM", "DPM-Solver++")  # of the teachers, by the names in the LCM paper's tables
DTYPES = ("fp16", "bf16", "fp32")

# Of --max_decode_mb: 104 megapixels, those of a medium-format camera, in all formats but WebP (62) and AVIF (78).
MAX_DECODE_MB = 1250

Group = TypeVar("Group")


# ------------------------------------------------------------------------------------------------------ the parser


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
        self.add_argument("--version", action="version", version=f"lcm_distill {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {mask(message)}\n(--help lists every flag)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, unless the help names it or there is none."""

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


def path(text: str) -> str:
    """A file or folder, or a Hub id, with ~ and ~user expanded: a shell does that only at the beginning of a word."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        raise argparse.ArgumentTypeError(
            f"{text!r}: there is no user {user[1:]!r}; for a file of that name write ./{text}"
        )
    return expanded


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


# ---------------------------------------------------------------------------------------- a group and its flags


def flag(default: Any, help: str, *, type: Callable[[str], Any] = str, title: str | None = None, **options: Any) -> Any:
    """A field of a group that is a flag, with argparse's `type`, `help` and further `options` (choices, nargs, …).

    A `default` of `MISSING`: the flag has to be given. `title` begins another heading of the help, for this flag and
    those after it.
    """
    metadata = {"help": help, "title": title, "options": {"type": type} | options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def switch(default: bool, help: str, *, title: str | None = None) -> Any:
    """A field of a group that is a flag without a value: `--name` or `--no-name`."""
    options = {"action": argparse.BooleanOptionalAction}
    return dataclasses.field(default=default, metadata={"help": help, "title": title, "options": options})


def add_group(parser: CommandParser, group: type, defaults: Mapping[str, Any] | None = None) -> None:
    """Adds the flags of a `group`, under its docstring as a heading; `defaults` replace its own, by name."""
    heading = parser.add_argument_group((group.__doc__ or "").partition("\n")[0].rstrip("."))
    for field in dataclasses.fields(group):
        if "help" not in field.metadata:
            continue  # set by code, not by a flag
        if field.metadata["title"]:
            heading = parser.add_argument_group(field.metadata["title"])
        options = dict(field.metadata["options"])
        own = field.default_factory() if field.default_factory is not MISSING else field.default
        default = (defaults or {}).get(field.name, own)
        options |= {"required": True} if default is MISSING else {"default": default}
        heading.add_argument(f"--{field.name}", help=field.metadata["help"], **options)


def take(group: type[Group], parsed: argparse.Namespace) -> Group:
    """The `group` with the values that a parser with its flags found."""
    names = {field.name for field in dataclasses.fields(group) if "help" in field.metadata}  # type: ignore[arg-type]
    return group(**{name: value for name, value in vars(parsed).items() if name in names})


# ---------------------------------------------------------------------------------------------------- the groups


@dataclass(frozen=True, kw_only=True)
class TeacherFlags:
    """models"""

    pretrained_teacher_model: str = flag(
        MISSING, "the teacher: a Diffusers pipeline folder, a Hub id, or a single .safetensors checkpoint", type=path
    )
    teacher_config: str | None = flag(
        None,
        "for a single-file teacher: the Diffusers folder or Hub id with its configs (default: guessed from the file)",
        type=path,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "another autoencoder than the teacher's own: a folder with its config.json, or a Hub id", type=path
    )
    teacher_revision: str | None = flag(None, "branch, tag or commit of a Hub teacher")
    revision: str | None = flag(
        None, "branch, tag or commit of the separate autoencoder (--pretrained_vae_model_name_or_path)"
    )
    variant: str | None = flag(None, "file variant of the teacher's weights, such as fp16")
    cache_dir: str | None = flag(None, "where models from the Hub are kept", type=path)


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """device"""

    device: str | None = flag(None, "cuda, cuda:1, mps or cpu (default: the first available of cuda, mps and cpu)")
    dtype: str | None = flag(
        None,
        "precision of the networks; SDXL's VAE stays in fp32 unless its config marks half precision as safe "
        "(default: fp16 on a GPU, fp32 on a CPU)",
        choices=list(DTYPES),
    )


@dataclass(frozen=True, kw_only=True)
class EncodingDeviceFlags(DeviceFlags):
    """device"""

    dtype: str | None = flag(
        "fp32",
        "precision of the networks; SDXL's VAE stays in fp32 unless its config marks half precision as safe",
        choices=list(DTYPES),
    )


@dataclass(frozen=True, kw_only=True)
class StreamingFlags:
    """data"""

    train_shards_path_or_url: str | None = flag(
        None,
        "WebDataset shards: a tar, a folder of tars, a pattern such as data/{00000..00099}.tar, a .txt file with "
        "one of these on each line, a URL (https, s3, hf, …) or 'pipe:COMMAND'; several are joined by '::'",
    )
    max_bad_fraction: float = flag(
        0.5,
        "stop when more than this share of the samples (of at least 500) cannot be used; filters do not count",
        type=fraction,
    )
    shuffle_window: int = flag(
        1000,
        "samples that each worker shuffles among themselves (at most 256 MiB); shards are shuffled in any case",
        type=positive_int,
    )
    allow_pipe_in_lists: bool = switch(
        False, "run the commands (pipe:COMMAND) in a .txt file of shards; one that was downloaded could run anything"
    )
    resampled_shards: bool = switch(False, "draw shards with replacement, instead of each once an epoch")
    dataloader_num_workers: int | None = flag(
        None,
        "processes per device that load data; 0 loads in the main one (default: as in the checkpoint that is resumed "
        "with as many devices, else up to 4 on a CUDA GPU, as its share of the CPU cores allows, 0 on other devices)",
        type=count,
    )
    train_batch_size: int = flag(16, "pictures per device and batch", type=positive_int)


@dataclass(frozen=True, kw_only=True)
class PreparationFlags:
    """pictures and captions"""

    caption_column: str | None = flag(
        None,
        "where the captions are: the extension of a file in the samples (txt, blip.txt) or a key of their JSON "
        "(top_caption, meta.caption); a list there holds several captions, of which each epoch draws one "
        "(default: .txt, .text or .caption, else the JSON's caption or text)",
    )
    resolution: int = flag(
        MISSING,
        "pictures are resized (shorter side) and cropped to this many pixels; a multiple of the VAE's factor, 8",
        type=positive_int,
    )
    interpolation_type: str = flag("bilinear", "filter of the resize", choices=sorted(INTERPOLATIONS))
    center_crop: bool = switch(False, "crop the middle instead of a random place")
    random_flip: bool = switch(False, "mirror half of the pictures left to right")
    min_image_size: int = flag(
        0, "leave out pictures whose shorter side is shorter than this (default: 0, none)", type=count, metavar="PIXELS"
    )
    max_decode_mb: int = flag(
        MAX_DECODE_MB,
        "leave out pictures that take more megabytes of memory to decode, at 12 bytes per pixel (AVIF 16, WebP 20; "
        "JPEGs take a fraction, since they are decoded small)",
        type=positive_int,
        metavar="MB",
    )
    max_pwatermark: float | None = flag(
        None, "leave out pictures whose JSON gives a higher pwatermark; a missing key never rejects", type=number(float)
    )
    min_aesthetic: float | None = flag(
        None,
        "leave out pictures whose JSON gives a lower aesthetic (or aesthetic_score, AESTHETIC_SCORE)",
        type=number(float),
    )
    filter: list[str] | None = flag(
        None,
        "leave out pictures whose JSON does not satisfy this: a key, one of >= <= > < = !=, and a number or a "
        "word, in quotes, such as 'punsafe<0.2' 'meta.language=en'",
        nargs="+",
        metavar="CONDITION",
    )
    proportion_empty_prompts: float = 0.0  # a flag in TrainingPreparationFlags
    use_fix_crop_and_size: bool = False  # a flag in SDXLPreparationFlags


@dataclass(frozen=True, kw_only=True)
class TrainingPreparationFlags(PreparationFlags):
    """pictures and captions"""

    proportion_empty_prompts: float = flag(0, "share of the captions that are replaced by the empty one", type=fraction)


@dataclass(frozen=True, kw_only=True)
class SDXLPreparationFlags(TrainingPreparationFlags):
    """pictures and captions"""

    use_fix_crop_and_size: bool = switch(
        False,
        "condition the networks on --resolution as every picture's original size and on no crop, instead of on its "
        "true size and crop",
        title="SDXL's size conditioning",
    )


@dataclass(frozen=True, kw_only=True)
class LengthFlags:
    """length of the training"""

    num_train_epochs: int = flag(100, "epochs to train, unless --max_train_steps is given", type=positive_int)
    max_train_steps: int | None = flag(None, "optimizer steps to train", type=positive_int)
    max_train_samples: int | None = flag(
        None, "pictures that count as one epoch (default: all; local shards are counted)", type=positive_int
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationFlags:
    """optimizer and learning rate"""

    learning_rate: float = flag(1e-4, "peak learning rate", type=non_negative)
    scale_lr: bool = switch(
        False, "multiply the learning rate by devices × --train_batch_size × --gradient_accumulation_steps"
    )
    lr_scheduler: str = flag("constant", "schedule of the learning rate", choices=list(LR_SCHEDULES))
    lr_warmup_steps: int = flag(
        500, "optimizer steps of rising learning rate, in the schedules that warm up ('constant' does not)", type=count
    )
    use_8bit_adam: bool = switch(False, "AdamW with 8-bit state (bitsandbytes)")
    adam_beta1: float = flag(0.9, "AdamW's β1", type=below_one)
    adam_beta2: float = flag(0.999, "AdamW's β2", type=below_one)
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay", type=non_negative)
    adam_epsilon: float = flag(1e-8, "AdamW's ε", type=positive)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", type=positive)


@dataclass(frozen=True, kw_only=True)
class DistillationFlags:
    """distillation"""

    w_min: float = flag(
        MISSING,
        "smallest guidance w to train; w is the LCM paper's, cond + w·(cond − uncond), "
        "so the pipelines' guidance_scale is w + 1",
        type=non_negative,
    )
    w_max: float = flag(15.0, "largest guidance w to train", type=non_negative)
    num_ddim_timesteps: int = flag(
        50, "points of the solver's grid; the paper's skipping step k is 1000 / this", type=positive_int
    )
    loss_type: str = flag("l2", "l2, or pseudo-Huber", choices=["l2", "huber"])
    huber_c: float = flag(0.001, "c of the pseudo-Huber loss √(d²+c²) − c", type=positive)
    timestep_scaling_factor: float = flag(
        10.0,
        "scales the timestep in the boundary scalings c_skip and c_out; goes into the saved scheduler",
        type=positive,
    )
    top_timestep: int | None = flag(
        None,
        "timestep where the student's sampling starts, from noise alone, and where the solver's grid ends; for one and "
        "two steps, see docs/reference.md (default: the teacher's last)",
        type=positive_int,
    )
    top_timestep_probability: float = flag(
        0.0,
        "with this probability a picture's n is that of the top timestep, where sampling starts, instead of uniform",
        type=fraction,
    )


@dataclass(frozen=True, kw_only=True)
class MatchingFlags:
    """distribution matching, for students of one and two steps"""

    dm_weight: float = flag(
        0.0, "weight of the distribution matching loss (0: none, and no fake score is trained)", type=non_negative
    )
    dm_consistency_weight: float = flag(
        1.0, "weight of the consistency loss once distribution matching has begun", type=non_negative
    )
    dm_start_step: int = flag(0, "optimizer steps of plain distillation before distribution matching", type=count)
    dm_steps: int = flag(1, "optimizer steps of the fake score for each of the student's", type=positive_int)
    dm_learning_rate: float = flag(1e-4, "learning rate of the fake score, constant", type=non_negative)
    dm_rank: int = flag(64, "rank of the fake score, an adapter of the teacher", type=positive_int)
    dm_guidance_w: float | None = flag(
        None, "guidance w of the real score, the teacher (default: the w that is drawn for the step)", type=non_negative
    )
    dm_timesteps: list[float] = flag(
        [0.02, 0.98],
        "the range of the timesteps at which the scores are compared, as shares of the teacher's",
        type=fraction,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )


@dataclass(frozen=True, kw_only=True)
class StudentFlags:
    """student and target"""

    init_student: str | None = flag(
        None,
        "a finished student to begin from, instead of the teacher: the output folder of a run, a Hub id, or a LoRA's "
        ".safetensors file, such as an LCM-LoRA; not read when a checkpoint is resumed",
        type=path,
        metavar="STUDENT",
    )


@dataclass(frozen=True, kw_only=True)
class FullStudentFlags(StudentFlags):
    """student and target"""

    unet_time_cond_proj_dim: int = flag(256, "width of the guidance embedding", type=number(int, 4))
    ema_decay: float = flag(
        0.95, "decay μ of the target network, θ⁻ ← μ·θ⁻ + (1−μ)·θ: 0 copies the student at every step", type=fraction
    )


@dataclass(frozen=True, kw_only=True)
class LoraFlags(StudentFlags):
    """student and target"""

    lora_rank: int = flag(64, "rank of the adapter", type=positive_int)
    lora_alpha: int | None = flag(
        None,
        "the adapter's change is scaled by this / --lora_rank (default: as in the checkpoint that is resumed, else "
        "--lora_rank, a scale of 1)",
        type=positive_int,
    )
    lora_dropout: float = flag(0.0, "dropout in front of the adapter, in the student's pass", type=below_one)
    lora_target_modules: str | None = flag(
        None,
        "modules that get an adapter, joined by commas (default: LCM-LoRA's fourteen kinds: "
        "attention, feed-forward, convolutions and time embeddings)",
    )
    ema_decay: float = flag(
        0.0,
        "decay μ of a target adapter, θ⁻ ← μ·θ⁻ + (1−μ)·θ; 0: the target is the student itself, as LCM-LoRA's",
        type=fraction,
    )
    not_given: frozenset[str] = dataclasses.field(default=frozenset(), init=False)  # what a checkpoint decides

    def __post_init__(self) -> None:
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", self.lora_rank)
            object.__setattr__(self, "not_given", frozenset({"lora_alpha"}))


@dataclass(frozen=True, kw_only=True)
class SpeedFlags:
    """speed and memory"""

    cast_teacher_unet: bool = switch(
        True, "keep the teacher's U-Net, which is also what is under a LoRA, in the mixed precision instead of float32"
    )
    channels_last: bool = switch(
        False,
        "keep the U-Nets' convolutions in channels-last memory format, which --compile can profit from; without it "
        "PyTorch's group norms on GPUs change the format back each time; FSDP and ZeRO do not keep it",
    )
    float32_norms: bool = switch(
        False, "compute the U-Nets' layer norms in float32, as autocast does on GPUs, and not in the mixed precision"
    )
    teacher_batch_size: int | None = flag(
        None,
        "rows that the teacher sees at once, of 2 × --train_batch_size (with guidance and without); less saves "
        "memory (default: all)",
        type=positive_int,
    )
    vae_encode_batch_size: int = flag(
        MISSING, "pictures that the VAE encodes at once; less saves memory", type=positive_int
    )
    compile: str | None = flag(
        None,
        "compile the U-Nets and the VAE's encoder: their repeated blocks (regional, what --compile alone means), or "
        "each in one piece (whole: slower to begin); the first steps take minutes, in later runs much less",
        nargs="?",
        const="regional",
        choices=list(COMPILE_MODES),
    )
    enable_xformers_memory_efficient_attention: bool = switch(
        False,
        "xformers' attention (pip install -e '.[xformers]') where it works, otherwise PyTorch's own, "
        "which has FlashAttention, too",
    )
    gradient_checkpointing: bool = switch(False, "recompute activations in the backward pass: less memory, slower")


@dataclass(frozen=True, kw_only=True)
class LaunchFlags:
    """precision, devices and seed"""

    seed: int | None = flag(
        None, "seed of every random draw (default: drawn, and logged)", type=number(int, 0, 2**32 - 1)
    )
    mixed_precision: str | None = flag(
        None,
        "precision of the networks' arithmetic (default: as `accelerate config` says); what trains, the "
        "schedule, the solver and the loss stay float32",
        choices=["no", "fp16", "bf16"],
    )
    allow_tf32: bool = switch(
        False,
        "TF32 matrix products and convolutions where float32 is asked for (Ampere or newer); in mixed precision that "
        "is SDXL's float32 VAE alone, which has TF32 in any case",
    )
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step", type=positive_int)
    local_rank: int = flag(-1, "this process's device, for launchers that do not set LOCAL_RANK", type=int)
    dry_run: bool = switch(
        False, "check shards, models and memory with one training step and one picture, then stop; writes nothing"
    )

    output_dir: str = flag(
        "lcm-xl-distilled", "everything the run writes goes here", type=path, title="output, checkpoints and logging"
    )
    logging_dir: str = flag("logs", "the trackers' folder, inside --output_dir", type=path)
    report_to: str = flag(
        "tensorboard", "trackers, joined by commas: tensorboard, wandb, comet_ml, …; 'all' installed ones, or 'none'"
    )
    tracker_project_name: str = flag("text2image-fine-tune", "the project's name in the trackers")
    logging_steps: int = flag(10, "optimizer steps between two logged values", type=positive_int)
    checkpointing_steps: int = flag(
        500, "optimizer steps between two checkpoints; one is always saved at the end", type=positive_int
    )
    checkpoints_total_limit: int | None = flag(
        None,
        "how many checkpoints to keep; older ones go after a new one is complete (default: keep all)",
        type=positive_int,
    )
    keep_best: bool = switch(
        False,
        "also keep the checkpoint that came closest to the teacher by the distance that validation measures: one is "
        "saved whenever that is less than ever before, and goes when the next one is",
    )
    max_train_time: float | None = flag(
        None,
        "save a checkpoint and stop when training has taken this long: 11.5h, 90m, 11:30:00 (default: no limit)",
        type=duration,
        metavar="TIME",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "'latest', 'best' (with --keep_best), or the folder of a checkpoint: the run continues exactly there",
        type=path,
    )

    push_to_hub: bool = switch(False, "upload the finished model to the Hub", title="Hub")
    hub_token: str | None = flag(None, "Hub token (default: HF_TOKEN, or that of `hf auth login`)")
    hub_model_id: str | None = flag(None, "Hub repository (default: the output folder's name)")


@dataclass(frozen=True, kw_only=True)
class ValidationFlags:
    """validation pictures"""

    validation_steps: int = flag(200, "optimizer steps between two validations", type=positive_int)
    validation_prompts: list[str] | None = flag(
        None,
        "prompts to generate, or .txt files with a prompt on each line (default: four captions of the first shard)",
        nargs="+",
        metavar="PROMPT",
    )
    num_validation_images: int = flag(4, "pictures per prompt; 0: none", type=count)
    validation_inference_steps: list[int] = flag(
        [4],
        "sampling steps of the pictures; with several numbers, such as 1 2 4, a row of pictures for each (default: 4)",
        type=positive_int,
        nargs="+",
        metavar="STEPS",
    )
    validation_guidance_scale: float | None = flag(
        None,
        "the pipelines' guidance_scale of the pictures (default: 8, clamped to the trained range of w + 1; for a "
        "LoRA, whose guidance is in its weights, 1)",
        type=non_negative,
    )
    validation_teacher_steps: int = flag(
        50,
        "DDIM steps of the teacher's row, generated once; the distance between its pictures and the student's in one "
        "step, in latents, is logged as distance/student; 0: neither",
        type=count,
        metavar="STEPS",
    )


# -------------------------------------------------------------------------------------------- a training program

Student = TypeVar("Student", FullStudentFlags, LoraFlags)


@dataclass(frozen=True, kw_only=True)
class ProgramFlags(Generic[Student]):
    """The groups of a training program; `student` are those of its kind of student."""

    teacher: TeacherFlags
    streaming: StreamingFlags
    preparation: PreparationFlags
    length: LengthFlags
    optimization: OptimizationFlags
    distillation: DistillationFlags
    matching: MatchingFlags
    student: Student
    speed: SpeedFlags
    launch: LaunchFlags
    validation: ValidationFlags

    def flat(self) -> dict[str, Any]:
        """Every flag by its name."""
        groups = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return {
            field.name: getattr(group, field.name)
            for group in groups
            for field in dataclasses.fields(group)
            if "help" in field.metadata
        }


@dataclass(frozen=True)
class FamilyDefaults:
    """In what the programs of two families differ: a group, and the defaults of these flags."""

    preparation: type[PreparationFlags]
    resolution: int
    w_min: float
    vae_encode_batch_size: int


SD = FamilyDefaults(TrainingPreparationFlags, resolution=512, w_min=5.0, vae_encode_batch_size=32)
SDXL = FamilyDefaults(SDXLPreparationFlags, resolution=1024, w_min=3.0, vae_encode_batch_size=8)


def parse(
    description: str | None, argv: list[str] | None, *, defaults: FamilyDefaults, student: type[Student]
) -> ProgramFlags[Student]:
    """Parses the command line of a training program (`argv` None: the shell's) and checks what no single flag can.

    `student` is the group of its kind of student.
    """
    usage = f"%(prog)s {TEACHER_FLAG} TEACHER {SHARDS_FLAG} SHARDS [flags]"
    parser = CommandParser(None, description, usage)
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(ProgramFlags)}
    kinds |= {"student": student, "preparation": defaults.preparation}
    for group in kinds.values():
        add_group(parser, group, vars(defaults))
    parsed = parser.parse_args(argv)
    if parsed.w_min > parsed.w_max:
        parser.error(f"argument --w_min: {parsed.w_min:g} is above --w_max {parsed.w_max:g}; give w_min <= w_max")
    low, high = parsed.dm_timesteps
    if low >= high:
        parser.error(f"argument --dm_timesteps: {low:g} is not below {high:g}; give LOW < HIGH, such as 0.02 0.98")
    if parsed.channels_last and parsed.use_8bit_adam:
        parser.error("argument --channels_last: --use_8bit_adam makes weights contiguous; leave out one of the two")
    for name in ("validation_teacher_steps", "num_validation_images"):
        if parsed.keep_best and not vars(parsed)[name]:
            parser.error(
                f"argument --keep_best: it goes by the distance to the teacher, which --{name} 0 does not measure"
            )
    return ProgramFlags(**{name: take(group, parsed) for name, group in kinds.items()})
