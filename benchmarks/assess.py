"""The metrics of a finished student of a toy teacher, for the benchmarks that train several."""

from collections.abc import Sequence

import torch

from lcm_distill import evaluate
from lcm_distill.models.teacher import Teacher
from lcm_distill.sampling.finished import find_students, load_teacher
from lcm_distill.sampling.metrics import LatentDistances
from toy.compare import TEACHERS, ToyMetric
from toy.score import RESOLUTION, real_pictures


def assess(program: str, folder: str, count: int, steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """The metrics of the student in `folder`, of `count` pictures in float32, by number of steps."""
    captions = real_pictures(count, 0)[1]
    rows = evaluate.evaluate(
        load_teacher(Teacher(str(TEACHERS[program.removeprefix("lora_")])), device="cpu", dtype=torch.float32),
        find_students([folder]),
        prompts=captions,
        make_metrics=lambda reference: [ToyMetric(captions, 0), LatentDistances(reference)],
        steps=steps,
        samplers=(),
        control=False,
        reference_steps=50,
        guidance_scale=4.0,
        resolution=RESOLUTION,
        batch_size=64,
    )
    return {str(row.steps): row.values for row in rows if not row.is_reference}
