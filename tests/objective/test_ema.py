"""The target network's moving average."""

import pytest
import torch

from lcm_distill.objective.consistency import update_ema


def parameters(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,), (2, 2, 2))]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.999943, 1.0])
def test_update_is_the_formula(decay):
    target, source = parameters(0), parameters(1)
    expected = [decay * t.double() + (1 - decay) * s.double() for t, s in zip(target, source, strict=True)]
    update_ema(target, source, decay)
    for t, e in zip(target, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=1e-6, atol=1e-7)


def test_decay_0_copies_and_1_leaves_alone_bitwise():
    target, source, before = parameters(0), parameters(1), parameters(0)
    update_ema(target, source, 1.0)
    assert all(torch.equal(t, b) for t, b in zip(target, before, strict=True))
    update_ema(target, source, 0.0)
    assert all(torch.equal(t, s) for t, s in zip(target, source, strict=True))
    assert all(s.grad is None and s.requires_grad for s in source)
