"""The target network θ⁻ of Algorithm 1: an exponential moving average of the student."""

from collections.abc import Iterable

import torch


@torch.no_grad()
def update_ema(target: Iterable[torch.nn.Parameter], source: Iterable[torch.nn.Parameter], decay: float) -> None:
    """θ⁻ ← decay · θ⁻ + (1 − decay) · θ, in place, in one fused pass; decay 0 copies and 1 leaves θ⁻ alone."""
    torch._foreach_lerp_(list(target), [parameter.detach() for parameter in source], 1.0 - decay)
