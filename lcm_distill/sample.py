"""Draw with a teacher and its students: one labelled grid, the single pictures, and what each was drawn with.

    python -m lcm_distill.sample --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --student lcm-sd15 lcm-lora-sd15 --prompts "a castle at dusk" "a fox in the snow" --output_dir drawn
    python -m lcm_distill.sample … --student lcm-lora-sd15 --prompts prompts.txt --sweep
    python -m lcm_distill.sample … --student lcm-lora-sd15 --lora a-style-lora=0.8 --lcm_lora_scale 1.0
    python -m lcm_distill.sample … --student lcm-sd15 --init_image photo.jpg --strength 0.5

A student is a full LCM (the folder that a distillation left, a U-Net, a whole pipeline's folder) or an LCM-LoRA (a
folder, a .safetensors file), here or on the Hub. The grid has a row for each model, number of steps and guidance, and
a column for each prompt and seed; every row starts from the same noise. --sweep is the step sweep of the LCM-LoRA
announcement: students at 1 to 8 steps, the teacher at 1, 4, 8, 15, 20, 25, 30 and 50.

Guidance. A full LCM is told --guidance_scale, which the teacher draws with too. An LCM-LoRA has a guidance in its
weights and draws at --lora_guidance_scale, 1. A negative prompt counts where a model is guided by a second pass: in
the teacher and in LoRAs at a scale above 1, not in a full LCM.

In OUT: grid.png; pictures/, whose names tell model, steps, guidance, prompt and seed, and whose PNG texts all settings;
samples.json, the same for all pictures. Each picture is what a Diffusers pipeline draws with these settings.
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
        default=None,
        metavar="STUDENT",
        help="full LCMs and LCM-LoRAs to draw with: folders, Hub ids, LoRAs' .safetensors files (default: none)",
    )
    group.add_argument(
        "--lcm_lora_scale", type=flags.number(float), default=1.0, help="weight of the students that are LoRAs"
    )
    group.add_argument(
        "--lora",
        nargs="+",
        default=None,
        metavar="NAME=WEIGHT",
        help="further LoRAs, such as styles, on every model, the teacher too: folders, Hub ids or .safetensors files; "
        "without =WEIGHT at 1",
    )
    group = parser.add_argument_group("what to draw")
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
        help="what not to draw; full LCMs, and guidance scales up to 1, do not heed it",
    )
    group.add_argument(
        "--num_images", type=flags.positive_int, default=1, help="pictures per prompt: seeds from --seed"
    )
    group.add_argument("--seed", type=flags.number(int, 0, 2**63 - 1), default=0, help="the first picture's")
    group.add_argument(
        "--seeds",
        type=flags.number(int, 0, 2**63 - 1),
        nargs="+",
        default=None,
        metavar="SEED",
        help="these seeds, in place of --num_images and --seed",
    )
    group.add_argument(
        "--resolution",
        type=flags.positive_int,
        default=None,
        help="side of the pictures in pixels (default: what the teacher's U-Net was made for)",
    )
    group.add_argument(
        "--init_image",
        default=None,
        metavar="PICTURE",
        help="a picture to start from (img2img), cut to a square of --resolution",
    )
    group.add_argument(
        "--strength",
        type=flags.number(float, 0.01, 1),
        default=None,
        help="of img2img: how much of the picture is noised, 0 to 1; --steps are those that the U-Net takes, whatever "
        "the strength (Diffusers' pipelines would take that share of them) (default: 0.5)",
    )
    group = parser.add_argument_group("how to draw it")
    group.add_argument(
        "--steps", type=flags.positive_int, nargs="+", default=None, help="steps of the students (default: 1 2 4 8)"
    )
    group.add_argument(
        "--teacher_steps",
        type=flags.count,
        nargs="+",
        default=None,
        help="steps of the teacher; 0 for no row of its own (default: 25)",
    )
    group.add_argument(
        "--sweep",
        action="store_true",
        help="--steps 1 2 3 4 5 6 7 8 and --teacher_steps 1 4 8 15 20 25 30 50, where these are not given",
    )
    group.add_argument(
        "--guidance_scale",
        type=flags.non_negative,
        nargs="+",
        default=[8.0],
        metavar="SCALE",
        help="the pipelines' guidance_scale, w + 1, of the teacher and of full LCMs (default: 8)",
    )
    group.add_argument(
        "--lora_guidance_scale",
        type=flags.non_negative,
        nargs="+",
        default=[1.0],
        metavar="SCALE",
        help="of LCM-LoRAs, and of LCMs without a guidance embedding; 1 to 2 is right (default: 1)",
    )
    group.add_argument(
        "--teacher_sampler", default="DDIM", choices=flags.SAMPLERS, help="sampler of the teacher's rows"
    )
    group.add_argument("--batch_size", type=flags.positive_int, default=4, help="pictures drawn at once")
    flags.add_group(parser, flags.DeviceFlags)
    parser.add_argument(
        "--output_dir", default="drawn", metavar="OUT", help="folder for grid, pictures and samples.json"
    )
    args = parser.parse_args(argv)
    if args.strength is not None and args.init_image is None:
        parser.error("argument --strength: it is img2img's; give a picture as --init_image too")
    if args.steps is None:
        args.steps = SWEEP_STUDENT_STEPS if args.sweep else STUDENT_STEPS
    if args.teacher_steps is None:
        args.teacher_steps = SWEEP_TEACHER_STEPS if args.sweep else TEACHER_STEPS
    if not args.student and not any(args.teacher_steps):
        parser.error("argument --teacher_steps: with 0 and no --student there is nothing to draw")
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from lcm_distill.data.decode import decode_picture
from lcm_distill.data.raw import BadSample
from lcm_distill.environment import check_writable, choose_device, memory_errors, quiet_libraries
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.vae import decode_latents
from lcm_distill.sampling.finished import (
    Student,
    WeightedLora,
    find_students,
    load_teacher,
    natural_resolution,
    with_loras,
)
from lcm_distill.sampling.generate import (
    check_steps,
    generate_from_picture,
    generate_latents,
    read_prompts,
    teacher_sampler,
)
from lcm_distill.sampling.grid import labelled_grid, shown

CELL = 256  # pixels of a picture in the grid, at most


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One line of the grid: a model and how it draws. `student` is None for the teacher."""

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
    """The rows of the grid, the teacher's first; what is given twice is drawn once, and 0 steps not at all.

    The negative prompt is that of the rows where it counts, those with a second pass to guide by.
    """
    rows = []
    for student in (None, *students):
        told = student is not None and student.has_guidance_embedding
        scales = guidance_scales if told or student is None else lora_guidance_scales
        for scale in dict.fromkeys(scales):
            negative = negative_prompt if scale > 1 and not told else None
            for number in dict.fromkeys(teacher_steps if student is None else steps):
                if number:
                    rows.append(GridRow(student, number, scale, negative))
    return rows


