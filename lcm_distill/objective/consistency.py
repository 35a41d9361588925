"""Latent consistency distillation (LCD): Algorithm 1 of arXiv 2310.04378.

    f(x, t)  = c_skip(t) · x + c_out(t) · x0(x, t)         the consistency function, `ConsistencyFunction`
    ẑ_n      = (1 + w) · Ψ(c) − w · Ψ(∅)                   the guided teacher's solver step, `guided_prediction`
    loss     = d(f_θ(z_{n+k}), f_θ⁻(ẑ_n))                  `consistency_loss`
    θ⁻       ← μ · θ⁻ + (1 − μ) · θ                        the target, `update_ema`

Guidance is the paper's w, here and in every flag: `cond + w · (cond − uncond)`, so that w = 0 is no guidance. The
pipelines' `guidance_scale` is w + 1. Everything but the networks is float32.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any

import torch

from lcm_distill.objective.schedule import NoiseSchedule, per_sample

Conditioning = Mapping[str, Any]  # keyword arguments of the U-Net: tensors `[B, …]`, or mappings of them


def boundary_scalings(
    timesteps: torch.Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out, float32 `[B]`, as in Diffusers' `LCMScheduler`: 1 and 0 at timestep 0.

    With s = timestep_scaling · t: c_skip = σ_d² / (s² + σ_d²) and c_out = s / √(s² + σ_d²).
    """
    scaled = timesteps.float() * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2).sqrt()
    return c_skip, c_out


class ConsistencyFunction:
    """f(x, t) from a U-Net's raw output: float32 `[B, C, H, W]`, the identity at timestep 0."""

    def __init__(self, schedule: NoiseSchedule, timestep_scaling: float = 10.0):
        self.schedule = schedule
        self.timestep_scaling = timestep_scaling

    def __call__(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        c_skip, c_out = boundary_scalings(timesteps, self.timestep_scaling)
        x0 = self.schedule.predict_x0(output, noisy, timesteps)
        return per_sample(c_skip, noisy) * noisy.float() + per_sample(c_out, noisy) * x0


def draw_guidance(
    w_min: float, w_max: float, batch: int, generator: torch.Generator, device: torch.device | str
) -> torch.Tensor | float:
    """w, uniform in [w_min, w_max], float32 `[batch]`; where the two are equal, a float, and nothing is drawn."""
    if w_min == w_max:
        return w_min
    return w_min + (w_max - w_min) * torch.rand(batch, generator=generator, device=device)


def unet_output(
    unet: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    timestep_cond: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The U-Net's raw output, float32 `[B, C, H, W]`; its inputs are cast to `dtype`, that of its weights."""
    if timestep_cond is not None:
        timestep_cond = timestep_cond.to(dtype)
    conditioning = map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, conditioning)
    return unet(noisy.to(dtype), timesteps, timestep_cond=timestep_cond, **conditioning).sample.float()


@torch.no_grad()
def guided_prediction(
    teacher: torch.nn.Module,
    schedule: NoiseSchedule,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance_w: torch.Tensor | float,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guided teacher's x0 and epsilon, float32 `[B, C, H, W]` each, in one pass over a doubled batch.

    A DDIM step is linear in (x0, epsilon), so guiding these guides the step: (1 + w)·Ψ(c) − w·Ψ(∅). `unconditional` has
    the layout of `conditioning`, with a batch of B or of 1. `guidance_w` is `[B]`, or one float for all; at a float 0
    the unconditional half is left out. `batch_size` splits the 2B rows into passes of at most that many.
    """

    def output_of(noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        inputs = {"noisy": noisy, "timesteps": timesteps, "conditioning": conditioning}
        size = batch_size or len(noisy)
        rows = [slice(start, start + size) for start in range(0, len(noisy), size)]
        return torch.cat([unet_output(teacher, **map_tensors(itemgetter(r), inputs), dtype=dtype) for r in rows])

    if not isinstance(guidance_w, torch.Tensor) and guidance_w == 0:
        output = output_of(noisy, timesteps, conditioning)
        return schedule.predict_x0(output, noisy, timesteps), schedule.predict_epsilon(output, noisy, timesteps)
    batch = len(noisy)
    noisy2, timesteps2 = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps])
    output = output_of(noisy2, timesteps2, _concatenate(conditioning, unconditional, batch))
    w = per_sample(guidance_w.float(), noisy) if isinstance(guidance_w, torch.Tensor) else guidance_w
    guided = []
    for predict in (schedule.predict_x0, schedule.predict_epsilon):
        cond, uncond = predict(output, noisy2, timesteps2).chunk(2)
        guided.append(cond + w * (cond - uncond))
    return guided[0], guided[1]


def consistency_loss(
    prediction: torch.Tensor, target: torch.Tensor, loss_type: str = "l2", huber_c: float = 0.001
) -> torch.Tensor:
    """The mean over all elements of d² ("l2") or √(d² + c²) − c ("huber", pseudo-Huber): a float32 scalar."""
    difference = prediction.float() - target.float()
    if loss_type == "l2":
        return difference.square().mean()
    if loss_type == "huber":
        return ((difference.square() + huber_c**2).sqrt() - huber_c).mean()
    raise ValueError(f"loss_type {loss_type!r} is neither 'l2' nor 'huber'")


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], conditioning: Conditioning) -> dict[str, Any]:
    """A copy of `conditioning` with `function` applied to every tensor."""
    mapped: dict[str, Any] = {}
    for key, value in conditioning.items():
        if isinstance(value, Mapping):
            mapped[key] = map_tensors(function, value)
        else:
            mapped[key] = function(value)
    return mapped


def _concatenate(first: Conditioning, second: Conditioning, batch: int) -> dict[str, Any]:
    """`first` followed by `second`, expanded to `batch` rows, along the batch dimension."""
    joined: dict[str, Any] = {}
    for key, value in first.items():
        other = second[key]
        if isinstance(value, Mapping):
            joined[key] = _concatenate(value, other, batch)
        else:
            joined[key] = torch.cat([value, other.expand(batch, *other.shape[1:])])
    return joined


@torch.no_grad()
def update_ema(target: Iterable[torch.nn.Parameter], source: Iterable[torch.nn.Parameter], decay: float) -> None:
    """θ⁻ ← decay · θ⁻ + (1 − decay) · θ, in place, in one fused pass; decay 0 copies θ, decay 1 leaves θ⁻ unchanged."""
    torch._foreach_lerp_(list(target), [parameter.detach() for parameter in source], 1.0 - decay)


def guidance_embedding(guidance_w: torch.Tensor, embedding_dim: int = 256) -> torch.Tensor:
    """Fourier features of w, float32 `[B, embedding_dim]`: what the pipelines compute from guidance_scale − 1.

    A student receives them as `timestep_cond`: sin and cos of 1000·w at frequencies 10000^(−i/(half−1)), and a zero at
    the end if the dimension is odd (Diffusers' `get_guidance_scale_embedding`).
    """
    half = embedding_dim // 2
    frequencies = torch.exp(torch.arange(half, device=guidance_w.device) * -(math.log(10000.0) / (half - 1)))
    angles = (guidance_w.float() * 1000.0)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))
