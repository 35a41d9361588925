"""What would a training step cost on an H100? Counted on any machine, kernel by kernel, without running one.

    python -m benchmarks.step_cost                                         # three usual runs, before and after: minutes
    python -m benchmarks.step_cost --program lora_sdxl --teacher sdxl --train_batch_size 2 --before --by_kind --by_part
    python -m benchmarks.step_cost --program sd --teacher sd15 --train_batch_size 16 --each "fused optimizer"

The step of `benchmarks.fake_step` runs on fake tensors. Each operation that PyTorch would send to a GPU is a kernel, or
the few that `Meter` lists: it reads and writes bytes, does arithmetic, and takes as long as the slowest of the three:
its bytes at the memory's rate, its arithmetic at the rate of its kind, a kernel's least time. The rates are the
constants below, with their sources; some are assumed. Where CUDA does other than the operation's name says (copies into
another memory format above all), `Meter` imitates that. If a GPU has measured a row (`results/gpu-train_step.json`, by
`benchmarks.train_step`), its milliseconds stand beside the prediction. benchmarks/README.md says how to read it all.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import fake_step
from benchmarks.architectures import RESOLUTIONS
from benchmarks.fake_step import Case, add_flags, build, fake_networks
from benchmarks.measuring import alone, flop_counter, write
from benchmarks.provenance import ROOT, provenance
from benchmarks.train_step import add_each, autocast_everywhere, optimizer_not_fused, peft_layers
from lcm_distill.models import unets

# An H100 SXM, per second. Peaks by its data sheet: 989 TFLOP in 16 bit, 494 in TF32, 67 in float32, 3.35 TB.
PEAK_MATRIX = 790e12  # a product of 8192² in bf16, measured on an H200, which is the same processor: the floor's rate
MATRIX = 0.8 * PEAK_MATRIX  # assumed: with a K of 320 to 1280 a kernel's start and end weigh more
CONVOLUTION = 0.6 * PEAK_MATRIX  # assumed: an implicit product gathers its operand
ATTENTION = 320e12  # FlashAttention-2 on an H100 at head size 64, by arXiv 2407.08608
ATTENTION_BACKWARD = 0.8 * ATTENTION  # assumed
FLOAT32_MATRIX = 50e12  # three quarters of the peak: PyTorch's products leave TF32 alone, its convolutions do not
TF32_OF_16_BIT = 0.5  # by the peaks
MEMORY = 0.88 * 3.35e12  # bytes; what a plain copy reaches (assumed)
# Elements of PyTorch's copies and sums if an operand's innermost dimension is another than the result's: its reads are
# not coalesced. An H100 transposes 268 M elements in 1.98 ms: github.com/pytorch/pytorch/issues/113560.
TRANSPOSED_ELEMENTS = 135e9
CUDNN_TRANSPOSED = 0.6 * MEMORY  # assumed: cuDNN's own kernels for that go through shared memory
KERNEL = 3e-6  # seconds that the smallest kernel takes, with the gap before it (assumed)
HOST = 15e-6  # seconds of Python, autograd and launch for a kernel in eager mode (assumed)
# FlashAttention-2 is compiled for these head sizes; a smaller head is padded to the next one, and keys to whole tiles.
HEAD_SIZES, KEY_TILE = (32, 64, 96, 128, 192, 256), 128

PRODUCTS, CONVOLUTIONS, ATTENTIONS, NORMS = "matrix products", "convolutions", "attention", "norms"
ELEMENTS, CASTS, LAYOUT, COPIES = "element-wise", "casts", "layout copies", "cat and copies"
REDUCTIONS, OPTIMIZER = "reductions", "optimizer and average"
RECOMPUTED = "recomputed"
KINDS = (PRODUCTS, CONVOLUTIONS, ATTENTIONS, NORMS, ELEMENTS, CASTS, LAYOUT, COPIES, REDUCTIONS, OPTIMIZER)

aten = torch.ops.aten
# No kernel: memory is set aside, or what is there gets another shape.
FREE = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view),
    *(aten.lift_fresh, aten._local_scalar_dense, aten.resize_, aten.set_, aten._reshape_alias),
}
WRITE_ONLY = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.random_}
_REDUCTIONS = {
    aten.sum,
    aten.mean,
    aten.amax,
    aten.amin,
    aten.linalg_vector_norm,
    aten.var_mean,
    aten.prod,
    aten.argmax,
}
_COPYING = {aten.cat, aten.stack, aten.clone, aten.copy_, aten.repeat, aten.constant_pad_nd, aten.slice_backward}
_COPYING |= {aten.select_backward, aten.index_select, aten.index, aten.embedding, aten.gather}
GATHERING = {aten.embedding, aten.index_select, aten.index, aten.gather}  # read as much as they write, not the table
TWO_KERNELS = {aten.constant_pad_nd, aten.slice_backward, aten.select_backward}  # fill, then copy into a part


@dataclass
class Cost:
    kernels: int = 0
    bytes: float = 0
    flops: float = 0
    seconds: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


def size(tensor: torch.Tensor) -> int:
    """Bytes that a kernel touches: a broadcast dimension is stored once."""
    stored = (length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(stored) * tensor.element_size()


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch would suggest channels-last for a tensor with these strides."""
    return tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]


