"""The teacher as its user has it: a Diffusers folder, a Hub id, or a single-file checkpoint."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
    fetch_diffusers_config,
)
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open

from lcm_distill.errors import UsageError, brief
from lcm_distill.flags import TEACHER_FLAG, VAE_FLAG, TeacherFlags
from lcm_distill.models.vae import vae_factor
from lcm_distill.objective.schedule import NoiseSchedule, check_scheduler_class, complete_schedule

logger = logging.getLogger(__name__)

_SD2_NAME = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# The prefixes of each part's tensors in the original layout (LDM, SGM). The moving average, "model_ema.", is not read.
_ORIGINAL = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}


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

    @property
    def is_single_file(self) -> bool:
        return self.model.endswith(".safetensors")

    def loading_code(self, pipeline: Any, *arguments: str) -> str:
        """Python code for a model card that builds `pipe`, this teacher in half precision on a GPU.

        `pipeline` is the family's pipeline class; `arguments` are added to the call.
        """
        lines = []
        given = [f"revision={self.revision!r}"] * bool(self.revision) + [f"variant={self.variant!r}"] * bool(
            self.variant
        )
        source = "DiffusionPipeline.from_pretrained"
        if self.is_single_file:
            source = f"{pipeline.__name__}.from_single_file"
            given = [f"config={self.config!r}"] * bool(self.config)
        if self.vae:
            own = f", revision={self.vae_revision!r}" if self.vae_revision else ""
            lines += [f"vae = AutoencoderKL.from_pretrained({self.vae!r}{own}, torch_dtype=torch.float16)"]
            given += ["vae=vae"]
        given = [*given, *arguments, "torch_dtype=torch.float16"]
        lines += [f'pipe = {source}({", ".join([repr(self.model), *given])}).to("cuda")']
        kinds = [source.partition(".")[0]] + ["AutoencoderKL"] * bool(self.vae)
        return "\n".join([f"from diffusers import {', '.join(sorted(kinds))}", *lines])

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
        if not Path(self.model).is_file():
            raise UsageError(f"{TEACHER_FLAG} {self.model}: no such file.")
        if self.variant or self.revision:
            raise UsageError(
                f"{TEACHER_FLAG} {self.model} is a single file: leave out --variant and --teacher_revision."
            )
        try:
            with safe_open(self.model, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{TEACHER_FLAG} {self.model}: not a complete .safetensors file; download it again. ({brief(error)})"
            ) from None
        if self.config:
            return self.config
        if "v_pred" in shapes:  # the marker of such fine-tunes, which no model that Diffusers infers fits
            raise UsageError(
                f"{TEACHER_FLAG} {self.model} predicts v{' and ends at zero SNR' if 'ztsnr' in shapes else ''}: pass a "
                "Diffusers folder or Hub id with such a scheduler config as --teacher_config."
            )
        if shapes.get(_SD2_NAME, [0])[-1] == 1024:  # some predict ε and some v; the file does not say which
            raise UsageError(
                f"{TEACHER_FLAG} {self.model} is a Stable Diffusion 2 model, of which some predict noise and some v: "
                "pass a Diffusers folder or Hub id with the right scheduler config as --teacher_config."
            )
        # Diffusers infers the model from a few names and shapes: no weights need to be read.
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])

    def read_config(self, kind: Any, subfolder: str | None) -> dict[str, Any]:
        """The config of one part, of the Diffusers class `kind`; `UsageError` if it cannot be read."""
        source = self.config_source
        try:
            return _config(
                kind,
                source,
                "--teacher_config" if self.config else TEACHER_FLAG,
                subfolder=subfolder,
                revision=self.revision,
                cache_dir=self.cache_dir,
            )
        except UsageError as error:
            if not self.is_single_file or self.config:
                raise
            raise UsageError(
                f"{TEACHER_FLAG} {self.model} is a single file, which has no configs, and those of {source}, the "
                "model that it seems to be, cannot be read. Pass a Diffusers folder or Hub id with its configs as "
                f"--teacher_config. ({error})"
            ) from None

    def read_scheduler_config(self) -> dict[str, Any]:
        """The scheduler's config, with the class that decides what it leaves out; `UsageError` if it cannot be read.

        That is the one that it names itself, since that class wrote it, else the one in model_index.json. A warning is
        logged if both are named and their defaults give other schedules. `UsageError` if neither is named and the betas
        are left out, or one is not of a discrete schedule of betas.
        """
        config = self.read_config(DDPMScheduler, "scheduler")
        index: Any = None
        with contextlib.suppress(UsageError):  # not all have one, such as the configs of a single file
            index = self.read_config(DiffusionPipeline, None).get("scheduler")
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

    def read_vae_config(self) -> dict[str, Any]:
        if self.vae is None:
            return self.read_config(AutoencoderKL, "vae")
        return _config(AutoencoderKL, self.vae, VAE_FLAG, revision=self.vae_revision, cache_dir=self.cache_dir)

    def load(self, parts: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        """Loads `parts`, Diffusers or Transformers classes by name; networks in `dtypes`, in eval mode, frozen.

        `UsageError` if weights are missing, cannot be loaded, or do not fit the configs.
        """
        own = {name: kind for name, kind in parts.items() if name != "vae" or self.vae is None}
        loaded = self._load_single_file(own, dtypes) if self.is_single_file else self._load_folder(own, dtypes)
        if self.vae is not None and "vae" in parts:
            try:
                loaded["vae"] = _from_folder(
                    AutoencoderKL, self.vae, dtypes["vae"], revision=self.vae_revision, cache_dir=self.cache_dir
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise UsageError(f"{VAE_FLAG} {self.vae}: its weights cannot be loaded. ({brief(error)})") from None
        for name, part in loaded.items():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
                torch.nn.Module.to(part, dtype=dtypes[name])  # Diffusers' own cast warns about modules that are missing
        return loaded

    def _load_folder(self, parts: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        hub: dict[str, Any] = dict(revision=self.revision, cache_dir=self.cache_dir)
        loaded = {}
        try:
            for name, kind in parts.items():
                if name not in dtypes:
                    loaded[name] = kind.from_pretrained(self.model, subfolder=name, **hub)
                else:
                    where = dict(subfolder=name, variant=self.variant, **hub)
                    loaded[name] = _from_folder(kind, self.model, dtypes[name], **where)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{TEACHER_FLAG} {self.model}: its weights cannot be loaded"
                f"{'' if self.variant is None else f' in the variant {self.variant}'}; if the model has only "
                "half-precision files, pass --variant fp16; if it has none, leave out --variant. "
                f"({brief(error)})"
            ) from None
        return loaded

    def _load_single_file(self, parts: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        """Part by part: a pipeline's `from_single_file` needs all parts, and confuses text encoders of equal width."""
        source = self.config_source
        loaded = {}
        try:
            # Of Diffusers' classes, only pipelines respect cache_dir for the configs of `from_single_file`.
            configs = source if Path(source).is_dir() else self._download_configs(source, parts)
            with safe_open(self.model, "pt") as file:
                for name, kind in parts.items():
                    if name not in dtypes:
                        loaded[name] = kind.from_pretrained(configs, subfolder=name)
                        continue
                    weights = {key: file.get_tensor(key) for key in file.keys() if key.startswith(_ORIGINAL[name])}
                    if not weights:
                        remedy = f"pass one as {VAE_FLAG}" if name == "vae" else "use a file with all parts"
                        raise UsageError(f"{TEACHER_FLAG} {self.model} contains no {name}; {remedy}.")
                    loaded[name] = _from_original_layout(kind, weights, configs, name, dtypes[name])
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
            raise UsageError(
                f"{TEACHER_FLAG} {self.model}: its weights do not fit the configs of {source}; "
                f"pass a Diffusers folder or Hub id with its own configs as --teacher_config. ({brief(error)})"
            ) from None
        return loaded

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
        prefixes = _ORIGINAL[part] if path == self.model else ("",)
        with safe_open(path, "pt") as file:
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
            model, subfolder, revision, variant = self.model, f"{part}/", self.revision, self.variant
        stem = "diffusion_pytorch_model" if hasattr(kind, "load_config") else "model"
        file = f"{subfolder}{stem}{f'.{variant}' if variant else ''}.safetensors"
        if Path(model).exists():
            return str(Path(model) / file) if (Path(model) / file).is_file() else None
        try:
            return hf_hub_download(model, file, revision=revision, cache_dir=self.cache_dir)
        except (OSError, ValueError):
            return None


