"""Teachers, untrained controls and students side by side: one picture of rows, one table of numbers.

    python -m toy.compare --student runs/demo/sd --output_dir runs/demo
    python -m toy.compare --student runs/all/sd runs/all/lora_sd runs/all/sdxl --output_dir runs/all

A student is the output folder of a distillation of a toy teacher: a U-Net, or a LoRA. Every row draws the same
captions from the same noise. The control is the teacher itself under `LCMScheduler` with classifier-free guidance:
what a student must beat for its training to have been worth anything. A LoRA draws at guidance_scale 1, since the
guidance of its training is in its weights. Caption accuracy and the Fréchet distance to drawn pictures of the same
captions are those of `toy.score`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from lcm_distill.errors import UsageError
from lcm_distill.pictures import labelled_grid
from toy.score import Scorer, caption_accuracy, frechet_distance, real_pictures

TEACHERS = {family: Path(__file__).parent / "teachers" / family for family in ("sd", "sdxl")}
NAMES = {"sd": "SD", "sdxl": "SDXL"}


@dataclasses.dataclass
class Row:
    """One line of the table: a way to draw, and how good and how fast it was."""

    family: str  # "sd" or "sdxl"
    model: str  # "teacher", "control", "student" or "lora"
    steps: int
    caption_accuracy: float
    frechet_distance: float
    seconds_per_picture: float
    pictures: list[Image.Image] = dataclasses.field(repr=False)

    @property
    def label(self) -> str:
        return f"{NAMES[self.family]} {_MODELS[self.model]}, {self.steps} step{'s' * (self.steps > 1)}"


_MODELS = {"teacher": "teacher, DDIM", "control": "untrained control", "student": "LCM", "lora": "LCM-LoRA"}


def draw_row(
    pipeline: Any, steps: int, captions: list[str], guidance_scale: float, seed: int, batch: int
) -> tuple[list[Image.Image], float]:
    """One picture of each caption, and seconds per picture; picture i starts from the noise of seed + i."""
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
    return pictures, (time.perf_counter() - start) / len(captions)


def kind_of(student: Path) -> tuple[str, str]:
    """(family, model) of a distillation's output folder, by what it holds; `UsageError` if it is none."""
    if (student / "pytorch_lora_weights.safetensors").is_file():
        with safe_open(student / "kohya_lora_weights.safetensors", "pt") as file:
            version = file.metadata()["ss_base_model_version"]
        return ("sdxl" if version.startswith("sdxl") else "sd"), "lora"
    if (student / "config.json").is_file():
        config = UNet2DConditionModel.load_config(student)
        return ("sdxl" if config.get("addition_embed_type") == "text_time" else "sd"), "student"
    raise UsageError(f"--student {student}: neither a U-Net nor a LoRA is there; give a distillation's --output_dir.")


def compare(
    students: Sequence[str | Path], *, count: int, guidance_scale: float = 4.0, seed: int = 0, batch: int = 64
) -> list[Row]:
    """The rows of the comparison, each of `count` pictures, family by family; prints each as it is done."""
    real, captions = real_pictures(count, seed)
    scorer = Scorer.load()
    real_features = scorer.features(real)
    kinds = {Path(student): kind_of(Path(student)) for student in students}
    rows = []
    for family in dict.fromkeys(family for family, _ in kinds.values()):
        own = {model: folder for folder, (of, model) in kinds.items() if of == family}
        pipeline = DiffusionPipeline.from_pretrained(TEACHERS[family], torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        teacher = pipeline.unet
        ddim = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, timestep_spacing="trailing")
        lcm = LCMScheduler.from_pretrained(next(iter(own.values())))
        plan = [("teacher", steps) for steps in (50, 4, 2, 1)]
        plan += [(model, steps) for model in ("control", *own) for steps in (1, 2, 4, 8)]
        for model, steps in plan:
            if steps == 1 and model == "student":
                pipeline.unet = UNet2DConditionModel.from_pretrained(own[model])
            elif steps == 1 and model == "lora":
                pipeline.unet = teacher
                pipeline.load_lora_weights(own[model])
            pipeline.scheduler = ddim if model == "teacher" else lcm
            guidance = 1.0 if model == "lora" else guidance_scale
            pictures, seconds = draw_row(pipeline, steps, captions, guidance, seed, batch)
            accuracy = caption_accuracy(pictures, captions, scorer)
            distance = frechet_distance(scorer.features(pictures), real_features)
            rows.append(Row(family, model, steps, accuracy, distance, seconds, pictures))
            print(
                f"  {rows[-1].label:34s} caption accuracy {accuracy:.3f}   Fréchet {distance:7.1f}   "
                f"{seconds:.3f} s a picture",
                flush=True,
            )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | steps | caption accuracy | Fréchet distance | seconds per picture |", "|---|---|---|---|---|"]
    lines += [
        f"| {NAMES[row.family]} {_MODELS[row.model]} | {row.steps} | {row.caption_accuracy:.3f} "
        f"| {row.frechet_distance:.1f} | {row.seconds_per_picture:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def verdict(rows: list[Row]) -> list[str]:
    """What the students gain on teacher and control, line by line: the caption errors at 2 and 4 steps."""
    found = {(row.family, row.model, row.steps): 1 - row.caption_accuracy for row in rows}
    lines = []
    for family, model in dict.fromkeys((row.family, row.model) for row in rows if row.model in ("student", "lora")):
        for steps in (2, 4):
            student, control, teacher = (found[family, m, steps] for m in (model, "control", "teacher"))
            lines.append(
                f"caption error at {steps} steps: {NAMES[family]} {_MODELS[model]} {student:.3f}, "
                f"untrained control {control:.3f}, teacher {teacher:.3f}"
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
    parser.add_argument(
        "--student", type=Path, nargs="+", required=True, help="output folders of distillations, at most one of a kind"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256, help="pictures in each row")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="w + 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = compare(args.student, count=args.count, guidance_scale=args.guidance_scale, seed=args.seed)
    write(rows, args.output_dir, real_pictures(args.count, args.seed)[1])
    print("", table(rows), "", *verdict(rows), f"\npicture: {args.output_dir / 'comparison.png'}", sep="\n")
    return rows


if __name__ == "__main__":
    main()
