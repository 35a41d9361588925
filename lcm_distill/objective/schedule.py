"""The teacher's noise schedule and the ODE solver of latent consistency distillation, all in float32.

A timestep is a training timestep, int64 in 0 … T−1 (T is 1000 for Stable Diffusion). The solver uses a coarser grid of
`num_ddim_timesteps` of them, indexed by `solver_index`, 0 … num_ddim_timesteps−1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, LCMScheduler

from lcm_distill.errors import UsageError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# The smallest alpha that is divided by for the x0 of an ε prediction: x0 stays finite where the last timestep is pure
# noise (Diffusers clamps alpha_bar at 2^-24 in its own ODE solvers for the same reason).
_MIN_ALPHA = 2.0**-12


class NoiseSchedule:
    """x_t = alpha_t · x0 + sigma_t · epsilon, with the teacher's alphas and its prediction type.

    `alphas`, `sigmas`: float32 `[T]`. `prediction_type`: one of `PREDICTION_TYPES`. `x0`, `epsilon`, `noisy` and a
    network's `output` are `[B, …]` of any floating dtype, `timesteps` int64 `[B]`; every result is float32.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon"):
        if prediction_type not in PREDICTION_TYPES:
            raise UsageError(
                f"--pretrained_teacher_model: its scheduler's prediction_type {prediction_type!r} is not supported; "
                f"supported are {', '.join(PREDICTION_TYPES)}."
            )
        # Square roots in float64: near timestep 0, 1 − alpha_bar loses half its digits in float32.
        alphas_cumprod = alphas_cumprod.double()
        self.alphas = alphas_cumprod.sqrt().float()
        self.sigmas = (1 - alphas_cumprod).sqrt().float()
        self.prediction_type = prediction_type

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of any Diffusers scheduler config: its betas, zero-terminal-SNR rescaling, prediction type."""
        scheduler = DDPMScheduler.from_config(dict(config))
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def __len__(self) -> int:
        return len(self.alphas)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Moves `alphas` and `sigmas` to `device`, in place; returns itself."""
        self.alphas, self.sigmas = self.alphas.to(device), self.sigmas.to(device)
        return self

    def _levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return per_sample(self.alphas[timesteps], like), per_sample(self.sigmas[timesteps], like)

    def add_noise(self, x0: torch.Tensor, epsilon: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t of `x0` at `timesteps`: alpha_t · x0 + sigma_t · epsilon."""
        alpha, sigma = self._levels(timesteps, x0)
        return alpha * x0.float() + sigma * epsilon.float()

    def predict_x0(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The x0 that a network's `output` at `noisy` stands for, in any prediction type."""
        alpha, sigma = self._levels(timesteps, noisy)
        output, noisy = output.float(), noisy.float()
        if self.prediction_type == "epsilon":
            return (noisy - sigma * output) / alpha.clamp(min=_MIN_ALPHA)
        if self.prediction_type == "v_prediction":
            return alpha * noisy - sigma * output
        return output

    def predict_epsilon(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The epsilon that a network's `output` at `noisy` stands for, in any prediction type."""
        alpha, sigma = self._levels(timesteps, noisy)
        output, noisy = output.float(), noisy.float()
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return alpha * output + sigma * noisy
        return (noisy - alpha * output) / sigma


class DDIMSolver:
    """DDIM steps along the teacher's probability-flow ODE, from one grid point to the one before (arXiv 2010.02502).

    The step at solver index i starts at `timesteps[i]` and ends at `previous_timesteps[i]`, both int64
    `[num_ddim_timesteps]`. The grid has Diffusers' "trailing" spacing: its last point is T−1, where sampling starts,
    whether or not `num_ddim_timesteps` divides T. The step at index 0 ends at timestep 0, where the consistency
    function is the identity.
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

    def draw_index(self, batch: int, top_probability: float, generator: torch.Generator) -> torch.Tensor:
        """Solver indices int64 `[batch]`: uniform, or with `top_probability` the last one, where sampling starts."""
        device = self.timesteps.device
        index = torch.randint(len(self), (batch,), generator=generator, device=device)
        if top_probability == 0:  # as before the option existed: nothing else is drawn
            return index
        top = torch.rand(batch, generator=generator, device=device) < top_probability
        return torch.where(top, len(self) - 1, index)

    def step(self, x0: torch.Tensor, epsilon: torch.Tensor, solver_index: torch.Tensor) -> torch.Tensor:
        """x_t at the previous grid point, from the predicted `x0` and `epsilon` `[B, …]` at `solver_index` `[B]`."""
        return self.schedule.add_noise(x0, epsilon, self.previous_timesteps[solver_index])


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values` `[B]` as `[B, 1, …]`, which broadcasts over `like` `[B, …]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def build_lcm_scheduler(
    scheduler_config: Mapping[str, Any], num_ddim_timesteps: int = 50, timestep_scaling: float = 10.0
) -> LCMScheduler:
    """The student's sampler: the teacher's noise schedule with the run's solver grid and timestep scaling."""
    return LCMScheduler.from_config(
        dict(scheduler_config),
        original_inference_steps=_sampler_grid(num_ddim_timesteps, scheduler_config.get("num_train_timesteps", 1000)),
        timestep_scaling=timestep_scaling,
    )


def _sampler_grid(num_ddim_timesteps: int, train_timesteps: int = 1000) -> int:
    """`original_inference_steps` for the `LCMScheduler` of a student that was trained on this solver grid.

    `LCMScheduler` rounds T / original_inference_steps down, so with a grid that does not divide T it would start below
    T−1. The largest divisor of T up to `num_ddim_timesteps` always starts at T−1; for a grid that divides T it is the
    training grid itself.
    """
    return max(n for n in range(1, num_ddim_timesteps + 1) if train_timesteps % n == 0)
