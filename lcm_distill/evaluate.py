"""How good is a student? Metrics of its pictures beside its teacher's, in tables like Table 1 of the LCM paper.

    python -m lcm_distill.evaluate --pretrained_teacher_model TEACHER --student lcm-sd15 lcm-lora-sd15 \\
        --prompts prompts.txt --num_pictures 256 --output_dir evaluation

All rows have the same prompts and the same noise, in 1, 2, 4 and 8 steps: the teacher with DDIM and with DPM-Solver++,
an untrained control (the teacher with LCMScheduler and guidance, which a student must beat for its training to have
been worthwhile), and the students. The reference is the teacher in 50 steps of DDIM at --guidance_scale, the end of the
trajectory that a student learns to reach in one step:

    latents    how far the student's one-step latents are from that end, ‖latents − end‖ / ‖end‖; in several steps LCMs
               add new noise, so the two distributions are compared by their energy distance. With more pictures than
               prompts, also how diverse the pictures of a prompt are. Needs no other network, works for every teacher.
    clip       CLIP score, with Transformers' CLIP (--clip_model, a folder or Hub id)
    cmmd       CMMD to the reference pictures (--cmmd_model)
    fid        FID to the reference pictures, if torch-fidelity is installed

The reference pictures are the teacher's, or with --real those of your shards, whose captions are then the prompts. A
full student generates at --guidance_scale. A LoRA, or a U-Net that one was merged into, has no guidance input: it
generates at --lora_guidance_scale 1, and the comparison is fair if it was trained at --guidance_scale
(w = guidance_scale − 1).

Writes evaluation.md, evaluation.json and evaluation.png (the first pictures of each row) to --output_dir.
"""

import argparse

from lcm_distill import flags
from lcm_distill.errors import UsageError, brief, run_program

