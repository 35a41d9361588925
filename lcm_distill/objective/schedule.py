"""The teacher's noise schedule and the ODE solver of latent consistency distillation, all in float32.

A timestep is a training timestep, int64 in 0 … T−1 (T is 1000 for Stable Diffusion). The solver uses a coarser grid of
`num_ddim_timesteps` of them, indexed by `solver_index`, 0 … num_ddim_timesteps−1.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import LCMScheduler

from lcm_distill.errors import UsageError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# Diffusers' schedulers with a discrete schedule of betas, and the class in whose signature their defaults are read: a
# config may leave them out, and they differ (SD's own are scaled_linear, 0.00085 to 0.012; DDIM's linear, 0.0001 to
# 0.02). Without scipy or torchsde, Diffusers has two of them only as placeholders, which have no signature.
_OWN_DEFAULTS = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
BETA_SCHEDULERS = {name: name for name in _OWN_DEFAULTS} | {
    "DPMSolverSDEScheduler": "HeunDiscreteScheduler",
    "LMSDiscreteScheduler": "DDPMScheduler",
}
_SCHEDULE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip

# Below, an ε prediction gives no picture: in x0 = (x − sigma · ε) / alpha, float32's rounding of x is as large as x0.
# (The smallest of a usual schedule, the cosine one, is 2^-14.)
_LEAST_ALPHA = 2.0**-24

# What every sampler here is created with. Pipelines change an offset other than 1, and LCM's and trailing grids ignore
# it; `set_alpha_to_one` false ends DDIM at timestep 0, as the solver in training does.
SAMPLER_OPTIONS = {"clip_sample": False, "thresholding": False, "steps_offset": 1, "set_alpha_to_one": False}

_EDM = "has the continuous noise levels of EDM"
_FLOW = "is one of flow matching"
# Why a scheduler of another kind is refused, by what its class's name contains.
_OTHER_KINDS = {
    "EDM": _EDM,
    "CosineDPM": _EDM,
    "Flow": _FLOW,
    "RF": _FLOW,
    "CogVideoX": "shifts the signal-to-noise ratio of its betas",
}
# Entries that turn a scheduler of discrete betas into another kind, or that only another kind has.
_OTHER_ENTRIES = {
    "use_flow_sigmas": _FLOW,
    "use_dynamic_shifting": _FLOW,
    "shift": _FLOW,
    "base_shift": _FLOW,
    "sigma_data": _EDM,
    "sigma_schedule": _EDM,
    "snr_shift_scale": _OTHER_KINDS["CogVideoX"],
}


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
        """The schedule of a Diffusers scheduler config (`complete_schedule`), which `build_lcm_scheduler` samples with.

        `UsageError` if the config is not one of a discrete schedule of betas, or its prediction type does not fit.
        """
        chosen = complete_schedule(config)
        schedule = cls(LCMScheduler(**chosen).alphas_cumprod, chosen["prediction_type"])
        if schedule.prediction_type == "epsilon" and (schedule.alphas < _LEAST_ALPHA).any():
            raise UsageError(
                "--pretrained_teacher_model: its scheduler's prediction_type is epsilon, and its last timestep is pure "
                "noise (rescale_betas_zero_snr, or large betas), where no picture follows from a prediction of noise. "
                "If the model predicts v, set prediction_type to v_prediction in its scheduler_config.json; else set "
                "rescale_betas_zero_snr to false."
            )
        return schedule

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
            return (noisy - sigma * output) / alpha
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
    `[num_ddim_timesteps]`. The grid has Diffusers' "trailing" spacing: its last point is `top_timestep`, where sampling
    starts, whether or not `num_ddim_timesteps` divides the timesteps up to it. That is T−1 unless it is given. The step
    at index 0 ends at timestep 0, where the consistency function is the identity.
    """

    def __init__(self, schedule: NoiseSchedule, num_ddim_timesteps: int, top_timestep: int | None = None):
        total = len(schedule) if top_timestep is None else top_timestep + 1
        if not 1 <= num_ddim_timesteps <= total:
            raise UsageError(
                f"--num_ddim_timesteps {num_ddim_timesteps}: must be between 1 and the "
                f"{total} training timesteps up to where sampling starts; 50 is usual."
            )
        self.schedule = schedule
        self._starts_from_noise = total < len(schedule)
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

    def add_noise(self, x0: torch.Tensor, epsilon: torch.Tensor, solver_index: torch.Tensor) -> torch.Tensor:
        """x_t of `x0` at the grid points `solver_index` `[B]`: alpha_t · x0 + sigma_t · epsilon.

        At a `top_timestep` below T−1 it is `epsilon` alone, without the rest of x0 that the schedule has there: that is
        what sampling starts from.
        """
        noisy = self.schedule.add_noise(x0, epsilon, self.timesteps[solver_index])
        if not self._starts_from_noise:
            return noisy
        return torch.where(per_sample(solver_index == len(self) - 1, noisy), epsilon.float(), noisy)

    def step(self, x0: torch.Tensor, epsilon: torch.Tensor, solver_index: torch.Tensor) -> torch.Tensor:
        """x_t at the previous grid point, from the predicted `x0` and `epsilon` `[B, …]` at `solver_index` `[B]`."""
        return self.schedule.add_noise(x0, epsilon, self.previous_timesteps[solver_index])


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values` `[B]` as `[B, 1, …]`, which broadcasts over `like` `[B, …]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def complete_schedule(config: Mapping[str, Any], given: str = "--pretrained_teacher_model") -> dict[str, Any]:
    """All entries of a Diffusers scheduler config that make its noise schedule, with its prediction type.

    What the config leaves out has the default of its own class, `_class_name` (`DDPMScheduler` if it names none); so
    any Diffusers scheduler that is created with all of these has the same schedule. What only a sampler reads (spacing,
    offset, clipping, Karras sigmas) is not among them. `given` is what a message names.

    Raises:
        UsageError: the config is not one of a discrete schedule of betas.
    """
    name = config.get("_class_name") or "DDPMScheduler"
    check_scheduler_class(name, given)
    for key, reason in _OTHER_ENTRIES.items():
        if config.get(key) not in (None, False):
            raise _other_kind(given, f"{key} {config[key]!r}", reason)
    if config.get("timestep_type") == "continuous":
        raise _other_kind(given, "timestep_type 'continuous'", _EDM)
    if config.get("predict_epsilon") is False and "prediction_type" not in config:
        raise UsageError(
            f"{given}: its scheduler_config.json says predict_epsilon false, as early Diffusers wrote, which today's "
            'ignores; replace it with "prediction_type": "sample".'
        )
    signature = inspect.signature(getattr(diffusers, BETA_SCHEDULERS[name])).parameters
    defaults = {key: signature[key].default for key in _SCHEDULE_KEYS if key in signature}
    written = {key: config[key] for key in _SCHEDULE_KEYS if key in config}
    chosen = {"rescale_betas_zero_snr": False} | defaults | written
    if not isinstance(chosen["rescale_betas_zero_snr"], bool | None):
        raise UsageError(
            f"{given}: its scheduler's rescale_betas_zero_snr is {chosen['rescale_betas_zero_snr']!r}; "
            "it must be true or false."
        )
    betas = chosen["trained_betas"]
    if betas is not None and not (isinstance(betas, list | tuple) and len(betas) == chosen["num_train_timesteps"]):
        raise UsageError(
            f"{given}: its scheduler's trained_betas must be {chosen['num_train_timesteps']} numbers, as many as "
            f"num_train_timesteps, not {len(betas) if isinstance(betas, list | tuple) else repr(betas)}; correct one "
            "of the two in its scheduler_config.json."
        )
    return chosen | {
        "trained_betas": None if betas is None else list(betas),
        "rescale_betas_zero_snr": bool(chosen["rescale_betas_zero_snr"]),
    }


