"""The Stable Diffusion 1.x / 2.x family: load the frozen parts, encode captions, build the sampling pipeline."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_distill.errors import UsageError
from lcm_distill.latents import vae_factor
from lcm_distill.schedule import NoiseSchedule
from lcm_distill.unets import check_teacher_config


@dataclasses.dataclass
class TeacherConfigs:
    """The teacher's configs, read before any weights are."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]


@dataclasses.dataclass
class Frozen:
    """The parts that do not train. `unet` is the teacher; all are in eval mode, without gradients."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's noise schedule, on the device of the teacher."""
        return NoiseSchedule.from_config(self.scheduler_config).to(self.unet.device)


def read_configs(
    teacher: str,
    *,
    resolution: int,
    num_ddim_timesteps: int,
    vae: str | None = None,
    revision: str | None = None,
    vae_revision: str | None = None,
    cache_dir: str | None = None,
) -> TeacherConfigs:
    """Reads the configs of `teacher` (folder or Hub id) and checks that this run can use them.

    Errors, all `UsageError`: no such model, another family, a resolution that the VAE's factor does not divide,
    a solver grid finer than the training's timesteps.
    """
    hub = dict(revision=revision, cache_dir=cache_dir)
    unet = _config(UNet2DConditionModel, teacher, "--pretrained_teacher_model", subfolder="unet", **hub)
    check_teacher_config(unet, family="sd")
    scheduler = _config(DDPMScheduler, teacher, "--pretrained_teacher_model", subfolder="scheduler", **hub)
    if vae is None:
        vae_config = _config(AutoencoderKL, teacher, "--pretrained_teacher_model", subfolder="vae", **hub)
    else:
        vae_config = _config(
            AutoencoderKL, vae, "--pretrained_vae_model_name_or_path", revision=vae_revision, cache_dir=cache_dir
        )
    factor = math.lcm(8, vae_factor(vae_config))  # the pipelines ask for a multiple of 8 whatever the VAE
    if resolution % factor:
        raise UsageError(
            f"--resolution {resolution} is not a multiple of {factor}, as the VAE and the pipelines need; "
            f"the nearest that are: {resolution // factor * factor or factor} and {-(-resolution // factor) * factor}."
        )
    if vae_config.get("latent_channels", 4) != unet["in_channels"]:
        raise UsageError(
            f"--pretrained_vae_model_name_or_path: its latents have {vae_config.get('latent_channels', 4)} channels, "
            f"the teacher's U-Net takes {unet['in_channels']}."
        )
    train_timesteps = scheduler.get("num_train_timesteps", 1000)
    if num_ddim_timesteps > train_timesteps:
        raise UsageError(
            f"--num_ddim_timesteps {num_ddim_timesteps} is above the teacher's {train_timesteps} training timesteps."
        )
    NoiseSchedule.from_config(scheduler)  # an unknown prediction type is known now
    return TeacherConfigs(unet=unet, vae=vae_config, scheduler=scheduler)


def load_frozen(
    teacher: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    vae: str | None = None,
    revision: str | None = None,
    vae_revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> Frozen:
    """Loads what does not train: text encoder and VAE in `dtype`, the teacher's U-Net in float32.

    The U-Net stays float32 until the student is made from it: what trains must not start from rounded weights.
    The autoencoders of SD 1.x and 2.x are safe in half precision. `variant` names the weight files of the
    teacher ("fp16"); `vae` is a separate autoencoder (folder or Hub id), of revision `vae_revision`.
    `UsageError` if weights are not there.
    """
    hub: dict[str, Any] = dict(revision=revision, cache_dir=cache_dir)
    weights: dict[str, Any] = hub | {"variant": variant}
    try:
        scheduler_config = DDPMScheduler.load_config(teacher, subfolder="scheduler", **hub)
        tokenizer = CLIPTokenizer.from_pretrained(teacher, subfolder="tokenizer", **hub)
        text_encoder = CLIPTextModel.from_pretrained(teacher, subfolder="text_encoder", dtype=dtype, **weights)
        unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", torch_dtype=torch.float32, **weights)
        if vae is None:
            autoencoder = AutoencoderKL.from_pretrained(teacher, subfolder="vae", torch_dtype=dtype, **weights)
        else:
            autoencoder = AutoencoderKL.from_pretrained(
                vae, torch_dtype=dtype, revision=vae_revision, cache_dir=cache_dir
            )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--pretrained_teacher_model {teacher}: its weights cannot be loaded"
            f"{'' if variant is None else f' in the variant {variant}'}; where a model has only half-precision files, "
            f"pass --variant fp16, where it has none, leave --variant out. ({str(error).strip().splitlines()[0]})"
        ) from None
    for network in (text_encoder, autoencoder, unet):
        network.requires_grad_(False).eval().to(device)
    return Frozen(tokenizer, text_encoder, autoencoder, unet, dict(scheduler_config))


@torch.no_grad()
def encode_captions(frozen: Frozen, captions: list[str]) -> dict[str, torch.Tensor]:
    """The U-Net's conditioning for `captions`: `encoder_hidden_states`, `[B, tokens, dim]`."""
    tokens = frozen.tokenizer(
        captions,
        padding="max_length",
        max_length=frozen.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    # As in the pipelines, the mask counts only for text encoders whose config asks for it.
    use_mask = getattr(frozen.text_encoder.config, "use_attention_mask", False)
    device = frozen.text_encoder.device
    mask = tokens.attention_mask.to(device, non_blocking=True) if use_mask else None
    output = frozen.text_encoder(tokens.input_ids.to(device, non_blocking=True), attention_mask=mask)
    return {"encoder_hidden_states": output.last_hidden_state}


def build_pipeline(frozen: Frozen, unet: UNet2DConditionModel, scheduler: LCMScheduler) -> StableDiffusionPipeline:
    """A pipeline that draws with `unet` and the frozen parts; it shares their weights."""
    pipeline = StableDiffusionPipeline(
        vae=frozen.vae,
        text_encoder=frozen.text_encoder,
        tokenizer=frozen.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _config(kind: Any, model: str, flag: str, **where: Any) -> dict[str, Any]:
    """A model's config as a dict; `UsageError` naming `flag` if there is none."""
    folder = where.get("subfolder") or "."
    if Path(model).exists():
        remedy = f"give a Diffusers pipeline folder, which has {folder}/{kind.config_name}"
        if not (Path(model) / folder / kind.config_name).is_file():
            raise UsageError(f"{flag} {model}: there is no {folder}/{kind.config_name} in it; {remedy}.")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(f"{flag} {model}: no such folder; give a Diffusers pipeline folder or a Hub id.")
    try:
        return dict(kind.load_config(model, **where))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{flag} {model}: neither a folder here nor a model that the Hub gave us; "
            f"check the name, the revision and the connection. ({str(error).strip().splitlines()[0]})"
        ) from None