METRICS = ("latents", "clip", "cmmd", "fid")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.CommandParser(
        "python -m lcm_distill.evaluate",
        __doc__,
        "%(prog)s --pretrained_teacher_model TEACHER --student STUDENT … --prompts PROMPT … [flags]",
    )
    flags.add_group(parser, flags.TeacherFlags)
    group = parser.add_argument_group("what to evaluate")
    add = group.add_argument
    add(
        "--student",
        type=flags.path,
        nargs="*",
        default=[],
        help="output folders of distillations, checkpoints of runs, Hub ids, or LoRA files",
    )
    add("--prompts", nargs="+", metavar="PROMPT", help="prompts, or .txt files with a prompt on each line")
    add("--real", metavar="SHARDS", help="shards of real pictures, for cmmd and fid; their captions, unless --prompts")
    add(
        "--num_pictures",
        type=flags.positive_int,
        help="pictures in each row; prompts are repeated, with new noise (default: one per prompt, or 64 of --real)",
    )
    add("--steps", type=flags.positive_int, nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    add(
        "--samplers",
        nargs="*",
        default=list(flags.SAMPLERS),
        choices=flags.SAMPLERS,
        help="samplers of the teacher's rows (default: both)",
    )
    add("--reference_steps", type=flags.positive_int, default=50, help="DDIM steps of the reference")
    add("--guidance_scale", type=flags.non_negative, default=8.0, help="w + 1, of teacher, control and full students")
    add(
        "--lora_guidance_scale",
        type=flags.non_negative,
        default=1.0,
        help="w + 1, of LoRAs, and of LCMs without a guidance embedding",
    )
    add("--resolution", type=flags.positive_int, help="side of the pictures in pixels (default: the teacher's own)")
    add("--seed", type=flags.number(int, 0, 2**63 - 1), default=0, help="picture i starts from the noise of seed + i")
    group = parser.add_argument_group("metrics")
    add = group.add_argument
    add("--metrics", nargs="+", default=["latents"], choices=METRICS, help="see above (default: latents)")
    add(
        "--clip_model",
        type=flags.path,
        default="openai/clip-vit-base-patch16",
        help="folder or Hub id of the CLIP for clip",
    )
    add(
        "--cmmd_model",
        type=flags.path,
        default="openai/clip-vit-large-patch14-336",
        help="folder or Hub id of the CLIP for cmmd",
    )
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", type=flags.path, required=True, help="folder for the tables and the grid")
    add("--shown", type=flags.positive_int, default=8, help="pictures per row in evaluation.png")
    add("--batch_size", type=flags.positive_int, default=16, help="pictures generated at once")
    flags.add_group(parser, flags.DeviceFlags)
    args = parser.parse_args(argv)
    if not args.prompts and not args.real:
        parser.error("pass --prompts, or --real shards with captions")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered here, before the seconds that the imports below take

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcm_distill.bars import progress_bar, say
from lcm_distill.environment import check_writable, choose_device, device_name, memory_errors, quiet_libraries, versions
from lcm_distill.models.teacher import Teacher
from lcm_distill.objective.schedule import build_lcm_scheduler
from lcm_distill.run.journal import finite
from lcm_distill.sampling.finished import Student, find_students, load_teacher, native_resolution
from lcm_distill.sampling.generate import (
    build_teacher_sampler,
    check_steps,
    count_steps,
    generate_latents,
    read_prompts,
    warn_of_long_prompts,
)
from lcm_distill.sampling.grid import labelled_grid
from lcm_distill.sampling.metrics import ClipScore, Cmmd, Fid, GeneratedRow, LatentDistances, Metric

CONTROL = "untrained control"


@dataclasses.dataclass
class EvaluatedRow:
    """One row of the tables: a model at a number of steps, and its metrics."""

    model: str  # "DDIM", "DPM-Solver++", "untrained control" or a student's name
    steps: int
    guidance_scale: float
    values: dict[str, float]
    seconds_per_picture: float  # to the latents
    pictures: list[Image.Image] = dataclasses.field(repr=False)  # the first ones, for the grid
    is_reference: bool = False

    @property
    def label(self) -> str:
        return f"{self.model}, {self.steps} step{'s' * (self.steps > 1)}"


def evaluate(
    pipeline: Any,
    students: Sequence[Student],
    *,
    prompts: Sequence[str],
    make_metrics: Callable[[GeneratedRow], Sequence[Metric]],
    steps: Sequence[int] = (1, 2, 4, 8),
    samplers: Sequence[str] = ("DDIM", "DPM-Solver++"),
    control: bool = True,
    reference_steps: int = 50,
    guidance_scale: float = 8.0,
    lora_guidance_scale: float = 1.0,
    resolution: int,
    batch_size: int = 16,
    seed: int = 0,
    shown: int = 8,
    on_step: Callable[[], object] | None = None,
) -> Iterator[EvaluatedRow]:
    """Generates and evaluates row by row: the reference, then the `samplers`, the control, the `students`.

    A row has one picture for each of `prompts`; picture i starts from the noise of seed + i. `pipeline` is the
    teacher's, from `load_teacher`; `make_metrics` receives the reference; `on_step` is called after each step of each
    batch. `UsageError`, before anything is generated, for more steps than a sampler can take, and for a student that
    does not fit the teacher.
    """
    scheduler_config = dict(pipeline.scheduler.config)
    teacher_samplers = {name: build_teacher_sampler(scheduler_config, name) for name in samplers}
    lcm = [student.sampler(scheduler_config) for student in students]
    untrained = lcm[0] if lcm else build_lcm_scheduler(scheduler_config)
    for sampler in [*teacher_samplers.values(), *lcm, *[untrained] * control]:
        check_steps("--steps", max(steps), sampler)
    check_steps("--reference_steps", reference_steps, build_teacher_sampler(scheduler_config))
    for student in students:
        with student.installed_in(pipeline):
            pass
    seeds = range(seed, seed + len(prompts))

    def generate(count: int, scale: float) -> tuple[GeneratedRow, float]:
        start = time.perf_counter()
        latents = generate_latents(
            pipeline,
            prompts,
            seeds,
            inference_steps=count,
            guidance_scale=scale,
            resolution=resolution,
            batch_size=batch_size,
            on_step=on_step,
        ).cpu()
        return GeneratedRow(prompts, latents, count, pipeline.vae), (time.perf_counter() - start) / len(prompts)

    def evaluate_row(model: str, count: int, scale: float) -> EvaluatedRow:
        row, seconds = generate(count, scale)
        values = {name: value for metric in metrics for name, value in metric(row).items()}
        return EvaluatedRow(model, count, scale, values, seconds, row.first_pictures(shown))

    pipeline.scheduler = build_teacher_sampler(scheduler_config)
    reference, seconds = generate(reference_steps, guidance_scale)
    metrics = make_metrics(reference)
    values = {name: value for metric in metrics for name, value in metric(reference).items()}
    yield EvaluatedRow("DDIM", reference_steps, guidance_scale, values, seconds, reference.first_pictures(shown), True)
    for name, sampler in teacher_samplers.items():
        pipeline.scheduler = sampler
        for count in steps:
            yield evaluate_row(name, count, guidance_scale)
    if control:
        pipeline.scheduler = untrained
        for count in steps:
            yield evaluate_row(CONTROL, count, guidance_scale)
    pipeline.scheduler = build_teacher_sampler(scheduler_config)
    for student in students:
        scale = guidance_scale if student.has_guidance_embedding else lora_guidance_scale
        with student.installed_in(pipeline):
            for count in steps:
                yield evaluate_row(student.name, count, scale)


def format_tables(rows: Sequence[EvaluatedRow], titles: dict[str, str], steps: Sequence[int]) -> str:
    """A Markdown table for each metric: a line for each model, a column for each number of steps."""
    values = {(row.model, row.steps): row.values for row in rows if not row.is_reference}
    parts = []
    for name, title in titles.items():
        columns = [count for count in steps if any(name in values.get((model, count), ()) for model, _ in values)]
        if not columns:
            continue
        lines = [f"**{title}**", ""]
        lines += ["| model | " + " | ".join(f"{count} step{'s' * (count > 1)}" for count in columns) + " |"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        for model in dict.fromkeys(model for model, _ in values):
            cells = [values.get((model, count), {}).get(name) for count in columns]
            written = ["" if cell is None else format_number(cell) for cell in cells]
            lines += [f"| {model} | " + " | ".join(written) + " |"]
        reference = [(row.label, row.values[name]) for row in rows if row.is_reference and name in row.values]
        if reference:
            written = [f"{label}: {format_number(value)}" for label, value in reference]
            lines += ["", "The reference: " + "; ".join(written) + "."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def format_number(value: float) -> str:
    """`value` as in the tables: 123, 12.3 or 1.234."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def read_real_pictures(shards: str, count: int, resolution: int) -> tuple[list[Image.Image], list[str]]:
    """The first `count` pictures of `shards`, resized and centre-cropped to `resolution`, and their captions."""
    # Imported here, since only --real needs the data modules.
    from lcm_distill.data.preparation import Preparation, prepare_sample
    from lcm_distill.data.raw import BadSample
    from lcm_distill.data.shards import expand_shards, read_shard

    preparation = Preparation(resolution, interpolation="bicubic", center_crop=True)
    pictures: list[Image.Image] = []
    captions: list[str] = []
    problems: list[str] = []
    try:
        for shard in expand_shards(shards):
            try:
                for raw in read_shard(shard):
                    try:
                        sample = prepare_sample(raw, preparation, draws=np.zeros(5))
                    except BadSample:
                        continue
                    pictures.append(Image.fromarray(np.ascontiguousarray(sample.arrays["pixels"])))
                    captions.append(sample.caption)
                    if len(pictures) == count:
                        return pictures, captions
            except UsageError:
                raise
            except Exception as error:  # noqa: BLE001 - opener, decompressor and tar reader raise nearly anything
                problems.append(f" {shard} cannot be read, or not to its end ({brief(error)}).")
    except UsageError as error:
        raise UsageError(str(error).replace(flags.SHARDS_FLAG, "--real")) from None
    raise UsageError(
        f"--real {shards} has {len(pictures)} usable pictures, but --num_pictures is {count}: lower it, or add "
        f"shards.{''.join(problems[:3])}"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    device, dtype = choose_device(args.device, args.dtype)
    prompts = read_prompts(args.prompts, "--prompts")
    students = find_students(args.student, args.cache_dir)
    check_writable(args.output_dir)
    teacher = Teacher.from_flags(flags.take(flags.TeacherFlags, args))
    pipeline = load_teacher(teacher, device=device, dtype=dtype, resolution=args.resolution)
    resolution = args.resolution or native_resolution(pipeline)
    count = args.num_pictures or (len(prompts) if prompts else 64)
    real, captions = read_real_pictures(args.real, count, resolution) if args.real else (None, [])
    prompts = list(itertools.islice(itertools.cycle(prompts or captions), count))
    warn_of_long_prompts(pipeline, prompts)

    def load_metric(name: str) -> Callable[[GeneratedRow], Metric]:
        """Loads what a metric needs; returns a function that makes the metric from the reference."""
        if name == "latents":
            return LatentDistances
        if name in ("cmmd", "fid"):
            compared = Fid(device) if name == "fid" else Cmmd(args.cmmd_model, device, args.cache_dir)
            return lambda reference: compared.against(real or reference.pictures)
        metric = ClipScore(args.clip_model, device, args.cache_dir)
        return lambda reference: metric

    makers = [load_metric(name) for name in dict.fromkeys(args.metrics)]

    def make_metrics(reference: GeneratedRow) -> list[Metric]:
        metrics = [make(reference) for make in makers]
        titles.update({name: title for metric in metrics for name, title in metric.titles.items()})
        return metrics

    titles: dict[str, str] = {}
    rows: list[EvaluatedRow] = []
    steps = list(dict.fromkeys(args.steps))
    numbers = [args.reference_steps, *steps * (len(args.samplers) + 1 + len(students))]
    bar = progress_bar(
        "generating",
        unit="step",
        total=sum(count_steps(count, args.batch_size, number) for number in numbers),
        leave=False,
    )
    evaluated = evaluate(
        pipeline,
        students,
        prompts=prompts,
        make_metrics=make_metrics,
        steps=steps,
        samplers=args.samplers,
        reference_steps=args.reference_steps,
        guidance_scale=args.guidance_scale,
        lora_guidance_scale=args.lora_guidance_scale,
        resolution=resolution,
        batch_size=args.batch_size,
        seed=args.seed,
        shown=args.shown,
        on_step=bar.update,
    )
    settings = {
        "teacher": args.pretrained_teacher_model,
        "students": args.student,
        "pictures": count,
        "resolution": resolution,
        "guidance_scale": args.guidance_scale,
        "lora_guidance_scale": args.lora_guidance_scale,
        "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "reference": "real pictures" if real else f"DDIM, {args.reference_steps} steps",
    }
    try:
        with bar, memory_errors("use a smaller --batch_size or --resolution."):
            for row in evaluated:
                rows.append(row)
                metrics = "  ".join(f"{name} {format_number(value)}" for name, value in row.values.items())
                say(f"{len(rows):3d} of {len(numbers)}  {row.label:32s} {metrics}")
    finally:  # rows are also written when the evaluation is interrupted
        if rows:
            write_results(rows, titles, steps, settings, Path(args.output_dir), prompts[: args.shown])
    print("", format_tables(rows, titles, steps), "", f"written to {args.output_dir}", sep="\n")


def write_results(
    rows: Sequence[EvaluatedRow],
    titles: dict[str, str],
    steps: Sequence[int],
    settings: dict[str, Any],
    output_dir: Path,
    columns: Sequence[str],
) -> None:
    """Writes `evaluation.md`, `evaluation.json` and `evaluation.png` to `output_dir`; `columns` label the grid."""
    output_dir.mkdir(parents=True, exist_ok=True)
    grid = labelled_grid(
        [(row.label, row.pictures) for row in rows], columns=columns, size=min(256, rows[0].pictures[0].width)
    )
    grid.save(output_dir / "evaluation.png")
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name != "students")
    text = f"{format_tables(rows, titles, steps)}\n\n{described}\n"
    (output_dir / "evaluation.md").write_text(text, encoding="utf-8")
    kept = [{k: v for k, v in dataclasses.asdict(row).items() if k != "pictures"} for row in rows]
    record = {"settings": settings, "versions": versions(), "rows": kept}
    (output_dir / "evaluation.json").write_text(json.dumps(finite(record), indent=2) + "\n")


if __name__ == "__main__":
    run_program(main, resume_hint="")
