"""The Stable Diffusion 1.x / 2.x family: load the frozen parts, encode captions, build the sampling pipeline."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_distill.teacher import Teacher

PIPELINE = StableDiffusionPipeline


@dataclasses.dataclass
class Frozen:
    """The parts that do not train. `unet` is the teacher; all are in eval mode, without gradients."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel


def load_frozen(
    teacher: Teacher, *, device: torch.device | str, dtype: torch.dtype, unet_dtype: torch.dtype = torch.float32
) -> Frozen:
    """Loads what does not train onto `device`: text encoder and VAE in `dtype`, the teacher's U-Net in `unet_dtype`.

    A student made from the U-Net needs it in float32: what trains must not start from rounded weights. The
    autoencoders of SD 1.x and 2.x are safe in half precision. `UsageError` if weights are not there.
    """
    kinds = {"tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    parts = teacher.load(
        kinds | {"unet": UNet2DConditionModel}, {"text_encoder": dtype, "vae": dtype, "unet": unet_dtype}
    )
    for name in ("text_encoder", "vae", "unet"):
        parts[name].to(device)
    return Frozen(**parts)


def base_model_version(unet_config: Mapping[str, Any]) -> str:
    """The model's name in the metadata of kohya-format LoRAs, by which programs tell what a LoRA fits."""
    return "sd_v2" if unet_config.get("cross_attention_dim") == 1024 else "sd_v1"


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
    pipeline = PIPELINE(
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
