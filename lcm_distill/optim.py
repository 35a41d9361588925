"""The optimizer and its learning rate."""

from collections.abc import Iterable

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
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or bitsandbytes' AdamW with 8-bit state."""
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
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon, fused=True
    )


def build_lr_scheduler(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Diffusers' course of the learning rate by name; it advances by one at each optimizer step."""
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=training_steps)
