"""Generate pictures with a teacher and its students: a labelled grid, single pictures, and the settings of each.

    python -m lcm_distill.sample --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --student lcm-sd15 lcm-lora-sd15 --prompts "a castle at dusk" "a fox in the snow" --output_dir drawn
    python -m lcm_distill.sample … --student lcm-lora-sd15 --prompts prompts.txt --sweep
    python -m lcm_distill.sample … --student lcm-lora-sd15 --lora a-style-lora=0.8 --lcm_lora_scale 1.0
    python -m lcm_distill.sample … --student lcm-sd15 --init_image photo.jpg --strength 0.5
    python -m lcm_distill.sample … --student lcm-sd15 --width 768 --height 512

A student is a full LCM (the output folder of a distillation, a checkpoint of one, a U-Net, a pipeline's folder) or an
LCM-LoRA (a folder, a checkpoint, a .safetensors file), local or on the Hub. The grid has a row for each model, number
of steps and guidance scale, and a column for each prompt and seed; all rows start from the same noise. --sweep is the
step sweep of the LCM-LoRA announcement: students at 1 to 8 steps, the teacher at 1, 4, 8, 15, 20, 25, 30 and 50.

Guidance: the teacher and full LCMs generate at --guidance_scale. An LCM-LoRA has its guidance in its weights, and
generates at --lora_guidance_scale, 1. A negative prompt has an effect where a model is guided with a second pass: in
the teacher and in LoRAs at a scale above 1, not in a full LCM.

Writes to OUT: grid.png; pictures/, with model, steps, guidance scale, prompt and seed in the file names and all
settings in the PNG metadata; samples.json, with the settings of all pictures. A Diffusers pipeline with these settings
generates the same pictures.
"""

import argparse

from lcm_distill import flags
from lcm_distill.errors import UsageError, run_program

STUDENT_STEPS, TEACHER_STEPS = [1, 2, 4, 8], [25]
SWEEP_STUDENT_STEPS, SWEEP_TEACHER_STEPS = list(range(1, 9)), [1, 4, 8, 15, 20, 25, 30, 50]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.CommandParser(
        "python -m lcm_distill.sample",
        __doc__,
        "%(prog)s --pretrained_teacher_model TEACHER [--student A B …] --prompts PROMPT … [flags]",
    )
    flags.add_group(parser, flags.TeacherFlags)
    group = parser.add_argument_group("students and LoRAs")
    group.add_argument(
        "--student",
        nargs="+",
        type=flags.path,
        default=None,
        metavar="STUDENT",
        help="full LCMs and LCM-LoRAs: folders, checkpoints of runs, Hub ids, LoRAs' .safetensors files "
        "(default: none)",
    )
    group.add_argument(
        "--lcm_lora_scale", type=flags.number(float), default=1.0, help="weight of the students that are LoRAs"
    )
    group.add_argument(
        "--lora",
        nargs="+",
        type=flags.path,
        default=None,
        metavar="NAME=WEIGHT",
        help="other LoRAs, such as styles, for all models, including the teacher: folders, Hub ids or .safetensors "
        "files; without =WEIGHT, the weight is 1",
    )
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="PROMPT",
        help="prompts, or .txt files with a prompt on each line",
    )
    group.add_argument(
        "--negative_prompt",
        default=None,
        help="what the pictures should not show; ignored by full LCMs, and at guidance scales up to 1",
    )
    group.add_argument(
        "--num_images", type=flags.positive_int, default=1, help="pictures per prompt: seeds from --seed on"
    )
    group.add_argument("--seed", type=flags.number(int, 0, 2**63 - 1), default=0, help="seed of the first picture")
    group.add_argument(
        "--seeds",
        type=flags.number(int, 0, 2**63 - 1),
        nargs="+",
        default=None,
        metavar="SEED",
        help="these seeds instead of --num_images and --seed",
    )
    group.add_argument(
        "--resolution",
        type=flags.positive_int,
        default=None,
        help="side of the pictures in pixels (default: what the teacher's U-Net was trained for)",
    )
    for side in ("width", "height"):
        group.add_argument(
            f"--{side}",
            type=flags.positive_int,
            default=None,
            help=f"{side} of the pictures in pixels, a multiple of 8 (default: --resolution)",
        )
    group.add_argument(
        "--init_image",
        type=flags.path,
        default=None,
        metavar="PICTURE",
        help="a picture to start from (img2img), cropped to --width and --height",
    )
    group.add_argument(
        "--strength",
        type=flags.number(float, 0.01, 1),
        default=None,
        help="img2img: how much noise is added to the picture, 0 to 1; the U-Net takes all --steps whatever the "
        "strength (in Diffusers' pipelines, that share of them) (default: 0.5)",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--steps", type=flags.positive_int, nargs="+", default=None, help="steps of the students (default: 1 2 4 8)"
    )
    group.add_argument(
        "--teacher_steps",
        type=flags.count,
        nargs="+",
        default=None,
        help="steps of the teacher; 0: no row for it (default: 25)",
    )
    group.add_argument(
        "--sweep",
        action="store_true",
        help="--steps 1 2 3 4 5 6 7 8 and --teacher_steps 1 4 8 15 20 25 30 50, unless these are given",
    )
    group.add_argument(
        "--guidance_scale",
        type=flags.non_negative,
        nargs="+",
        default=[8.0],
        metavar="SCALE",
        help="guidance_scale (w + 1) of the teacher and of full LCMs (default: 8)",
    )
    group.add_argument(
        "--lora_guidance_scale",
        type=flags.non_negative,
        nargs="+",
        default=[1.0],
        metavar="SCALE",
        help="guidance_scale of LCM-LoRAs, and of LCMs without a guidance embedding; 1 to 2 works best (default: 1)",
    )
    group.add_argument(
        "--teacher_sampler", default="DDIM", choices=flags.SAMPLERS, help="sampler of the teacher's rows"
    )
    group.add_argument("--batch_size", type=flags.positive_int, default=4, help="pictures generated at once")
    flags.add_group(parser, flags.DeviceFlags)
    parser.add_argument(
        "--output_dir",
        type=flags.path,
        default="drawn",
        metavar="OUT",
        help="folder for the grid, the pictures and samples.json",
    )
    args = parser.parse_args(argv)
    if args.strength is not None and args.init_image is None:
        parser.error("argument --strength: it needs --init_image, the picture to start from")
    if args.width and args.height and args.resolution:
        parser.error("argument --resolution: it is the side that --width or --height leaves open; both are given")
    if args.steps is None:
        args.steps = SWEEP_STUDENT_STEPS if args.sweep else STUDENT_STEPS
    if args.teacher_steps is None:
        args.teacher_steps = SWEEP_TEACHER_STEPS if args.sweep else TEACHER_STEPS
    if not args.student and not any(args.teacher_steps):
        parser.error("argument --teacher_steps: with 0 and no --student there is nothing to generate")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered here, before the seconds that the imports below take

