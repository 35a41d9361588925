"""The teacher as its user has it: a Diffusers folder, a Hub id, or a single-file checkpoint."""

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTokenizer

from lcm_distill.errors import UsageError, brief
from lcm_distill.flags import TEACHER_FLAG, VAE_FLAG, TeacherFlags
from lcm_distill.models import support
from lcm_distill.models.code import LoadingCode, loading_code
from lcm_distill.models.files import ModelFiles, check_pickles
from lcm_distill.models.single_file import PREFIXES, SingleFile, from_original_layout
from lcm_distill.models.tokenizer import load_tokenizer
from lcm_distill.models.vae import scale_and_shift, vae_factor
from lcm_distill.objective.schedule import NoiseSchedule, check_scheduler_class, complete_schedule

logger = logging.getLogger(__name__)

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_WEIGHTS = (".safetensors", ".bin")  # in a folder
_NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae")


@dataclasses.dataclass
class TeacherConfigs:
    """The teacher's configs, which are read before any weights."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Where a teacher's parts are loaded from; creating one reads nothing.

    `model` is a Diffusers pipeline folder, a Hub id (at `revision`), or a `.safetensors` file with all parts in the
    original layout (LDM, SGM). Such a file has no configs: they come from `config`, a folder or Hub id, or else from
    the model on the Hub that Diffusers infers from the file. `variant` is that of the weight files ("fp16"). `vae` is a
    separate autoencoder, a folder or Hub id (at `vae_revision`).
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    vae: str | None = None
    vae_revision: str | None = None
    cache_dir: str | None = None

    @classmethod
    def from_flags(cls, flags: TeacherFlags) -> "Teacher":
        return cls(
            flags.pretrained_teacher_model,
            revision=flags.teacher_revision,
            variant=flags.variant,
            config=flags.teacher_config,
            vae=flags.pretrained_vae_model_name_or_path,
            vae_revision=flags.revision,
            cache_dir=flags.cache_dir,
        )

    def __str__(self) -> str:
        """As in messages."""
        return f"{TEACHER_FLAG} {self.model}"

    @property
    def is_single_file(self) -> bool:
        return self.model.endswith(".safetensors")

    def loading_code(self, pipeline: Any, *arguments: str) -> str:
        """Python code that builds `pipe`, this teacher in half precision on a GPU; it needs torch.

        `pipeline` is the family's pipeline class; `arguments` are added to the call.
        """
        found = self.code(pipeline, *arguments)
        return "\n".join([f"from diffusers import {', '.join(sorted(found.imports))}", *found.lines])

    def code(self, pipeline: Any, *arguments: str, **options: str) -> LoadingCode:
        """As `loading_code`, with its imports apart; `options` are those of `code.loading_code`."""
        given = {field: getattr(self, field) for field in ("revision", "variant", "config", "vae", "vae_revision")}
        return loading_code(self.model, pipeline.__name__, *arguments, **given, **options)

    @functools.cached_property
    def config_source(self) -> str:
        """The folder or Hub id with the configs. `UsageError` if the teacher is a file that cannot be used."""
        if self.model.endswith(_PICKLES):
            raise UsageError(
                f"{TEACHER_FLAG} {self.model}: only .safetensors files are read, since a pickled one can run any "
                "code; look for the model as .safetensors, or convert it."
            )
        if not self.is_single_file:
            if self.config:
                raise UsageError(
                    f"--teacher_config is for a single-file teacher; {TEACHER_FLAG} {self.model} has its own configs."
                )
            return self.model
        if self.variant or self.revision:
            raise UsageError(f"{self} is a single file: leave out --variant and --teacher_revision.")
        file = self.file  # a damaged one is reported before its configs
        return self.config or file.infer_configs()

    @functools.cached_property
    def file(self) -> SingleFile:
        """The header of a single-file teacher. `UsageError` if the file is missing or damaged."""
        return SingleFile.open(self.model, str(self))

    @functools.cached_property
    def files(self) -> ModelFiles:
        """The files with the configs and tokenizers. `UsageError` if the teacher is a file that cannot be used."""
        flag = "--teacher_config" if self.config else TEACHER_FLAG
        return ModelFiles(self.config_source, flag, self.revision, self.cache_dir)

    @functools.cached_property
    def _parts_read(self) -> dict[str, Any]:
        """Tokenizers and text encoders' configs, by their parts."""
        return {}

    def read_json(self, file: str, *, optional: bool = False) -> dict[str, Any]:
        """The JSON object in a file beside the configs; `UsageError` if it cannot be used.

        Without such a file: a `UsageError`, or an empty object if it is `optional`.
        """
        source = self.config_source
        try:
            return self.files.read_optional_json(file) if optional else self.files.read_json(file)
        except UsageError as error:
            if not self.is_single_file or self.config:
                raise
            raise UsageError(
                f"{self} is a single file, which has no configs, and those of {source}, the "
                "model that it seems to be, cannot be read. Pass a Diffusers folder or Hub id with its configs as "
                f"--teacher_config. ({error})"
            ) from None

    def read_config(self, kind: Any, subfolder: str | None) -> dict[str, Any]:
        """The config of one part, of the Diffusers class `kind`; `UsageError` if it cannot be read."""
        return self.read_json(str(Path(subfolder or ".") / kind.config_name))

    def read_scheduler_config(self) -> dict[str, Any]:
        """The scheduler's config, with the class that decides what it leaves out; `UsageError` if it cannot be read.

        That is the one that it names itself, since that class wrote it, else the one in model_index.json. A warning is
        logged if both are named and their defaults give other schedules. `UsageError` if neither is named and the betas
        are left out, or one is not of a discrete schedule of betas.
        """
        config = self.read_config(DDPMScheduler, "scheduler")
        index = self.read_json("model_index.json", optional=True).get("scheduler")  # configs alone have none
        listed = index[1] if isinstance(index, list) and len(index) == 2 else None
        if listed is not None:
            check_scheduler_class(listed)
        if not config.get("_class_name"):
            left_out = [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in config]
            if listed is None and left_out and not config.get("trained_betas"):
                raise UsageError(
                    f"{TEACHER_FLAG}: its scheduler_config.json has neither {left_out[0]} nor a _class_name, which "
                    "would say what that is; add the schedule that the model was trained with."
                )
            return config if listed is None else config | {"_class_name": listed}
        if listed not in (None, config["_class_name"]):
            taken, other = complete_schedule(config), complete_schedule(config | {"_class_name": listed})
            if different := [key for key in taken if taken[key] != other[key]]:
                logger.warning(
                    "%s: its scheduler_config.json is of %s and leaves out %s, but its model_index.json lists %s, "
                    "which has another default (%s and %s). The first is taken; if the model was trained with the "
                    "second, write that into scheduler_config.json.",
                    TEACHER_FLAG,
                    config["_class_name"],
                    different[0],
                    listed,
                    taken[different[0]],
                    other[different[0]],
                )
        return config

    def zeros_for_empty_caption(self) -> bool:
        """Whether the pipeline of an SDXL teacher encodes the empty caption as zeros; `UsageError` if unknown."""
        index = self.read_json("model_index.json", optional=True)
        what = "whether the empty caption is encoded as zeros (force_zeros_for_empty_prompt, true or false)"
        if not index:
            raise UsageError(
                f"{self.files} has no model_index.json, which says {what}; copy it from the model that the teacher was "
                "made from."
            )
        zeros = index.get("force_zeros_for_empty_prompt", True)  # the pipeline's own default
        if not isinstance(zeros, bool):
            raise UsageError(f"{self.files}: its model_index.json has to say {what}, and says {zeros!r}; correct it.")
        return zeros

    def read_vae_config(self) -> dict[str, Any]:
        if self.vae is None:
            return self.read_config(AutoencoderKL, "vae")
        files, path = ModelFiles(self.vae, VAE_FLAG, self.vae_revision, self.cache_dir), Path(self.vae)
        if path.is_file():
            raise UsageError(f"{files} is a file; pass a folder or Hub id with a {AutoencoderKL.config_name}.")
        if files.is_local and files.find(AutoencoderKL.config_name) is None:
            inner = f"vae/{AutoencoderKL.config_name}"
            remedy = f"pass its folder {path / 'vae'}" if files.find(inner) else "pass the folder of a Diffusers VAE"
            raise UsageError(f"{files} contains no {AutoencoderKL.config_name}; {remedy}.")
        return files.read_json(AutoencoderKL.config_name)

    def read_text_config(self, part: str) -> CLIPTextConfig:
        """The config of the text encoder `part`; `UsageError` unless it is CLIP's."""
        if part not in self._parts_read:
            config = self.read_json(f"{part}/config.json")
            self._parts_read[part] = support.check_text_encoder(config, part=part, name=str(self))
        return self._parts_read[part]

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """The tokenizer `part`, read once; `UsageError` unless it fits its text encoder."""
        if part not in self._parts_read:
            text_encoder = self.read_text_config(part.replace("tokenizer", "text_encoder"))
            self._parts_read[part] = load_tokenizer(self.files, part, text_encoder)
        return self._parts_read[part]

    def load(self, parts: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        """Loads `parts`, Diffusers or Transformers classes by name; networks in `dtypes`, in eval mode, frozen.

        `UsageError` if weights are missing, cannot be loaded, or do not fit the configs.
        """
        own = {name: kind for name, kind in parts.items() if name in dtypes and (name != "vae" or self.vae is None)}
        loaded: dict[str, Any] = {name: self.tokenizer(name) for name in parts if name not in dtypes}
        loaded |= self._load_single_file(own, dtypes) if self.is_single_file else self._load_folder(own, dtypes)
        if self.vae is not None and "vae" in parts:
            try:
                loaded["vae"] = _from_folder(
                    AutoencoderKL, self.vae, dtypes["vae"], revision=self.vae_revision, cache_dir=self.cache_dir
                )
            except Exception as error:  # a pickle that is none, shapes that do not fit: each raises another class
                raise UsageError(f"{VAE_FLAG} {self.vae}: its weights cannot be loaded. ({brief(error)})") from None
        for name, part in loaded.items():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
                torch.nn.Module.to(part, dtype=dtypes[name])  # Diffusers' own cast warns about modules that are missing
        return loaded

    def _load_folder(self, parts: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        where: dict[str, Any] = dict(revision=self.revision, cache_dir=self.cache_dir)
        loaded = {}
        for name, kind in parts.items():
            try:
                variant_here = self._variant_of(name)
                loaded[name] = _from_folder(
                    kind, self.model, dtypes[name], subfolder=name, variant=variant_here, **where
                )
            except Exception as error:  # a pickle that is none, shapes that do not fit: each raises another class
                if isinstance(error, _UnfitError):
                    raise UsageError(f"{self}: its {error}; use weights and config of the same model.") from None
                variant = "" if self.variant is None else f" in the variant {self.variant}"
                raise UsageError(
                    f"{self}: the weights of its {name} cannot be loaded{variant}; {self._remedy(name)}. "
                    f"({brief(error)})"
                ) from None
        return loaded

    def _variant_of(self, part: str) -> str | None:
        """The variant of the weight files of `part`: as in Diffusers' pipelines, none if only others come in it."""
        if self.variant is None or self._has_variant(part):
            return self.variant
        elsewhere = any(self._has_variant(other) for other in _NETWORKS if other != part)
        return None if elsewhere else self.variant

    def _has_variant(self, part: str) -> bool:
        """Whether `part` has weight files in the variant, in one piece or several."""
        stems = ("model", "pytorch_model") if part.startswith("text_encoder") else ("diffusion_pytorch_model",) * 2
        files = [
            f"{part}/{stem}.{name}"
            for stem, kind in zip(stems, _WEIGHTS, strict=True)
            for name in (f"{self.variant}{kind}", f"{kind[1:]}.index.{self.variant}.json")
        ]
        return any(self.files.find(file) is not None for file in files)

    def _remedy(self, part: str) -> str:
        """What to do if the weights of `part` of a folder or a Hub model cannot be loaded."""
        files = [path.name.split(".") for path in Path(self.model, part).glob("*") if path.suffix in _WEIGHTS]
        variants = {None if len(words) == 2 else words[1].partition("-")[0] for words in files}
        if self.variant in variants:
            return "download them again, or pass the model as .safetensors"
        if variants:  # files such as diffusion_pytorch_model.fp16.safetensors
            own = variants.pop()
            return "leave out --variant" if own is None else f"pass --variant {own}"
        return "if the model has only half-precision files, pass --variant fp16; if it has none, leave out --variant"

    def _load_single_file(self, parts: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        """Part by part: a pipeline's `from_single_file` needs all parts, and confuses text encoders of equal width."""
        source = self.config_source
        loaded = {}
        self.check_weight_files(parts)
        try:
            # Of Diffusers' classes, only pipelines respect cache_dir for the configs of `from_single_file`.
            configs = source if Path(source).is_dir() else self._download_configs(source, parts)
            for name, kind in parts.items():
                loaded[name] = from_original_layout(kind, self.file.read(name), configs, name, dtypes[name])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
            raise UsageError(
                f"{self}: its weights do not fit the configs of {source}; "
                f"pass a Diffusers folder or Hub id with its own configs as --teacher_config. ({brief(error)})"
            ) from None
        return loaded

    def check_weight_files(self, networks: Iterable[str]) -> None:
        """`UsageError` unless a single file has all of `networks`, or if a local folder's are pickles with code."""
        if self.is_single_file:
            remedy = {"vae": f"pass one as {VAE_FLAG}"}
            self.file.check_parts({name: remedy.get(name, "use a file with all parts") for name in networks})
            return
        for name in networks:
            check_pickles(Path(self.model, name), f"{self}: {name}")

    def _download_configs(self, source: str, parts: Mapping[str, Any]) -> str:
        patterns = [f"{name}/{files}" for name in parts for files in ("*.json", "*.txt")]
        return snapshot_download(source, cache_dir=self.cache_dir, allow_patterns=patterns)

    def fingerprint(self, part: str, kind: Any) -> str:
        """A hash that identifies the weights of `part`, a network of class `kind`, mostly without loading them.

        It depends on the first row of each tensor (of a vector, on all of it), rounded to float16, and not on its name:
        the same weights have the same fingerprint in a folder, on the Hub or in a single file, in full and in half
        precision. Of a VAE only the encoder counts, since latents do not depend on the decoder. (OpenCLIP's text
        encoders have another fingerprint in the original layout, which concatenates tensors that Diffusers' keeps
        separate.) `UsageError` if weights cannot be loaded.
        """
        counted = ("encoder.", "quant_conv.") if part == "vae" else ""
        rows = [
            hashlib.blake2b(row.half().numpy().tobytes(), digest_size=16).digest()
            for name, row in self._first_rows(part, kind)
            if row.is_floating_point() and row.dim() and name.startswith(counted)
        ]
        return hashlib.blake2b(b"".join(sorted(rows)), digest_size=16).hexdigest()

    def _first_rows(self, part: str, kind: Any) -> Iterator[tuple[str, torch.Tensor]]:
        path = self._weights_file(part, kind)
        if path is None:  # pickled, in several files, or missing, in which case `load` raises
            network = self.load({part: kind}, {part: torch.float32})[part]
            for name, tensor in network.state_dict().items():
                yield name, tensor[:1] if tensor.dim() > 1 else tensor
            return
        prefixes = PREFIXES[part] if path == self.model else ("",)
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{VAE_FLAG if part == 'vae' and self.vae else TEACHER_FLAG}: {path} is not a complete .safetensors "
                f"file; download it again. ({brief(error)})"
            ) from None
        with file:
            for name in file.keys():
                for prefix in prefixes:
                    if name.startswith(prefix):
                        tensor = file.get_slice(name)
                        many = len(tensor.get_shape()) > 1
                        yield name.removeprefix(prefix), tensor[:1] if many else file.get_tensor(name)

    def _weights_file(self, part: str, kind: Any) -> str | None:
        """The .safetensors file that `part` is loaded from; None if it is not a single one."""
        if part == "vae" and self.vae is not None:
            model, subfolder, revision, variant = self.vae, "", self.vae_revision, None
        elif self.is_single_file:
            return self.model
        else:
            model, subfolder, revision, variant = self.model, f"{part}/", self.revision, self._variant_of(part)
        stem = "diffusion_pytorch_model" if hasattr(kind, "load_config") else "model"
        file = f"{subfolder}{stem}{f'.{variant}' if variant else ''}.safetensors"
        if Path(model).exists():
            return str(Path(model) / file) if (Path(model) / file).is_file() else None
        try:
            return hf_hub_download(model, file, revision=revision, cache_dir=self.cache_dir)
        except (OSError, ValueError):
            return None


class _UnfitError(ValueError):
    """Weights are whole, but not those of the config."""


def _from_folder(kind: Any, model: str, dtype: torch.dtype, **where: Any) -> torch.nn.Module:
    """A network of class `kind` by its `from_pretrained`; `ValueError` if weights are missing or left over.

    The libraries would initialize the first at random and ignore the second, with a warning at most: a network with
    fewer layers than it was trained with, or an LCM without its guidance embedding.
    """
    argument = "torch_dtype" if hasattr(kind, "load_config") else "dtype"  # Diffusers', Transformers'
    part, report = kind.from_pretrained(model, output_loading_info=True, **{argument: dtype}, **where)
    missing = sorted(report["missing_keys"])
    folder = where.get("subfolder") or model
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}")
    unused = sorted(report["unexpected_keys"]) if hasattr(kind, "load_config") else []
    if unused:  # of a text encoder, the last layers are left out on purpose in some models ("clip skip")
        raise _UnfitError(f"{folder} has {len(unused)} weights that its config has no place for, such as {unused[0]}")
    return part


def read_configs(
    teacher: Teacher, *, family: str, resolution: int, num_ddim_timesteps: int, sizes: Mapping[str, int] | None = None
) -> TeacherConfigs:
    """Reads the configs of `teacher` and checks that the programs of `family`, "sd" or "sdxl", can use them.

    Tokenizers, too; no weights. `UsageError` if there is no such model, it is not one that `support` knows, it is of
    the other family or already an LCM, a part of it does not fit another, its scheduler is not of a discrete schedule
    of betas or its prediction type does not fit that, `resolution` or one of the `sizes`, by their flags, is not a
    multiple of the VAE's factor (in pixels), or the solver's grid is finer than the training timesteps. A separate VAE
    that scales latents unlike the teacher's own is logged.
    """
    name = str(teacher)
    _check_pipeline(teacher)
    unet = teacher.read_config(UNet2DConditionModel, "unet")
    text_parts = support.TEXT_PARTS[family]
    networks = ["unet", *["vae"] * (teacher.vae is None), *text_parts.values()]
    teacher.check_weight_files(networks)
    support.check_unet(unet, family=family, name=name)
    vae, vae_name = teacher.read_vae_config(), f"{VAE_FLAG} {teacher.vae}" if teacher.vae else name
    support.check_vae(vae, name=vae_name)
    latent_channels = vae.get("latent_channels", 4)
    found = teacher.file.unet_config(unet) if teacher.is_single_file else unet
    support.check_channels(found, latent_channels, name=name, vae_name=vae_name)
    scheduler = teacher.read_scheduler_config()
    support.check_scheduler(scheduler, name=name)
    if teacher.is_single_file:
        teacher.file.check_scheduler(scheduler, teacher.config_source)
    schedule = NoiseSchedule.from_config(scheduler)  # fails for one of another kind, or an unknown prediction type
    support.check_noise_levels(schedule.alphas, name=name)
    if family == "sdxl":
        support.check_not_refiner(unet, teacher.read_json("text_encoder_2/config.json"), name=name)
        teacher.zeros_for_empty_caption()
    text = {part: teacher.read_text_config(part) for part in text_parts.values()}
    for part in text_parts:
        teacher.tokenizer(part)
    support.check_conditioning(unet, text, family=family, name=name)
    if teacher.vae is not None:
        check_pickles(Path(teacher.vae), vae_name)
        _compare_vaes(teacher, vae)

    factor = math.lcm(8, vae_factor(vae))  # the pipelines need a multiple of 8 whatever the VAE
    for flag, pixels in {"--resolution": resolution, **(sizes or {})}.items():
        if pixels % factor:
            raise UsageError(
                f"{flag} {pixels} is not a multiple of {factor}, which the VAE and the pipelines need; "
                f"the nearest are {pixels // factor * factor or factor} and {-(-pixels // factor) * factor}."
            )
    train_timesteps = scheduler.get("num_train_timesteps", 1000)
    if num_ddim_timesteps > train_timesteps:
        raise UsageError(
            f"--num_ddim_timesteps {num_ddim_timesteps} is above the teacher's {train_timesteps} training timesteps."
        )
    return TeacherConfigs(unet=unet, vae=vae, scheduler=scheduler)


def _check_pipeline(teacher: Teacher) -> None:
    """`UsageError`, which names the kind of model, if its pipeline has no U-Net such as Stable Diffusion's."""
    index = teacher.read_json("model_index.json", optional=True)
    if index:
        support.check_pipeline(index, name=str(teacher))


def _compare_vaes(teacher: Teacher, vae: Mapping[str, Any]) -> None:
    """Logs a warning if a separate VAE scales latents unlike the teacher's own, if that has one."""
    own = teacher.read_json(f"vae/{AutoencoderKL.config_name}", optional=True)
    if not own or not support.has_usable_scale(own):
        return
    separate, expected = scale_and_shift(vae), scale_and_shift(own)
    differing = [key for key, value in expected.items() if (value or 0) != (separate[key] or 0)]
    for key in differing:
        logger.warning(
            "%s %s: its %s is %s, that of the teacher's own VAE (%s) %s: the U-Net was trained on latents of that "
            "scale; use this VAE only if it was made for this teacher.",
            VAE_FLAG, teacher.vae, key, separate[key], teacher.model, expected[key],
        )  # fmt: skip
