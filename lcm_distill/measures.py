"""How far a student is from its teacher, in latents: no further network, so for any teacher and at any time.

relative_distance    one step: is this the end of the teacher's own trajectory from the same noise?
energy_distance      several steps, which add noise of their own: is this the same distribution?
"""

import torch


def relative_distance(answers: torch.Tensor, ends: torch.Tensor) -> float:
    """The mean over samples of ‖answer − end‖ / ‖end‖, of `[N, …]` each, in pairs: 0 is perfect.

    With `ends` the ends of the guided teacher's DDIM trajectories and `answers` what the student makes of the same
    noise in one step, it is how far distillation is from what it promises (f(z_T) = z_0, arXiv 2310.04378). An answer
    of nothing at all has 1.
    """
    answers, ends = _as_rows(answers), _as_rows(ends)
    if answers.shape != ends.shape:
        raise ValueError(f"answers {list(answers.shape)} and ends {list(ends.shape)} must come in pairs")
    return float(((answers - ends).norm(dim=1) / ends.norm(dim=1)).mean())


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The energy coefficient of two distributions, from N samples of each, `[N, …]`: 0 if equal, 1 if far apart.

    (2·E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖) / 2·E‖a − b‖, of Székely and Rizzo (2013). All means are over pairs i ≠ j, so
    that samples that belong together (one prompt, one noise) do not count as close, and the estimate can be a little
    below 0. Needs two or more of each, and as many of the one as of the other.
    """
    a, b = _as_rows(a), _as_rows(b)
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"as many samples of each are needed, two or more, not {len(a)} and {len(b)}")
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    across, within_a, within_b = (torch.cdist(x, y)[others].mean() for x, y in ((a, b), (a, a), (b, b)))
    return float((2 * across - within_a - within_b) / (2 * across))


def _as_rows(samples: torch.Tensor) -> torch.Tensor:
    return samples.detach().double().flatten(1)
