"""Finished models as their users have them: a teacher's pipeline, and students to put into it by turns."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lcm_distill import sd, sdxl
from lcm_distill.drawing import teacher_sampler
from lcm_distill.errors import UsageError, brief
from lcm_distill.teacher import Teacher, read_configs
from lcm_distill.unets import architecture

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
FAMILIES: Mapping[str, ModuleType] = {"sd": sd, "sdxl": sdxl}


def family_of(unet_config: Mapping[str, Any]) -> str:
    """ "sd" or "sdxl", by a U-Net's config."""
    return "sdxl" if unet_config.get("addition_embed_type") == "text_time" else "sd"


def load_teacher(teacher: Teacher, *, device: torch.device | str, dtype: torch.dtype, resolution: int = 8) -> Any:
    """The teacher's pipeline on `device`, networks in `dtype` (SDXL's VAE in float32 unless half is safe for it).

    It samples with DDIM. `UsageError` for a teacher that cannot be read, or a `resolution` that it cannot draw.
    """
    family = family_of(teacher.read_config(UNet2DConditionModel, "unet"))
    configs = read_configs(teacher, family=family, resolution=resolution, num_ddim_timesteps=1)
    frozen = FAMILIES[family].load_frozen(teacher, device=device, dtype=dtype, unet_dtype=dtype)
    return FAMILIES[family].build_pipeline(frozen, frozen.unet, teacher_sampler(configs.scheduler))


@dataclasses.dataclass(frozen=True)
class Student:
    """What a distillation left, found but not loaded yet.

    `source` is its folder, Hub id, or `.safetensors` file (a LoRA). `kind` is "full" for a U-Net, in the `subfolder`
    if that is not None, or "lora".
    """

    source: str
    kind: str
    subfolder: str | None = None
    cache_dir: str | None = None

    @property
    def name(self) -> str:
        """A short name for tables: the last part of where it is."""
        return Path(self.source).resolve().stem if Path(self.source).is_file() else Path(self.source).resolve().name

    def sampler(self, scheduler_config: Mapping[str, Any]) -> LCMScheduler:
        """The scheduler that was saved beside it, or else an `LCMScheduler` of the teacher's config."""
        if not self.source.endswith(".safetensors") and _has(self.source, "scheduler_config.json", self.cache_dir):
            return LCMScheduler.from_pretrained(self.source, cache_dir=self.cache_dir)
        if self.subfolder and _has(self.source, "scheduler/scheduler_config.json", self.cache_dir):
            return LCMScheduler.from_pretrained(self.source, subfolder="scheduler", cache_dir=self.cache_dir)
        return LCMScheduler.from_config(dict(scheduler_config))

    @contextlib.contextmanager
    def drawing_in(self, pipeline: Any, *, fuse: bool = False) -> Iterator[Any]:
        """Inside, the teacher's `pipeline` draws with this student and its sampler; then it is the teacher's again.

        `fuse` adds a LoRA to the weights under it, as for fast drawing. `UsageError` if it does not fit the teacher.
        """
        teacher, scheduler = pipeline.unet, pipeline.scheduler
        try:
            pipeline.scheduler = self.sampler(scheduler.config)
            if self.kind == "full":
                pipeline.unet = self._load_unet(teacher)
            else:
                self._load_lora(pipeline)
                if fuse:
                    pipeline.fuse_lora(components=["unet"])
            yield pipeline
        finally:
            if self.kind == "lora":
                if fuse and pipeline.num_fused_loras:
                    pipeline.unfuse_lora(components=["unet"])
                pipeline.unload_lora_weights()
            pipeline.unet, pipeline.scheduler = teacher, scheduler

    def _load_unet(self, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
        where: dict[str, Any] = dict(subfolder=self.subfolder, cache_dir=self.cache_dir)
        design = architecture(UNet2DConditionModel.load_config(self.source, **where))
        expected = architecture(teacher.config) | {"time_cond_proj_dim": design.get("time_cond_proj_dim")}
        if different := sorted(key for key in expected if design.get(key, expected[key]) != expected[key]):
            raise UsageError(
                f"--student {self.source} was not made from this teacher: their U-Nets differ in {different[0]} "
                f"({design[different[0]]} and {expected[different[0]]}). Give the teacher that it was distilled from."
            )
        unet = UNet2DConditionModel.from_pretrained(self.source, torch_dtype=teacher.dtype, **where)
        return unet.to(teacher.device).requires_grad_(False).eval()

    def _load_lora(self, pipeline: Any, adapter: str = "student") -> None:
        load_lora(pipeline, self.source, adapter, flag="--student", cache_dir=self.cache_dir)


def load_lora(pipeline: Any, source: str, adapter: str, *, flag: str, cache_dir: str | None = None) -> None:
    """Puts the LoRA of a folder, Hub id or `.safetensors` file into `pipeline`; `UsageError` if it does not fit."""
    path = Path(source)
    where: dict[str, Any] = {"cache_dir": cache_dir}
    if path.is_file():
        source, where = str(path.parent), where | {"weight_name": path.name}
    try:
        pipeline.load_lora_weights(source, adapter_name=adapter, **where)
    except Exception as error:  # no such file, other shapes, another model's names: each its own class
        raise UsageError(
            f"{flag} {path}: this LoRA cannot be put into the teacher ({brief(error)}). "
            "Give the teacher, or one of the same architecture, that it was made for."
        ) from None


def find_student(source: str, cache_dir: str | None = None) -> Student:
    """What `source` is: a folder or Hub id with a U-Net or a LoRA, or a LoRA's file; `UsageError` if it is none.

    A U-Net is taken for a student even without a guidance embedding. In a whole pipeline it is the `unet/`.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return Student(str(path), "lora", cache_dir=cache_dir)
    source = str(path) if path.exists() else source
    if _has(source, LORA_FILE, cache_dir):
        return Student(source, "lora", cache_dir=cache_dir)
    if _has(source, "config.json", cache_dir):
        return Student(source, "full", cache_dir=cache_dir)
    if _has(source, "unet/config.json", cache_dir):
        return Student(source, "full", "unet", cache_dir)
    raise UsageError(
        f"--student {source}: neither a U-Net (config.json) nor a LoRA ({LORA_FILE}) is there; give the --output_dir "
        "of a finished distillation, its Hub id, or a LoRA's .safetensors file."
    )


def find_students(sources: Sequence[str], cache_dir: str | None = None) -> list[Student]:
    """`find_student` of each; `UsageError` if two of them have one name, under which tables would list both."""
    students = [find_student(source, cache_dir) for source in sources]
    names = [student.name for student in students]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--student: two are called {twice[0]}; rename the folder of one.")
    return students


def _has(source: str, file: str, cache_dir: str | None) -> bool:
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return (Path(source) / file).is_file()
    try:
        if not isinstance(try_to_load_from_cache(source, file, cache_dir=cache_dir), str):
            return file_exists(source, file)
        return True
    except HFValidationError:
        return False
    except Exception as error:  # no connection, no right
        raise UsageError(f"--student {source}: no such folder, and the Hub cannot be asked ({brief(error)}).") from None