def _from_folder(kind: Any, model: str, dtype: torch.dtype, **where: Any) -> torch.nn.Module:
    """A network of class `kind` by its `from_pretrained`; `ValueError` if weights are missing.

    The libraries would initialize these at random, with a warning at most.
    """
    argument = "torch_dtype" if hasattr(kind, "load_config") else "dtype"  # Diffusers', Transformers'
    part, report = kind.from_pretrained(model, output_loading_info=True, **{argument: dtype}, **where)
    missing = sorted(report["missing_keys"])
    if missing:
        folder = where.get("subfolder") or model
        raise ValueError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}")
    return part


def _from_original_layout(
    kind: Any, weights: dict[str, torch.Tensor], configs: str, name: str, dtype: torch.dtype
) -> torch.nn.Module:
    """A network of class `kind` from its `weights` in the original layout; `ValueError` unless they all fit."""
    if hasattr(kind, "from_single_file"):  # in float32: given a dtype, it warns about modules that are missing
        part = kind.from_single_file(weights, config=configs, subfolder=name)
    else:
        part = create_diffusers_clip_model_from_ldm(
            kind, checkpoint=weights, config=configs, subfolder=name, torch_dtype=dtype
        )
    state = part.state_dict()
    missing = [key for key, tensor in state.items() if tensor.is_meta]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
    if kind is UNet2DConditionModel and len(weights) != len(state):  # the same tensors in both layouts
        raise ValueError(f"{name} has {len(weights)} tensors in the file, {len(state)} by its config")
    return part


