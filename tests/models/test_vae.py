"""Pictures that are not finite are said to be."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lcm_distill.models.vae import decode_latents


def fake_vae(limit: float = float("inf"), dtype: torch.dtype = torch.float32):
    """A VAE whose pixels are its latents, in red; above `limit` they are not a number."""

    def decode(latents):
        return SimpleNamespace(sample=torch.where(latents > limit, torch.nan, latents).repeat(1, 3, 1, 1))

    config = SimpleNamespace(scaling_factor=1.0)
    return SimpleNamespace(config=config, device=torch.device("cpu"), dtype=dtype, decode=decode)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_that_are_not_finite_are_reported(value, dtype):
    """They became black pictures without a word."""
    latents = torch.ones(3, 1, 2, 2)
    latents[1, 0, 1, 1] = value
    said = []
    pictures = decode_latents(fake_vae(dtype=dtype), latents, 2, said.append)
    assert said == [
        "1 of 3 pictures are not finite, and shown black: their latents are not, so the network or its sampler failed"
    ]
    assert np.asarray(pictures[0]).min() == 255 and np.asarray(pictures[1])[1, 1].tolist() == [0, 0, 0]
    assert np.asarray(pictures[1])[0, 0].tolist() == [255, 255, 255]


@pytest.mark.hostile("teachers")
def test_a_vae_that_overflows_is_reported(caplog):
    latents = torch.tensor([0.0, 9.0]).reshape(2, 1, 1, 1)
    with caplog.at_level(logging.WARNING):
        decode_latents(fake_vae(limit=5.0, dtype=torch.float16), latents, 1)
    assert caplog.messages == [
        "1 of 2 pictures are not finite, and shown black: their latents are, so the VAE, in float16, overflowed"
    ]


def test_of_finite_pictures_nothing_is_said(caplog):
    (picture,) = decode_latents(fake_vae(), torch.full((1, 1, 2, 2), -1e30), 1)
    assert not caplog.records and np.asarray(picture).max() == 0
