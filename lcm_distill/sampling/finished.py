"""Finished students and LoRAs, put into a teacher's pipeline one after another, as their users do."""

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file

from lcm_distill.environment import refused_lora
from lcm_distill.errors import UsageError, brief
from lcm_distill.models.families import family_of
from lcm_distill.models.files import parse_object
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.models.unets import architecture
from lcm_distill.objective.schedule import build_lcm_scheduler
from lcm_distill.sampling.generate import build_teacher_sampler

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
RECORD = "run.json"  # what makes a folder a checkpoint
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
# The parts of a run's output folder, and of its checkpoints.
PARTS = ("unet", "unet_target", "target", "adapter", "adapter_target")


def load_teacher(
    teacher: Teacher,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    resolution: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """The teacher's pipeline on `device`, with DDIM; networks in `dtype` (SDXL's VAE in float32 unless half is safe).

    `UsageError` for a teacher that cannot be loaded, or a `resolution` (pixels; None: not checked), or one of the
    `sizes` by their flags, that it cannot generate.
    """
    family = family_of(teacher.read_config(UNet2DConditionModel, "unet"))
    configs = read_configs(teacher, family=family.NAME, resolution=resolution or 0, num_ddim_timesteps=1, sizes=sizes)
    frozen = family.load_frozen(teacher, device=device, dtype=dtype, unet_dtype=dtype)
    return family.build_pipeline(frozen, frozen.unet, build_teacher_sampler(configs.scheduler))


def native_resolution(pipeline: Any) -> int:
    """The side, in pixels, of the pictures that a pipeline's U-Net was trained for; `UsageError` if it is unknown."""
    size = pipeline.unet.config.sample_size
    if not isinstance(size, int):
        raise UsageError("--resolution is needed: the config of this teacher's U-Net has no sample_size.")
    return size * pipeline.vae_scale_factor


def lora_source(source: str) -> tuple[str | dict[str, torch.Tensor], dict[str, Any]]:
    """What Diffusers' LoRA loaders take for `source`: a folder, Hub id, file, checkpoint, or PEFT's folder.

    Their first argument and further ones. An adapter in PEFT's format, as in checkpoints, is read: float32 tensors by
    name, with its scale in them. `ValueError` or `OSError` if it cannot be.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return str(path.parent), {"weight_name": path.name}
    adapter = path / "adapter" if (path / RECORD).is_file() else path
    if (adapter / ADAPTER_CONFIG).is_file():
        return _read_adapter(adapter), {}
    return (str(path) if path.exists() else source), {}


def _read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    config = parse_object(folder / ADAPTER_CONFIG, ADAPTER_CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    special = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "megatron_config")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or any(config.get(name) for name in special):
        raise ValueError(f"{ADAPTER_CONFIG} is not that of a plain LoRA of one rank and alpha")
    weights = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        scale = alpha / rank if ".lora_B." in name else 1.0
        weights[f"unet.{name.removeprefix('base_model.model.')}"] = tensor.float() * scale
    return weights


@dataclasses.dataclass(frozen=True)
class WeightedLora:
    """A LoRA and its weight: a folder, Hub id, `.safetensors` file or checkpoint, passed as `flag`."""

    source: str
    weight: float = 1.0
    flag: str = "--lora"
    cache_dir: str | None = None

    def load(self, pipeline: Any, adapter: str) -> None:
        """Loads it into `pipeline` as `adapter`; `UsageError` if it cannot be loaded or does not fit."""
        try:
            source, where = lora_source(self.source)
            with refused_lora(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PEFT's warning about a second adapter
                # use_safetensors: by default Diffusers also loads pickled files, which can run any code.
                pipeline.load_lora_weights(
                    source, adapter_name=adapter, cache_dir=self.cache_dir, use_safetensors=True, **where
                )
        except Exception as error:  # no such file, other shapes, another model's names: each raises another class
            raise UsageError(
                f"{self.flag} {self.source}: this LoRA cannot be loaded into the teacher ({brief(error)}). Pass a "
                ".safetensors LoRA, and the teacher that it was trained on or one of the same architecture."
            ) from None


@contextlib.contextmanager
def with_loras(pipeline: Any, loras: Sequence[WeightedLora]) -> Iterator[Any]:
    """Inside, `pipeline` generates with all `loras` at their weights; afterwards without."""
    if not loras:
        yield pipeline
        return
    try:
        adapters = [f"lora_{number}" for number in range(len(loras))]
        for lora, adapter in zip(loras, adapters, strict=True):
            lora.load(pipeline, adapter)
        pipeline.set_adapters(adapters, [lora.weight for lora in loras])
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


@dataclasses.dataclass(frozen=True)
class Student:
    """A finished student; creating one loads nothing.

    `source` is a folder, a checkpoint of a run, a Hub id, or a `.safetensors` file (a LoRA). `kind` is "full" for a
    U-Net, in `subfolder` unless that is None, or "lora".
    """

    source: str
    kind: str
    subfolder: str | None = None
    cache_dir: str | None = None
    flag: str = "--student"

    @property
    def name(self) -> str:
        """A short name for tables: the last part of its source; of a checkpoint, its run's name and its own."""
        path = Path(self.source).resolve()
        if (path / RECORD).is_file():
            return f"{path.parent.name}/{path.name}"
        if self._is_file:
            return path.parent.name if path.name == LORA_FILE else path.stem
        return path.name

    @property
    def _is_file(self) -> bool:
        return self.source.endswith(".safetensors") and Path(self.source).is_file()

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether it has a guidance embedding: then it takes any guidance in one pass, and ignores negative prompts.

        Other students, LoRAs and U-Nets that a LoRA was merged into, have a fixed guidance in their weights and
        generate at guidance_scale 1; above that, the pipelines guide them again, with a second pass.
        """
        if self.kind == "lora":
            return False
        return self.load_config().get("time_cond_proj_dim") is not None

    def load_config(self) -> dict[str, Any]:
        """The config of a full student's U-Net."""
        return UNet2DConditionModel.load_config(self.source, subfolder=self.subfolder, cache_dir=self.cache_dir)

    def sampler(self, scheduler_config: Mapping[str, Any]) -> LCMScheduler:
        """The scheduler saved with it, or else an `LCMScheduler` with the schedule of the teacher's `scheduler_config`.

        A part of a distillation's folder, such as `unet_target/` or a LoRA's file, has the scheduler of the folder. A
        checkpoint has none: its run's flags say the grid, the scaling and where it starts.
        What clips is turned off, since latents are not bounded: results of older versions may have it from a teacher.
        Of a saved scheduler of another class, such as a pipeline's, the noise schedule is taken.
        """
        folders = [self.source]
        if self._is_file:
            folders = [str(Path(self.source).parent)]
        elif Path(self.source).resolve().name in PARTS:
            folders.append(str(Path(self.source).resolve().parent))
        for folder in folders:
            if (Path(folder) / RECORD).is_file():
                return build_lcm_scheduler(scheduler_config, *self._trained_sampling(Path(folder)))
            for subfolder in (None, "scheduler"):
                file = "scheduler_config.json" if subfolder is None else f"{subfolder}/scheduler_config.json"
                if _has(folder, file, self.cache_dir):
                    saved = LCMScheduler.load_config(folder, subfolder=subfolder, cache_dir=self.cache_dir)
                    if saved.get("_class_name", "LCMScheduler") != "LCMScheduler":
                        return build_lcm_scheduler(saved, given=f"{self.flag} {self.source}")
                    return LCMScheduler.from_config(saved, clip_sample=False, thresholding=False)
        return build_lcm_scheduler(scheduler_config)

    def _trained_sampling(self, checkpoint: Path) -> tuple[int, float, int | None]:
        """Grid, scaling and top timestep of a checkpoint's run; `UsageError` if its run.json does not say them."""
        given = f"{self.flag} {self.source}: its {RECORD}"
        found = parse_object(checkpoint / RECORD, given).get("flags")
        found = found if isinstance(found, dict) else {}
        grid, scaling = found.get("num_ddim_timesteps"), found.get("timestep_scaling_factor")
        top = found.get("top_timestep")  # earlier runs had no such flag
        if not isinstance(grid, int) or not isinstance(scaling, (int, float)) or grid < 1 or not 0 < scaling < 1e9:
            raise UsageError(f"{given} does not have the flags of a run; pass a checkpoint as a run has written it.")
        if top is not None and (not isinstance(top, int) or top < 1):
            raise UsageError(f"{given} has the top_timestep {top!r}; pass a checkpoint as a run has written it.")
        return grid, float(scaling), top

    @contextlib.contextmanager
    def installed_in(
        self, pipeline: Any, *, fuse: bool = False, lora_scale: float = 1.0, loras: Sequence[WeightedLora] = ()
    ) -> Iterator[Any]:
        """Inside, `pipeline`, a teacher's, generates with this student and its sampler; afterwards with the teacher.

        `loras` are applied on top. If the student is a LoRA, `lora_scale` is its weight; with `fuse`, it and `loras`
        are merged into a copy of the U-Net, which generates faster and may be kept. `UsageError` if the student or a
        LoRA does not fit the teacher.
        """
        teacher, scheduler = pipeline.unet, pipeline.scheduler
        try:
            pipeline.scheduler = self.sampler(scheduler.config)
            student_lora: list[WeightedLora] = []
            if self.kind == "full":
                check_same_teacher(self.load_config(), teacher.config, f"{self.flag} {self.source}")
                pipeline.unet = self.load_unet(teacher.dtype).to(teacher.device).requires_grad_(False).eval()
            else:
                student_lora = [WeightedLora(self.source, lora_scale, self.flag, self.cache_dir)]
                if fuse:
                    pipeline.unet = copy.deepcopy(teacher)
            with with_loras(pipeline, [*student_lora, *loras]):
                if student_lora and fuse:
                    pipeline.unet.fuse_lora()
                    pipeline.unet.unload_lora()
                yield pipeline
        finally:
            pipeline.unet, pipeline.scheduler = teacher, scheduler

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """The U-Net of a full student, on the CPU; `UsageError` if its weights cannot be loaded."""
        reasons = []
        for variant in (None, "fp16"):  # some models on the Hub have only fp16 files
            try:
                return UNet2DConditionModel.from_pretrained(
                    self.source, subfolder=self.subfolder, cache_dir=self.cache_dir, torch_dtype=dtype, variant=variant
                )
            except (OSError, ValueError, RuntimeError) as error:
                reasons.append(brief(error))
        raise UsageError(
            f"{self.flag} {self.source}: its weights cannot be loaded ({reasons[0]}); pass the output folder of a "
            "finished distillation, or download it again."
        )


def check_same_teacher(config: Mapping[str, Any], teacher_config: Mapping[str, Any], given: str) -> None:
    """`UsageError` unless a full student, by the `config` of its U-Net, may be of this teacher; `given` names it."""
    own, expected = _comparable(config), _comparable(teacher_config)
    if different := sorted(key for key in expected if own.get(key, expected[key]) != expected[key]):
        raise UsageError(
            f"{given} was not distilled from this teacher: their U-Nets differ in {different[0]} "
            f"({own[different[0]]} and {expected[different[0]]}). Pass the teacher that it was distilled from."
        )


# Config entries that may differ between teacher and student: a precision, dropout, and the guidance embedding.
_MAY_DIFFER = ("upcast_attention", "dropout", "time_cond_proj_dim")


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's architecture in a canonical form: old configs have null for false, or a number for one per block."""
    entries = {key: value for key, value in architecture(config).items() if key not in _MAY_DIFFER}
    for key, value in entries.items():
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        entries[key] = value or None
    return entries


def find_student(source: str, cache_dir: str | None = None, flag: str = "--student") -> Student:
    """The student in `source`: a folder or Hub id with a U-Net or a LoRA, or a LoRA's file; `UsageError` if none is.

    A U-Net counts as a student even without a guidance embedding. Of a complete pipeline it is the `unet/`, of a
    checkpoint of a run what it trains: its `unet/` or `adapter/`.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return Student(str(path), "lora", cache_dir=cache_dir, flag=flag)
    source = str(path) if path.exists() else source
    adapters = [f"adapter/{ADAPTER_CONFIG}"] * (path / RECORD).is_file() + [ADAPTER_CONFIG] * path.is_dir()
    if any((path / adapter).is_file() for adapter in adapters):
        return Student(source, "lora", cache_dir=cache_dir, flag=flag)
    if _has(source, LORA_FILE, cache_dir, flag):
        return Student(source, "lora", cache_dir=cache_dir, flag=flag)
    if _has(source, "config.json", cache_dir, flag):
        return Student(source, "full", cache_dir=cache_dir, flag=flag)
    if _has(source, "unet/config.json", cache_dir, flag):
        return Student(source, "full", "unet", cache_dir, flag)
    raise UsageError(
        f"{flag} {source} contains neither a U-Net (config.json) nor a LoRA ({LORA_FILE}); pass the --output_dir of "
        "a finished distillation, a checkpoint of one, its Hub id, or a LoRA's .safetensors file."
    )


def find_students(sources: Sequence[str], cache_dir: str | None = None) -> list[Student]:
    """`find_student` for each of `sources`; `UsageError` if two have the same name, by which tables list them."""
    students = [find_student(source, cache_dir) for source in sources]
    names = [student.name for student in students]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--student: two are called {repeated[0]}; rename the folder or file of one.")
    return students


def _has(source: str, file: str, cache_dir: str | None, flag: str = "--student") -> bool:
    """Whether a folder or Hub id has `file`; without a connection, whether the Hub's cache has it."""
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return (Path(source) / file).is_file()
    try:
        if not isinstance(try_to_load_from_cache(source, file, cache_dir=cache_dir), str):
            return file_exists(source, file)
        return True
    except HFValidationError:
        return False
    except Exception as error:  # no connection, no access
        with contextlib.suppress(Exception):
            return (Path(snapshot_download(source, cache_dir=cache_dir, local_files_only=True)) / file).is_file()
        raise UsageError(
            f"{flag} {source}: no such folder, and the Hub cannot be reached ({brief(error)}); check the "
            "name and the connection."
        ) from None