import contextlib
import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from lcm_distill.bars import progress_bar, say
from lcm_distill.data.decode import decode_picture
from lcm_distill.data.raw import BadSample
from lcm_distill.environment import check_writable, choose_device, memory_errors, quiet_libraries
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.vae import decode_latents
from lcm_distill.sampling.finished import (
    Student,
    WeightedLora,
    check_same_teacher,
    find_students,
    load_teacher,
    native_resolution,
    with_loras,
)
from lcm_distill.sampling.generate import (
    build_teacher_sampler,
    check_steps,
    count_steps,
    generate_from_picture,
    generate_latents,
    read_prompts,
    warn_of_long_prompts,
)
from lcm_distill.sampling.grid import labelled_grid, resize_to_cell

MAX_CELL = 256  # side of a picture in the grid, pixels


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One row of the grid: a model and its settings. `student` is None for the teacher."""

    student: Student | None
    steps: int
    guidance_scale: float
    negative_prompt: str | None

    @property
    def model(self) -> str:
        return self.student.name if self.student else "teacher"


def plan_rows(
    students: Sequence[Student],
    *,
    steps: Sequence[int],
    teacher_steps: Sequence[int],
    guidance_scales: Sequence[float],
    lora_guidance_scales: Sequence[float],
    negative_prompt: str | None,
) -> list[GridRow]:
    """The rows of the grid, the teacher's first; duplicates are dropped, and so are 0 steps.

    Only rows that are guided with a second pass have the negative prompt, which has no effect in others.
    """
    rows = []
    for student in (None, *students):
        embedded = student is not None and student.has_guidance_embedding
        scales = guidance_scales if embedded or student is None else lora_guidance_scales
        for scale in dict.fromkeys(scales):
            negative = negative_prompt if scale > 1 and not embedded else None
            for count in dict.fromkeys(teacher_steps if student is None else steps):
                if count:
                    rows.append(GridRow(student, count, scale, negative))
    return rows


def row_labels(rows: Sequence[GridRow], teacher_sampler_name: str) -> list[str]:
    """A label for each row, with the guidance scale if its model has several."""
    scales: dict[str, set[float]] = {}
    for row in rows:
        scales.setdefault(row.model, set()).add(row.guidance_scale)
    labels = []
    for row in rows:
        model = row.model if row.student else f"{row.model}, {teacher_sampler_name}"
        guidance = f", guidance {row.guidance_scale:g}" if len(scales[row.model]) > 1 else ""
        labels.append(f"{model}, {row.steps} step{'s' * (row.steps != 1)}{guidance}")
    return labels


class PictureFolder:
    """Writes pictures to `pictures/` in `folder`, each with a unique name and its settings as metadata; lists them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: set[str] = set()
        self.listed: list[dict[str, Any]] = []

    def add(self, picture: Image.Image, number: int, settings: dict[str, Any]) -> None:
        """Writes a picture of prompt `number`; `settings` are its model, steps, guidance_scale, prompt, seed, …"""
        words = (
            _slug(settings["model"], 60),
            f"{settings['steps']}-step{'s' * (settings['steps'] != 1)}",
            f"guidance-{settings['guidance_scale']:g}",
            f"{number:03d}-{_slug(settings['prompt'], 40)}",
            f"seed-{settings['seed']}",
        )
        name = stem = "_".join(words)
        count = 1
        while name.lower() in self._names:  # file names ignore case on some systems
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name.lower())
        info = PngInfo()
        for key, value in settings.items():
            if value is not None:
                info.add_text(key, value if isinstance(value, str) else json.dumps(value))
        file = f"pictures/{name}.png"
        (self._folder / "pictures").mkdir(parents=True, exist_ok=True)
        picture.save(self._folder / file, pnginfo=info)
        self.listed.append({"file": file} | settings)