def innermost(tensor: torch.Tensor) -> int | None:
    """The dimension whose elements are neighbours in memory; None if it has less than two elements."""
    strides = [(stride, dim) for dim, stride in enumerate(tensor.stride()) if stride and tensor.shape[dim] > 1]
    return min(strides)[1] if strides else None


def tensors(*values: Any) -> list[torch.Tensor]:
    """All in lists and tuples, each once."""
    found = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return list({id(tensor): tensor for tensor in found}.values())


class Meter(TorchDispatchMode):
    """Adds up the kernels of what runs inside, by part of the step and kind: `costs[part, kind]`.

    `mixed` counts, by part, the sums, `cat`s and other element-wise kernels whose operands of one shape have different
    memory formats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[tuple[str, str], Cost] = defaultdict(Cost)
        self.mixed: Counter[str] = Counter()
        self.part = ""
        self._operation = ""
        self._flops = flop_counter().flop_registry
        self._imitated: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys((aten.mm, aten.bmm, aten.addmm, aten.baddbmm), self._product),
            **dict.fromkeys((aten.addmm_, aten.baddbmm_), self._product),
            aten.convolution: self._convolution,
            aten.convolution_backward: self._convolution_backward,
            aten.native_group_norm: self._group_norm,
            aten.native_group_norm_backward: self._group_norm_backward,
            aten.native_layer_norm: self._layer_norm,
            aten.native_layer_norm_backward: self._layer_norm_backward,
            aten._scaled_dot_product_flash_attention_for_cpu: self._attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: self._attention_backward,
            aten._fused_adamw_: self._fused_adamw,
        }

    def begin(self, part: str) -> None:
        self.part = part

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, what runs is a part of its own."""
        before, self.part = self.part, RECOMPUTED
        try:
            yield
        finally:
            self.part = before

    def total(self, of: Callable[[str, str], bool] = lambda part, kind: True) -> Cost:
        return sum((cost for (part, kind), cost in self.costs.items() if of(part, kind)), Cost())

    def add(
        self,
        kind: str,
        read: Iterable[torch.Tensor],
        written: Iterable[torch.Tensor],
        *,
        flops: float = 0,
        rate: float = MATRIX,
        seconds: float = 0,
        kernels: int = 1,
        work: float | None = None,
    ) -> None:
        """Kernels that together take as long as their bytes, `work` (the FLOPs, if not given) or `seconds`."""
        moved = sum(map(size, read)) + sum(map(size, written))
        took = max(moved / MEMORY, (flops if work is None else work) / rate, seconds, kernels * KERNEL)
        key = self.part, kind
        self.costs[key] = self.costs[key] + Cost(kernels, moved, flops, took)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        packet = getattr(function, "overloadpacket", None)
        if function.namespace != "aten" or packet in FREE or function.is_view:
            return function(*args, **kwargs)
        self._operation = str(packet).removeprefix("aten.")
        if imitation := self._imitated.get(packet):
            return imitation(function, *args, **kwargs)
        result = function(*args, **kwargs)
        self._plain(function, packet, args, kwargs, result)
        return result

    def _plain(self, function: Any, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operation that reads its arguments and writes its result, or the arguments that it changes."""
        read = tensors(args, kwargs)
        changed = [
            value
            for argument, value in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written = tensors(changed) or tensors(result)
        if packet in WRITE_ONLY:
            read = [tensor for tensor in read if tensor is not args[0]]
        if packet in GATHERING:
            read = written
        if self._operation.startswith("_foreach"):
            self.add(OPTIMIZER, read, written, kernels=launches([value for value in args if isinstance(value, list)]))
            return
        kernels = 2 if packet in TWO_KERNELS else 1
        same = [tensor for tensor in (*read, *written) if written and tensor.shape == written[0].shape]
        inner = {innermost(tensor) for tensor in same} - {None}
        seconds = 0.0
        if packet is aten.cat:
            inner = {innermost(tensor) for tensor in (*read, *written)} - {None}
        if len(inner) > 1:
            seconds = written[0].numel() / TRANSPOSED_ELEMENTS
        if packet in _REDUCTIONS:
            kind = REDUCTIONS
        elif packet in (aten.clone, aten.copy_, aten._to_copy) and len(inner) > 1:
            kind = LAYOUT
        elif packet is aten._to_copy or (packet is aten.copy_ and args[0].dtype != args[1].dtype):
            kind = CASTS
        elif packet in _COPYING:
            kind = COPIES
        else:
            kind = ELEMENTS
        if len(inner) > 1 and kind != LAYOUT:
            self.mixed[self.part] += 1
        self.add(kind, read, written, kernels=kernels, seconds=seconds)

    def _counted(self, function: Any, result: Any, *args: Any, **kwargs: Any) -> int:
        return self._flops[function.overloadpacket](*args, **kwargs, out_val=result)

    def _product(self, function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = function(*args, **kwargs)
        operands = list(args)
        if self._operation in ("addmm", "baddbmm") and operands[0].shape == result.shape:
            # cuBLAS adds to what is in the result: PyTorch copies the summand there first. Not so a bias.
            self.add(COPIES, [operands[0]], [result])
        rate = FLOAT32_MATRIX if args[-1].dtype == torch.float32 else MATRIX
        self.add(
            PRODUCTS, tensors(operands), [result], flops=self._counted(function, result, *args, **kwargs), rate=rate
        )
        return result

    def _in_format(self, tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
        """`tensor.contiguous(memory_format)`, and what it costs."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if tensor.is_contiguous(memory_format=memory_format):
            return tensor
        copy = tensor.contiguous(memory_format=memory_format)
        strided = innermost(copy) != innermost(tensor)
        seconds = tensor.numel() / TRANSPOSED_ELEMENTS if strided else 0.0
        self.add(LAYOUT if strided else COPIES, [tensor], [copy], seconds=seconds)
        return copy

    def _cudnn(self, *operands: torch.Tensor, flops: float, channels_last: bool) -> None:
        """A convolution's kernel. Tensor cores take channels-last: cuDNN transposes the default format, and back."""
        if not channels_last:
            for tensor in operands:
                self.add(LAYOUT, [tensor], [tensor], seconds=2 * size(tensor) / CUDNN_TRANSPOSED)
        rate = CONVOLUTION * (TF32_OF_16_BIT if operands[0].dtype == torch.float32 else 1)
        self.add(CONVOLUTIONS, operands, [], flops=flops, rate=rate)

    def _convolution(self, function: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> torch.Tensor:
        result = function(x, weight, bias, *rest)
        channels_last = is_channels_last(x) or is_channels_last(weight)
        x, weight = (self._in_format(tensor, channels_last) for tensor in (x, weight))
        flops = self._counted(function, result, x, weight, bias, *rest)
        self._cudnn(x, weight, result, flops=flops, channels_last=channels_last)
        if bias is not None:  # PyTorch adds it to cuDNN's result
            self.add(ELEMENTS, [result, bias], [result])
        return result

    def _convolution_backward(self, function: Any, gradient: Any, x: Any, weight: Any, *rest: Any) -> Any:
        """As in PyTorch's ConvShared.cpp: the gradient is put in the format of x, then each product chooses its own."""
        needs_x, needs_weight, needs_bias = rest[-1]
        results = function(gradient, x, weight, *rest)
        if needs_bias:
            self.add(REDUCTIONS, [gradient], [])
        if needs_weight:
            x = self._in_format(x, is_channels_last(x) or is_channels_last(weight))
        gradient = self._in_format(gradient, is_channels_last(x))
        flops = self._counted(function, results, gradient, x, weight, *rest) / max(1, needs_x + needs_weight)
        if needs_x:
            channels_last = is_channels_last(gradient) or is_channels_last(weight)
            operands = (self._in_format(gradient, channels_last), self._in_format(weight, channels_last), results[0])
            self._cudnn(*operands, flops=flops, channels_last=channels_last)
        if needs_weight:
            self._cudnn(gradient, x, results[1], flops=flops, channels_last=is_channels_last(gradient))
        return results

    def _group_norm(self, function: Any, x: Any, *rest: Any) -> Any:
        result = function(x, *rest)
        self.add(NORMS, [x, x], [result[0]], kernels=3)  # moments, then scale and shift
        return result

    def _group_norm_backward(self, function: Any, gradient: Any, x: Any, *rest: Any) -> Any:
        gradient = self._in_format(gradient, False)
        result = function(gradient, x, *rest)
        self.add(NORMS, [gradient, x, gradient, x], tensors(result[0]), kernels=3)  # sums, then the gradient
        return result

    def _layer_norm(self, function: Any, x: Any, *rest: Any) -> Any:
        """CUDA's takes contiguous tensors: what SD's 1×1 convolutions give its transformers is not."""
        x = self._in_format(x, False)
        result = function(x, *rest)
        self.add(NORMS, [x], [result[0]])
        return result

    def _layer_norm_backward(self, function: Any, gradient: Any, x: Any, *rest: Any) -> Any:
        gradient, x = self._in_format(gradient, False), self._in_format(x, False)
        result = function(gradient, x, *rest)
        self.add(NORMS, [gradient, x], tensors(result[0]))
        if result[1] is not None:
            self.add(NORMS, [gradient, x], tensors(result[1:]))
        return result

    def _attention(self, function: Any, query: Any, key: Any, value: Any, *rest: Any, **kwargs: Any) -> Any:
        result = function(query, key, value, *rest, **kwargs)
        flops = self._counted(function, result, query, key, value, *rest, **kwargs)
        work = flops * padding(query.shape[-1], key.shape[-2])
        self.add(ATTENTIONS, [query, key, value], tensors(result), flops=flops, work=work, rate=ATTENTION)
        return result

    def _attention_backward(self, function: Any, gradient: Any, query: Any, key: Any, *rest: Any, **kwargs: Any) -> Any:
        result = function(gradient, query, key, *rest, **kwargs)
        flops = self._counted(function, result, gradient, query, key, *rest, **kwargs)
        work = flops * padding(query.shape[-1], key.shape[-2])
        sums = [query] * 6 if query.element_size() == 2 else []  # the query's gradient is summed in float32, then cast
        read = tensors(gradient, query, key, rest)
        self.add(ATTENTIONS, [*read, *sums], result, flops=flops, work=work, rate=ATTENTION_BACKWARD, kernels=3)
        return result

    def _fused_adamw(self, function: Any, *args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        parameters, gradients, first, second = args[:4]
        written = [*parameters, *first, *second]
        self.add(OPTIMIZER, [*written, *gradients], written, kernels=launches([parameters, gradients, first, second]))


def padding(head: int, keys: int) -> float:
    """How much more FlashAttention's tiles do than the attention needs."""
    padded = next((length for length in HEAD_SIZES if length >= head), head)
    return padded / head * math.ceil(keys / KEY_TILE) * KEY_TILE / keys


def launches(lists: list[list[torch.Tensor]]) -> int:
    """Kernels of PyTorch's operations on lists: each takes 320 chunks of 65536 elements, and so many tensors."""
    limit = {1: 110, 2: 64, 3: 48, 4: 36}.get(len(lists), 30)
    chunks = sum(math.ceil(tensor.numel() / 65536) for tensor in lists[0])
    return max(math.ceil(len(lists[0]) / limit), math.ceil(chunks / 320))


# What a GPU does otherwise than the CPU that the fake tensors are on.


def cuda_group_norm(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """CUDA's takes and returns the default memory format."""
    return lambda x, *given, **options: norm(x.contiguous(), *given, **options)


def build_optimizer(trained: list[torch.nn.Parameter], case: Case, *, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW with the state that it has after the first step. An 8-bit one costs nothing here: it is not PyTorch's."""
    if case.use_8bit_adam:
        return fake_step.State(trained, use_8bit=True)
    optimizer = torch.optim.AdamW(trained, fused=fused, foreach=not fused)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@contextlib.contextmanager
def gpu_behaviour() -> Iterator[None]:
    functional = torch.nn.functional
    clip = "torch.nn.utils.clip_grad._has_foreach_support"
    with (
        mock.patch.object(functional, "group_norm", cuda_group_norm(functional.group_norm)),
        mock.patch.object(fake_step, "build_optimizer", build_optimizer),
        mock.patch(clip, lambda *given: True),
        fake_networks(),
    ):
        yield


# Ways to run the step.


def earlier_formats() -> AbstractContextManager[Any]:
    """Channels-last as it was: the VAE too, but not the adapters, which were made after it."""
    convert, build_vae = unets.to_channels_last, fake_step.build_vae

    def all_but_adapters(*networks: torch.nn.Module) -> None:
        convert(*networks)
        for module in (m for network in networks for name, m in network.named_modules() if "lora_" in name):
            torch.nn.Module.to(module, memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def vae(name: str) -> torch.nn.Module:
        return torch.nn.Module.to(build_vae(name), memory_format=torch.channels_last)  # type: ignore[call-overload]

    stack = ExitStack()
    stack.enter_context(mock.patch.object(unets, "to_channels_last", all_but_adapters))
    stack.enter_context(mock.patch.object(fake_step, "build_vae", vae))
    return stack


# Each by what it turns off, as in `benchmarks.train_step`: a patch of the step, or changes of the case.
OPTIMISATIONS: dict[str, Callable[[], AbstractContextManager[Any]] | dict[str, Any]] = {
    "fused LoRA layers": functools.partial(peft_layers, fake_step),
    "low-precision layer norms": {"float32_norms": True},
    "half networks without autocast": functools.partial(autocast_everywhere, fake_step),
    "low-precision frozen U-Net": {"cast_teacher_unet": False},
    "fused optimizer": functools.partial(optimizer_not_fused, fake_step),
}


@dataclass(frozen=True)
class Variant:
    """A way to run the step: which optimisations are off, changes of the case, patches."""

    name: str
    off: tuple[str, ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()
    patches: tuple[Callable[[], AbstractContextManager[Any]], ...] = ()

    def apply(self, case: Case, stack: ExitStack) -> Case:
        """The changed case; patches hold until `stack` ends."""
        case = replace(case, **dict(self.changes))
        for patch in (*self.patches, *(OPTIMISATIONS[name] for name in self.off)):
            if isinstance(patch, dict):
                case = replace(case, **patch)
            else:
                stack.enter_context(patch())
        return case


ALL_ON = Variant("all on")
LAST = (("channels_last", True),)
CHANNELS_LAST = Variant("--channels_last", changes=LAST)
# What they were before the optimisations that this command was written for. A LoRA of SDXL was checkpointed.
BEFORE = Variant("before", ("fused LoRA layers", "low-precision layer norms"), LAST, (earlier_formats,))
SPARING = (("gradient_checkpointing", True),)
BEFORE_SPARING = replace(BEFORE, name="before, --gradient_checkpointing", changes=LAST + SPARING)
_CASE = Case("lora_sdxl", "sdxl", train_batch_size=4, vae_encode_batch_size=8)
_SD = replace(_CASE, program="sd", teacher="sd15", train_batch_size=16, vae_encode_batch_size=32)
TABLE = [
    (_SD, [BEFORE, ALL_ON, CHANNELS_LAST]),
    (_CASE, [BEFORE_SPARING, BEFORE, ALL_ON, CHANNELS_LAST]),
    (replace(_CASE, dm_steps=1), [ALL_ON]),
    (replace(_CASE, teacher="ssd1b"), [BEFORE_SPARING, BEFORE, ALL_ON, CHANNELS_LAST]),
]


def compute(case: Case, variant: Variant = ALL_ON) -> dict[str, Any]:
    """What the step of this case and variant costs: see `summarise`."""
    meter = Meter()
    with ExitStack() as stack:
        stack.enter_context(gpu_behaviour())
        contexts = functools.partial(checkpoint.checkpoint, context_fn=lambda: (ExitStack(), meter.recomputing()))
        stack.enter_context(mock.patch.object(checkpoint, "checkpoint", contexts))
        case = variant.apply(case, stack)
        step = build(case, meter.begin)
        with meter:
            step()
    return summarise(meter)


def summarise(meter: Meter) -> dict[str, Any]:
    """Kernels, gigabytes, TFLOP, milliseconds, those of the host, the share of the matrix rate; by part and kind."""

    def numbers(cost: Cost) -> dict[str, Any]:
        return {
            "kernels": cost.kernels,
            "gigabytes": round(cost.bytes / 1e9, 2),
            "tflop": round(cost.flops / 1e12, 3),
            "ms": round(1e3 * cost.seconds, 2),
        }

    total = meter.total()
    again = meter.total(lambda part, kind: part == RECOMPUTED)
    parts = dict.fromkeys(part for part, _ in meter.costs)
    return numbers(total) | {
        "host_ms": round(1e3 * HOST * total.kernels, 1),
        "share_of_matrix_rate": round((total.flops - again.flops) / PEAK_MATRIX / total.seconds, 3),
        "mixed_layouts": dict(meter.mixed),
        "by_part": {name: numbers(meter.total(lambda part, kind, name=name: part == name)) for name in parts},  # type: ignore
        "by_kind": {name: numbers(meter.total(lambda part, kind, name=name: kind == name)) for name in KINDS},  # type: ignore
    }


def title(case: Case) -> str:
    """How `benchmarks.train_step` begins the title of a measurement of this case; flags follow."""
    size = case.resolution or RESOLUTIONS[case.teacher]
    return f"{case.program}, {case.teacher} at {size}, batch {case.train_batch_size}, {case.mixed_precision}"


_MATCHING = "--dm_weight"


def switches(case: Case) -> set[str]:
    """The case's flags, as far as they are on or off and not as usual; with matching --dm_weight, without its value."""
    usual = asdict(Case())
    values = ((name, value) for name, value in asdict(case).items() if isinstance(value, bool) and value != usual[name])
    matching = {_MATCHING} if case.dm_steps else set()
    return {f"--{name}" if value else f"--no-{name}" for name, value in values} | matching


def measured_ms(case: Case, variant: Variant, results: Path) -> float | None:
    """What a GPU took for the same row, if it is among the `results` of `benchmarks.train_step`.

    There it may be a variant of this name, or have its flags given to the command.
    """
    known = json.loads(results.read_text()) if results.exists() else {}
    with ExitStack() as stack:
        changed = variant.apply(case, stack)
    patched = variant.patches or any(not isinstance(OPTIMISATIONS[name], dict) for name in variant.off)
    wanted = [(case, variant.name)] + ([] if patched else [(changed, ALL_ON.name)])
    names = {f"--{prefix}{name}" for name in asdict(case) for prefix in ("", "no-")} | {_MATCHING}
    for heading, result in known.items():
        for one, name in wanted:
            start, _, flags = heading.partition(f"{one.mixed_precision}, ")
            same = f"{start.rstrip(', ')}, {one.mixed_precision}" == title(one) or heading == title(one)
            if same and set(flags.split()) & names == switches(one) and name in result["variants"]:
                return result["variants"][name]["step_ms"]
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each row; its ratio is to the first row of its case."""
    columns = ["case", "variant", "kernels", "GB moved", "TFLOP", "predicted ms", "ratio", "of the matrix rate"]
    columns += ["of it layout copies", "mixed layouts", "host ms", "measured ms"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    first: dict[str, float] = {}
    for row in rows:
        reference = first.setdefault(row["title"], row["ms"])
        cells = [row["title"], row["variant"], f"{row['kernels']:,}", f"{row['gigabytes']:.0f}", f"{row['tflop']:.1f}"]
        cells += [f"{row['ms']:.0f}", f"{row['ms'] / reference:.2f}", f"{row['share_of_matrix_rate']:.0%}"]
        cells += [
            f"{row['by_kind'][LAYOUT]['ms']:.0f}",
            f"{sum(row['mixed_layouts'].values())}",
            f"{row['host_ms']:.0f}",
        ]
        cells.append("" if row["measured_ms"] is None else f"{row['measured_ms']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(row: dict[str, Any], by: str) -> str:
    """Markdown of one row's parts or kinds."""
    lines = [f"{row['title']}, {row['variant']}", "", f"| {by} | kernels | GB moved | TFLOP | ms |", "|---" * 5 + "|"]
    for name, cost in row[f"by_{by}"].items():
        cells = (f"{cost['kernels']:,}", f"{cost['gigabytes']:.1f}", f"{cost['tflop']:.2f}", f"{cost['ms']:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, _CASE)
    parser.add_argument("--before", action="store_true", help="also as it was before the latest optimisations")
    parser.add_argument("--straightforward", action="store_true", help="also with every optimisation turned off")
    add_each(parser)
    parser.add_argument("--by_kind", action="store_true", help="a table of the kinds of kernels, for each row")
    parser.add_argument("--by_part", action="store_true", help="a table of the parts of the step, for each row")
    parser.add_argument("--measured", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-train_step.json")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    case = Case(**{name: getattr(args, name) for name in asdict(_CASE)})
    off = args.each or OPTIMISATIONS if args.each is not None else ()
    variants = [BEFORE_SPARING, BEFORE, ALL_ON] if args.before else [ALL_ON]
    variants += [Variant(f"without {name}", (name,)) for name in off]
    variants += [Variant("straightforward", tuple(OPTIMISATIONS))] if args.straightforward else []
    plan = TABLE if case == _CASE and len(variants) == 1 else [(case, variants)]
    result: dict[str, Any] = provenance("benchmarks.step_cost", sys.argv[1:])
    result["rows"] = rows = []
    for case, variants in plan:
        for variant in variants:
            row: dict[str, Any] = {"title": ", ".join([title(case), *sorted(switches(case))]), "case": asdict(case)}
            row |= {"variant": variant.name} | alone(compute, case, variant)
            row["measured_ms"] = measured_ms(case, variant, args.measured)
            rows.append(row)
            print(f"{row['title']}, {row['variant']}: {row['ms']:.0f} ms", flush=True)
            for by in ("part", "kind"):
                if getattr(args, f"by_{by}"):
                    print(details(row, by) + "\n", flush=True)
    print(table(rows))
    if args.output:
        write(args.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
