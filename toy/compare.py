"""Toy teachers, untrained controls and students side by side: a grid of pictures, and a table for each metric.

    python -m toy.compare --student runs/demo/sd --output_dir runs/demo
    python -m toy.compare --student runs/all/sd runs/all/sd-few runs/all/sdxl --output_dir runs/all

A student is the output folder of a distillation of a toy teacher: a U-Net, or a LoRA. This is
`lcm_distill.evaluate` for both toy teachers at once, with captions of the toy world and their metrics, caption accuracy
and Fréchet distance (`toy.score`). A LoRA generates at guidance_scale 1, since its guidance is in its weights. The
README's table and picture are `wide_table.md` and `evaluation.jpg` in the output folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from lcm_distill import evaluate, flags
from lcm_distill.environment import quiet_libraries
from lcm_distill.evaluate import CONTROL, EvaluatedRow
from lcm_distill.flags import SAMPLERS
from lcm_distill.models.families import family_of
from lcm_distill.models.teacher import Teacher
from lcm_distill.sampling.finished import Student, find_students, load_teacher
from lcm_distill.sampling.metrics import GeneratedRow, LatentDistances
from toy.score import RESOLUTION, Scorer, caption_accuracy, frechet_distance, real_pictures

TEACHERS = {family: Path(__file__).parent / "teachers" / family for family in ("sd", "sdxl")}
NAMES = {"sd": "SD", "sdxl": "SDXL"}
KINDS = {"full": "LCM", "lora": "LCM-LoRA"}
STEPS = (1, 2, 4, 8)


class ToyMetric:
    """A metric for `evaluate`: caption accuracy, and Fréchet distance to drawn pictures of the same captions."""

    titles = {
        "caption_accuracy": "Caption accuracy (higher is better)",
        "frechet_distance": "Fréchet distance to drawn pictures of the captions (lower is better)",
    }

    def __init__(self, captions: Sequence[str], seed: int):
        self._scorer = Scorer.load()
        drawn, _ = real_pictures(len(captions), seed, captions)
        self._real = self._scorer.features(drawn)

    def __call__(self, row: GeneratedRow) -> dict[str, float]:
        features = self._scorer.features(row.pictures)
        return {
            "caption_accuracy": caption_accuracy(row.pictures, row.prompts, self._scorer),
            "frechet_distance": frechet_distance(features, self._real),
        }


TITLES = ToyMetric.titles | LatentDistances.titles


def family_name(student: Student) -> str:
    """ "sd" or "sdxl", from the student's files."""
    if student.kind == "full":
        return family_of(UNet2DConditionModel.load_config(student.source)).NAME
    with safe_open(Path(student.source) / "kohya_lora_weights.safetensors", "pt") as file:
        return "sdxl" if file.metadata()["ss_base_model_version"].startswith("sdxl") else "sd"


def label(name: str, kind: str, family: str) -> str:
    """A student's name in the tables: its kind, and what the name of its folder has after that of its program."""
    program = {"full": family, "lora": f"lora_{family}"}[kind]
    return f"{KINDS[kind]}, {name.removeprefix(f'{program}-')}" if name.startswith(f"{program}-") else KINDS[kind]


def compare(
    sources: Sequence[str], *, count: int, guidance_scale: float = 4.0, seed: int = 0, batch: int = 64
) -> list[EvaluatedRow]:
    """The rows of the comparison, teacher by teacher, with `count` pictures each; prints each row when it is done."""
    quiet_libraries()
    captions = real_pictures(count, seed)[1]
    students = find_students(sources)
    rows = []
    for name in dict.fromkeys(family_name(student) for student in students):
        own = [student for student in students if family_name(student) == name]
        labels = {student.name: label(student.name, student.kind, name) for student in own}
        if len(set(labels.values())) < len(own):
            labels = {student.name: student.name for student in own}
        for row in evaluate.evaluate(
            load_teacher(Teacher(str(TEACHERS[name])), device="cpu", dtype=torch.float32),
            own,
            prompts=captions,
            make_metrics=lambda reference: [ToyMetric(captions, seed), LatentDistances(reference)],
            steps=STEPS,
            guidance_scale=guidance_scale,
            resolution=RESOLUTION,
            batch_size=batch,
            seed=seed,
            shown=10,
        ):
            row.model = f"{NAMES[name]} {labels.get(row.model, row.model)}"
            rows.append(row)
            metrics = "  ".join(f"{key} {evaluate.format_number(value)}" for key, value in row.values.items())
            print(f"  {row.label:34s} {metrics}", flush=True)
    return rows


def wide_table(rows: Sequence[EvaluatedRow]) -> str:
    """The README's table, in Markdown: a line for each model, its accuracies at all steps, then its distances."""
    accuracy, distance = "caption_accuracy", "frechet_distance"
    lines = ["| model | " + " | ".join(map(str, STEPS)) + f" | Fréchet at {' | '.join(map(str, STEPS))} |"]
    lines += ["|---" * (1 + 2 * len(STEPS)) + "|"]
    found = {(row.model, row.steps): row.values for row in rows if not row.is_reference}
    references = {row.model: row for row in rows if row.is_reference}
    for model in dict.fromkeys(model for model, _ in found):
        teacher, _, name = model.partition(" ")
        label = f"{teacher} teacher, {name}" if name in SAMPLERS else model if name == CONTROL else f"**{model}**"
        if model in references:
            values = references[model].values
            steps = references[model].steps
            label += f" ({_share(values[accuracy])} and {values[distance]:.0f} at {steps} steps)"
        cells = [_share(found[model, steps][accuracy]) for steps in STEPS]
        cells += [f"{found[model, steps][distance]:.0f}" for steps in STEPS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(value: float) -> str:
    """A number from 0 to 1 with two digits, as .93."""
    return f"{value:.2f}".removeprefix("0")


def verdict(rows: Sequence[EvaluatedRow]) -> list[str]:
    """Lines that compare each student's caption error at 2 and 4 steps with the control's and the teacher's."""
    error = {(row.model, row.steps): 1 - row.values["caption_accuracy"] for row in rows}
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        teacher = model.split()[0]
        if model.removeprefix(f"{teacher} ") in (CONTROL, *SAMPLERS):
            continue
        for steps in (2, 4):
            lines.append(
                f"caption error at {steps} steps: {model} {error[model, steps]:.3f}, "
                f"untrained control {error[f'{teacher} {CONTROL}', steps]:.3f}, "
                f"teacher under DDIM {error[f'{teacher} DDIM', steps]:.3f}"
            )
    return lines


def main(argv: list[str] | None = None) -> list[EvaluatedRow]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", required=True, help="output folders of distillations of toy teachers")
    parser.add_argument("--output_dir", type=lambda text: Path(flags.path(text)), required=True)
    parser.add_argument("--count", type=int, default=256, help="pictures per row")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="w + 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = compare(args.student, count=args.count, guidance_scale=args.guidance_scale, seed=args.seed)
    settings = {"pictures": args.count, "guidance_scale": args.guidance_scale, "seed": args.seed}
    evaluate.write_results(rows, TITLES, STEPS, settings, args.output_dir, real_pictures(10, args.seed)[1])
    (args.output_dir / "wide_table.md").write_text(wide_table(rows) + "\n", encoding="utf-8")
    picture = args.output_dir / "evaluation.png"
    with Image.open(picture) as grid:
        grid.save(picture.with_suffix(".jpg"), quality=85)
    print("", evaluate.format_tables(rows, TITLES, STEPS), "", *verdict(rows), f"\npicture: {picture}", sep="\n")
    return rows


if __name__ == "__main__":
    main()
