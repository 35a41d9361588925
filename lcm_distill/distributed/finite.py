"""Whether all values are finite: of the networks and optimizers that are about to be written to files.

A loss is looked at before the step that it leads to, so weights can be infinite, or NaN, although no loss ever was.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from lcm_distill.errors import DivergenceError

HALF = torch.finfo(torch.float16).max


def find_not_finite(tensors: Iterable[tuple[str, torch.Tensor]], largest: float = math.inf) -> str | None:
    """The name of the first of the `tensors` with a NaN, an infinity or a value beyond ±`largest`; None without any.

    Only floats are looked at, on their device, and of a tensor that is split over the ranks this rank's slice. The host
    waits once for all of them.
    """
    found: dict[torch.device, tuple[list[str], list[torch.Tensor]]] = {}
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.is_floating_point() or not local.numel():
            continue
        size = torch.linalg.vector_norm(local.detach(), math.inf)  # the largest; NaN if there is a NaN
        names, good = found.setdefault(local.device, ([], []))
        names.append(name)
        good.append(size <= min(largest, torch.finfo(size.dtype).max))
    for names, good in found.values():
        for name, is_good in zip(names, torch.stack(good).tolist(), strict=True):
            if not is_good:
                return name
    return None


def check_finite(
    what: str, tensors: Iterable[tuple[str, torch.Tensor]], *, largest: float = math.inf, together: bool = False
) -> None:
    """`DivergenceError` that names `what`, and which of the `tensors`, unless `find_not_finite` finds nothing.

    `together`: every rank calls it, with its own slices; if one of them finds something, all raise.
    """
    name = find_not_finite(tensors, largest)
    if together:
        name = next(filter(None, gather_object([name])), None)
    if name is not None:
        limit = "are not finite" if largest == math.inf else f"are not finite, or beyond ±{largest:g}"
        raise DivergenceError(f"{what}: values in {name} {limit}")


def tensors_in(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in dicts and lists, at any depth, each with the keys that lead to it: "state.0.exp_avg"."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, (Mapping, list, tuple)):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
