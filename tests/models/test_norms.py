"""Norms in the precision of the other layers and in float32, under autocast and without it."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from lcm_distill.models.norms import Norm, set_norm_precision

KINDS = {"group": lambda: torch.nn.GroupNorm(4, 16), "layer": lambda: torch.nn.LayerNorm(16)}


def made(kind: str) -> torch.nn.Module:
    norm = KINDS[kind]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(16, generator=generator))
        norm.bias.copy_(0.3 * torch.randn(16, generator=generator))
    return norm


def given(kind: str) -> torch.Tensor:
    """Values around 4, in bf16: a mean and a variance that are summed in bf16 would be visibly wrong."""
    x = 4 + torch.randn((2, 16, 9, 9) if kind == "group" else (2, 9, 16), generator=torch.Generator().manual_seed(1))
    return x.bfloat16()


@pytest.mark.parametrize(
    "kind, float32, dtype, tolerance",
    [
        ("layer", False, torch.bfloat16, 0.02),
        ("layer", True, torch.float32, 1e-5),
        ("group", False, torch.float32, 1e-5),
        ("group", True, torch.float32, 1e-5),
    ],
)
def test_under_autocast_a_norm_has_its_precision(kind, float32, dtype, tolerance):
    """The truth is PyTorch's norm of the same values in float64; both precisions sum in float32."""
    norm, x = made(kind), given(kind).requires_grad_()
    exact, exact_x = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    set_norm_precision(norm, float32=float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    expected = exact(exact_x)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(gradient.to(dtype))
    expected.backward(gradient.to(dtype).double())
    assert output.dtype == dtype and x.grad.dtype == torch.bfloat16
    assert norm.weight.dtype == norm.weight.grad.dtype == torch.float32
    # The gradient of x is bf16 in any case.
    pairs = [(output, expected, tolerance), (x.grad, exact_x.grad, 0.01)]
    pairs += [(mine.grad, p.grad, tolerance) for mine, p in zip(norm.parameters(), exact.parameters(), strict=True)]
    for mine, truth, limit in pairs:
        assert (mine.double() - truth).norm() < limit * truth.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_without_autocast_a_norm_is_pytorch_s(kind):
    norm, x = made(kind), given(kind).float()
    expected = norm(x)
    for float32 in (False, True):
        set_norm_precision(norm, float32=float32)
        assert torch.equal(norm(x), expected)
    set_norm_precision(norm)
    norm.bfloat16()
    assert norm(given(kind)).dtype == torch.bfloat16  # a half network computes as it does in the pipelines


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_all_norms_of_a_u_net_change_and_its_file_does_not(family, teachers, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(teachers[family], subfolder="unet")
    names, norms = list(unet.state_dict()), [m for m in unet.modules() if "Norm" in type(m).__name__]
    set_norm_precision(unet)
    twin = copy.deepcopy(unet)  # as the target is made
    for network in (unet, twin):
        changed = [m for m in network.modules() if isinstance(m, Norm)]
        assert len(changed) == len(norms) > 20
        assert all(m.low_precision == isinstance(m, torch.nn.LayerNorm) for m in changed)
        assert any(m.low_precision for m in changed)
    set_norm_precision(twin, float32=True)
    assert not any(getattr(m, "low_precision", False) for m in twin.modules())
    assert list(unet.state_dict()) == names
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), unet.parameters(), strict=True))
