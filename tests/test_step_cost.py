"""What predicts a step's time counts kernels, bytes and FLOPs as one does by hand, and what CUDA does otherwise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional

from benchmarks import fake_step, step_cost, train_step
from benchmarks.architectures import UNETS
from benchmarks.step_cost import (
    CASTS,
    CONVOLUTIONS,
    COPIES,
    ELEMENTS,
    KERNEL,
    LAYOUT,
    MEMORY,
    NORMS,
    OPTIMIZER,
    PRODUCTS,
    RECOMPUTED,
    TRANSPOSED_ELEMENTS,
    Case,
    Meter,
    Variant,
    compute,
    gpu_behaviour,
)
from lcm_distill.models import norms

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = UNet2DConditionModel.load_config(ROOT / "toy/teachers/sd/unet")
TINY = {name: value for name, value in _CONFIG.items() if name[0] != "_" and name != "time_cond_proj_dim"}
LAST = torch.channels_last


def half(*shape, **options):
    return torch.zeros(*shape, dtype=torch.bfloat16, **options)


def of(meter, kind):
    return meter.total(lambda part, its: its == kind)


def test_a_linear_layer_is_one_kernel_that_reads_its_operands_once():
    x, weight, bias = half(4, 16, 128), half(256, 128), half(256)
    with Meter() as meter:
        functional.linear(x, weight, bias).view(64, 256).t()[:8]
    total = meter.total()
    assert total == of(meter, PRODUCTS) and total.kernels == 1
    assert total.flops == 2 * 64 * 128 * 256
    assert total.bytes == 2 * (64 * 128 + 256 * 128 + 256 + 64 * 256)
    assert total.seconds == KERNEL  # it is too small to take longer


def test_a_product_added_in_place_spares_a_copy_of_the_sum():
    result, low, up = half(4096, 1024), half(4096, 64), half(64, 1024)
    product = 2 * (4096 * 64 + 64 * 1024 + 2 * 4096 * 1024)  # the sum is read and written
    with Meter() as in_place:
        result.addmm_(low, up, alpha=0.5)
    assert in_place.total().kernels == 1 and in_place.total().bytes == product
    assert in_place.total().flops == 2 * 4096 * 64 * 1024
    assert in_place.total().seconds == pytest.approx(product / MEMORY)
    with Meter() as out_of_place:
        torch.addmm(result, low, up)
    assert of(out_of_place, PRODUCTS) == of(in_place, PRODUCTS)
    assert of(out_of_place, COPIES).bytes == 2 * 2 * 4096 * 1024


def test_what_is_broadcast_is_read_once_and_what_is_only_written_is_not_read():
    x, row, out = torch.zeros(100, 50), torch.zeros(50), torch.zeros(100, 50)
    with Meter() as meter:
        x + row.expand(100, 50)
    assert meter.total().bytes == 4 * (5000 + 50 + 5000)
    with Meter() as meter:
        out.copy_(x)
    assert meter.total().bytes == 4 * 2 * 5000
    with Meter() as meter:
        x.mul_(2)
    assert meter.total().bytes == 4 * 2 * 5000


def test_autocasts_norms_write_a_float32_copy_and_read_it(monkeypatch):
    size, norm = 2 * 32 * 8 * 8, torch.nn.GroupNorm(8, 32).requires_grad_(False)
    monkeypatch.setattr(norms, "LOW_PRECISION", (norms.Norm,))
    costs = {}
    for float32 in (False, True):
        norms.set_norm_precision(norm, float32=float32)
        with torch.autocast("cpu", dtype=torch.bfloat16), Meter() as costs[float32]:
            norm(half(2, 32, 8, 8))
    low, full = costs[False], costs[True]
    assert of(low, NORMS).bytes == 2 * 3 * size and of(full, NORMS).bytes == 4 * 3 * size  # read for the moments, too
    assert of(low, CASTS).bytes == 2 * 32 * (4 + 2)  # weight and bias, which are float32
    assert of(full, CASTS).bytes == (2 + 4) * size


def test_cudas_group_norm_copies_a_channels_last_input_and_returns_the_default_format():
    x, elements = half(2, 64, 64, 64), 2 * 64 * 64 * 64
    for given, copies in ((x, 0), (x.to(memory_format=LAST), 1)):
        with gpu_behaviour(), Meter() as meter:
            given = half(2, 64, 64, 64).to(memory_format=LAST) if copies else half(2, 64, 64, 64)
            before = of(meter, LAYOUT).kernels
            result = functional.group_norm(given, 8)
        assert result.is_contiguous()
        assert of(meter, LAYOUT).kernels - before == copies
    assert of(meter, LAYOUT).seconds == pytest.approx(2 * elements / TRANSPOSED_ELEMENTS)  # there, and back


def test_cudas_layer_norm_copies_what_is_not_contiguous():
    x, size = half(2, 16, 64), 2 * 16 * 64
    for given, copies in ((x, 0), (half(2, 64, 16).transpose(1, 2), 1)):
        with Meter() as meter:
            functional.layer_norm(given, (64,))
        assert of(meter, LAYOUT).kernels == copies and of(meter, LAYOUT).bytes == copies * 2 * 2 * size
        assert of(meter, NORMS).bytes == 2 * 2 * size


@pytest.mark.parametrize("last, copies", [(True, 1), (False, 3)])
def test_a_convolution_has_its_operands_in_channels_last(last, copies):
    """PyTorch transposes the input for weights in that format; without them cuDNN does, the weights and result too."""
    x, weight, bias = half(2, 16, 8, 8), half(32, 16, 3, 3), half(32)
    weight = weight.to(memory_format=LAST) if last else weight
    with Meter() as meter:
        result = functional.conv2d(x, weight, bias, padding=1)
    assert result.is_contiguous(memory_format=LAST) == last
    assert of(meter, LAYOUT).kernels == copies
    assert of(meter, CONVOLUTIONS).flops == 2 * (2 * 8 * 8) * 32 * 16 * 9
    assert of(meter, CONVOLUTIONS).bytes == 2 * (x.numel() + weight.numel() + result.numel())
    assert of(meter, ELEMENTS).kernels == 1  # the bias, which cuDNN leaves to PyTorch


def test_a_frozen_convolutions_gradient_is_transposed_twice_if_its_input_was_not_channels_last():
    """PyTorch brings it into the input's format, then into the weights'."""
    for given, copies in ((half(2, 16, 8, 8), 2), (half(2, 16, 8, 8).to(memory_format=LAST), 0)):
        weight = half(32, 16, 3, 3).to(memory_format=LAST)
        result = functional.conv2d(given.requires_grad_(), weight, padding=1)
        gradient = torch.ones_like(result)
        with Meter() as meter:
            torch.autograd.grad(result, given, gradient)
        assert of(meter, LAYOUT).kernels == copies
        assert of(meter, CONVOLUTIONS).flops == 2 * (2 * 8 * 8) * 32 * 16 * 9


def test_operands_of_different_memory_formats_are_counted_and_slow():
    x, small = half(16, 64, 256, 256, device="meta"), half(16, 64, 1, 1, device="meta")
    other = x.to(memory_format=LAST)
    with Meter() as same:
        x + x
        other + other
        other + small
    with Meter() as mixed:
        mixed.begin("student")
        other + x
        torch.cat([x, other], dim=1)
    assert not same.mixed and mixed.mixed == {"student": 2}
    assert of(mixed, ELEMENTS).bytes == 2 * 3 * x.numel()
    assert of(mixed, ELEMENTS).seconds == x.numel() / TRANSPOSED_ELEMENTS
    assert of(same, ELEMENTS).seconds < of(mixed, ELEMENTS).seconds


def test_attentions_tiles_are_padded():
    assert step_cost.padding(64, 4096) == 1
    assert step_cost.padding(40, 4096) == 1.6
    assert step_cost.padding(40, 77) == pytest.approx(1.6 * 128 / 77)
    with Meter() as meter:
        query = half(2, 8, 256, 40)
        functional.scaled_dot_product_attention(query, query, query)
    assert meter.total(lambda part, kind: kind == "attention").flops == 4 * 2 * 8 * 256 * 256 * 40


def test_a_fused_adamw_is_one_pass_over_weights_gradients_and_moments():
    parameters = [torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(24))]
    costs = {}
    for fused in (True, False):
        optimizer = step_cost.build_optimizer(parameters, Case(), fused=fused)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with Meter() as meter:
            optimizer.step()
        costs[fused] = of(meter, OPTIMIZER)
    count = 2 * 4 * 2  # the number of steps of each tensor, float32, is read and written
    assert costs[True].bytes == 4 * 1024 * (4 + 3) + count and costs[True].kernels == 2
    assert costs[False].bytes > 2 * costs[True].bytes and costs[False].kernels > 5
    assert step_cost.launches([[torch.zeros(100)] * 300]) == 3
    assert step_cost.launches([[torch.empty(320 * 65536 * 2, device="meta")]]) == 2


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(UNETS, "half", TINY | {"layers_per_block": 1})  # SD's layout, quick
    monkeypatch.setattr(fake_step, "build_text_encoders", lambda name: [])
    monkeypatch.setattr(fake_step, "build_vae", lambda name: AutoencoderKL(latent_channels=4))
    return Case("lora_sd", "half", resolution=32, train_batch_size=2, vae_encode_batch_size=2)


def test_each_optimisation_of_a_lora_spares_what_it_is_for(tiny):
    on, peft = compute(tiny), compute(tiny, Variant("", ("fused LoRA layers", "low-precision layer norms")))
    before = compute(tiny, step_cost.BEFORE)
    last = compute(tiny, replace(step_cost.BEFORE, patches=()))
    again = compute(replace(tiny, gradient_checkpointing=True))
    assert on["tflop"] == peft["tflop"] == before["tflop"]
    layers = 100  # and more, each in three passes
    for kind in (ELEMENTS, CASTS):
        assert peft["by_kind"][kind]["kernels"] > on["by_kind"][kind]["kernels"] + 2 * layers, kind
    assert peft["by_kind"][NORMS]["gigabytes"] > on["by_kind"][NORMS]["gigabytes"]
    mixed, of_last = before["mixed_layouts"], last["mixed_layouts"]
    assert mixed["student"] > of_last.get("student", 0)  # adapters that are not channels-last
    assert before["by_part"]["VAE"]["kernels"] < on["by_part"]["VAE"]["kernels"]  # cuDNN copies nothing
    parts = again["by_part"]
    assert RECOMPUTED in parts and RECOMPUTED not in on["by_part"]
    assert 0.5 < parts[RECOMPUTED]["kernels"] / parts["student"]["kernels"] < 1
    assert again["kernels"] - parts[RECOMPUTED]["kernels"] == pytest.approx(on["kernels"], rel=0.01)


def test_what_stands_in_the_table_is_the_sum_of_parts_and_of_kinds(tiny):
    for case in (tiny, replace(tiny, program="sd")):
        row = compute(case)
        assert list(row["by_part"]) == ["VAE", "teacher", "target", "student", "backward", "optimizer"]
        for by in ("by_part", "by_kind"):
            assert sum(cost["kernels"] for cost in row[by].values()) == row["kernels"]
            assert math.isclose(sum(cost["ms"] for cost in row[by].values()), row["ms"], abs_tol=0.1)
    assert row["by_kind"][OPTIMIZER]["kernels"] > 2


def test_a_measurement_of_the_same_flags_stands_beside_the_prediction(tmp_path):
    case, results = Case("sd", "sd15", train_batch_size=16), tmp_path / "gpu-train_step.json"
    assert step_cost.measured_ms(case, step_cost.ALL_ON, results) is None
    name = "sd, sd15 at 512, batch 16, bf16"
    measured = {
        f"{name}0, --gradient_checkpointing": {"variants": {"all on": {"step_ms": 1}}},
        f"{name}, --dataloader_num_workers 4 --gradient_checkpointing": {"variants": {"all on": {"step_ms": 2}}},
        f"{name}, --dataloader_num_workers 4": {
            "variants": {"all on": {"step_ms": 3}, "without half networks without autocast": {"step_ms": 4}}
        },
        f"{name}, --float32_norms": {"variants": {"all on": {"step_ms": 5}}},
        f"{name}, --channels_last": {"variants": {"all on": {"step_ms": 6}}},
        f"{name}, --dm_weight 0.5 --dataloader_num_workers 4": {"variants": {"all on": {"step_ms": 7}}},
    }
    results.write_text(json.dumps(measured))
    for variant, found in (
        (step_cost.ALL_ON, 3),
        (Variant("without half networks without autocast", ("half networks without autocast",)), 4),
        (step_cost.CHANNELS_LAST, 6),
        (Variant("without low-precision layer norms", ("low-precision layer norms",)), 5),
        (Variant("without fused optimizer", ("fused optimizer",)), None),
    ):
        assert step_cost.measured_ms(case, variant, results) == found, variant
    sparing = replace(case, gradient_checkpointing=True)
    assert step_cost.measured_ms(sparing, step_cost.ALL_ON, results) == 2
    matching = replace(case, dm_steps=1)
    assert step_cost.switches(matching) == {"--dm_weight"}  # by which its row is called
    assert step_cost.measured_ms(matching, step_cost.ALL_ON, results) == 7


def test_what_can_be_turned_off_is_what_can_be_timed():
    """A row of another name would stand without what a GPU has measured."""
    assert step_cost.OPTIMISATIONS.keys() <= train_step.OPTIMISATIONS.keys()
