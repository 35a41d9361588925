"""The teacher's noise schedule and the ODE solver of latent consistency distillation, all in float32.

Timesteps are the training's, int64 in 0 … T−1 (T is 1000 for Stable Diffusion). The solver walks a coarser
grid of `num_ddim_timesteps` of them, named by `solver_index`, 0 … num_ddim_timesteps−1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, LCMScheduler

from lcm_distill.errors import UsageError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# The smallest signal level that an ε prediction is divided by, so that a schedule whose last timestep is pure
# noise stays finite (Diffusers floors alpha_bar at 2^-24 in its own ODE solvers for the same reason).
_SMALLEST_ALPHA = 2.0**-12


class NoiseSchedule:
    """x_t = alpha_t · x_0 + sigma_t · ε, with the teacher's own alphas and what its network predicts.

    `alphas`, `sigmas`: float32 `[T]`. `prediction_type`: one of `PREDICTION_TYPES`. Samples are `[B, ...]`
    of any floating dtype, timesteps int64 `[B]`; every result is float32.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon"):
        if prediction_type not in PREDICTION_TYPES:
            raise UsageError(
                f"--pretrained_teacher_model: its scheduler says prediction_type {prediction_type!r}; "
                f"this program knows {', '.join(PREDICTION_TYPES)}."
            )
        # The roots are taken in float64: near the clean end 1 − alpha_bar loses half its digits in float32.
        alphas_cumprod = alphas_cumprod.double()
        self.alphas = alphas_cumprod.sqrt().float()
        self.sigmas = (1 - alphas_cumprod).sqrt().float()
        self.prediction_type = prediction_type

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of any Diffusers scheduler config (betas, zero-terminal-SNR rescaling, prediction type)."""
        scheduler = DDPMScheduler.from_config(dict(config))
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def __len__(self) -> int:
        return len(self.alphas)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Moves the tables to `device` and returns the schedule itself."""
        self.alphas, self.sigmas = self.alphas.to(device), self.sigmas.to(device)
        return self

    def _levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return per_sample(self.alphas[timesteps], like), per_sample(self.sigmas[timesteps], like)

    def add_noise(self, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`samples` noised to `timesteps`: alpha_t · x_0 + sigma_t · ε."""
        alpha, sigma = self._levels(timesteps, samples)
        return alpha * samples.float() + sigma * noise.float()

    def predict_sample(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x̂_0 of a network's `output` at `noisy`, whatever the network predicts."""
        alpha, sigma = self._levels(timesteps, noisy)
        output, noisy = output.float(), noisy.float()
        if self.prediction_type == "epsilon":
            return (noisy - sigma * output) / alpha.clamp(min=_SMALLEST_ALPHA)
        if self.prediction_type == "v_prediction":
            return alpha * noisy - sigma * output
        return output

    def predict_noise(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """ε̂ of a network's `output` at `noisy`, whatever the network predicts."""
        alpha, sigma = self._levels(timesteps, noisy)
        output, noisy = output.float(), noisy.float()
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return alpha * output + sigma * noisy
        return (noisy - alpha * output) / sigma


class DDIMSolver:
    """One DDIM step of the teacher's probability-flow ODE, from grid point to grid point (arXiv 2010.02502).

    `timesteps[i]` is where the step of solver index i starts, `previous_timesteps[i]` where it ends: int64
    `[num_ddim_timesteps]`. The grid is Diffusers' "trailing" spacing: its last point is T−1, where sampling
    starts, whether or not `num_ddim_timesteps` divides T. The first step ends at timestep 0, where the
    consistency function is the identity.
    """

    def __init__(self, schedule: NoiseSchedule, num_ddim_timesteps: int):
        total = len(schedule)
        if not 1 <= num_ddim_timesteps <= total:
            raise UsageError(
                f"--num_ddim_timesteps {num_ddim_timesteps}: must be between 1 and the teacher's "
                f"{total} training timesteps; 50 is usual."
            )
        self.schedule = schedule
        device = schedule.alphas.device
        steps = torch.arange(1, num_ddim_timesteps + 1, dtype=torch.float64)
        self.timesteps = (steps * total / num_ddim_timesteps).round().long().sub(1).to(device)
        self.previous_timesteps = torch.cat([self.timesteps.new_zeros(1), self.timesteps[:-1]])

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, sample: torch.Tensor, noise: torch.Tensor, solver_index: torch.Tensor) -> torch.Tensor:
        """x at the previous grid point, from the predictions x̂_0 and ε̂ (`[B, ...]`) at `solver_index` (`[B]`)."""
        return self.schedule.add_noise(sample, noise, self.previous_timesteps[solver_index])


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[B]` reshaped to `[B, 1, …]` so that it multiplies `like`, `[B, …]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def lcm_scheduler(
    scheduler_config: Mapping[str, Any], num_ddim_timesteps: int = 50, timestep_scaling: float = 10.0
) -> LCMScheduler:
    """The sampler of a student: the teacher's schedule with the run's solver grid and timestep scaling."""
    return LCMScheduler.from_config(
        dict(scheduler_config),
        original_inference_steps=sampling_grid(num_ddim_timesteps, scheduler_config.get("num_train_timesteps", 1000)),
        timestep_scaling=timestep_scaling,
    )


def sampling_grid(num_ddim_timesteps: int, train_timesteps: int = 1000) -> int:
    """`original_inference_steps` for the `LCMScheduler` that samples a student trained on this grid.

    That scheduler floors T / original_inference_steps, so a grid that does not divide T would make it start
    below T−1. The largest divisor of T up to `num_ddim_timesteps` always starts at the top; for a grid that
    divides T it is the training grid itself.
    """
    return max(n for n in range(1, num_ddim_timesteps + 1) if train_timesteps % n == 0)
