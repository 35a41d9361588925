"""Seconds per picture on this machine: students in a few steps, compared with their teacher in many.

    python -m lcm_distill.bench_inference --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 \\
        --variant fp16 --student latent-consistency/lcm-lora-sdxl --batch_sizes 1 4
    python -m lcm_distill.bench_inference … --student lcm-sd15 lcm-lora-sd15 --steps 2 --output_dir speed

The defaults are those of the LCM-LoRA announcement: a student at --steps 4, the teacher at --teacher_steps 25.

The time of a picture is measured from the prompt to the pixels: text encoders, the U-Net's steps, the VAE's decoder,
without loading. LoRA students are fused into the U-Net. The teacher, and students without a guidance embedding at a
guidance scale above 1, take two passes of the U-Net per step.

In each round every model is timed once; the first --warmup rounds are discarded. The table has medians over the rounds
of the seconds and of the ratios within a round, which a machine that is busy now and then does not distort. Models that
are not being timed are in CPU memory, so that the peak GPU memory is that of one model.
"""

import argparse

from lcm_distill import flags
from lcm_distill.errors import run_program

PROG = "python -m lcm_distill.bench_inference"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    usage = "%(prog)s --pretrained_teacher_model TEACHER --student A [B …] [flags]"
    parser = flags.CommandParser(PROG, __doc__, usage)
    flags.add_group(parser, flags.TeacherFlags)
    group = parser.add_argument_group("what to time")
    group.add_argument(
        "--student",
        nargs="+",
        required=True,
        type=flags.path,
        metavar="STUDENT",
        help="full LCMs and LCM-LoRAs: folders, checkpoints of runs, Hub ids, LoRAs' .safetensors files",
    )
    group.add_argument("--steps", type=flags.positive_int, default=4, help="steps of the students")
    group.add_argument("--teacher_steps", type=flags.positive_int, default=25, help="DDIM steps of the teacher")
    group.add_argument(
        "--guidance_scale",
        type=flags.non_negative,
        default=8.0,
        help="guidance scale (w + 1) of the teacher, and of students with a guidance embedding",
    )
    group.add_argument(
        "--lora_guidance_scale",
        type=flags.non_negative,
        default=1.0,
        help="guidance scale of the other students; above 1, each step takes a second pass",
    )
    group.add_argument(
        "--batch_sizes", type=flags.positive_int, nargs="+", default=[1, 4], metavar="N", help="(default: 1 4)"
    )
    group.add_argument(
        "--resolution",
        type=flags.positive_int,
        default=None,
        help="side of the pictures in pixels (default: what the teacher's U-Net was trained for)",
    )
    group.add_argument("--prompt", default="a castle at dusk", help="what to generate")
    group.add_argument("--repeats", type=flags.positive_int, default=5, help="timed rounds")
    group.add_argument("--warmup", type=flags.count, default=1, help="untimed rounds before them")
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the U-Nets (torch.compile); takes minutes, in the first warm-up round, which it needs",
    )
    flags.add_group(parser, flags.DeviceFlags)
    parser.add_argument(
        "--output_dir",
        type=flags.path,
        default=None,
        metavar="OUT",
        help="also write bench_inference.md, and bench_inference.json with each round's seconds, into this folder",
    )
    args = parser.parse_args(argv)
    if args.compile and not args.warmup:
        parser.error("argument --compile: it needs a round to compile in; pass --warmup 1 or more")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered here, before the seconds that the imports below take

import dataclasses
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lcm_distill.bars import progress_bar
from lcm_distill.distributed.compiling import compile_networks
from lcm_distill.environment import check_writable, choose_device, device_name, memory_errors, quiet_libraries
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.vae import decode_latents
from lcm_distill.sampling.finished import Student, find_students, load_teacher, native_resolution
from lcm_distill.sampling.generate import check_steps, generate_latents


@dataclasses.dataclass
class Contender:
    """A model to time, and its settings."""

    name: str
    unet: Any
    scheduler: Any
    steps: int
    guidance_scale: float
    two_passes: bool


@dataclasses.dataclass
class Result:
    """One line of the table: a model at a batch size. `seconds` are those per picture, for each round."""

    model: str
    steps: int
    guidance_scale: float
    unet_passes: int
    batch_size: int
    seconds: list[float]
    times_as_fast: float
    peak_gpu_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def prepare_contenders(
    pipeline: Any,
    students: Sequence[Student],
    *,
    steps: int,
    teacher_steps: int,
    guidance_scale: float,
    lora_guidance_scale: float,
) -> list[Contender]:
    """The teacher and each student, with LoRAs fused; the students' U-Nets are in CPU memory.

    `UsageError` for more steps than a sampler can take, or a student that does not fit the teacher.
    """
    check_steps("--teacher_steps", teacher_steps, pipeline.scheduler)
    contenders = [
        Contender("teacher", pipeline.unet, pipeline.scheduler, teacher_steps, guidance_scale, guidance_scale > 1)
    ]
    for student in students:
        embedded = student.has_guidance_embedding
        scale = guidance_scale if embedded else lora_guidance_scale
        check_steps("--steps", steps, student.sampler(pipeline.scheduler.config))
        with student.installed_in(pipeline, fuse=True):
            unet = pipeline.unet.to("cpu")
            contenders.append(
                Contender(student.name, unet, pipeline.scheduler, steps, scale, scale > 1 and not embedded)
            )
    return contenders


