"""The layers of a LoRA against PEFT's own: values and gradients, kernels and bytes."""

import contextlib

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcm_distill.models import lora as lora_module
from lcm_distill.models.lora import STUDENT, TARGET, Lora
from lcm_distill.models.norms import set_norm_precision

aten = torch.ops.aten
NOT_KERNELS = {  # views, and memory that is only allocated
    aten.view.default, aten.t.default, aten.permute.default, aten.expand.default, aten.detach.default,
    aten._unsafe_view.default, aten.unsqueeze.default, aten.as_strided.default, aten.slice.Tensor,
    aten.transpose.int, aten.split.Tensor, aten.empty.memory_format, aten.empty_like.default,
}  # fmt: skip


class Small(torch.nn.Module):
    """A linear layer and convolutions as a U-Net's, by LCM-LoRA's names."""

    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(24, 40)
        self.to_k = torch.nn.Linear(24, 40, bias=False)
        self.conv1 = torch.nn.Conv2d(24, 40, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(24, 40, 3, padding=1, stride=2)
        self.conv_shortcut = torch.nn.Conv2d(24, 40, 1)


LAYERS = ("to_q", "to_k", "conv1", "conv2", "conv_shortcut")


@contextlib.contextmanager
def peft_layers(monkeypatch):
    """Inside, adapters are PEFT's own layers; their input is not cast to float32, as autocast casts it back at once."""
    with monkeypatch.context() as patch:
        patch.setattr(lora_module, "LAYERS", {})
        patch.setattr(LoraLayer, "cast_input_dtype_enabled", False, raising=False)
        yield


def adapted(monkeypatch, *, own: bool, dtype=torch.float32, channels_last=False, dropout=0.0, alpha=9):
    """`Small` with adapters on all layers, as a LoRA student has them; the same weights whether `own` or PEFT's."""
    unet = UNet2DConditionModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, cross_attention_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    small = Small().to(dtype)
    unet.small = small
    with contextlib.nullcontext() if own else peft_layers(monkeypatch):
        lora = Lora(unet, rank=6, alpha=alpha, dropout=dropout, target_modules=list(LAYERS))
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    if channels_last:
        small.to(memory_format=torch.channels_last)
    assert all(type(getattr(small, name)).__module__.startswith("lcm_distill" if own else "peft") for name in LAYERS)
    return lora, small


def example(layer: str, dtype, channels_last=False) -> torch.Tensor:
    shape = (2, 5, 24) if layer.startswith("to_") else (2, 24, 6, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return (x.to(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x).requires_grad_()


def run(small, layer: str, x: torch.Tensor, autocast: bool) -> dict[str, torch.Tensor]:
    """The layer's output, and the gradients of its input and of both factors."""
    small.zero_grad()
    torch.manual_seed(3)  # of the dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = getattr(small, layer)(x)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=output.dtype)
    output.backward(gradient)
    factors = {name: p.grad for name, p in getattr(small, layer).named_parameters() if p.requires_grad}
    assert len(factors) == 2 and all(value.dtype == torch.float32 for value in factors.values())
    return {"output": output.detach(), "x": x.grad} | factors


def errors(values, truth) -> dict[str, float]:
    return {name: float((value - truth[name]).norm() / truth[name].norm()) for name, value in values.items()}


@pytest.mark.parametrize("dropout, alpha", [(0.0, 9), (0.0, 6), (0.3, 9)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients_are_peft_s_in_float32(layer, channels_last, dropout, alpha, monkeypatch):
    options = {"channels_last": channels_last, "dropout": dropout, "alpha": alpha}
    results = []
    for own in (True, False):
        _, small = adapted(monkeypatch, own=own, **options)
        results.append(run(small, layer, example(layer, torch.float32, channels_last), autocast=False))
    mine, peft = results
    assert mine.keys() == peft.keys()
    assert max(errors(mine, peft).values()) < 1e-6
    assert mine["output"].stride() == peft["output"].stride() and mine["x"].stride() == peft["x"].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_under_autocast_no_value_is_further_from_the_truth_than_peft_s(layer, channels_last, dtype, monkeypatch):
    """In bf16, on a base of either precision; the truth is the same layer in float32, from the same rounded inputs."""
    results = {}
    for own in (True, False):
        _, small = adapted(monkeypatch, own=own, dtype=dtype, channels_last=channels_last)
        results[own] = run(small, layer, example(layer, torch.bfloat16, channels_last), autocast=True)
    lora, small = adapted(monkeypatch, own=False, dtype=dtype, channels_last=channels_last)
    for parameter in small.parameters():
        parameter.data = parameter.data.bfloat16().float()
    truth = run(small, layer, example(layer, torch.bfloat16, channels_last).detach().float().requires_grad_(), False)
    mine, peft = errors(results[True], truth), errors(results[False], truth)
    for name, error in mine.items():
        assert results[True][name].dtype == results[False][name].dtype
        assert error < 1.1 * peft[name] and error < 0.01, name
    assert mine["output"] < 0.8 * peft["output"]  # one rounding in place of three


class Counter(TorchDispatchMode):
    """Kernels, the bytes of the tensors that they read and write, and casts from float32 to bf16."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = self.casts = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in NOT_KERNELS:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.kernels += 1
            self.bytes += sum(t.nbytes for t in read + written)
            self.casts += function is aten._to_copy.default and read[0].dtype == torch.float32
        return result


@pytest.mark.parametrize("layer", LAYERS)
def test_fewer_kernels_move_fewer_bytes(layer, monkeypatch):
    counts = {}
    for own in (True, False):
        _, small = adapted(monkeypatch, own=own, dtype=torch.bfloat16)
        x = example(layer, torch.bfloat16)
        with Counter() as counts[own]:
            run(small, layer, x, autocast=True)
    assert counts[True].kernels <= counts[False].kernels - 3  # scaled, added; the gradient scaled
    assert counts[True].casts == 2  # each factor, once
    size = 2 * 2 * 40 * (5 if layer.startswith("to_") else 9 if layer == "conv2" else 36)
    assert counts[False].bytes - counts[True].bytes > 5 * size  # of the result's


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_u_net_is_the_same_with_peft_s_layers(family, checkpointing, teachers, monkeypatch):
    """Student, averaged target and teacher, and the student's gradients."""
    results = []
    for own in (True, False):
        unet = UNet2DConditionModel.from_pretrained(teachers[family], subfolder="unet")
        torch.manual_seed(0)
        with contextlib.nullcontext() if own else peft_layers(monkeypatch):
            lora = Lora(unet, rank=4, alpha=8, average=True)
        for seed, adapter in enumerate((STUDENT, TARGET)):
            generator = torch.Generator().manual_seed(seed)
            for parameter in lora.parameters(adapter):
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(9)
        given = {"encoder_hidden_states": torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)}
        if family == "sdxl":
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            embeds = torch.randn(2, width, generator=generator)
            given["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": torch.full((2, 6), 64.0)}
        x = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
        timesteps = torch.tensor([999, 19])
        with torch.no_grad(), lora.off():
            teacher = unet(x, timesteps, **given).sample
        with torch.no_grad(), lora.target():
            target = unet(x, timesteps, **given).sample
        student = unet(x, timesteps, **given).sample
        student.square().mean().backward()
        gradients = [parameter.grad for parameter in lora.parameters()]
        results.append([teacher, target, student.detach(), *gradients])
    assert torch.equal(results[0][0], results[1][0])
    for mine, peft in zip(*results, strict=True):  # 1e-5 was too little on a CPU with other kernels
        assert torch.allclose(mine, peft, rtol=1e-4, atol=1e-4 * float(peft.abs().max()))
    assert not torch.allclose(results[0][1], results[0][2], rtol=1e-2)  # the two adapters differ


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("block", ["down_blocks.1.resnets.0", "down_blocks.1.attentions.0.transformer_blocks.0"])
def test_a_block_compiles_in_one_graph_with_eager_s_gradients(block, dropout, teachers):
    """Dynamo breaks graphs at what it does not know, and in older versions took wrong gradients of in-place results."""
    unet = UNet2DConditionModel.from_pretrained(teachers["sd"], subfolder="unet")
    lora = Lora(unet, rank=4, alpha=8, dropout=dropout)
    set_norm_precision(unet)
    for parameter in lora.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    module = unet.get_submodule(block)
    generator = torch.Generator().manual_seed(1)
    if "resnets" in block:
        width = module.norm1.num_channels
        given = (
            torch.randn(2, width, 8, 8, generator=generator),
            torch.randn(2, module.time_emb_proj.in_features, generator=generator),
        )
    else:
        width = module.norm1.normalized_shape[0]
        text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
        given = torch.randn(2, 16, width, generator=generator), None, text
    results = []
    for function in (module, torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)):
        unet.zero_grad()
        torch.manual_seed(2)  # of the dropout
        x = given[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = function(x, *given[1:])
        output.float().square().sum().backward()
        factors = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        results.append([output.detach(), x.grad, *factors])
    assert len(results[0]) > 6
    for eager, compiled in zip(*results, strict=True):
        assert (eager.float() - compiled.float()).norm() <= 0.02 * eager.float().norm()
