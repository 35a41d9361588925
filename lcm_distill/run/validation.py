"""Validation: pictures generated as a user would, on disk and in every tracker, and distances to the teacher."""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from lcm_distill.bars import progress_bar
from lcm_distill.distributed.fsdp import free_gathered, is_split
from lcm_distill.errors import DivergenceError
from lcm_distill.flags import DistillationFlags, ValidationFlags
from lcm_distill.models.vae import decode_latents
from lcm_distill.run.trackers import log_pictures
from lcm_distill.sampling.generate import check_steps, count_steps, generate_latents, read_prompts, warn_of_long_prompts
from lcm_distill.sampling.grid import labelled_grid
from lcm_distill.sampling.metrics import relative_distance

if TYPE_CHECKING:
    from lcm_distill.run.run import Run

logger = logging.getLogger(__name__)

_REMEDY = (
    "If it is the teacher's, check its weights and its scheduler_config.json; in fp16, use --mixed_precision bf16 "
    "or no; if it is a student's alone, lower --learning_rate."
)


def check_validation(flags: ValidationFlags, student_sampler: Any, teacher_sampler: Any) -> list[str] | None:
    """The prompts in the flags, None without any; `UsageError` for prompts that cannot be read or too many steps."""
    check_steps("--validation_inference_steps", max(flags.validation_inference_steps), student_sampler)
    check_steps("--validation_teacher_steps", flags.validation_teacher_steps, teacher_sampler)
    return read_prompts(flags.validation_prompts)


def validation_guidance_scale(flags: ValidationFlags, distillation: DistillationFlags) -> float:
    """The flag's value, else 8 clamped to the trained range of guidance_scale, w_min + 1 to w_max + 1."""
    chosen = flags.validation_guidance_scale
    return min(max(8.0, distillation.w_min + 1), distillation.w_max + 1) if chosen is None else chosen