def row_labels(rows: Sequence[GridRow], teacher_sampler_name: str) -> list[str]:
    """A label for each row; it tells the guidance where a model draws with several."""
    scales: dict[str, set[float]] = {}
    for row in rows:
        scales.setdefault(row.model, set()).add(row.guidance_scale)
    labels = []
    for row in rows:
        model = row.model if row.student else f"{row.model}, {teacher_sampler_name}"
        guidance = f", guidance {row.guidance_scale:g}" if len(scales[row.model]) > 1 else ""
        labels.append(f"{model}, {row.steps} step{'s' * (row.steps != 1)}{guidance}")
    return labels


class Album:
    """The `pictures/` of `folder`: each under a name of its own, with its settings in it, and listed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: set[str] = set()
        self.listed: list[dict[str, Any]] = []
        (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def add(self, picture: Image.Image, number: int, settings: dict[str, Any]) -> None:
        """Writes the picture of the `number`-th prompt; `settings` tells model, steps, guidance, prompt, seed, …"""
        words = (
            _plain(settings["model"], 60),
            f"{settings['steps']}-step{'s' * (settings['steps'] != 1)}",
            f"guidance-{settings['guidance_scale']:g}",
            f"{number:03d}-{_plain(settings['prompt'], 40)}",
            f"seed-{settings['seed']}",
        )
        name = stem = "_".join(words)
        count = 1
        while name.lower() in self._names:  # on some systems a file has both
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name.lower())
        info = PngInfo()
        for key, value in settings.items():
            if value is not None:
                info.add_text(key, value if isinstance(value, str) else json.dumps(value))
        file = f"pictures/{name}.png"
        picture.save(self._folder / file, pnginfo=info)
        self.listed.append({"file": file} | settings)


def _plain(text: str, most: int) -> str:
    """`text` as a part of a file's name: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+|_+", "-", text)[:most].strip("-.") or "x"


def parse_lora(text: str, cache_dir: str | None = None) -> WeightedLora:
    """`NAME=WEIGHT`, or `NAME` at 1; a name may have = in it, if what follows is no number."""
    name, _, last = text.rpartition("=")
    weight = 1.0
    with contextlib.suppress(ValueError):
        text, weight = (name, float(last)) if name else (text, weight)
    if not math.isfinite(weight):
        raise UsageError(f"--lora {text}={weight}: a weight is a finite number.")
    return WeightedLora(text, weight, cache_dir=cache_dir)


