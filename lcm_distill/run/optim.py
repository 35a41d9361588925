"""The optimizer and its learning rate."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from lcm_distill.errors import UsageError
from lcm_distill.flags import OptimizationFlags


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], flags: OptimizationFlags, learning_rate: float, *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or not `fused` in PyTorch's own way; or bitsandbytes' AdamW with 8-bit state.

    The `learning_rate` is the plan's, scaled if the flags say so. `fused` must be off under a loss scaler (fp16): a
    fused step leaves out an overflowed update inside its kernel, so that neither PyTorch nor Accelerate knows.
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
        fused=fused or None,  # False would mean one tensor at a time on GPUs too, which None does all at once
    )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, flags: OptimizationFlags, *, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Diffusers' schedule of the learning rate by name; it advances by one at each of the optimizer's `steps`."""
    name = flags.lr_scheduler
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=flags.lr_warmup_steps, num_training_steps=steps)
    except ValueError as error:
        raise UsageError(f"--lr_scheduler {name} does not go with the other flags: {error}") from None


@contextlib.contextmanager
def keeping_hyperparameters(
    optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LambdaLR
) -> Iterator[None]:
    """Inside, a checkpoint's state is loaded; afterwards learning rate, betas, ε and weight decay are the flags' again.

    So is whether the optimizer is fused, which depends on the precision. A checkpoint's state holds these values too,
    so that a flag changed for a resume would be logged as changed and have no effect. With unchanged flags nothing
    changes, to the bit.
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
        _place_counts(optimizer, group)
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _place_counts(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Moves AdamW's counts of steps to the device of their parameters if it is fused, else to the CPU.

    A fused kernel cannot read a count on the CPU; the other kernels would wait for a count on the GPU, parameter by
    parameter.
    """
    for parameter in group["params"]:
        count = optimizer.state.get(parameter, {}).get("step")
        if isinstance(count, torch.Tensor):
            optimizer.state[parameter]["step"] = count.to(parameter.device if group.get("fused") else "cpu")
