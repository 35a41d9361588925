"""Distribution matching against float64, and on Gaussian data, whose scores are known in closed form."""

import itertools

import pytest
import torch

from lcm_distill.objective.matching import denoising_loss, draw_timesteps, matching_loss
from lcm_distill.objective.schedule import NoiseSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def pictures(*spreads: float) -> list[torch.Tensor]:
    """Float32 `[5, 4, 8, 8]` of each spread."""
    generator = torch.Generator().manual_seed(0)
    return [spread * torch.randn(5, 4, 8, 8, generator=generator) for spread in spreads]


def gradient_of(x: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    matching_loss(x, real, fake).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_value_and_gradient_are_those_of_float64(dtype, tolerance):
    """The gradient of each picture is (x0_fake − x0_real) / mean|x − x0_real|, over the number of elements."""
    x, real, fake = (tensor.to(dtype).requires_grad_() for tensor in pictures(1.0, 0.7, 1.3))
    loss = matching_loss(x, real, fake)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward()
    assert real.grad is fake.grad is None
    x64, real64, fake64 = (tensor.detach().double() for tensor in (x, real, fake))
    g = torch.stack([(f - r) / (a - r).abs().mean() for a, r, f in zip(x64, real64, fake64, strict=True)])
    torch.testing.assert_close(x.grad.double(), g / x.numel(), rtol=tolerance, atol=1e-8)
    assert loss.item() == pytest.approx(float(0.5 * g.square().mean()), rel=1e-5)


def test_every_picture_is_scaled_by_its_own_distance():
    """A batch's common scale would let one poor picture silence the others."""
    x, real, fake = pictures(1.0, 1.0, 1.0)
    x[0] = real[0] + 100 * (x[0] - real[0])
    whole = gradient_of(x, real, fake)
    for number in range(len(x)):
        one = slice(number, number + 1)
        alone = gradient_of(x[one], real[one], fake[one]) / len(x)
        torch.testing.assert_close(whole[one], alone, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["real", "fake"])
def test_a_picture_whose_scores_are_not_finite_has_no_gradient_and_spoils_no_other(wrong, which):
    x, real, fake = pictures(1.0, 1.0, 1.0)
    expected = gradient_of(x, real, fake)
    broken = {"real": real, "fake": fake}[which]
    broken[2] = wrong
    gradient = gradient_of(x, real, fake)
    assert torch.isfinite(matching_loss(x, real, fake))
    assert not gradient[2].any()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(gradient[others], expected[others], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-3])