def measure(
    pipeline: Any,
    contenders: Sequence[Contender],
    *,
    prompt: str,
    resolution: int,
    batch_sizes: Sequence[int],
    repeats: int,
    warmup: int,
) -> list[Result]:
    """Times all `contenders`, of which the first, the teacher, is what the others are compared with; by batch size."""
    device = pipeline.unet.device
    seconds: dict[tuple[int, int], list[float]] = {}
    peaks: dict[tuple[int, int], int] = {}
    for contender in contenders:
        contender.unet.to("cpu")
    rounds = warmup + repeats
    with progress_bar("timing", unit="batch", total=rounds * len(contenders) * len(batch_sizes), leave=False) as bar:
        for number, (turn, contender) in itertools.product(range(rounds), enumerate(contenders)):
            pipeline.unet, pipeline.scheduler = contender.unet.to(device), contender.scheduler
            for batch_size in batch_sizes:
                taken, peak = _time(pipeline, contender, [prompt] * batch_size, resolution)
                bar.update()
                if number >= warmup:
                    seconds.setdefault((batch_size, turn), []).append(taken / batch_size)
                    peaks[batch_size, turn] = max(peak, peaks.get((batch_size, turn), 0))
            contender.unet.to("cpu")
    pipeline.unet, pipeline.scheduler = contenders[0].unet.to(device), contenders[0].scheduler
    return [
        Result(
            contender.name,
            contender.steps,
            contender.guidance_scale,
            contender.steps * (1 + contender.two_passes),
            batch_size,
            seconds[batch_size, turn],
            statistics.median(
                teacher / own for teacher, own in zip(seconds[batch_size, 0], seconds[batch_size, turn], strict=True)
            ),
            peaks[batch_size, turn] or None,
        )
        for batch_size in batch_sizes
        for turn, contender in enumerate(contenders)
    ]


def _time(pipeline: Any, contender: Contender, prompts: list[str], resolution: int) -> tuple[float, int]:
    """(seconds, peak bytes of a CUDA device, else 0) of generating pictures of `prompts` in one batch."""
    device = pipeline.unet.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _synchronize(device)
    start = time.perf_counter()
    latents = generate_latents(
        pipeline,
        prompts,
        range(len(prompts)),
        inference_steps=contender.steps,
        guidance_scale=contender.guidance_scale,
        resolution=resolution,
        batch_size=len(prompts),
    )
    decode_latents(pipeline.vae, latents, batch_size=len(prompts))
    _synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    """Waits until the device has finished all work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def format_table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    on_gpu = any(result.peak_gpu_bytes for result in results)
    heads = ["model", "steps", "guidance scale", "U-Net passes", "batch", "seconds per picture", "times as fast"]
    lines = [heads + ["peak GPU memory"] * on_gpu, ["---"] * (len(heads) + on_gpu)]
    for result in results:
        lines.append(
            [
                result.model.replace("|", "\\|"),
                str(result.steps),
                f"{result.guidance_scale:g}",
                str(result.unet_passes),
                str(result.batch_size),
                f"{result.median:.3g}",
                f"{result.times_as_fast:.1f}",
            ]
            + [f"{(result.peak_gpu_bytes or 0) / 2**30:.1f} GiB"] * on_gpu
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on: device, threads, versions."""
    versions = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft")]
    return {
        "device": device_name(device),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "system": platform.platform(),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    device, dtype = choose_device(args.device, args.dtype)
    students = find_students(args.student, args.cache_dir)
    if args.output_dir is not None:
        check_writable(args.output_dir)
    teacher = Teacher.from_flags(flags.take(flags.TeacherFlags, args))
    with memory_errors("use smaller --batch_sizes or a smaller --resolution."):
        pipeline = load_teacher(teacher, device=device, dtype=dtype, resolution=args.resolution)
        resolution = args.resolution or native_resolution(pipeline)
        contenders = prepare_contenders(
            pipeline,
            students,
            steps=args.steps,
            teacher_steps=args.teacher_steps,
            guidance_scale=args.guidance_scale,
            lora_guidance_scale=args.lora_guidance_scale,
        )
        if args.compile:
            compile_networks("whole", *(contender.unet for contender in contenders))
        results = measure(
            pipeline,
            contenders,
            prompt=args.prompt,
            resolution=resolution,
            batch_sizes=list(dict.fromkeys(args.batch_sizes)),
            repeats=args.repeats,
            warmup=args.warmup,
        )
    machine = describe_machine(device)
    arguments = sys.argv[1:] if argv is None else argv
    settings = (
        f"{resolution} × {resolution} pixels, {str(dtype).removeprefix('torch.')}"
        f"{', U-Nets compiled' if args.compile else ''}; medians of {args.repeats} rounds after {args.warmup}. Text "
        "encoders, U-Net and VAE are in it, loading is not; LoRAs are fused."
    )
    report = "\n\n".join(
        [
            format_table(results),
            settings,
            "\n".join(f"- {name}: {value}" for name, value in machine.items())
            + f"\n- date: {date.today()}\n- command: `{shlex.join([*PROG.split(), *arguments])}`",
        ]
    )
    print(report)
    if args.output_dir is not None:
        out = Path(args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench_inference.md").write_text(report + "\n", encoding="utf-8")
        written = {
            "machine": machine,
            "date": str(date.today()),
            "command": [*PROG.split(), *arguments],
            "resolution": resolution,
            "dtype": str(dtype).removeprefix("torch."),
            "compiled": args.compile,
            "warmup": args.warmup,
            "results": [dataclasses.asdict(result) | {"median_seconds": result.median} for result in results],
        }
        (out / "bench_inference.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main, resume_hint="")
