"""Teacher, untrained control and student side by side: one picture of rows, one table of numbers.

    python -m toy.compare --student runs/demo/lcm --output_dir runs/demo

Every row draws the same captions from the same noise. The control is the teacher itself under `LCMScheduler`
with classifier-free guidance: what a student must beat for its training to have been worth anything. Caption
accuracy and the Fréchet distance to drawn pictures of the same captions are those of `toy.score`.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from lcm_distill.pictures import labelled_grid
from toy.score import Scorer, caption_accuracy, frechet_distance, real_pictures

TEACHER = Path(__file__).parent / "teachers" / "sd"


@dataclasses.dataclass
class Row:
    """One line of the table: a way to draw, and how good and how fast it was."""

    label: str
    model: str
    steps: int
    caption_accuracy: float
    frechet_distance: float
    seconds_per_picture: float
    pictures: list[Image.Image] = dataclasses.field(repr=False)


def draw_row(
    pipeline: Any, label: str, model: str, steps: int, captions: list[str], guidance_scale: float, seed: int, batch: int
) -> Row:
    """Draws one picture of each caption; picture i starts from the noise of seed + i whatever the row."""
    pictures: list[Image.Image] = []
    start = time.perf_counter()
    for first in range(0, len(captions), batch):
        chosen = captions[first : first + batch]
        pictures += pipeline(
            chosen,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + first + k) for k in range(len(chosen))],
        ).images
    seconds = (time.perf_counter() - start) / len(captions)
    return Row(label, model, steps, 0.0, 0.0, seconds, pictures)


def compare(
    teacher: str | Path, student: str | Path, *, count: int, guidance_scale: float = 4.0, seed: int = 0, batch: int = 64
) -> list[Row]:
    """The rows of the comparison, each of `count` pictures; prints each as it is done."""
    real, captions = real_pictures(count, seed)
    scorer = Scorer.load()
    real_features = scorer.features(real)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    unet = UNet2DConditionModel.from_pretrained(student)
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    lcm = LCMScheduler.from_pretrained(student)
    networks = {"teacher": (pipeline.unet, ddim), "control": (pipeline.unet, lcm), "student": (unet, lcm)}
    names = {"teacher": "teacher, DDIM", "control": "untrained control", "student": "student"}
    plan = [("teacher", 50), ("teacher", 4), ("teacher", 2), ("teacher", 1)]
    plan += [(model, steps) for model in ("control", "student") for steps in (1, 2, 4, 8)]
    rows = []
    for model, steps in plan:
        pipeline.unet, pipeline.scheduler = networks[model]
        label = f"{names[model]}, {steps} step{'s' * (steps > 1)}"
        row = draw_row(pipeline, label, model, steps, captions, guidance_scale, seed, batch)
        row.caption_accuracy = caption_accuracy(row.pictures, captions, scorer)
        row.frechet_distance = frechet_distance(scorer.features(row.pictures), real_features)
        rows.append(row)
        print(
            f"  {row.label:28s} caption accuracy {row.caption_accuracy:.3f}   Fréchet {row.frechet_distance:7.1f}   "
            f"{row.seconds_per_picture:.3f} s a picture",
            flush=True,
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | steps | caption accuracy | Fréchet distance | seconds per picture |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.label.rpartition(',')[0]} | {row.steps} | {row.caption_accuracy:.3f} | {row.frechet_distance:.1f} "
        f"| {row.seconds_per_picture:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def verdict(rows: list[Row]) -> list[str]:
    """What the student gains on teacher and control, line by line: the errors at 2 and 4 steps, the distances."""
    found = {(row.model, row.steps): row for row in rows}
    lines = []
    for steps in (2, 4):
        errors = {m: 1 - found[m, steps].caption_accuracy for m in ("student", "control", "teacher")}
        lines.append(
            f"caption error at {steps} steps: student {errors['student']:.3f}, "
            f"untrained control {errors['control']:.3f}, teacher {errors['teacher']:.3f}"
        )
    return lines


def write(rows: list[Row], output_dir: Path, captions: list[str], columns: int = 10) -> None:
    """`comparison.png`, `comparison.md` and `comparison.json` in `output_dir`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    grid = labelled_grid([(row.label, row.pictures[:columns]) for row in rows], columns=captions[:columns], size=80)
    grid.save(output_dir / "comparison.png")
    (output_dir / "comparison.md").write_text(table(rows) + "\n")
    numbers = [{k: v for k, v in dataclasses.asdict(row).items() if k != "pictures"} for row in rows]
    (output_dir / "comparison.json").write_text(json.dumps(numbers, indent=2) + "\n")


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--student", type=Path, required=True, help="output folder of a distillation")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256, help="pictures in each row")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="w + 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = compare(args.teacher, args.student, count=args.count, guidance_scale=args.guidance_scale, seed=args.seed)
    write(rows, args.output_dir, real_pictures(args.count, args.seed)[1])
    print("", table(rows), "", *verdict(rows), f"\npicture: {args.output_dir / 'comparison.png'}", sep="\n")
    return rows


if __name__ == "__main__":
    main()
