"""The precision of a U-Net's group and layer norms under autocast.

On a GPU autocast computes norms in float32: it writes a float32 copy of their input and of their result. PyTorch's
kernels for half-precision tensors take sums in float32 as well, and move a quarter of the bytes without these copies. A
layer norm's result goes into a matrix product, which rounds it in any case. A group norm's goes through SiLU first:
rounded before that, too, it made toy students measurably worse (docs/LOG.md, 2026-11-27).
"""

from collections.abc import Callable

import torch
from torch.nn import functional


class Norm(torch.nn.Module):
    """What both kinds of norm do; without autocast they are PyTorch's own."""

    low_precision: bool
    _normalize: Callable[..., torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device) if self.low_precision else torch.float32
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        with torch.autocast(device, enabled=False):
            return self._normalize(x.to(dtype), weight, bias)


class GroupNorm(Norm, torch.nn.GroupNorm):
    def _normalize(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


class LayerNorm(Norm, torch.nn.LayerNorm):
    def _normalize(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


LOW_PRECISION: tuple[type, ...] = (LayerNorm,)  # those that follow the precision of the other layers
_CLASSES: dict[type, type] = {torch.nn.GroupNorm: GroupNorm, torch.nn.LayerNorm: LayerNorm}


def set_norm_precision(*networks: torch.nn.Module, float32: bool = False) -> None:
    """In place: under autocast, norms take and return float32, but for `LOW_PRECISION` unless `float32` is set.

    Autocast has all of them in float32 on GPUs, none on CPUs. Without autocast nothing changes.
    """
    for module in (module for network in networks for module in network.modules()):
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]  # names, weights and hooks stay
        if isinstance(module, Norm):
            module.low_precision = isinstance(module, LOW_PRECISION) and not float32
