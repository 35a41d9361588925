"""Finished models as their users have them: a teacher's pipeline, and students and LoRAs to put into it by turns."""

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

from lcm_distill.errors import UsageError, brief
from lcm_distill.models.families import family_of
from lcm_distill.models.student import architecture
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.sampling.generate import teacher_sampler

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"


def load_teacher(
    teacher: Teacher, *, device: torch.device | str, dtype: torch.dtype, resolution: int | None = None
) -> Any:
    """The teacher's pipeline on `device`, networks in `dtype` (SDXL's VAE in float32 unless half is safe for it).

    It samples with DDIM. `UsageError` for a teacher that cannot be read, or a `resolution` (None: not known yet) that
    it cannot draw.
    """
    family = family_of(teacher.read_config(UNet2DConditionModel, "unet"))
    configs = read_configs(teacher, family=family.NAME, resolution=resolution or 0, num_ddim_timesteps=1)
    frozen = family.load_frozen(teacher, device=device, dtype=dtype, unet_dtype=dtype)
    return family.build_pipeline(frozen, frozen.unet, teacher_sampler(configs.scheduler))


def natural_resolution(pipeline: Any) -> int:
    """The side of the pictures, in pixels, that a pipeline's U-Net was made for; `UsageError` if it does not say."""
    size = pipeline.unet.config.sample_size
    if not isinstance(size, int):
        raise UsageError("--resolution is needed: this teacher's U-Net does not tell what size it draws.")
    return size * pipeline.vae_scale_factor


@dataclasses.dataclass(frozen=True)
class WeightedLora:
    """A LoRA as its user names it, at a weight: a folder, Hub id or `.safetensors` file, given by `flag`."""

    source: str
    weight: float = 1.0
    flag: str = "--lora"
    cache_dir: str | None = None

    def load(self, pipeline: Any, adapter: str) -> None:
        """Puts it into `pipeline` as `adapter`; `UsageError` if it cannot be read or does not fit."""
        path = Path(self.source).expanduser()
        source, where = (str(path) if path.exists() else self.source), dict[str, Any]()
        if path.is_file():
            source, where = str(path.parent), {"weight_name": path.name}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PEFT asks whether two adapters are meant
                # Not as Diffusers does if not told: a pickled file can run any program.
                pipeline.load_lora_weights(
                    source, adapter_name=adapter, cache_dir=self.cache_dir, use_safetensors=True, **where
                )
        except Exception as error:  # no such file, other shapes, another model's names: each its own class
            raise UsageError(
                f"{self.flag} {self.source}: this LoRA cannot be put into the teacher ({brief(error)}). Give a "
                ".safetensors LoRA, and the teacher, or one of the same architecture, that it was made for."
            ) from None


