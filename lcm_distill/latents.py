"""Pictures to the VAE's latents, and back."""

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image


@torch.no_grad()
def encode_pixels(
    vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Latents float32 `[B, C, H/8, W/8]`, drawn from the VAE's posterior, of `pixels` uint8 `[B, 3, H, W]`.

    Times the VAE's `scaling_factor`, less its shift if it has one. At most `batch_size` pictures are encoded
    at once. The posterior is sampled in float32 from `generator`, on the VAE's device.
    """
    pixels = (pixels.to(vae.device, non_blocking=True).float() / 127.5 - 1.0).to(vae.dtype)
    moments = torch.cat([vae.encode(part).latent_dist.parameters.float() for part in pixels.split(batch_size)])
    mean, log_variance = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    shift = getattr(vae.config, "shift_factor", None)
    return (latents - shift if shift else latents) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, batch_size: int) -> list[Image.Image]:
    """RGB pictures of `latents` `[B, C, H/8, W/8]`, of any floating dtype: what `encode_pixels` does, undone.

    The VAE works in its own dtype even where autocast is on (SDXL's is float32 because it overflows in half
    precision), on its own device, on at most `batch_size` pictures at once.
    """
    shift = getattr(vae.config, "shift_factor", None)
    latents = latents.to(vae.device).float() / vae.config.scaling_factor
    latents = (latents + shift if shift else latents).to(vae.dtype)
    processor, pictures = VaeImageProcessor(), list[Image.Image]()
    with torch.autocast(vae.device.type, enabled=False):
        for part in latents.split(batch_size):
            pictures += processor.postprocess(vae.decode(part).sample, output_type="pil")
    return pictures


def vae_factor(config: dict) -> int:
    """Pixels per latent along each side, from the VAE's config: 8 for Stable Diffusion."""
    return 2 ** (len(config["block_out_channels"]) - 1)
