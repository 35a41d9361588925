"""Distances in latents compared with closed forms and properties."""

import math

import pytest
import torch

from lcm_distill.sampling.metrics import GeneratedRow, LatentDistances, energy_distance, relative_distance, spread


def test_relative_distance_of_known_latents():
    ends = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert relative_distance(ends, ends) == 0
    assert relative_distance(torch.zeros_like(ends), ends) == 1
    assert relative_distance(ends + 0.25 * ends, ends) == pytest.approx(0.25)
    # The mean of each sample's own ratio, whatever its norm.
    scale = torch.tensor([1e-2, 1.0, 1e2, 1.0, 1.0])[:, None, None, None]
    worse = ends.clone()
    worse[2] = -worse[2]
    assert relative_distance(scale * worse, scale * ends) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="in pairs"):
        relative_distance(ends[:4], ends)


@pytest.mark.parametrize("mean", [0.0, 0.5, 3.0])
def test_energy_distance_of_two_normal_distributions(mean):
    """E|N(m, s²)| = s √(2/π) exp(−m²/2s²) + m erf(m / s√2); the difference of two samples has s² = 2."""

    def absolute(m):
        return math.sqrt(4 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)

    expected = (2 * absolute(mean) - 2 * absolute(0)) / (2 * absolute(mean))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2000, 1, generator=generator), mean + torch.randn(2000, 1, generator=generator)
    assert energy_distance(a, b) == pytest.approx(expected, abs=0.01)
    assert energy_distance(b, a) == pytest.approx(energy_distance(a, b), abs=1e-12)


def test_energy_distance_is_zero_for_one_set_and_does_not_count_pairs_as_close():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 4, 8, 8, generator=generator)
    assert energy_distance(a, a) == 0
    # Independent or in pairs, the distributions are the same. Over all pairs i, j, the second would differ from 0.
    assert abs(energy_distance(a, torch.randn(64, 4, 8, 8, generator=generator))) < 2e-3
    assert abs(energy_distance(a, a + 1e-3 * torch.randn(a.shape, generator=generator))) < 1e-5
    assert energy_distance(a, 0 * a) == pytest.approx(0.5 * (2 - _mean_distance(a) / _mean_norm(a)), rel=1e-6)
    for other in (a[:10], a[:1]):
        with pytest.raises(ValueError, match="same number of samples"):
            energy_distance(other[:1] if len(other) == 1 else a, other)


def _mean_distance(a):
    rows = a.double().flatten(1)
    return float(torch.stack([(rows[i] - rows[j]).norm() for i in range(64) for j in range(64) if i != j]).mean())


def _mean_norm(a):
    return float(a.double().flatten(1).norm(dim=1).mean())


def test_diversity_is_the_mean_distance_of_the_pictures_of_one_prompt():
    """A student that always generates one picture of a prompt has none, however far its prompts are apart."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 4, 8, 8, generator=generator)
    prompts = ["a", "b", "a", "c", "a"]
    pairs = [(latents[i].double() - latents[j].double()).norm() for i, j in ((0, 2), (0, 4), (2, 4))]
    assert spread(latents, prompts) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)
    assert spread(latents, list("abcde")) == 0

    def row(values: torch.Tensor, given: list[str]) -> GeneratedRow:
        return GeneratedRow(given, values, 4, None)

    metric = LatentDistances(row(latents, prompts))
    assert metric(row(latents, prompts))["diversity"] == 1
    assert metric(row(0.25 * latents, prompts))["diversity"] == pytest.approx(0.25)
    collapsed = latents[[0, 1, 0, 3, 0]]
    assert metric(row(collapsed, prompts))["diversity"] == 0
    assert "diversity" not in LatentDistances(row(latents, list("abcde")))(row(latents, list("abcde")))
