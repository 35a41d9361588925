"""The metrics of finished students of a toy teacher, for the benchmarks that train several."""

from collections.abc import Sequence

import torch

from lcm_distill import evaluate
from lcm_distill.models.teacher import Teacher
from lcm_distill.sampling.finished import find_students, load_teacher
from lcm_distill.sampling.metrics import LatentDistances
from toy.compare import TEACHERS, ToyMetric
from toy.score import RESOLUTION, real_pictures


def assess(program: str, folders: Sequence[str], count: int, steps: Sequence[int]) -> list[dict[str, dict[str, float]]]:
    """For the student in each of `folders`, its metrics by number of steps, of `count` pictures in float32.

    All of them at once: the reference, the teacher's pictures, takes longer than a student's.
    """
    torch.set_num_threads(1)  # several wait for each other where another process has a core
    captions = real_pictures(count, 0)[1]
    students = find_students(folders)
    found: dict[str, dict[str, dict[str, float]]] = {student.name: {} for student in students}
    for row in evaluate.evaluate(
        load_teacher(Teacher(str(TEACHERS[program.removeprefix("lora_")])), device="cpu", dtype=torch.float32),
        students,
        prompts=captions,
        make_metrics=lambda reference: [ToyMetric(captions, 0), LatentDistances(reference)],
        steps=steps,
        samplers=(),
        control=False,
        reference_steps=50,
        guidance_scale=4.0,
        resolution=RESOLUTION,
        batch_size=64,
    ):
        if not row.is_reference:
            found[row.model][str(row.steps)] = row.values
    return list(found.values())