def test_where_the_teacher_finds_nothing_to_change_the_gradient_stays_small(distance):
    """Divided by mean|x − x0_real| alone it would be a thousand times, or infinitely, that of any other picture."""
    x, offset, difference = pictures(1.0, 1.0, 0.01)
    real = x - distance * offset
    gradient = gradient_of(x, real, real + difference)
    torch.testing.assert_close(gradient, difference / 0.05 / x.numel(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    "low, high, total, first, last",
    [(0.02, 0.98, 1000, 20, 979), (0, 1, 1000, 0, 999), (0.5, 0.503, 1000, 500, 502), (0.2, 0.5, 10, 2, 4)],
)
def test_timesteps_are_drawn_from_the_whole_range_and_no_further(low, high, total, first, last):
    generator = torch.Generator().manual_seed(0)
    drawn = draw_timesteps(low, high, total, 20_000, generator, "cpu")
    assert drawn.dtype == torch.int64 and drawn.shape == (20_000,)
    assert (int(drawn.min()), int(drawn.max())) == (first, last)
    counts = torch.bincount(drawn - first).double()
    expected = len(drawn) / (last - first + 1)
    assert (counts - expected).abs().max() < 6 * expected**0.5  # uniform: six standard deviations
    assert torch.equal(drawn, draw_timesteps(low, high, total, 20_000, generator.manual_seed(0), "cpu"))


@pytest.mark.parametrize("low, high, only", [(0.9999, 1, 999), (0, 1e-4, 0), (0.5, 0.5001, 500)])
def test_a_range_narrower_than_a_timestep_has_one(low, high, only):
    drawn = draw_timesteps(low, high, 1000, 64, torch.Generator().manual_seed(0), "cpu")
    assert set(drawn.tolist()) == {only}


def test_the_fake_score_s_loss_is_the_mean_square_in_float32():
    epsilon, noise = (tensor.bfloat16().requires_grad_() for tensor in pictures(1.0, 1.0))
    loss = denoising_loss(epsilon, noise)
    loss.backward()
    difference = epsilon.detach().double() - noise.detach().double()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(float(difference.square().mean()), rel=1e-6)
    torch.testing.assert_close(epsilon.grad.double(), 2 * difference / difference.numel(), rtol=0.01, atol=1e-8)


# ------------------------------------------------------------------------------------------------- Gaussian data

MEAN = torch.tensor([0.8, -0.5, 0.1, 0.3]).view(1, 4, 1, 1)  # of the teacher's data, by dimension
SPREAD = torch.tensor([0.6, 1.1, 0.4, 0.9]).view(1, 4, 1, 1)


def levels(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma `[B, 1, 1, 1]`, from Stable Diffusion's betas."""
    betas = torch.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    return alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()


def gaussian_x0(noisy: torch.Tensor, timesteps: torch.Tensor, mean, spread) -> torch.Tensor:
    """E[x0 | x_t] where the data is N(mean, spread²)."""
    alpha, sigma = levels(timesteps)
    return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (noisy - alpha * mean)


def distances(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """How far the student's N(b, a²) is from the teacher's data: the largest of the means', and of the spreads'."""
    return float((b - MEAN).detach().abs().max()), float((a.abs() - SPREAD).detach().abs().max())


def test_a_gaussian_student_becomes_the_teacher_s_distribution():
    """The student x = a·z + b, with both scores in closed form, at random timesteps.

    With the opposite sign, or real and fake exchanged, a and b move away; without one of the scores they end elsewhere.
    """
    schedule, generator = NoiseSchedule.from_config(SD), torch.Generator().manual_seed(0)
    a = torch.full((1, 4, 1, 1), 0.2, requires_grad=True)
    b = torch.zeros(1, 4, 1, 1, requires_grad=True)
    assert min(distances(a, b)) > 0.5
    optimizer = torch.optim.Adam([a, b], lr=0.03)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(500):
        x = a * torch.randn(128, 4, 2, 2, generator=generator) + b
        timesteps = draw_timesteps(0.02, 0.98, len(schedule), len(x), generator, "cpu")
        noisy = schedule.add_noise(x.detach(), torch.randn(x.shape, generator=generator), timesteps)
        real = gaussian_x0(noisy, timesteps, MEAN, SPREAD)
        fake = gaussian_x0(noisy, timesteps, b.detach(), a.detach())
        optimizer.zero_grad()
        matching_loss(x, real, fake).backward()
        optimizer.step()
        decay.step()
    assert max(distances(a, b)) < 1e-3


def test_a_fake_score_that_learns_beside_the_student_leads_to_the_same_end():
    """In two time scales: five steps of the fake score on the student's answers for each of the student's.

    Pictures noised by another schedule than the scores' would give a fake score, and so a student, of another spread.
    It knows the family, ε = σ·(x_t − α·mean) / (α²·spread² + σ²), and learns mean and spread from `denoising_loss`.
    """
    schedule, generator = NoiseSchedule.from_config(SD), torch.Generator().manual_seed(0)
    a = torch.full((1, 4, 1, 1), 0.2, requires_grad=True)
    b = torch.zeros(1, 4, 1, 1, requires_grad=True)
    fake_mean = torch.zeros(1, 4, 1, 1, requires_grad=True)
    fake_spread = torch.ones(1, 4, 1, 1, requires_grad=True)
    student = torch.optim.Adam([a, b], lr=0.02, betas=(0.0, 0.99))
    score = torch.optim.Adam([fake_mean, fake_spread], lr=0.02, betas=(0.0, 0.99))
    rates = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.992) for optimizer in (student, score)]
    for step in itertools.count():
        x = a * torch.randn(128, 4, 2, 2, generator=generator) + b
        for _ in range(5):
            timesteps = draw_timesteps(0, 1, len(schedule), len(x), generator, "cpu")
            noise = torch.randn(x.shape, generator=generator)
            noisy = schedule.add_noise(x.detach(), noise, timesteps)
            x0 = gaussian_x0(noisy, timesteps, fake_mean, fake_spread)
            alpha, sigma = levels(timesteps)
            score.zero_grad()
            denoising_loss((noisy - alpha * x0) / sigma, noise).backward()
            score.step()
        if step == 400:
            break
        timesteps = draw_timesteps(0.02, 0.98, len(schedule), len(x), generator, "cpu")
        noisy = schedule.add_noise(x.detach(), torch.randn(x.shape, generator=generator), timesteps)
        real = gaussian_x0(noisy, timesteps, MEAN, SPREAD)
        student.zero_grad()
        matching_loss(x, real, gaussian_x0(noisy, timesteps, fake_mean, fake_spread)).backward()
        student.step()
        for rate in rates:
            rate.step()
    assert max(distances(a, b)) < 0.03
    assert max(distances(fake_spread, fake_mean)) < 0.03  # and the fake score found the student
