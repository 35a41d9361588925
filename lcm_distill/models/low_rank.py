"""The layers of a LoRA: PEFT's, with a forward and a backward pass that read and write less memory.

    result = base(x) + scaling · up(down(x))            x [..., in], down [rank, in], up [out, rank]

PEFT makes the product, scales it and adds it: each of the three reads or writes tensors as large as the result, in
every pass. Here the matrix product adds itself to the base layer's result, scaled, in place (`addmm_`), and so does the
gradient of x. Weights, their names and files are PEFT's, and so are the values, up to rounding. Adapter weights, which
are float32, are cast to the precision of the pass once in it.

`LAYERS` is what `LoraConfig` takes as custom layers.
"""

from typing import Any

import torch
from peft.tuners import lora as peft_lora
from torch.autograd.function import once_differentiable
from torch.nn import functional


def _dtype_of_pass(x: torch.Tensor, layer: torch.nn.Module) -> torch.dtype:
    """Autocast's dtype, or without autocast that of the base layer's weights."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return layer.weight.dtype  # type: ignore[return-value]


def _scale(tensor: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling · tensor`, in place; nothing is to do where alpha equals the rank, as by default."""
    return tensor if scaling == 1 else tensor.mul_(scaling)


class _AdaptedLinear(torch.autograd.Function):
    """`x @ weight.T + bias + scaling · (adapted @ down.T) @ up.T`; None as `adapted` stands for x.

    x and `adapted` are `[rows, in]` in the dtype of the result. Gradients of x, adapted, down and up; weight and bias
    are frozen.
    """

    @staticmethod
    def forward(ctx: Any, x, adapted, weight, bias, down, up, scaling):  # type: ignore[no-untyped-def]
        down, up = down.to(x.dtype), up.to(x.dtype)
        adapter_input = x if adapted is None else adapted
        low = functional.linear(adapter_input, down)
        result = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        result.addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(adapter_input, weight, down, up, low)
        ctx.scaling, ctx.shared = scaling, adapted is None
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        adapter_input, weight, down, up, low = ctx.saved_tensors
        needs_x, needs_adapted, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        of_low = _scale(gradient @ up, ctx.scaling)
        of_up = _scale(gradient.t() @ low, ctx.scaling) if needs_up else None
        of_down = of_low.t() @ adapter_input if needs_down else None
        of_x = gradient @ weight.to(gradient.dtype) if needs_x else None
        if of_x is not None and ctx.shared:
            of_x.addmm_(of_low, down)
        of_adapted = of_low @ down if needs_adapted else None
        return of_x, of_adapted, None, None, of_down, of_up, None


class _AdaptedConvolution(torch.autograd.Function):
    """`conv2d(x, weight, bias) + scaling · conv1x1(low, up)`; low is the down-convolution's result.

    x `[B, in, H, W]` and low `[B, rank, H', W']` have the dtype of the result. Gradients of x, low and up; weight and
    bias are frozen.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, low, up, scaling, stride, padding):  # type: ignore[no-untyped-def]
        up = up.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        result = functional.conv2d(x, weight.to(x.dtype), bias, stride, padding)
        matrix = up.flatten(1)
        if result.is_contiguous(memory_format=torch.channels_last):
            rows = result.permute(0, 2, 3, 1).view(-1, result.shape[1])
            rows.addmm_(low.permute(0, 2, 3, 1).flatten(0, 2), matrix.t(), alpha=scaling)
        else:
            columns = result.view(*result.shape[:2], -1)
            columns.baddbmm_(matrix.expand(len(low), -1, -1), low.flatten(2), alpha=scaling)
        ctx.save_for_backward(x, weight, low, up)  # the down-convolution saves x as well
        ctx.scaling, ctx.stride, ctx.padding = scaling, stride, padding
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, low, up = ctx.saved_tensors
        needs_x, _, _, needs_low, needs_up, *_ = ctx.needs_input_grad
        of_x = None
        if needs_x:
            weight = weight.to(gradient.dtype)
            of_x, _, _ = _convolution_backward(gradient, x, weight, ctx.stride, ctx.padding, [True, False, False])
        of_low, of_up, _ = _convolution_backward(gradient, low, up, (1, 1), (0, 0), [needs_low, needs_up, False])
        scaled = [None if tensor is None else _scale(tensor, ctx.scaling) for tensor in (of_low, of_up)]
        return of_x, None, None, *scaled, None, None, None


def _convolution_backward(gradient, x, weight, stride, padding, wanted):  # type: ignore[no-untyped-def]
    """Gradients of a convolution's input, weight and bias, as far as they are `wanted`."""
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, wanted
    )


class Linear(peft_lora.Linear):
    """A linear layer with at most one active adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if self.disable_adapters:
            return self.base_layer(x)
        (adapter,) = self.active_adapters
        x = x.to(_dtype_of_pass(x, self.base_layer))
        rows = x.reshape(-1, x.shape[-1])
        dropout = self.lora_dropout[adapter]
        dropped = None if isinstance(dropout, torch.nn.Identity) else dropout(rows)
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        base, scaling = self.base_layer, self.scaling[adapter]
        result = _AdaptedLinear.apply(rows, dropped, base.weight, base.bias, down, up, scaling)
        return result.view(*x.shape[:-1], -1)


class Conv2d(peft_lora.Conv2d):
    """A convolution with at most one active adapter; with zero padding, without dilation and groups."""

    def __init__(self, base_layer: torch.nn.Conv2d, *args: Any, **options: Any):
        super().__init__(base_layer, *args, **options)
        assert (base_layer.padding_mode, base_layer.dilation, base_layer.groups) == ("zeros", (1, 1), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if self.disable_adapters:
            return self.base_layer(x)
        (adapter,) = self.active_adapters
        x = x.to(_dtype_of_pass(x, self.base_layer))
        base, down = self.base_layer, self.lora_A[adapter]
        stride, padding, scaling = base.stride, base.padding, self.scaling[adapter]
        low = functional.conv2d(  # type: ignore[call-overload]
            self.lora_dropout[adapter](x), down.weight.to(x.dtype), None, stride, padding
        )
        up = self.lora_B[adapter].weight
        return _AdaptedConvolution.apply(x, base.weight, base.bias, low, up, scaling, stride, padding)


LAYERS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {torch.nn.Linear: Linear, torch.nn.Conv2d: Conv2d}