class Validation:
    """Generates pictures of the prompts with every pipeline, and measures the students' distances to the teacher.

    `pipelines`, by their labels, and `teacher` are functions that build a pipeline. They are called at each validation,
    inside the context `all_loaded` (`FrozenParts.all_on_device`): what only pipelines need is loaded only then. Without
    prompts or pictures nothing is generated.

    A grid has a row for each pipeline and each number of --validation_inference_steps, "student, 4 steps", all from the
    same noise. Its first row is the `teacher`'s, generated once, with --validation_teacher_steps of DDIM at
    `teacher_guidance_scale`: the ends of the trajectories that a student should reach in one step. How far from them
    the student's one step ends is the distance (`metrics.relative_distance`). With 0 teacher steps there is neither.

    At most `batch_size` pictures are generated at once, the training's batch size: that needs no more memory than the
    guided teacher in training. Grids go to `validation/step-N.png` in the run's output folder and to every tracker; in
    a dry run nowhere, and the teacher takes one step. Picture number k has the seed `run.seed` + k. `contexts` has, by
    a pipeline's label, a context to generate in.

    Every rank has one and calls it; the main process generates while the others wait. If networks are split over the
    ranks, all ranks generate the same pictures, of the main process's `prompts`.
    """

    def __init__(
        self,
        run: "Run",
        flags: ValidationFlags,
        pipelines: Mapping[str, Callable[[], Any]],
        teacher: Callable[[], Any],
        *,
        prompts: Sequence[str],
        batch_size: int,
        guidance_scale: float,
        teacher_guidance_scale: float,
        resolution: int,
        all_loaded: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        contexts: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
    ):
        images_per_prompt, teacher_steps = flags.num_validation_images, flags.validation_teacher_steps
        self.every = flags.validation_steps
        self._accelerator, output_dir = run.accelerator, run.output_dir
        self._pipelines = dict(pipelines)
        self._teacher = teacher
        self._inference_steps = list(dict.fromkeys(flags.validation_inference_steps))
        self._guidance_scale = guidance_scale
        self._teacher_steps = teacher_steps if output_dir else min(teacher_steps, 1)
        self._teacher_guidance_scale = teacher_guidance_scale
        self._resolution = resolution
        self._output_dir = output_dir
        self._all_loaded = all_loaded
        self._contexts = dict(contexts or {})
        prompts = broadcast_object_list([list(prompts)])[0]
        self._prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        self._seeds = [run.seed + number for number in range(len(self._prompts))]
        self._columns = [text for prompt in prompts for text in [prompt, *[""] * (images_per_prompt - 1)]]
        self._batch_size = min(batch_size, images_per_prompt)
        self._check_length = bool(flags.validation_prompts)  # the preflight has checked the captions
        self._teacher_row: dict[str, list[Image.Image]] = {}
        self._ends = torch.empty(0)
        self.measured: dict[str, float] = {}  # the last distances, by a description of each

    def __call__(self, global_step: int) -> dict[str, float]:
        """Generates the grid of `global_step`; returns the distances ("distance/student"), the same on every rank.

        Pictures and distances that are not finite are logged as an error. `DivergenceError` for them in a dry run.
        """
        distances: dict[str, float] = {}
        problems: list[str] = []
        if not self._prompts:
            return distances
        if self._accelerator.is_main_process or is_split(self._accelerator):
            with self._all_loaded():
                main = self._accelerator.is_main_process
                with progress_bar("validating", unit="step", total=self._count(), leave=False, disable=not main) as bar:
                    fresh = self._generate(distances, problems, bar.update)
            if self._output_dir is not None and self._accelerator.is_main_process:
                self._write(self._teacher_row | fresh, global_step)
                log_pictures(self._accelerator, fresh, global_step)
        distances, problems = broadcast_object_list([distances, problems])
        self.measured = {
            f"distance of one step from the teacher's {self._teacher_steps}, in latents, relative (0 is perfect): "
            f"{name.removeprefix('distance/')}": value
            for name, value in distances.items()
        }
        if distances and self._output_dir is not None:
            logger.info(
                "step %d: distance to the teacher %s (0 is perfect)",
                global_step,
                ", ".join(f"{name.removeprefix('distance/')} {value:.3f}" for name, value in distances.items()),
            )
        if problems:
            message = f"validation at step {global_step} is not finite: {'; '.join(problems)}. {_REMEDY}"
            if self._output_dir is None:
                raise DivergenceError(message)
            logger.error("%s The run continues.", message)
        return distances

    def _student_steps(self) -> list[int]:
        """The numbers of steps in which each student generates: those of its pictures, and that of the distance."""
        return list(dict.fromkeys([*self._inference_steps, *[1] * bool(self._teacher_steps)]))

    def _count(self) -> int:
        """How many steps `_generate` takes, of all networks and batches."""
        steps = [] if self._teacher_row else [self._teacher_steps]
        steps += self._student_steps() * len(self._pipelines)
        return sum(count_steps(len(self._prompts), self._batch_size, number) for number in steps)

    def _generate(
        self, distances: dict[str, float], problems: list[str], on_step: Callable[[], object]
    ) -> dict[str, list[Image.Image]]:
        """The rows generated now; fills `distances`, and `problems` with what is not finite."""
        fresh: dict[str, list[Image.Image]] = {}
        if self._teacher_steps and not self._teacher_row:
            pipeline = self._teacher()
            self._ends = self._latents("teacher", pipeline, self._teacher_steps, self._teacher_guidance_scale, on_step)
            row = f"teacher, {_steps_in_words(self._teacher_steps)}"
            fresh[row] = self._decode(pipeline, self._ends, row, problems)
            self._teacher_row = dict(fresh)
        measured = [1] if self._teacher_steps else []
        for label, build in self._pipelines.items():
            pipeline = build()
            if self._check_length:
                warn_of_long_prompts(pipeline, self._prompts)
                self._check_length = False
            for steps in self._student_steps():
                latents = self._latents(label, pipeline, steps, self._guidance_scale, on_step)
                if steps in self._inference_steps:
                    row = f"{label}, {_steps_in_words(steps)}"
                    fresh[row] = self._decode(pipeline, latents, row, problems)
                if steps in measured:
                    distances[f"distance/{label}"] = distance = relative_distance(latents, self._ends)
                    if not math.isfinite(distance):
                        problems.append(f"{label}: the distance to the teacher is {distance}")
        return fresh

    def _latents(
        self, label: str, pipeline: Any, steps: int, guidance_scale: float, on_step: Callable[[], object]
    ) -> torch.Tensor:
        # Compiled networks run uncompiled here: another batch size and resolution would be compiled anew.
        eager = torch.compiler.set_stance("force_eager")
        with eager, self._accelerator.autocast(), self._contexts.get(label, contextlib.nullcontext)():
            latents = generate_latents(
                pipeline,
                self._prompts,
                self._seeds,
                inference_steps=steps,
                guidance_scale=guidance_scale,
                resolution=self._resolution,
                batch_size=self._batch_size,
                on_step=on_step,
            )
        free_gathered(pipeline.unet)
        return latents.cpu()

    def _decode(self, pipeline: Any, latents: torch.Tensor, row: str, problems: list[str]) -> list[Image.Image]:
        # One at once: at 1024 pixels each takes gigabytes.
        return decode_latents(pipeline.vae, latents, 1, lambda problem: problems.append(f"{row}: {problem}"))

    def _write(self, rows: Mapping[str, Sequence[Image.Image]], global_step: int) -> None:
        path = Path(self._output_dir or "") / "validation" / f"step-{global_step:06d}.png"
        grid = labelled_grid(list(rows.items()), columns=self._columns, size=min(256, self._resolution))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
        except OSError as error:
            logger.error("%s could not be written (%s); the run continues", path, error)


def _steps_in_words(steps: int) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}"
