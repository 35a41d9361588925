"""The optimizer and its learning rate."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from lcm_distill.errors import UsageError


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    use_8bit: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or not `fused` in PyTorch's own way; or bitsandbytes' AdamW with 8-bit state.

    `fused` must be off under a loss scaler (fp16): a fused step leaves out an overflowed update inside its kernel,
    so that neither PyTorch nor Accelerate knows it was left out.
    """
    if use_8bit:
        try:
            import bitsandbytes
        except ImportError as error:
            raise UsageError(
                f"--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes ({error})"
            ) from None
        return bitsandbytes.optim.AdamW8bit(
            parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon
        )
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=betas,
        weight_decay=weight_decay,
        eps=epsilon,
        fused=fused or None,  # False would mean one tensor at a time on GPUs too, which None does all at once
    )


def build_lr_scheduler(
    name: str, optimizer: torch.optim.Optimizer, *, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Diffusers' course of the learning rate by name; it advances by one at each of the `steps` of the optimizer."""
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    except ValueError as error:
        raise UsageError(f"--lr_scheduler {name} does not go with the other flags: {error}") from None


@contextlib.contextmanager
def keeping_settings(
    optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LambdaLR
) -> Iterator[None]:
    """Inside, a checkpoint's state is loaded; afterwards learning rate, betas, ε and weight decay are again the flags'.

    So is whether the optimizer is fused, which the precision decides. The state of both holds those settings too, so
    that a flag changed for a resume would be announced and ignored. With unchanged flags nothing changes, to the bit.
    """
    names = ("initial_lr", "betas", "eps", "weight_decay", "fused")
    settings = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    rates = list(lr_scheduler.base_lrs)
    yield
    lr_scheduler.base_lrs = rates
    done = lr_scheduler.last_epoch
    for group, kept, rate, course in zip(optimizer.param_groups, settings, rates, lr_scheduler.lr_lambdas, strict=True):
        group.update(kept)
        group["lr"] = rate * course(done)
        _place_counts(optimizer, group)
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _place_counts(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """AdamW's count of steps lies where the parameter does when it is fused, else in main memory.

    There a fused kernel cannot read it; on a GPU the others would wait for it at each parameter.
    """
    for parameter in group["params"]:
        count = optimizer.state.get(parameter, {}).get("step")
        if isinstance(count, torch.Tensor):
            optimizer.state[parameter]["step"] = count.to(parameter.device if group.get("fused") else "cpu")
