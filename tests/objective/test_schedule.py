"""The schedule and the solver against Diffusers' own schedulers and a closed-form ODE."""

import ast
import inspect
import logging
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import DummyObject
from diffusers.utils import logging as diffusers_logging

from lcm_distill.errors import UsageError
from lcm_distill.objective.consistency import ConsistencyFunction
from lcm_distill.objective.schedule import (
    BETA_SCHEDULERS,
    DDIMSolver,
    NoiseSchedule,
    build_lcm_scheduler,
    complete_schedule,
)
from lcm_distill.sampling.generate import build_teacher_sampler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TYPES = ["epsilon", "v_prediction", "sample"]


def schedule(**more) -> NoiseSchedule:
    return NoiseSchedule.from_config(SD | more)


def network_output(kind: str, x0, epsilon, alpha, sigma):
    """The output of a perfect network of that prediction type."""
    return {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[kind]


def test_noising_is_that_of_diffusers():
    torch.manual_seed(0)
    x0, epsilon = torch.randn(2, 64, 4, 4, 4)
    timesteps = torch.randint(1000, (64,))
    expected = DDPMScheduler(**SD).add_noise(x0, epsilon, timesteps)
    torch.testing.assert_close(schedule().add_noise(x0, epsilon, timesteps), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_latents_are_noised_in_float32():
    """The public programs noise in bf16, where sigma is 5 % off at t = 19, and recover x0 in float32."""
    x0, epsilon = torch.randn(2, 8, 4, 4, 4).bfloat16()
    timesteps = torch.full((8,), 19)
    noisy = schedule().add_noise(x0, epsilon, timesteps)
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy, schedule().add_noise(x0.float(), epsilon.float(), timesteps), rtol=0, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_predictions_invert_the_noising(kind):
    torch.manual_seed(0)
    s = schedule(prediction_type=kind)
    timesteps = torch.arange(0, 1000, 9)
    x0, epsilon = torch.randn(2, len(timesteps), 3, 2, 2)
    alpha, sigma = s.alphas[timesteps].view(-1, 1, 1, 1), s.sigmas[timesteps].view(-1, 1, 1, 1)
    noisy = s.add_noise(x0, epsilon, timesteps)
    output = network_output(kind, x0, epsilon, alpha, sigma)
    # Dividing by a small alpha (or sigma) magnifies float32's rounding: the bound follows it.
    torch.testing.assert_close(s.predict_x0(output, noisy, timesteps), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(s.predict_epsilon(output, noisy, timesteps), epsilon, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr_stays_finite(kind):
    s = schedule(prediction_type=kind, rescale_betas_zero_snr=True)
    assert s.alphas[-1] == 0
    x = torch.randn(2, 4, 8, 8)
    top = torch.full((2,), 999)
    for value in (s.predict_x0(x, x, top), s.predict_epsilon(x, x, top), s.add_noise(x, x, top)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
@pytest.mark.parametrize(
    "betas",
    [
        SD | {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_end": 1.0},
        {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_end": 0.1},
        {"num_train_timesteps": 5, "trained_betas": [0.1, 0.2, 0.3, 0.4, 1.0]},
        {"num_train_timesteps": 5, "trained_betas": [0.1, 0.2, 0.3, 0.4, 0.5], "rescale_betas_zero_snr": True},
    ],
    ids=["rescaled", "linear to 1", "linear to 0.1", "trained", "trained and rescaled"],
)
def test_noise_prediction_at_zero_snr_is_refused(name, betas):
    """Pictures were not a number, and a dry run said that all worked."""
    config = {"_class_name": name, "prediction_type": "epsilon"} | betas
    for given in (config, {key: value for key, value in config.items() if key != "prediction_type"}):
        with pytest.raises(UsageError, match="prediction_type is epsilon, and its last timestep is pure noise.*set"):
            NoiseSchedule.from_config(given)
    assert NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"}).alphas[-1] < 1e-10


def test_a_small_last_alpha_is_divided_by_as_in_the_sampler():
    """The cosine schedule's last alpha, 5e-5, was replaced by 2e-4: x0 was four times smaller than the sampler's."""
    config = SD | {"beta_schedule": "squaredcos_cap_v2"}
    s, scheduler = NoiseSchedule.from_config(config), DDIMScheduler(**config, clip_sample=False)
    scheduler.set_timesteps(1000)
    noisy, output = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = scheduler.step(output, 999, noisy).pred_original_sample
    ours = s.predict_x0(output, noisy, torch.tensor([999]))
    # The oracle's own 1 − alpha_bar and square root are float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


# --- schedulers' configs


def defaults_in_source(name: str) -> dict[str, object]:
    """The defaults of a Diffusers class, read from its source: some cannot be imported without further packages."""
    for file in Path(diffusers.__file__).parent.joinpath("schedulers").glob("scheduling_*.py"):
        if f"class {name}(" in file.read_text():
            break
    (found,) = (node for node in ast.parse(file.read_text()).body if getattr(node, "name", None) == name)
    (init,) = (node for node in found.body if getattr(node, "name", None) == "__init__")
    names = [argument.arg for argument in init.args.args][-len(init.args.defaults) :]
    pairs = zip(names, init.args.defaults, strict=True)
    return {key: value.value for key, value in pairs if isinstance(value, ast.Constant)}


@pytest.mark.parametrize("name", sorted(BETA_SCHEDULERS))
def test_what_a_config_leaves_out_has_its_own_class_s_default(name):
    """The betas were DDPM's in training, LCM's in the exported sampler: σ/α at the last timestep 157 and 15."""
    theirs = {"rescale_betas_zero_snr": False} | defaults_in_source(name)
    ours = complete_schedule({"_class_name": name})
    assert ours == {key: theirs[key] for key in ours} and len(ours) == 7


OPTIONS = [
    {},
    {"num_train_timesteps": 500},
    {"beta_end": 0.012},
    {"beta_schedule": "scaled_linear"},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"num_train_timesteps": 20, "trained_betas": [0.01 * step for step in range(1, 21)]},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    # What only a sampler reads.
    {"use_karras_sigmas": True, "timestep_spacing": "linspace", "steps_offset": 7, "final_sigmas_type": "sigma_min"},
    {"set_alpha_to_one": True, "interpolation_type": "log_linear", "lower_order_final": False, "solver_order": 3},
    # As later versions write them for schedulers of betas too.
    {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "sigma_max": None, "sigma_min": None},
]


def own_alphas_cumprod(name: str, options: dict) -> torch.Tensor:
    """Those of a Diffusers class, created with the options that it has, before it lifts a last alpha of 0."""
    kind = getattr(diffusers, name)
    known = inspect.signature(kind).parameters.keys() - {"rescale_betas_zero_snr"}
    theirs = kind(**{key: value for key, value in options.items() if key in known})
    if "rescale_betas_zero_snr" in options:  # some classes do not have it: then it says what the model is
        theirs = DDIMScheduler(len(theirs.betas), trained_betas=theirs.betas.tolist(), rescale_betas_zero_snr=True)
    return theirs.alphas_cumprod


@pytest.mark.parametrize("name", sorted(BETA_SCHEDULERS))
def test_the_schedule_is_that_of_the_teacher_s_own_class(name):
    if isinstance(getattr(diffusers, name), DummyObject):
        pytest.skip(f"{name} needs a package that is not installed")
    slow = name.startswith(("KDPM2", "LMS"))
    for options in (OPTIONS[0], OPTIONS[6]) if slow else OPTIONS:
        schedule = NoiseSchedule.from_config({"_class_name": name} | options)
        expected = own_alphas_cumprod(name, options)
        assert torch.equal(schedule.alphas, expected.double().sqrt().float()), options
        assert schedule.prediction_type == options.get("prediction_type", "epsilon")


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "TCDScheduler"])
def test_all_samplers_have_the_schedule_that_is_trained(name, tmp_path):
    """Each class had its own defaults for what the teacher's config leaves out, and so did each class made of it."""
    for options in OPTIONS:
        config = {"_class_name": name} | options
        expected = own_alphas_cumprod(name, options)
        lcm = build_lcm_scheduler(config, 10, 7.0)
        lcm.save_pretrained(tmp_path)
        reloaded = LCMScheduler.from_pretrained(tmp_path)
        ddim, dpm_solver = build_teacher_sampler(config), build_teacher_sampler(config, "DPM-Solver++")
        for sampler in (lcm, reloaded, ddim, dpm_solver):
            assert torch.equal(sampler.alphas_cumprod[:-1], expected[:-1]), options
            last = 2**-24 if sampler is dpm_solver and expected[-1] == 0 else expected[-1]  # it divides by it
            assert sampler.alphas_cumprod[-1] == last
            assert sampler.config.prediction_type == options.get("prediction_type", "epsilon")
            # A sampler of a sampler's config, as the commands make them, has it too.
            assert torch.equal(build_lcm_scheduler(sampler.config).alphas_cumprod, lcm.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "TCDScheduler"])
def test_the_exported_config_has_lcm_s_entries_alone_and_loads_without_a_warning(name, tmp_path):
    """`LCMScheduler.from_pretrained` warned of up to eight entries of the teacher's scheduler."""
    teacher = dict(getattr(diffusers, name)(**SD).config) | {"sigma_max": None, "skip_prk_steps": True, "mine": 1}
    build_lcm_scheduler(teacher | {"_class_name": name}).save_pretrained(tmp_path)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    diffusers_logging.add_handler(handler)
    try:
        reloaded = LCMScheduler.from_pretrained(tmp_path)
    finally:
        diffusers_logging.remove_handler(handler)
    assert messages == []
    saved = LCMScheduler.load_config(tmp_path)
    assert {key for key in saved if not key.startswith("_")} == inspect.signature(LCMScheduler).parameters.keys()
    assert saved["_class_name"] == "LCMScheduler"
    # Whatever scheduler a user makes of it, from the file or from the reloaded one, has the schedule too.
    for kind in (DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.TCDScheduler):
        assert torch.equal(kind.from_config(saved).alphas_cumprod, reloaded.alphas_cumprod)


@pytest.mark.parametrize(
    "clipping",
    [
        {"_class_name": "DDIMScheduler"},  # its default
        {"_class_name": "DDPMScheduler", "clip_sample": True, "clip_sample_range": 2.0},
        {"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": True},
        {"_class_name": "LCMScheduler", "clip_sample": True, "thresholding": True, "sample_max_value": 2.0},
    ],
)
def test_no_sampler_clips(clipping):
    """A teacher's clip_sample was exported: latents, of which many are beyond ±1, were clipped."""
    config = SD | clipping
    x0, epsilon = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = 5 * x0
    for sampler in (build_lcm_scheduler(config), build_teacher_sampler(config)):
        sampler.set_timesteps(1)
        (start,) = sampler.timesteps
        noisy = sampler.add_noise(x0, epsilon, sampler.timesteps)
        answer = sampler.step(epsilon, start, noisy)
        found = answer.denoised if isinstance(sampler, LCMScheduler) else answer.pred_original_sample
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)
    sampler = build_teacher_sampler(config, "DPM-Solver++")
    assert not sampler.config.thresholding


EDM, FLOW, UNKNOWN = "continuous noise levels of EDM", "flow matching", "is not known here"


@pytest.mark.parametrize(
    "config, words",
    [
        # CosXL's
        (
            {
                "_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
                "sigma_data": 1.0, "sigma_max": 120.0, "sigma_min": 0.002, "sigma_schedule": "exponential",
            },
            rf"EDMEulerScheduler\) has the {EDM}",
        ),
        # Playground v2.5's
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "sigma_schedule": "karras"}, EDM),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, EDM),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, FLOW),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, FLOW),
        ({"_class_name": "FlowMatchLCMScheduler"}, FLOW),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "shifts the signal-to-noise ratio"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, rf"CMStochasticIterativeScheduler\) {UNKNOWN}"),
        ({"_class_name": "UnCLIPScheduler"}, UNKNOWN),
        ({"_class_name": "FlaxDDIMScheduler"}, UNKNOWN),
        ({"_class_name": "MyScheduler"}, UNKNOWN),
        ({"_class_name": ["mine", "MyScheduler"]}, UNKNOWN),
        ({"_class_name": 5}, UNKNOWN),
        # A known class that its entries make another kind.
        (SD | {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, f"use_flow_sigmas True.*{FLOW}"),
        (SD | {"_class_name": "DPMSolverMultistepScheduler", "use_dynamic_shifting": True}, FLOW),
        (SD | {"_class_name": "EulerDiscreteScheduler", "shift": 3.0}, f"shift 3.0.*{FLOW}"),
        (SD | {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "sigma_max": 700.0}, EDM),
        (SD | {"_class_name": "DPMSolverMultistepScheduler", "sigma_data": 0.5}, f"sigma_data 0.5.*{EDM}"),
        (SD | {"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}, "shifts the signal-to-noise ratio"),
        ({"num_train_timesteps": 1000, "sigma_data": 0.5, "sigma_schedule": "karras"}, EDM),
        ({"num_train_timesteps": 1000, "shift": 3.0}, FLOW),
        # Entries that are not what they should be.
        (SD | {"predict_epsilon": False}, "predict_epsilon false"),
        (SD | {"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr is 'false'; it must be true or false"),
        (SD | {"trained_betas": [0.1, 0.2]}, "trained_betas must be 1000 numbers.*not 2;"),
        (SD | {"trained_betas": 0.1}, "trained_betas must be 1000 numbers"),
    ],
)  # fmt: skip
def test_a_scheduler_of_another_kind_is_refused_with_the_reason(config, words):
    """Students were trained on an invented schedule of betas."""
    for build in (NoiseSchedule.from_config, build_lcm_scheduler, build_teacher_sampler):
        with pytest.raises(UsageError, match=f"^--pretrained_teacher_model: its scheduler.*{words}"):
            build(config)
    with pytest.raises(UsageError, match="^--student x: its scheduler"):
        build_lcm_scheduler(config, given="--student x")


@pytest.mark.parametrize("kind", ["flow_prediction", "trigflow", "edm", "v", None])
def test_an_unknown_prediction_type_of_a_config_is_refused(kind):
    with pytest.raises(UsageError, match=re.escape(f"prediction_type {kind!r} is not supported")):
        NoiseSchedule.from_config(SD | {"prediction_type": kind})


def test_every_scheduler_of_diffusers_is_known_or_refused():
    """All that Diffusers itself takes for Stable Diffusion are known, except EDM's."""
    names = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert len(names) > 40 and names >= BETA_SCHEDULERS.keys()
    for name in names - BETA_SCHEDULERS.keys():
        with pytest.raises(UsageError, match=name):
            NoiseSchedule.from_config({"_class_name": name})
    assert {kind.name for kind in KarrasDiffusionSchedulers} - BETA_SCHEDULERS.keys() == {"EDMEulerScheduler"}


def test_unknown_prediction_type_is_named():
    with pytest.raises(UsageError, match="flow_prediction"):
        NoiseSchedule(torch.linspace(0.99, 0.01, 10), "flow_prediction")


@pytest.mark.parametrize("steps", [1, 4, 7, 48, 50, 333, 999, 1000])
def test_grid_is_diffusers_trailing_spacing_up_to_the_last_timestep(steps):
    """A grid that does not divide 1000 left the top timesteps, where sampling starts, untrained."""
    scheduler = DDIMScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    solver = DDIMSolver(schedule(), steps)
    theirs = scheduler.timesteps.flip(0)[-steps:]
    assert solver.timesteps[-1] == 999
    assert len(solver) == steps
    # Where T / steps ends in .5, Diffusers' accumulated sum rounds either way.
    assert (solver.timesteps[-len(theirs) :] - theirs).abs().max() <= (0 if 1000 % steps == 0 else 1)
    assert (solver.timesteps >= solver.previous_timesteps).all()
    assert torch.equal(solver.previous_timesteps[1:], solver.timesteps[:-1])


@pytest.mark.parametrize("steps", [0, 1001])
def test_grid_out_of_range_names_the_flag(steps):
    with pytest.raises(UsageError, match="--num_ddim_timesteps"):
        DDIMSolver(schedule(), steps)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("steps", [10, 50])
def test_solver_step_is_ddim(kind, steps):
    torch.manual_seed(1)
    s = schedule(prediction_type=kind)
    solver = DDIMSolver(s, steps)
    scheduler = DDIMScheduler(
        **SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    noisy, output = torch.randn(2, steps, 4, 4, 4)
    index = torch.arange(steps)
    start = solver.timesteps[index]
    ours = solver.step(s.predict_x0(output, noisy, start), s.predict_epsilon(output, noisy, start), index)
    for i in range(steps):
        theirs = scheduler.step(output[i], int(start[i]), noisy[i]).prev_sample
        torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-4)
    assert ours.dtype == torch.float32


def test_solver_follows_the_exact_ode_of_gaussian_data():
    """For data N(m, s²) the optimal ε̂ and the probability-flow ODE are known; DDIM's error falls with the step size."""
    mean, spread = 0.7, 0.6
    s = schedule()

    def level(timesteps):
        return (s.alphas[timesteps] ** 2 * spread**2 + s.sigmas[timesteps] ** 2).sqrt().double()

    def error(steps: int) -> float:
        solver = DDIMSolver(s, steps)
        z = torch.randn(256, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        top = torch.tensor([999])
        x = (s.alphas[top].double() * mean + level(top) * z).float()
        for i in reversed(range(steps)):
            index = torch.full((len(x),), i)
            t = solver.timesteps[index]
            alpha, sigma = s.alphas[t].view(-1, 1, 1, 1), s.sigmas[t].view(-1, 1, 1, 1)
            epsilon = sigma * (x - alpha * mean) / level(t).float().view(-1, 1, 1, 1) ** 2
            x = solver.step(s.predict_x0(epsilon, x, t), epsilon, index)
        zero = torch.tensor([0])
        exact = s.alphas[zero].double() * mean + level(zero) * z
        return float((x.double() - exact).abs().max())

    coarse, middle, fine = error(20), error(100), error(500)
    assert coarse > 3 * middle and middle > 3 * fine  # first order: five times the steps, about a fifth of the error
    assert fine < 0.01


@pytest.mark.parametrize("steps", [7, 48, 50, 25, 1000])
def test_sampler_starts_at_the_last_timestep_and_stays_on_the_trained_grid(steps):
    scheduler = build_lcm_scheduler(SD, num_ddim_timesteps=steps, timestep_scaling=7.0)
    assert isinstance(scheduler, LCMScheduler) and scheduler.config.timestep_scaling == 7.0
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999
    if 1000 % steps == 0:
        assert set(scheduler.timesteps.tolist()) <= set(DDIMSolver(schedule(), steps).timesteps.tolist())


@pytest.mark.parametrize("options", [SD, SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
def test_sampling_starts_at_a_lower_top_timestep_with_the_teacher_s_schedule(options, tmp_path):
    """By default, in any pipeline, and in any scheduler that a user makes of the saved one."""
    build_lcm_scheduler(options, 12, 7.0, 599).save_pretrained(tmp_path)
    sampler = LCMScheduler.from_pretrained(tmp_path)
    expected = LCMScheduler(**complete_schedule(options)).alphas_cumprod[:600]
    solver = DDIMSolver(NoiseSchedule.from_config(options), 12, 599)
    assert solver.timesteps.tolist() == list(range(49, 600, 50)) and len(solver) == 12
    assert solver.previous_timesteps.tolist() == [0, *range(49, 550, 50)]
    for made in (sampler, DDIMScheduler.from_config(sampler.config)):
        assert torch.equal(made.alphas_cumprod, expected)
    assert sampler.config.prediction_type == options.get("prediction_type", "epsilon")
    for steps, timesteps in {1: [599], 2: [599, 299], 4: [599, 449, 299, 149]}.items():
        sampler.set_timesteps(steps)
        assert sampler.timesteps.tolist() == timesteps
    # One step of it is the consistency function at 599.
    noise, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler.set_timesteps(1)
    consistency = ConsistencyFunction(solver.schedule, 7.0)
    torch.testing.assert_close(
        sampler.step(output, sampler.timesteps[0], noise).denoised,
        consistency(output, noise, solver.timesteps[-1:]),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_lower_top_timestep_starts_from_noise_alone():
    """As sampling does; all other grid points have the schedule's noise, and so has the last of the whole schedule."""
    x0, noise = torch.randn(2, 12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(12)
    for top in (None, 999, 599):
        solver = DDIMSolver(schedule(), 12, top)
        noisy = solver.add_noise(x0, noise, index)
        expected = schedule().add_noise(x0, noise, solver.timesteps)
        assert torch.equal(noisy[:-1], expected[:-1])
        assert torch.equal(noisy[-1], noise[-1] if top == 599 else expected[-1])


@pytest.mark.parametrize(
    "top, steps, message",
    [
        (1000, 50, "--top_timestep 1000: the teacher's last timestep is 999; use that or less."),
        (600, 50, "--top_timestep 600: the 601 timesteps up to it are no multiple of .* 50.* or 649."),
        (30, 50, "--top_timestep 30: .*; use 49."),
        (980, 600, "--top_timestep 980: .*; use 599."),
    ],
)  # fmt: skip
def test_a_top_timestep_that_samplers_could_not_start_at_is_refused(top, steps, message):
    with pytest.raises(UsageError, match=message):
        build_lcm_scheduler(SD, steps, 10.0, top)


def test_the_last_top_timestep_is_the_whole_schedule():
    for steps in (7, 50):
        assert build_lcm_scheduler(SD, steps, 10.0, 999).config == build_lcm_scheduler(SD, steps, 10.0).config


def test_the_last_index_is_drawn_more_often_if_asked():
    """At 0 the draw, and all that follow, are those of `torch.randint` alone, as before the option existed."""
    solver = DDIMSolver(schedule(), 50)
    before, after = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected = torch.randint(50, (4000,), generator=before)
    drawn = solver.draw_index(4000, 0.0, after)
    assert drawn.dtype == torch.int64 and torch.equal(drawn, expected)
    assert torch.equal(before.get_state(), after.get_state())
    assert solver.draw_index(64, 1.0, after).tolist() == [49] * 64
    drawn = solver.draw_index(4000, 0.5, after)
    top = drawn == 49
    assert abs(float(top.double().mean()) - (0.5 + 0.5 / 50)) < 0.04  # five standard deviations
    counts = torch.bincount(drawn[~top], minlength=49)
    assert len(counts) == 49 and (counts - 40).abs().max() < 32  # the others are uniform