def _slug(text: str, max_length: int) -> str:
    """`text` as a part of a file name: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+|_+", "-", text)[:max_length].strip("-.") or "x"


def parse_lora(text: str, cache_dir: str | None = None) -> WeightedLora:
    """`NAME=WEIGHT`, or `NAME` with weight 1; a name may contain = unless a number follows it."""
    name, _, last = text.rpartition("=")
    weight = 1.0
    with contextlib.suppress(ValueError):
        text, weight = (name, float(last)) if name else (text, weight)
    if not math.isfinite(weight):
        raise UsageError(f"--lora {text}={weight}: the weight must be a finite number.")
    return WeightedLora(text, weight, cache_dir=cache_dir)


def read_init_image(name: str) -> Image.Image:
    """The upright RGB picture of `--init_image`; `UsageError` if the file cannot be read or is not a picture."""
    try:
        return decode_picture(Path(name).expanduser().read_bytes())[0]
    except OSError as error:
        raise UsageError(f"--init_image {name} cannot be read ({error.strerror}); correct its path.") from None
    except BadSample as error:
        raise UsageError(f"--init_image {name}: {error}; use another picture.") from None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()

    # Mistakes in the flags are reported here, before anything is loaded.
    prompts = read_prompts(args.prompts, "--prompts") or []
    seeds = list(dict.fromkeys(args.seeds or range(args.seed, args.seed + args.num_images)))
    strength = 1.0 if args.init_image is None else args.strength or 0.5
    init_image = None if args.init_image is None else read_init_image(args.init_image)
    device, dtype = choose_device(args.device, args.dtype)
    loras = [parse_lora(text, args.cache_dir) for text in args.lora or []]
    rows = plan_rows(
        find_students(args.student or [], args.cache_dir),
        steps=args.steps,
        teacher_steps=args.teacher_steps,
        guidance_scales=args.guidance_scale,
        lora_guidance_scales=args.lora_guidance_scale,
        negative_prompt=args.negative_prompt,
    )
    check_writable(args.output_dir)
    teacher = Teacher.from_flags(flags.take(flags.TeacherFlags, args))
    sides = {f"--{side}": value for side, value in (("width", args.width), ("height", args.height)) if value}
    pipeline = load_teacher(teacher, device=device, dtype=dtype, resolution=args.resolution, sizes=sides)
    pipeline.scheduler = build_teacher_sampler(pipeline.scheduler.config, args.teacher_sampler)
    resolution = args.resolution or (0 if len(sides) == 2 else native_resolution(pipeline))
    size = (args.width or resolution, args.height or resolution)
    for row in rows:
        sampler = row.student.sampler(pipeline.scheduler.config) if row.student else pipeline.scheduler
        check_steps("--steps" if row.student else "--teacher_steps", row.steps, sampler, strength)
    if args.negative_prompt is not None:
        guided = {row.model for row in rows if row.negative_prompt is not None}
        for model in dict.fromkeys(row.model for row in rows if row.model not in guided):
            print(f"{model} ignores --negative_prompt, which needs a second pass, at a guidance scale above 1")
    check_students(pipeline, dict.fromkeys(row.student for row in rows if row.student), loras)

    # Each row has a picture for each prompt and seed.
    common: dict[str, Any] = {"width": size[0], "height": size[1]}
    if size[0] == size[1]:
        common["resolution"] = size[0]
    common["loras"] = {lora.source: lora.weight for lora in loras}
    if init_image is not None:
        init_image = ImageOps.fit(init_image, size, Image.Resampling.LANCZOS)
        common |= {"init_image": args.init_image, "strength": strength}
    warn_of_long_prompts(pipeline, prompts)
    columns = [(number, prompt, seed) for number, prompt in enumerate(prompts, 1) for seed in seeds]
    folder, grid = PictureFolder(Path(args.output_dir)), list[tuple[str, list[Image.Image]]]()
    steps = sum(count_steps(len(columns), args.batch_size, row.steps) for row in rows)
    bar = progress_bar("generating", unit="step", total=steps, leave=False)
    generated = generate_rows(
        pipeline,
        rows,
        [prompt for _, prompt, _ in columns],
        [seed for _, _, seed in columns],
        init_image=init_image,
        strength=strength,
        size=size,
        batch_size=args.batch_size,
        lcm_lora_scale=args.lcm_lora_scale,
        loras=loras,
        on_step=bar.update,
    )
    with bar, memory_errors("use a smaller --batch_size or --resolution."):
        for label, (row, pictures, seconds) in zip(row_labels(rows, args.teacher_sampler), generated, strict=True):
            say(f"{label}: {len(columns)} in {seconds:.1f} s")
            grid.append((label, [resize_to_cell(picture, min(MAX_CELL, max(size))) for picture in pictures]))
            settings: dict[str, Any] = {
                "model": row.model,
                "source": row.student.source if row.student else args.pretrained_teacher_model,
                "sampler": "LCM" if row.student else args.teacher_sampler,
                "steps": row.steps,
                "guidance_scale": row.guidance_scale,
                "negative_prompt": row.negative_prompt,
            }
            if row.student and row.student.kind == "lora":
                settings["lcm_lora_scale"] = args.lcm_lora_scale
            for (number, prompt, seed), picture in zip(columns, pictures, strict=True):
                folder.add(picture, number, settings | {"prompt": prompt, "seed": seed} | common)
    headings = [
        (prompt if seed == seeds[0] else "") + (f" (seed {seed})" if len(seeds) > 1 else "")
        for _, prompt, seed in columns
    ]
    out = Path(args.output_dir)
    labelled_grid(grid, columns=headings).save(out / "grid.png")
    (out / "samples.json").write_text(json.dumps(folder.listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out / 'grid.png'}, and {len(folder.listed)} pictures in {out / 'pictures'}")


def check_students(pipeline: Any, students: Iterable[Student], loras: Sequence[WeightedLora]) -> None:
    """`UsageError` for a student or one of the `loras` that does not fit the teacher in `pipeline`.

    Before anything is generated: the teacher's rows, which are the first, may take minutes.
    """
    for student in students:
        if student.kind == "full":
            check_same_teacher(student.load_config(), pipeline.unet.config, f"{student.flag} {student.source}")
        else:
            with student.installed_in(pipeline):
                pass
    with with_loras(pipeline, loras):
        pass


def generate_rows(
    pipeline: Any,
    rows: Sequence[GridRow],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    init_image: Image.Image | None = None,
    strength: float = 1.0,
    size: tuple[int, int],
    batch_size: int,
    lcm_lora_scale: float = 1.0,
    loras: Sequence[WeightedLora] = (),
    on_step: Callable[[], object] | None = None,
) -> Iterator[tuple[GridRow, list[Image.Image], float]]:
    """Yields each row with its pictures, one for each prompt and its seed, and the seconds that they took.

    `pipeline` is the teacher's, with the teacher's sampler; `size` is (width, height). With `init_image`, of that size,
    it is img2img. `on_step` is called after each step of each batch.
    """
    for student, student_rows in itertools.groupby(rows, lambda row: row.student):
        with contextlib.ExitStack() as stack:
            if student is None:
                stack.enter_context(with_loras(pipeline, loras))
            else:
                stack.enter_context(student.installed_in(pipeline, lora_scale=lcm_lora_scale, loras=loras))
            for row in student_rows:
                start = time.perf_counter()
                options: dict[str, Any] = dict(
                    inference_steps=row.steps,
                    guidance_scale=row.guidance_scale,
                    negative_prompt=row.negative_prompt,
                    batch_size=batch_size,
                    on_step=on_step,
                )
                if init_image is None:
                    latents = generate_latents(pipeline, prompts, seeds, resolution=size, **options)
                else:
                    latents = generate_from_picture(pipeline, init_image, prompts, seeds, strength=strength, **options)
                pictures = decode_latents(pipeline.vae, latents, batch_size=1)  # one takes gigabytes at 1024 pixels
                yield row, pictures, time.perf_counter() - start


if __name__ == "__main__":
    run_program(main, resume_hint="")
