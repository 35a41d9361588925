"""The objective against Diffusers' `LCMScheduler`, closed forms and float64, forward and backward."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import LCMScheduler

from lcm_distill.objective.consistency import (
    ConsistencyFunction,
    boundary_scalings,
    consistency_loss,
    guided_prediction,
    unet_output,
)
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Linear(torch.nn.Module):
    """A stand-in for a U-Net: a·x plus the means of the text embedding, the guidance embedding and the time ids."""

    def __init__(self, a: float = 0.5):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a))
        self.calls: list[int] = []

    def forward(self, sample, timestep, encoder_hidden_states, timestep_cond=None, added_cond_kwargs=None):
        self.calls.append(len(sample))
        output = self.a.to(sample.dtype) * sample + encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        if timestep_cond is not None:
            output = output + timestep_cond.mean(dim=1)[:, None, None, None]
        if added_cond_kwargs:
            assert not added_cond_kwargs["time_ids"].is_floating_point()
            output = output + added_cond_kwargs["time_ids"].float().mean(dim=1)[:, None, None, None]
        return SimpleNamespace(sample=output)


@pytest.mark.parametrize("scaling", [1.0, 10.0, 33.0])
def test_boundary_scalings_are_those_of_the_sampler(scaling):
    scheduler = LCMScheduler(timestep_scaling=scaling)
    c_skip, c_out = boundary_scalings(torch.arange(1000), scaling)
    assert c_skip.dtype == c_out.dtype == torch.float32
    for t in (0, 1, 2, 5, 19, 259, 999):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        torch.testing.assert_close(c_skip[t].item(), float(skip), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(c_out[t].item(), float(out), rtol=1e-5, atol=1e-9)


def test_consistency_function_is_the_identity_at_timestep_zero():
    f = ConsistencyFunction(NoiseSchedule.from_config(SD))
    x, output = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(f(output, x, torch.zeros(3, dtype=torch.int64)), x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_consistency_function_is_what_the_sampler_computes(kind):
    scheduler = LCMScheduler(**SD, prediction_type=kind, timestep_scaling=8.0)
    scheduler.set_timesteps(4)
    f = ConsistencyFunction(NoiseSchedule.from_config(SD | {"prediction_type": kind}), timestep_scaling=8.0)
    x, output = torch.randn(2, 1, 4, 8, 8)
    for t in scheduler.timesteps:
        expected = scheduler.step(output, t, x, generator=torch.Generator()).denoised
        torch.testing.assert_close(f(output, x, t[None]), expected, rtol=2e-4, atol=2e-4)


def test_gradient_through_the_consistency_function_is_the_closed_form():
    """d loss / d ε̂ = 2/N · (f − target) · c_out · (−σ/α), re-derived in float64."""
    schedule = NoiseSchedule.from_config(SD)
    t = torch.tensor([19, 499, 999])
    x, output, target = torch.randn(3, 3, 4, 8, 8)
    output.requires_grad_()
    consistency_loss(ConsistencyFunction(schedule)(output, x, t), target).backward()
    alpha, sigma = (v[t].double().view(-1, 1, 1, 1) for v in (schedule.alphas, schedule.sigmas))
    s = 10.0 * t.double().view(-1, 1, 1, 1)
    skip, out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()
    f = skip * x + out * (x - sigma * output.detach()) / alpha
    expected = 2 / x.numel() * (f - target) * out * (-sigma / alpha)
    torch.testing.assert_close(output.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_losses_and_their_gradients():
    a, b = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    for kind, value, slope in (
        ("l2", (a - b) ** 2, 2 * (a - b)),
        ("huber", ((a - b) ** 2 + 1e-4).sqrt() - 1e-2, (a - b) / ((a - b) ** 2 + 1e-4).sqrt()),
    ):
        x = a.float().requires_grad_()
        loss = consistency_loss(x, b.float(), kind, huber_c=1e-2)
        loss.backward()
        torch.testing.assert_close(loss.double(), value.mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(x.grad.double(), slope / a.numel(), rtol=1e-4, atol=1e-8)


def test_losses_are_float32_and_zero_for_equal_tensors():
    x = torch.randn(2, 4, 8, 8)
    for kind in ("l2", "huber"):
        assert consistency_loss(x.bfloat16(), x.bfloat16(), kind) == 0
        assert consistency_loss(x.bfloat16(), x.half(), kind).dtype == torch.float32
        assert consistency_loss(x, x.double() + 1, kind).dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guided_teacher_is_one_batched_pass_of_the_paper_s_formula(kind):
    schedule = NoiseSchedule.from_config(SD | {"prediction_type": kind})
    solver = DDIMSolver(schedule, 50)
    teacher = Linear()
    x = torch.randn(5, 4, 8, 8)
    index = torch.tensor([0, 10, 20, 30, 49])
    t = solver.timesteps[index]
    cond, empty = {"encoder_hidden_states": torch.randn(5, 3, 8)}, {"encoder_hidden_states": torch.randn(1, 3, 8)}
    w = torch.tensor([0.0, 1.0, 3.0, 7.5, 14.0])
    x0, epsilon = guided_prediction(teacher, schedule, x, t, cond, empty, w)
    assert teacher.calls == [10]
    steps = []
    for conditioning in (cond, {"encoder_hidden_states": empty["encoder_hidden_states"].expand(5, 3, 8)}):
        output = unet_output(teacher, x, t, conditioning)
        predictions = schedule.predict_x0(output, x, t), schedule.predict_epsilon(output, x, t)
        steps.append(solver.step(*predictions, index))
    wide = w.view(-1, 1, 1, 1)
    expected = (1 + wide) * steps[0] - wide * steps[1]
    torch.testing.assert_close(solver.step(x0, epsilon, index), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(solver.step(x0, epsilon, index)[0], steps[0][0], rtol=1e-6, atol=1e-6)  # w = 0
    assert x0.dtype == epsilon.dtype == torch.float32 and not x0.requires_grad and not epsilon.requires_grad


@pytest.mark.parametrize("w", [torch.tensor([0.5, 3.0, 8.0]), 0.0], ids=["guided", "w = 0"])
@pytest.mark.parametrize("rows, sizes", [(1, [1] * 6), (4, [4, 2]), (6, [6]), (7, [6])])
def test_the_teacher_in_several_passes_equals_the_teacher_in_one(w, rows, sizes):
    """`--teacher_batch_size`, with SDXL's nested conditioning and where it does not divide the rows."""
    schedule = NoiseSchedule.from_config(SD)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([19, 499, 999])
    added = {"time_ids": torch.randint(9, (3, 1))}
    cond = {"encoder_hidden_states": torch.randn(3, 3, 8), "added_cond_kwargs": added}
    empty = {"encoder_hidden_states": torch.randn(1, 3, 8), "added_cond_kwargs": added}
    teacher = Linear()
    parts = guided_prediction(teacher, schedule, x, t, cond, empty, w, batch_size=rows)
    assert teacher.calls == (sizes if isinstance(w, torch.Tensor) else [min(rows, 3)] * (3 // min(rows, 3)))
    at_once = guided_prediction(teacher, schedule, x, t, cond, empty, w)
    for part, expected in zip(parts, at_once, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


def test_guided_teacher_concatenates_nested_conditioning():
    """SDXL's conditioning holds a mapping; its integer time ids must not be rounded to the teacher's dtype."""
    teacher = Linear().bfloat16()
    cond = {
        "encoder_hidden_states": torch.zeros(2, 3, 8),
        "added_cond_kwargs": {"time_ids": torch.tensor([[1023], [7]])},
    }
    empty = {"encoder_hidden_states": torch.zeros(1, 3, 8), "added_cond_kwargs": {"time_ids": torch.tensor([[5]])}}
    schedule = NoiseSchedule.from_config(SD | {"prediction_type": "sample"})
    x0, _ = guided_prediction(
        teacher,
        schedule,
        torch.zeros(2, 4, 1, 1),
        torch.tensor([3, 3]),
        cond,
        empty,
        torch.ones(2),
        dtype=torch.bfloat16,
    )
    torch.testing.assert_close(x0[:, 0, 0, 0], torch.tensor([1023.0 * 2 - 5, 7.0 * 2 - 5]))


def test_the_exact_model_of_gaussian_data_is_self_consistent():
    """For N(m, s²) data the consistency function is known; with the exact teacher its loss falls with the grid."""
    mean, spread = 0.3, 0.5
    schedule = NoiseSchedule.from_config(SD)

    def variance(t):
        return schedule.alphas[t] ** 2 * spread**2 + schedule.sigmas[t] ** 2

    def wide(values):
        return values.view(-1, 1, 1, 1)

    def exact(x, t):  # the end of x's trajectory at timestep 0
        zero = torch.zeros_like(t)
        ratio = (variance(zero) / variance(t)).sqrt()
        return wide(schedule.alphas[zero]) * mean + wide(ratio) * (x - wide(schedule.alphas[t]) * mean)

    def loss(steps):
        solver = DDIMSolver(schedule, steps)
        index = torch.arange(steps).repeat(2000 // steps)
        t, end = solver.timesteps[index], solver.previous_timesteps[index]
        g = torch.Generator().manual_seed(0)
        x0 = mean + spread * torch.randn(len(t), 1, 4, 4, generator=g)
        noise = torch.randn(len(t), 1, 4, 4, generator=g)
        x = schedule.add_noise(x0, noise, t)
        epsilon = wide(schedule.sigmas[t] / variance(t)) * (x - wide(schedule.alphas[t]) * mean)
        previous = solver.step(schedule.predict_x0(epsilon, x, t), epsilon, index)
        return consistency_loss(exact(x, t), exact(previous, end))

    coarse, middle, fine = loss(10), loss(50), loss(200)
    assert fine < 0.3 * middle and middle < 0.3 * coarse
    assert fine < 1e-4