def read_configs(teacher: Teacher, *, family: str, resolution: int, num_ddim_timesteps: int) -> TeacherConfigs:
    """Reads the configs of `teacher` and checks that the programs of `family`, "sd" or "sdxl", can use them.

    `UsageError` if there is no such model, it is of the other family or already an LCM, its scheduler is not of a
    discrete schedule of betas or its prediction type does not fit that, its VAE does not fit or is not supported,
    `resolution` (pixels) is not a multiple of the VAE's factor, or the solver's grid is finer than the training
    timesteps.
    """
    unet = teacher.read_config(UNet2DConditionModel, "unet")
    check_teacher_config(unet, family=family)
    scheduler = teacher.read_scheduler_config()
    vae = teacher.read_vae_config()
    factor = math.lcm(8, vae_factor(vae))  # the pipelines need a multiple of 8 whatever the VAE
    if resolution % factor:
        raise UsageError(
            f"--resolution {resolution} is not a multiple of {factor}, which the VAE and the pipelines need; "
            f"the nearest are {resolution // factor * factor or factor} and {-(-resolution // factor) * factor}."
        )
    latent_channels, in_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if latent_channels != in_channels:
        raise UsageError(
            f"{VAE_FLAG}: its latents have {latent_channels} channels, the teacher's U-Net takes {in_channels}."
        )
    if vae.get("latents_mean") or vae.get("latents_std"):
        raise UsageError(
            f"{VAE_FLAG}: its latents are normalized per channel (latents_mean, latents_std), as in Playground v2.5; "
            "such models are not supported."
        )
    train_timesteps = scheduler.get("num_train_timesteps", 1000)
    if num_ddim_timesteps > train_timesteps:
        raise UsageError(
            f"--num_ddim_timesteps {num_ddim_timesteps} is above the teacher's {train_timesteps} training timesteps."
        )
    NoiseSchedule.from_config(scheduler)  # fails for one of another kind, or an unknown prediction type
    return TeacherConfigs(unet=unet, vae=vae, scheduler=scheduler)


def is_sdxl(unet_config: Mapping[str, Any]) -> bool:
    """Whether a U-Net is one of SDXL's family, by its config."""
    return unet_config.get("addition_embed_type") == "text_time"


def check_teacher_config(config: Mapping[str, Any], *, family: str) -> None:
    """`UsageError` if the programs of `family`, "sd" or "sdxl", cannot distil a teacher with this U-Net config."""
    found_sdxl = is_sdxl(config)
    if found_sdxl != (family == "sdxl"):
        right = "sdxl" if found_sdxl else "sd"
        raise UsageError(
            f"--pretrained_teacher_model is a Stable Diffusion {'XL ' if found_sdxl else ''}model; "
            f"distil it with train_lcm_distill_{right}_wds.py or train_lcm_distill_lora_{right}_wds.py."
        )
    if config.get("time_cond_proj_dim") is not None:
        raise UsageError(
            "--pretrained_teacher_model already has a guidance embedding: it is an LCM, not a teacher. "
            "Pass the model that it was distilled from."
        )


def _config(kind: Any, model: str, flag: str, *, subfolder: str | None = None, **where: Any) -> dict[str, Any]:
    """A model's config; `UsageError`, which names `flag`, if it cannot be read."""
    file = str(Path(subfolder or ".") / kind.config_name)
    if Path(model).exists():
        if not (Path(model) / file).is_file():
            raise UsageError(f"{flag} {model} contains no {file}; pass a Diffusers pipeline folder, which has {file}.")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(f"{flag} {model}: no such folder; pass a Diffusers pipeline folder or a Hub id.")
    try:
        return dict(kind.load_config(model, subfolder=subfolder, **where))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{flag} {model}: neither a local folder nor a model that the Hub provides; check the name, the revision "
            f"and the connection. ({brief(error)})"
        ) from None
