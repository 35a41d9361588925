"""Drawing as users draw: a pipeline, a sampler, prompts, and noise that depends on a seed alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

# The samplers of undistilled models, by the names that the LCM paper's tables give them.
SAMPLERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


def teacher_sampler(scheduler_config: Mapping[str, Any], name: str = "DDIM") -> Any:
    """One of `SAMPLERS` for a teacher of any Diffusers scheduler config, starting at the top timestep (trailing).

    DDIM ends at timestep 0, as the solver of the training does: with as many steps as that solver's grid has points,
    what it draws is the end of the trajectory that a student is to jump to.
    """
    options: dict[str, Any] = {"timestep_spacing": "trailing"}
    if name == "DDIM":
        options |= {"clip_sample": False, "set_alpha_to_one": False}
    return SAMPLERS[name].from_config(dict(scheduler_config), **options)


@torch.no_grad()
def draw_latents(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    inference_steps: int,
    guidance_scale: float,
    resolution: int,
    batch_size: int,
) -> torch.Tensor:
    """Latents `[N, C, h, w]`, one for each prompt and its seed, of a pipeline of either family; not yet decoded.

    Everything random comes from the picture's seed, on the CPU: the first noise in float32, then what the sampler
    draws. So neither the device, the batch nor the other pictures matter, and different samplers and networks start
    from the same noise. With autocast on, sampling is in float32 and the U-Net's products are not; else all is in the
    U-Net's dtype. The U-Net draws in eval mode and is given back in the mode it was in; nothing touches torch's
    global random state.
    """
    unet = pipeline.unet
    was_training = unet.training
    unet.eval()
    dtype = torch.float32 if torch.is_autocast_enabled(unet.device.type) else unet.dtype
    side = resolution // pipeline.vae_scale_factor
    shape = (1, unet.config.in_channels, side, side)
    drawn = []
    for first in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch_size]]
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        drawn += pipeline(
            list(prompts[first : first + batch_size]),
            num_inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            generator=generators,
            latents=noise.to(dtype),
            output_type="latent",
        ).images
    unet.train(was_training)
    return torch.stack(drawn)
