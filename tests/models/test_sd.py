"""The Stable Diffusion family: captions and latents compared with the pipeline's."""

import warnings

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from lcm_distill.models import sd
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.vae import encode_pixels
from lcm_distill.objective.schedule import build_lcm_scheduler
from lcm_distill.sampling.generate import build_teacher_sampler


@pytest.fixture(scope="module")
def frozen(teacher):
    return sd.load_frozen(Teacher(teacher), device="cpu", dtype=torch.float32)


def test_captions_are_encoded_as_the_pipeline_does(teacher, frozen):
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    captions = ["a small red circle on a black background", "", "no such words", "a " * 60]
    expected, empty = pipeline.encode_prompt(captions, "cpu", 1, True, negative_prompt=[""] * 4)
    torch.testing.assert_close(sd.encode_captions(frozen, captions)["encoder_hidden_states"], expected, rtol=0, atol=0)
    ours = sd.encode_captions(frozen, [""])["encoder_hidden_states"]
    torch.testing.assert_close(ours.expand_as(empty), empty, rtol=1e-5, atol=1e-5)


def test_latents_are_the_vae_s_posterior_scaled(frozen):
    pixels = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    latents = encode_pixels(frozen.vae, pixels, batch_size=2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = frozen.vae.encode(pixels / 127.5 - 1.0).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(1)) * frozen.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert latents.dtype == torch.float32 and latents.shape == (5, 4, 16, 16)


def test_latents_do_not_depend_on_the_encoding_batch_size(frozen):
    pixels = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    one, all_ = (
        encode_pixels(frozen.vae, pixels, batch_size=n, generator=torch.Generator().manual_seed(1)) for n in (1, 32)
    )
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-4)


def test_the_shift_of_a_vae_is_subtracted(frozen):
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)

    def encode():
        return encode_pixels(frozen.vae, pixels, batch_size=1, generator=torch.Generator().manual_seed(1))

    unshifted = encode()
    frozen.vae.register_to_config(shift_factor=0.5)
    try:
        expected = unshifted - 0.5 * frozen.vae.config.scaling_factor
        torch.testing.assert_close(encode(), expected, rtol=1e-4, atol=1e-5)
    finally:
        frozen.vae.register_to_config(shift_factor=None)


def test_frozen_parts_are_frozen(frozen):
    for network in (frozen.text_encoder, frozen.vae, frozen.unet):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("version", ["0.6.0", "0.30.0"])
def test_a_pipeline_edits_neither_scheduler_nor_u_net(version, frozen):
    """Diffusers' pipeline does: what was exported depended on whether pictures had been generated before.

    Of a scheduler it replaces the offset and the clipping, of an old U-Net a sample_size below 64.
    """
    unet = UNet2DConditionModel.from_config(dict(frozen.unet.config) | {"_diffusers_version": version})
    scheduler = LCMScheduler(clip_sample=True, steps_offset=0)
    before = dict(unet.config), dict(scheduler.config)
    assert unet.config.sample_size == 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = sd.build_pipeline(frozen, unet, scheduler)
        pipeline.scheduler.set_timesteps(4)
    assert (dict(unet.config), dict(scheduler.config)) == before
    assert pipeline.unet is unet and pipeline.vae is frozen.vae
    assert scheduler.num_inference_steps is None and len(pipeline.scheduler.timesteps) == 4


def test_a_pipeline_with_the_project_s_samplers_has_nothing_to_edit(frozen, recwarn):
    config = {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0}
    for scheduler in (build_lcm_scheduler(config), build_teacher_sampler(config)):
        pipeline = sd.build_pipeline(frozen, frozen.unet, scheduler)
        assert dict(pipeline.scheduler.config) == dict(scheduler.config)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
