"""Generated pictures equal those of Diffusers' pipelines; noise depends only on a seed; img2img."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from lcm_distill.errors import UsageError
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.vae import encode_pixels
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule
from lcm_distill.sampling.finished import load_teacher
from lcm_distill.sampling.generate import (
    build_teacher_sampler,
    check_steps,
    count_steps,
    generate_from_picture,
    generate_latents,
    steps_before_strength,
)

PROMPTS = ["a small red circle on a black background", "a large blue square on a white background", "a green star"]
SEEDS = [3, 5, 2**40]
IMG2IMG = {"sd": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}
SETTINGS = dict(inference_steps=2, guidance_scale=3.0, batch_size=2)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family, teachers):
    return load_teacher(Teacher(teachers[family]), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def picture():
    """A red disc in the toy world's manner, with soft colours."""
    y, x = np.mgrid[:64, :64]
    inside = ((x - 24) ** 2 + (y - 40) ** 2 < 14**2)[..., None]
    return Image.fromarray(np.where(inside, (200, 30, 40), (20, 20, 60)).astype(np.uint8))


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- samplers


def test_the_teacher_s_ddim_follows_the_solver_s_grid(teachers):
    """With as many steps as the solver's grid has points, it ends where the solver's trajectory does."""
    config = DDIMScheduler.load_config(teachers["sd"], subfolder="scheduler")
    sampler, schedule = build_teacher_sampler(config), NoiseSchedule.from_config(config)
    solver = DDIMSolver(schedule, 10)
    sampler.set_timesteps(10)
    assert sampler.timesteps.tolist() == solver.timesteps.flip(0).tolist() and sampler.timesteps[0] == 999
    x = y = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for index in reversed(range(10)):
        t = solver.timesteps[index : index + 1]
        x = sampler.step(torch.sin(3 * x), t.item(), x).prev_sample
        output = torch.sin(3 * y)
        y = solver.step(
            schedule.predict_x0(output, y, t), schedule.predict_epsilon(output, y, t), torch.tensor([index])
        )
    # The alpha_bar of DDIM's last step is that of timestep 0, where the solver's grid ends.
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_teacher_s_dpm_solver_starts_at_the_last_timestep(pipeline, steps):
    sampler = build_teacher_sampler(pipeline.scheduler.config, "DPM-Solver++")
    assert isinstance(sampler, DPMSolverMultistepScheduler)
    sampler.set_timesteps(steps)
    assert len(sampler.timesteps) == steps and sampler.timesteps[0] == 999


@pytest.mark.parametrize("name", ["DDIM", "DPM-Solver++"])
@pytest.mark.parametrize(
    "options",
    [
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "solver_type": "bh1", "thresholding": True},
        {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min", "use_beta_sigmas": True},
        {"_class_name": "DDIMScheduler", "clip_sample": True, "set_alpha_to_one": True, "timestep_spacing": "leading"},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 3},
    ],
)
def test_the_teacher_s_own_options_do_not_change_a_named_sampler(name, options):
    """ "DPM-Solver++" was an SDE solver, on another grid, for a teacher with that in its config."""
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sampler = build_teacher_sampler(betas | options, name)
    expected = {
        "DDIM": DDIMScheduler(**betas, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False),
        "DPM-Solver++": DPMSolverMultistepScheduler(**betas, timestep_spacing="trailing"),
    }[name]
    ends = []
    for scheduler in (sampler, expected):
        scheduler.set_timesteps(8)
        x = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(3 * x), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends) and ends[0].abs().max() > 1


