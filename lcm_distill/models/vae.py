"""Pictures to latents, and back.

    pixels --encode_moments--> mean and standard deviation --sample_moments--> latents --decode_latents--> pictures

Encoded shards hold the moments, so that latents are still drawn at random in training.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The VAE's posterior of `pixels` uint8 `[B, 3, H, W]`: mean and standard deviation, float32 `[B, 2C, H/8, W/8]`.

    At most `batch_size` pictures are encoded at once, on the VAE's device.
    """
    pixels = (pixels.to(vae.device, non_blocking=True).float() / 127.5 - 1.0).to(vae.dtype)
    parameters = torch.cat([vae.encode(part).latent_dist.parameters.float() for part in pixels.split(batch_size)])
    mean, log_variance = parameters.chunk(2, dim=1)
    return torch.cat([mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))], dim=1)


def sample_moments(
    moments: torch.Tensor, generator: torch.Generator, *, scaling_factor: float, shift_factor: float | None
) -> torch.Tensor:
    """Latents float32 `[B, C, h, w]`, drawn with `generator` from the posteriors `moments` `[B, 2C, h, w]`.

    Less the VAE's shift, if it has one, and times its `scaling_factor`.
    """
    mean, deviation = moments.float().chunk(2, dim=1)
    latents = mean + deviation * torch.randn(mean.shape, generator=generator, device=mean.device)
    return (latents - shift_factor if shift_factor else latents) * scaling_factor


def encode_pixels(
    vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Latents float32 `[B, C, H/8, W/8]` of `pixels` uint8 `[B, 3, H, W]`: `encode_moments`, then `sample_moments`."""
    moments = encode_moments(vae, pixels, batch_size)
    shift = getattr(vae.config, "shift_factor", None)
    return sample_moments(moments, generator, scaling_factor=vae.config.scaling_factor, shift_factor=shift)


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKL, latents: torch.Tensor, batch_size: int, report: Callable[[str], None] = logger.warning
) -> list[Image.Image]:
    """RGB pictures of `latents` `[B, C, H/8, W/8]` of any floating dtype: the inverse of `encode_pixels`.

    The VAE decodes in its own dtype even under autocast (SDXL's is float32, since it overflows in half precision), on
    its own device, at most `batch_size` pictures at once. Values that are not finite become black; if there are any,
    `report` is called with a sentence that says so, "2 of 4 pictures are not finite …".
    """
    shift = getattr(vae.config, "shift_factor", None)
    finite = latents.isfinite().flatten(1).all(dim=1).tolist()
    latents = latents.to(vae.device).float() / vae.config.scaling_factor
    latents = (latents + shift if shift else latents).to(vae.dtype)
    processor, pictures, decoded = VaeImageProcessor(), list[Image.Image](), list[bool]()
    with torch.autocast(vae.device.type, enabled=False):
        for part in latents.split(batch_size):
            pixels = vae.decode(part).sample
            decoded += pixels.isfinite().flatten(1).all(dim=1).tolist()
            pictures += processor.postprocess(pixels.nan_to_num(-1, -1, -1), output_type="pil")
    if bad := decoded.count(False):
        where = "their latents are not, so the network or its sampler failed"
        if all(finite):
            where = f"their latents are, so the VAE, in {str(vae.dtype).removeprefix('torch.')}, overflowed"
        report(f"{bad} of {len(decoded)} pictures are not finite, and shown black: {where}")
    return pictures


def scale_and_shift(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `sample_moments` from a VAE's config; old configs omit Stable Diffusion's `scaling_factor`."""
    return {"scaling_factor": float(config.get("scaling_factor", 0.18215)), "shift_factor": config.get("shift_factor")}


def moments_shape(config: Mapping[str, Any], resolution: int) -> tuple[int, int, int]:
    """The shape `[2C, h, w]` of the moments of a square picture of `resolution` pixels, from the VAE's config."""
    side = resolution // vae_factor(dict(config))
    return 2 * config.get("latent_channels", 4), side, side


def vae_factor(config: dict) -> int:
    """Pixels per latent along each side, from the VAE's config: 8 for Stable Diffusion."""
    return 2 ** (len(config.get("block_out_channels", [64])) - 1)  # the default of Diffusers' class