@contextlib.contextmanager
def with_loras(pipeline: Any, loras: Sequence[WeightedLora]) -> Iterator[Any]:
    """Inside, `pipeline` draws with all these LoRAs at their weights; then with none."""
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
        path = Path(self.source).resolve()
        if self._is_file:
            return path.parent.name if path.name == LORA_FILE else path.stem
        return path.name

    @property
    def _is_file(self) -> bool:
        return self.source.endswith(".safetensors") and Path(self.source).is_file()

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether it has a guidance embedding: it draws any guidance in one pass, and heeds no negative prompt.

        All others have a guidance in their weights: a LoRA, a LoRA merged into a U-Net. They draw at guidance_scale 1;
        above that, the pipelines guide them a second time, by a second pass.
        """
        if self.kind == "lora":
            return False
        config = UNet2DConditionModel.load_config(self.source, subfolder=self.subfolder, cache_dir=self.cache_dir)
        return config.get("time_cond_proj_dim") is not None

    def sampler(self, scheduler_config: Mapping[str, Any]) -> LCMScheduler:
        """The scheduler that was saved beside it, or else an `LCMScheduler` of the teacher's config.

        Of the parts of a distillation's folder, such as `unet_target/` or a LoRA's file, it is that of the folder.
        """
        folders = [self.source]
        if self._is_file:
            folders = [str(Path(self.source).parent)]
        elif Path(self.source).resolve().name in ("unet", "unet_target", "target"):
            folders.append(str(Path(self.source).resolve().parent))
        for folder in folders:
            for subfolder in (None, "scheduler"):
                file = "scheduler_config.json" if subfolder is None else f"{subfolder}/scheduler_config.json"
                if _has(folder, file, self.cache_dir):
                    return LCMScheduler.from_pretrained(folder, subfolder=subfolder, cache_dir=self.cache_dir)
        return LCMScheduler.from_config(dict(scheduler_config))

    @contextlib.contextmanager
    def installed_in(
        self, pipeline: Any, *, fuse: bool = False, lora_scale: float = 1.0, loras: Sequence[WeightedLora] = ()
    ) -> Iterator[Any]:
        """Inside, the teacher's `pipeline` draws with this student and its sampler; then it is the teacher's again.

        Further `loras` go on top. If the student is a LoRA, `lora_scale` is its weight, and with `fuse` it is added,
        and they are, to a copy of the U-Net, for drawing without its products; the copy may be kept. `UsageError` if
        one of them does not fit the teacher.
        """
        teacher, scheduler = pipeline.unet, pipeline.scheduler
        try:
            pipeline.scheduler = self.sampler(scheduler.config)
            own: list[WeightedLora] = []
            if self.kind == "full":
                pipeline.unet = self._load_unet(teacher)
            else:
                own = [WeightedLora(self.source, lora_scale, "--student", self.cache_dir)]
                if fuse:
                    pipeline.unet = copy.deepcopy(teacher)
            with with_loras(pipeline, [*own, *loras]):
                if own and fuse:
                    pipeline.unet.fuse_lora()
                    pipeline.unet.unload_lora()
                yield pipeline
        finally:
            pipeline.unet, pipeline.scheduler = teacher, scheduler

    def _load_unet(self, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
        where: dict[str, Any] = dict(subfolder=self.subfolder, cache_dir=self.cache_dir)
        design = _structure(UNet2DConditionModel.load_config(self.source, **where))
        expected = _structure(teacher.config)
        if different := sorted(key for key in expected if design.get(key, expected[key]) != expected[key]):
            raise UsageError(
                f"--student {self.source} was not made from this teacher: their U-Nets differ in {different[0]} "
                f"({design[different[0]]} and {expected[different[0]]}). Give the teacher that it was distilled from."
            )
        reasons = []
        for variant in (None, "fp16"):  # some folders on the Hub have nothing but the latter
            try:
                unet = UNet2DConditionModel.from_pretrained(
                    self.source, torch_dtype=teacher.dtype, variant=variant, **where
                )
                return unet.to(teacher.device).requires_grad_(False).eval()
            except (OSError, ValueError, RuntimeError) as error:
                reasons.append(brief(error))
        raise UsageError(
            f"--student {self.source}: its weights cannot be loaded ({reasons[0]}); give a folder that a finished "
            "distillation left, or download it anew."
        )


# What does not tell whether a U-Net's weights fit another: precision of a product, and the embedding of guidance.
_NO_STRUCTURE = ("upcast_attention", "dropout", "time_cond_proj_dim")


def _structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's architecture in one notation: older configs have null for false, or one number for one per level."""
    structure = {key: value for key, value in architecture(config).items() if key not in _NO_STRUCTURE}
    for key, value in structure.items():
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        structure[key] = value or None
    return structure


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
        raise UsageError(f"--student: two are called {twice[0]}; rename the folder or file of one.")
    return students


def _has(source: str, file: str, cache_dir: str | None) -> bool:
    """Whether a folder or Hub id has a file; without a connection, whether the cache of the Hub has it."""
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return (Path(source) / file).is_file()
    try:
        if not isinstance(try_to_load_from_cache(source, file, cache_dir=cache_dir), str):
            return file_exists(source, file)
        return True
    except HFValidationError:
        return False
    except Exception as error:  # no connection, no right
        with contextlib.suppress(Exception):
            return (Path(snapshot_download(source, cache_dir=cache_dir, local_files_only=True)) / file).is_file()
        raise UsageError(f"--student {source}: no such folder, and the Hub cannot be asked ({brief(error)}).") from None