def read_init_image(name: str) -> Image.Image:
    """An upright RGB picture; `UsageError` if the file of `--init_image` is none."""
    try:
        return decode_picture(Path(name).expanduser().read_bytes())[0]
    except OSError as error:
        raise UsageError(f"--init_image {name} cannot be read ({error.strerror}); correct its path.") from None
    except BadSample as error:
        raise UsageError(f"--init_image {name}: {error}; give another one.") from None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()

    # What can be wrong with the flags is said here, before anything is loaded.
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
    pipeline = load_teacher(teacher, device=device, dtype=dtype, resolution=args.resolution)
    pipeline.scheduler = teacher_sampler(pipeline.scheduler.config, args.teacher_sampler)
    resolution = args.resolution or natural_resolution(pipeline)
    for row in rows:
        sampler = row.student.sampler(pipeline.scheduler.config) if row.student else pipeline.scheduler
        check_steps("--steps" if row.student else "--teacher_steps", row.steps, sampler, strength)
    if args.negative_prompt is not None:
        heeding = {row.model for row in rows if row.negative_prompt is not None}
        for model in dict.fromkeys(row.model for row in rows if row.model not in heeding):
            print(f"{model} does not heed --negative_prompt: nothing but a second pass, above guidance scale 1, does")

    # In every row a picture for each prompt and seed.
    common: dict[str, Any] = {"resolution": resolution, "loras": {lora.source: lora.weight for lora in loras}}
    if init_image is not None:
        init_image = ImageOps.fit(init_image, (resolution, resolution), Image.Resampling.LANCZOS)
        common |= {"init_image": args.init_image, "strength": strength}
    columns = [(number, prompt, seed) for number, prompt in enumerate(prompts, 1) for seed in seeds]
    album, grid = Album(Path(args.output_dir)), list[tuple[str, list[Image.Image]]]()
    drawing = generate_rows(
        pipeline,
        rows,
        [prompt for _, prompt, _ in columns],
        [seed for _, _, seed in columns],
        init_image=init_image,
        strength=strength,
        resolution=resolution,
        batch_size=args.batch_size,
        lcm_lora_scale=args.lcm_lora_scale,
        loras=loras,
    )
    with memory_errors("take a smaller --batch_size or --resolution."):
        for label, (row, pictures, seconds) in zip(row_labels(rows, args.teacher_sampler), drawing, strict=True):
            print(f"{label}: {len(columns)} in {seconds:.1f} s", flush=True)
            grid.append((label, [shown(picture, min(CELL, resolution)) for picture in pictures]))
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
                album.add(picture, number, settings | {"prompt": prompt, "seed": seed} | common)
    headings = [
        (prompt if seed == seeds[0] else "") + (f" (seed {seed})" if len(seeds) > 1 else "")
        for _, prompt, seed in columns
    ]
    out = Path(args.output_dir)
    labelled_grid(grid, columns=headings).save(out / "grid.png")
    (out / "samples.json").write_text(json.dumps(album.listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out / 'grid.png'}, and {len(album.listed)} pictures in {out / 'pictures'}")


def generate_rows(
    pipeline: Any,
    rows: Sequence[GridRow],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    init_image: Image.Image | None = None,
    strength: float = 1.0,
    resolution: int,
    batch_size: int,
    lcm_lora_scale: float = 1.0,
    loras: Sequence[WeightedLora] = (),
) -> Iterator[tuple[GridRow, list[Image.Image], float]]:
    """Each row with its pictures, one for each prompt and its seed, and the seconds that they took.

    `pipeline` is the teacher's, and has its sampler. With `init_image`, of the size to draw, it is img2img.
    """
    for student, own in itertools.groupby(rows, lambda row: row.student):
        with contextlib.ExitStack() as stack:
            if student is None:
                stack.enter_context(with_loras(pipeline, loras))
            else:
                stack.enter_context(student.installed_in(pipeline, lora_scale=lcm_lora_scale, loras=loras))
            for row in own:
                start = time.perf_counter()
                options: dict[str, Any] = dict(
                    inference_steps=row.steps,
                    guidance_scale=row.guidance_scale,
                    negative_prompt=row.negative_prompt,
                    batch_size=batch_size,
                )
                if init_image is None:
                    latents = generate_latents(pipeline, prompts, seeds, resolution=resolution, **options)
                else:
                    latents = generate_from_picture(pipeline, init_image, prompts, seeds, strength=strength, **options)
                pictures = decode_latents(pipeline.vae, latents, batch_size=1)  # at 1024 pixels each takes gigabytes
                yield row, pictures, time.perf_counter() - start


if __name__ == "__main__":
    run_program(main, "")
