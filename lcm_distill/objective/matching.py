"""Distribution matching (DMD2, arXiv 2405.14867) of the student's one-step answers x = f_θ(z_{n+k}).

    x_t    = α_t · x + σ_t · ε                                     x, noised anew to a drawn timestep
    g      = (x0_fake(x_t) − x0_real(x_t)) / mean|x − x0_real(x_t)|
    loss   = ½ · ‖x − stop(x − g)‖²                                `matching_loss`: its gradient with respect to x is g
    fake score's loss = ‖ε_fake(x_t) − ε‖²                         `denoising_loss`, on x without gradient

x0_real is the guided teacher's: the score of the pictures that the student is to generate. x0_fake is the fake score's:
a network that is trained, beside the student, on what the student generates. Their difference is the gradient of the
Kullback-Leibler divergence between the two distributions, so that x moves to where the teacher's are denser. Everything
but the networks is float32.
"""

import torch

# The least mean|x − x0_real|, in units of the latents' own standard deviation, by which the gradient is divided. At a
# small timestep the teacher finds little to change in a good x, and the quotient of two small numbers is all noise.
_MIN_SCALE = 0.05


def draw_timesteps(
    low: float, high: float, train_timesteps: int, batch: int, generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    """Timesteps int64 `[batch]`, uniform in [low · T, high · T), where T is the number of `train_timesteps`."""
    first = min(round(low * train_timesteps), train_timesteps - 1)
    last = max(first + 1, round(high * train_timesteps))
    return torch.randint(first, last, (batch,), generator=generator, device=device)


def matching_loss(x: torch.Tensor, real_x0: torch.Tensor, fake_x0: torch.Tensor) -> torch.Tensor:
    """The distribution matching loss of DMD2 (its equations 3 and 4, DMD's equation 8): a float32 scalar.

    A mean over all elements, like the consistency loss, so that the gradient of each picture is g over the number of
    elements. `x`, the student's answer, `real_x0` and `fake_x0` are `[B, …]`; the latter two are without gradient. A
    picture whose scores are not finite has no gradient.
    """
    x, real_x0, fake_x0 = x.float(), real_x0.detach().float(), fake_x0.detach().float()
    fixed = x.detach()
    dimensions = tuple(range(1, x.ndim))
    scale = (fixed - real_x0).abs().mean(dimensions, keepdim=True).clamp(min=_MIN_SCALE)
    gradient = torch.nan_to_num((fake_x0 - real_x0) / scale, nan=0.0, posinf=0.0, neginf=0.0)
    return 0.5 * (x - (fixed - gradient)).square().mean()


def denoising_loss(epsilon: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What trains the fake score: the mean of ‖ε_fake(x_t) − ε‖² over all elements, a float32 scalar."""
    return (epsilon.float() - noise.float()).square().mean()