def check_scheduler_class(name: Any, given: str = "--pretrained_teacher_model") -> None:
    """`UsageError`, which names what is `given`, unless `name` is a Diffusers scheduler of discrete betas."""
    if isinstance(name, str) and name in BETA_SCHEDULERS:
        return
    reasons = [reason for part, reason in _OTHER_KINDS.items() if part in str(name)]
    raise _other_kind(given, str(name), *reasons[:1])


def _other_kind(given: str, what: str, reason: str = "is not known here") -> UsageError:
    return UsageError(
        f"{given}: its scheduler ({what}) {reason}. Only models that were trained with a discrete schedule of betas "
        "are supported, with a scheduler_config.json of DDIMScheduler, EulerDiscreteScheduler or the like; use such a "
        "model."
    )


def build_lcm_scheduler(
    scheduler_config: Mapping[str, Any],
    num_ddim_timesteps: int = 50,
    timestep_scaling: float = 10.0,
    top_timestep: int | None = None,
    given: str = "--pretrained_teacher_model",
) -> LCMScheduler:
    """The student's sampler: the noise schedule of `scheduler_config` with the solver's grid and timestep scaling.

    Its config has all of `LCMScheduler`'s entries and no others, so no class's defaults replace what was trained.
    It clips nothing, whatever `scheduler_config` says: latents are not bounded. A `top_timestep` is where it starts:
    the schedule ends there, so that pipelines start there without being asked to. `UsageError`, which names what is
    `given`, if that is not of a discrete schedule of betas, or if the grid does not end at `top_timestep`.
    """
    chosen = complete_schedule(scheduler_config, given)
    if top_timestep is not None:
        chosen = _first_timesteps(chosen, top_timestep, num_ddim_timesteps)
    return LCMScheduler(
        **chosen,
        original_inference_steps=_sampler_grid(num_ddim_timesteps, chosen["num_train_timesteps"]),
        timestep_scaling=timestep_scaling,
        **SAMPLER_OPTIONS,
    )