@pytest.mark.parametrize(
    "sampler, most", [(LCMScheduler(original_inference_steps=20), 20), (DDIMScheduler(num_train_timesteps=500), 500)]
)
def test_more_steps_than_the_grid_has_are_refused_with_their_flag(sampler, most):
    check_steps("--steps", most, sampler)
    sampler.set_timesteps(most)  # does not raise
    with pytest.raises(UsageError, match=rf"--steps {most + 1}: .* at most {most} steps"):
        check_steps("--steps", most + 1, sampler)
    with pytest.raises(ValueError):
        sampler.set_timesteps(most + 1)
    check_steps("--steps", most // 2, sampler, strength=0.5)
    with pytest.raises(UsageError, match=rf"at most {most // 2} steps at --strength 0.5"):
        check_steps("--steps", most // 2 + 1, sampler, strength=0.5)


def test_steps_before_strength_are_the_fewest_of_which_diffusers_takes_as_many():
    for strength in [*(n / 100 for n in range(1, 101)), 0.999, 1 / 3]:
        for steps in (1, 2, 3, 4, 7, 8, 25, 29, 50):
            total = steps_before_strength(steps, strength)
            assert int(total * strength) == steps and int((total - 1) * strength) < steps, (steps, strength)
    assert steps_before_strength(29, 0.29) == 101  # 100 · 0.29 is 28.999999999999996


# --- from noise


def test_latents_are_those_of_the_pipeline_called_one_by_one(pipeline):
    """With a negative prompt, in a batch of other prompts and seeds."""
    generated = generate_latents(pipeline, PROMPTS, SEEDS, resolution=64, negative_prompt="blue", **SETTINGS)
    expected = torch.cat(
        [
            pipeline(
                prompt, negative_prompt="blue", num_inference_steps=2, guidance_scale=3.0, generator=generator,
                output_type="latent",
            ).images
            for prompt, generator in zip(PROMPTS, generators(), strict=True)
        ]
    )  # fmt: skip
    torch.testing.assert_close(generated, expected, rtol=1e-4, atol=1e-4)
    without = generate_latents(pipeline, PROMPTS, SEEDS, resolution=64, **SETTINGS)
    assert (without - generated).abs().amax((1, 2, 3)).min() > 0.01  # the negative prompt changes each picture


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_each_step_of_each_batch_is_counted(guidance_scale, pipeline):
    """Guided or not: two passes of the guided teacher are one of twice the batch."""
    counted, options = [], SETTINGS | {"resolution": 64, "guidance_scale": guidance_scale, "batch_size": 2}
    latents = generate_latents(pipeline, PROMPTS, SEEDS, on_step=lambda: counted.append(1), **options)
    assert len(counted) == count_steps(len(PROMPTS), 2, SETTINGS["inference_steps"]) == 4
    assert torch.equal(latents, generate_latents(pipeline, PROMPTS, SEEDS, **options)) and len(counted) == 4


def test_pictures_of_another_shape_have_latents_of_that_shape(pipeline):
    latents = generate_latents(pipeline, PROMPTS[:1], SEEDS[:1], resolution=(96, 32), **SETTINGS)
    assert latents.shape[2:] == (32 // pipeline.vae_scale_factor, 96 // pipeline.vae_scale_factor)


def test_the_batch_does_not_matter_with_a_sampler_that_draws(pipeline):
    """`LCMScheduler` draws new noise between its steps: that too comes from the picture's own seed."""
    scheduler = pipeline.scheduler
    pipeline.scheduler = LCMScheduler.from_config(scheduler.config)
    try:
        options = SETTINGS | {"resolution": 64, "guidance_scale": 1.0}
        together = generate_latents(pipeline, PROMPTS, SEEDS, **options | {"batch_size": 3})
        alone = generate_latents(pipeline, PROMPTS, SEEDS, **options | {"batch_size": 1})
        last = generate_latents(pipeline, PROMPTS[2:], SEEDS[2:], **options)
    finally:
        pipeline.scheduler = scheduler
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(last, alone[2:])


def test_generating_restores_the_mode_even_after_an_error_and_uses_no_global_randomness(pipeline):
    before = torch.get_rng_state()
    pipeline.unet.train()
    generate_latents(pipeline, PROMPTS[:1], SEEDS[:1], resolution=64, **SETTINGS)
    assert pipeline.unet.training
    with pytest.raises(ValueError):
        generate_latents(pipeline, PROMPTS[:1], SEEDS[:1], resolution=64, **SETTINGS | {"inference_steps": 2000})
    assert pipeline.unet.training and torch.equal(before, torch.get_rng_state())
    pipeline.unet.eval()


# --- from a picture


@pytest.mark.parametrize("sampler", ["DDIM", "LCM"])
def test_img2img_equals_diffusers_and_takes_the_given_steps(pipeline, family, picture, sampler):
    scheduler, passes = pipeline.scheduler, []
    if sampler == "LCM":
        pipeline.scheduler = LCMScheduler.from_config(scheduler.config)
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    try:
        generated = generate_from_picture(
            pipeline, picture, PROMPTS[:2], SEEDS[:2], strength=0.6, inference_steps=2, guidance_scale=3.0, batch_size=2
        )
        hook.remove()
        own = {"force_zeros_for_empty_prompt": pipeline.config.get("force_zeros_for_empty_prompt")}
        own = own if family == "sdxl" else {"requires_safety_checker": False}
        img2img = IMG2IMG[family](**pipeline.components, **own)
        img2img.set_progress_bar_config(disable=True)
        expected = torch.cat(
            [
                img2img(
                    prompt, image=picture, strength=0.6, num_inference_steps=4, guidance_scale=3.0,
                    generator=generator, output_type="latent",
                ).images
                for prompt, generator in zip(PROMPTS[:2], generators()[:2], strict=True)
            ]
        )  # fmt: skip
    finally:
        hook.remove()
        pipeline.scheduler = scheduler
    assert passes == [4] * 2  # two pictures, two passes each, and two steps of the four
    torch.testing.assert_close(generated, expected, rtol=1e-4, atol=1e-4)


def test_img2img_at_low_strength_returns_the_picture(pipeline, picture):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    there_and_back = encode_pixels(pipeline.vae, pixels, 1, torch.Generator().manual_seed(0))

    def distance(strength, steps):
        options = dict(strength=strength, inference_steps=steps, guidance_scale=1.0, batch_size=1)
        return (generate_from_picture(pipeline, picture, PROMPTS[:1], [0], **options) - there_and_back).abs().mean()

    near, far = distance(0.02, 1), distance(1.0, 4)
    assert near < 0.3 * there_and_back.abs().mean() and far > 2 * near


def test_img2img_leaves_the_vae_as_it_was(teachers, picture):
    """Diffusers' SDXL img2img pipeline casts a VAE that must stay float32 to half precision, where it overflows."""
    pipeline = load_teacher(Teacher(teachers["sdxl"]), device="cpu", dtype=torch.bfloat16)
    pipeline.vae.register_to_config(force_upcast=True)
    torch.nn.Module.to(pipeline.vae, torch.float32)
    before = copy.deepcopy(pipeline.vae.state_dict())
    latents = generate_from_picture(
        pipeline, picture, PROMPTS[:1], [0], strength=0.5, inference_steps=1, guidance_scale=1.0, batch_size=1
    )
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.vae.state_dict().items())
    assert pipeline.vae.dtype == torch.float32
