"""The optimizer and the schedule of its learning rate."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor

from lcm_distill.errors import UsageError
from lcm_distill.flags import OptimizationFlags


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], flags: OptimizationFlags, learning_rate: float, *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW, as one fused kernel if `fused`, or bitsandbytes' AdamW with 8-bit state.

    `learning_rate` is the plan's, scaled if --scale_lr is given. `fused` must be off with a loss scaler (fp16): a fused
    step skips an overflowed update inside its kernel, without PyTorch or Accelerate knowing.
    """
    betas = (flags.adam_beta1, flags.adam_beta2)
    if flags.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise UsageError(
                f"--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes ({error})"
            ) from None
        return bitsandbytes.optim.AdamW8bit(
            parameters, lr=learning_rate, betas=betas, weight_decay=flags.adam_weight_decay, eps=flags.adam_epsilon
        )
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=betas,
        weight_decay=flags.adam_weight_decay,
        eps=flags.adam_epsilon,
        fused=fused or None,  # None: all tensors at once on a GPU; False: one at a time
    )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, flags: OptimizationFlags, *, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Diffusers' learning-rate schedule of that name, which advances at each of the optimizer's `steps`."""
    name = flags.lr_scheduler
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=flags.lr_warmup_steps, num_training_steps=steps)
    except ValueError as error:
        raise UsageError(f"--lr_scheduler {name} does not work with the other flags: {error}") from None


class LearningRateSteps:
    """Where the schedule of the learning rate is, as a part of a checkpoint: its number of steps.

    The rest is the flags' (`keeping_hyperparameters`). Accelerate would save it as a pickle, and run what that holds.
    """

    FILE = "lr_scheduler.json"  # its name among the parts of a checkpoint
    _OF_EARLIER_VERSIONS = "custom_checkpoint_0.pkl"  # Accelerate's

    def __init__(self, lr_scheduler: torch.optim.lr_scheduler.LambdaLR):
        self._lr_scheduler = lr_scheduler

    def save(self, file: Path) -> None:
        if PartialState().is_main_process:
            file.write_text(json.dumps({"last_epoch": self._lr_scheduler.last_epoch}) + "\n")

    def load(self, file: Path) -> None:
        if file.is_file():
            steps = json.loads(file.read_text())["last_epoch"]
        else:  # read without running anything: PyTorch refuses what is not tensors, numbers and text
            steps = torch.load(file.with_name(self._OF_EARLIER_VERSIONS), weights_only=True)["last_epoch"]
        if type(steps) is not int or steps < 0:
            raise ValueError(f"{file.name} says {str(steps)[:100]} steps")
        self._lr_scheduler.last_epoch = steps
        self._lr_scheduler._step_count = steps + 1


@contextlib.contextmanager
def keeping_hyperparameters(
    optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LambdaLR
) -> Iterator[None]:
    """Inside this context a checkpoint's state is loaded; learning rate, betas, ε and weight decay stay the flags'.

    So does whether the optimizer is fused, which depends on the precision. A checkpoint's state holds these values too:
    a flag changed for a resume would be logged as changed and have no effect. With unchanged flags the result is
    bitwise that of the checkpoint.
    """
    names = ("initial_lr", "betas", "eps", "weight_decay", "fused")
    settings = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    rates = list(lr_scheduler.base_lrs)
    yield
    lr_scheduler.base_lrs = rates
    done = lr_scheduler.last_epoch
    for group, kept, rate, factor in zip(optimizer.param_groups, settings, rates, lr_scheduler.lr_lambdas, strict=True):
        group.update(kept)
        group["lr"] = rate * factor(done)
        match_parameters(optimizer, group)
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def match_parameters(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Brings AdamW's loaded state into the memory format and onto the device that its kernel expects.

    The moments take their parameter's memory format: the fused kernel for CPUs goes through memory without regard to
    strides, and read moments that were saved in another one (channels_last) in the wrong order. The step counts are
    on the device of their parameter if the optimizer is fused, else on the CPU: a fused kernel cannot read a count on
    the CPU; the other kernels would wait for the GPU at each parameter's count.
    """
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if name == "step":
                state[name] = value.to(parameter.device if group.get("fused") else "cpu")
            elif value.shape == parameter.shape and _local_strides(value) != _local_strides(parameter):
                state[name] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def _local_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor in memory; of one that is split over the ranks, those of this rank's slice."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).stride()