def sampling_sigmas(scheduler: LCMScheduler, steps: int) -> list[float]:
    """sigma_t / alpha_t at the timesteps of `steps` steps, and 0 at the end: what programs with sigmas sample at."""
    own = LCMScheduler.from_config(scheduler.config)  # the timesteps of `scheduler` stay as they are
    own.set_timesteps(steps)
    alphas_cumprod = own.alphas_cumprod[own.timesteps].double()
    return [*((1 - alphas_cumprod) / alphas_cumprod).sqrt().tolist(), 0.0]


def _first_timesteps(chosen: dict[str, Any], top_timestep: int, num_ddim_timesteps: int) -> dict[str, Any]:
    """The entries of a schedule that ends at `top_timestep`, before which it is that of the entries `chosen`."""
    total, length = chosen["num_train_timesteps"], top_timestep + 1
    if length > total:
        raise UsageError(
            f"--top_timestep {top_timestep}: the teacher's last timestep is {total - 1}; use that or less."
        )
    if length == total:
        return chosen
    if length % num_ddim_timesteps:
        below = length // num_ddim_timesteps * num_ddim_timesteps
        nearest = [each - 1 for each in (below, below + num_ddim_timesteps) if 0 < each <= total]
        raise UsageError(
            f"--top_timestep {top_timestep}: the {length} timesteps up to it are no multiple of --num_ddim_timesteps "
            f"{num_ddim_timesteps}, so that samplers would start elsewhere; use {' or '.join(map(str, nearest))}."
        )
    betas = LCMScheduler(**chosen).betas[:length].tolist()
    return chosen | {"num_train_timesteps": length, "trained_betas": betas, "rescale_betas_zero_snr": False}


def _sampler_grid(num_ddim_timesteps: int, train_timesteps: int) -> int:
    """`original_inference_steps` for the `LCMScheduler` of a student that was trained on this solver grid.

    `LCMScheduler` rounds T / original_inference_steps down, so with a grid that does not divide T it would start below
    T−1. The largest divisor of T up to `num_ddim_timesteps` always starts at T−1; for a grid that divides T it is the
    training grid itself.
    """
    return max(n for n in range(1, num_ddim_timesteps + 1) if train_timesteps % n == 0)
