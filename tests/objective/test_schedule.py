"""The schedule and the solver against Diffusers' own schedulers and a closed-form ODE."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler

from lcm_distill.errors import UsageError
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule, build_lcm_scheduler

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


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_zero_terminal_snr_stays_finite(kind):
    s = schedule(prediction_type=kind, rescale_betas_zero_snr=True)
    assert s.alphas[-1] == 0
    x = torch.randn(2, 4, 8, 8)
    top = torch.full((2,), 999)
    for value in (s.predict_x0(x, x, top), s.predict_epsilon(x, x, top), s.add_noise(x, x, top)):
        assert torch.isfinite(value).all()


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
