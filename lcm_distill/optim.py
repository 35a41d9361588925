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
            raise UsageError(f"--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes ({error})") from None
        return bitsandbytes.optim.AdamW8bit(
            parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon
        )
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon, fused=True
    )


def scaled_learning_rate(learning_rate: float, *, batch_size: int, accumulation: int, processes: int) -> float:
    """The learning rate times the pictures of one optimizer step (`--scale_lr`)."""
    return learning_rate * batch_size * accumulation * processes


def training_steps(
    *, max_steps: int | None, epochs: int, samples: int | None, batch_size: int, accumulation: int, processes: int
) -> int:
    """Optimizer steps of the run: `max_steps`, or `epochs` times those that `samples` pictures take."""
    if max_steps is not None:
        return max_steps
    if samples is None:
        raise UsageError(
            "--max_train_steps: the length of the run is not known, since only local shards can be counted; "
            "give --max_train_steps, or --max_train_samples with --num_train_epochs."
        )
    per_step = batch_size * accumulation * processes
    return epochs * -(-samples // per_step)


def build_lr_scheduler(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Diffusers' course of the learning rate by name; it advances by one at each optimizer step."""
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=training_steps)
