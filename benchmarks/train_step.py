"""How fast is a training step, where does its time go, and how far is that from what the device could do?

    python -m benchmarks.train_step --straightforward                     # the toy, against the plain step: a minute
    python -m benchmarks.train_step --program lora_sd --teacher half --straightforward --each
    python -m benchmarks.train_step --program sdxl --teacher sdxl --train_batch_size 8 --mixed_precision bf16 \\
        --straightforward --variant compile=--compile --output benchmarks/results/train_step-gpu.json
        --gradient_checkpointing --use_8bit_adam        # flags that are not this command's are the program's

What runs is the program's own `main`, on a teacher of the real shapes with random weights (`benchmarks/
architectures.py`) or on the toy's, and toy pictures of the right size. Its functions are wrapped by clocks; nothing of
the step is written down here a second time, but for what `--straightforward` puts in place of the optimisations.

All variants run in this process, one after another, round after round, the most wanted first: all on, straightforward,
the public program, those of `--variant`, then each part off. Whatever a variant changed is undone after it. First come
warm-up steps, then `--steps` whose total time is taken without waiting for the device in between, then `--part_steps`
in which every part waits for the device before and after: those give the milliseconds per part. Numbers are medians
over the rounds, printed and saved after each variant. FLOPs are counted in one more step, on one picture and without
gradient checkpointing (products, convolutions and attention), the device's matrix rate by a large product in the run's
precision: the floor is their quotient. benchmarks/README.md says how to read it all.
"""

import argparse
import contextlib
import faulthandler
import functools
import importlib
import logging
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft.tuners.lora import LoraLayer

from benchmarks import public
from benchmarks.architectures import RESOLUTIONS, write_teacher
from benchmarks.measuring import (
    DTYPES,
    PEAK_OF,
    alone,
    elapsed,
    flop_counter,
    forget_peak,
    free,
    keep,
    matrix_rate,
    peak_memory,
    say,
    wait,
)
from benchmarks.provenance import ROOT, provenance
from lcm_distill.distributed import compiling
from lcm_distill.models import lora, unets
from lcm_distill.objective import consistency
from lcm_distill.objective.schedule import per_sample
from lcm_distill.run import run, stopping
from lcm_distill.run.progress import Progress
from toy.make_shards import make_shards

PROGRAMS = ("sd", "sdxl", "lora_sd", "lora_sdxl")
PARTS = ("data", "VAE", "text", "teacher", "target", "student", "backward", "clip", "optimizer", "EMA")
ALL_ON, PLAIN, PUBLIC = "all on", "straightforward", "public program"


# What the plain step does in place of each optimisation.

Patch = AbstractContextManager[Any]


def two_teacher_passes(program: Any) -> Patch:
    def guided(teacher, schedule, noisy, timesteps, conditioning, unconditional, w, **options):  # type: ignore
        options.pop("batch_size", None)
        branches = []
        for given in (conditioning, unconditional):
            given = consistency.map_tensors(lambda tensor: tensor.expand(len(noisy), *tensor.shape[1:]), given)
            output = consistency.unet_output(teacher, noisy, timesteps, given, **options)
            branches.append((output, noisy, timesteps))
        w = per_sample(w, noisy) if isinstance(w, torch.Tensor) else w
        guide = []
        for prediction in (schedule.predict_x0, schedule.predict_epsilon):
            conditional, empty = (prediction(*branch) for branch in branches)
            guide.append(conditional + w * (conditional - empty))
        return tuple(guide)

    return mock.patch.object(consistency, "guided_prediction", torch.no_grad()(guided))


def ema_per_tensor(program: Any) -> Patch:
    @torch.no_grad()
    def update(target, source, decay):  # type: ignore
        for mine, other in zip(target, source, strict=True):
            mine.mul_(decay).add_(other, alpha=1 - decay)

    return mock.patch.object(consistency, "update_ema", update)


def optimizer_not_fused(program: Any) -> Patch:
    build = program.build_optimizer
    return mock.patch.object(
        program, "build_optimizer", lambda *given, **options: build(*given, **options | {"fused": False})
    )


def sync_every_step(program: Any) -> Patch:
    step = Progress.step

    def waiting(self: Progress, grad_norm: torch.Tensor) -> None:
        float(self._loss)
        step(self, grad_norm)

    return mock.patch.object(Progress, "step", waiting)


def autocast_everywhere(program: Any) -> Patch:
    return mock.patch.object(program, "autocast_over", lambda accelerator, weights: accelerator.autocast())


@contextlib.contextmanager
def peft_layers(program: Any) -> Iterator[None]:
    """PEFT's own layers, but for their cast of the input to float32: each would keep that for the backward pass."""
    with (
        mock.patch.object(lora, "LAYERS", {}),
        mock.patch.object(LoraLayer, "_cast_input_dtype", lambda self, x, dtype: x),
    ):
        yield


def after_start(settle: Callable[[], None]) -> Patch:
    """`settle` is called when the run has set PyTorch's switches."""
    start = run.start_accelerator

    def started(*given: Any, **options: Any) -> Accelerator:
        accelerator = start(*given, **options)
        settle()
        return accelerator

    return mock.patch.object(run, "start_accelerator", started)


def no_search(program: Any) -> Patch:
    return after_start(lambda: setattr(torch.backends.cudnn, "benchmark", False))


def float32_products(program: Any) -> Patch:
    return after_start(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False))


def _in_half(args: Any) -> bool:
    return args.launch.mixed_precision != "no"


def _on_gpu(args: Any) -> bool:
    return torch.cuda.is_available()


@dataclass(frozen=True)
class Optimisation:
    """`off` turns it off: a patch of the program, or a flag; `applies` says whether a run with these flags has it."""

    off: Callable[[Any], Patch] | list[str]
    applies: Callable[[Any], bool] = lambda args: True


# Those that a GPU gains most by come first: who has little time measures them.
OPTIMISATIONS: dict[str, Optimisation] = {
    "fused LoRA layers": Optimisation(peft_layers, lambda args: hasattr(args.student, "lora_rank")),
    "low-precision layer norms": Optimisation(["--float32_norms"], _in_half),
    "half networks without autocast": Optimisation(autocast_everywhere, _in_half),
    "one teacher pass": Optimisation(two_teacher_passes),
    "cuDNN's search": Optimisation(no_search, _on_gpu),
    "low-precision frozen U-Net": Optimisation(["--no-cast_teacher_unet"], _in_half),
    "fused optimizer": Optimisation(
        optimizer_not_fused, lambda args: args.launch.mixed_precision != "fp16" and not args.optimization.use_8bit_adam
    ),
    "fused EMA": Optimisation(ema_per_tensor, lambda args: args.student.ema_decay > 0),
    "no sync": Optimisation(sync_every_step, _on_gpu),
    "TF32 for what is float32": Optimisation(float32_products, lambda args: _on_gpu(args) and _in_half(args)),
}


class Variant:
    """A way to run the program: which optimisations are off, and flags of its own.

    `alone`: in a process of its own, as a launch that finds in the caches what an earlier one left.
    """

    def __init__(self, name: str, off: tuple[str, ...] = (), flags: tuple[str, ...] = (), alone: bool = False):
        self.name, self.alone = name, alone
        turned_off = [OPTIMISATIONS[o].off for o in off]
        self._patches = [what for what in turned_off if not isinstance(what, list)]
        self.flags = [*flags, *(flag for what in turned_off if isinstance(what, list) for flag in what)]

    def apply(self, program: Any, stack: ExitStack) -> None:
        """Changes the program until `stack` ends."""
        for patch in self._patches:
            stack.enter_context(patch(program))


# Clocks around the parts of a step.


class Done(BaseException):
    """Enough steps are taken."""


class Watch:
    """Adds up what `read` returns (seconds, FLOPs) by part, while `on`; one inside another counts as the outer one."""

    def __init__(self, read: Callable[[], float]):
        self.read = read
        self.on = False
        self._inside = False
        self.parts: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on or self._inside:
            yield
            return
        before, self._inside = self.read(), True
        try:
            yield
        finally:
            self._inside = False
            self.parts[name] += self.read() - before

    def wrap(self, owner: Any, function: str, name: str | Callable[[], str], stack: ExitStack) -> None:
        original = getattr(owner, function)

        def watched(*given: Any, **options: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return original(*given, **options)

        stack.enter_context(mock.patch.object(owner, function, watched))

    def attach(self, program: Any, family: Any, stack: ExitStack) -> None:
        """To the functions that a program calls in a step, where it finds them, until `stack` ends."""
        wrap = functools.partial(self.wrap, stack=stack)
        wrap(program, "batch_latents", "VAE")
        wrap(family, "batch_conditioning", "text")
        wrap(consistency, "guided_prediction", "teacher")
        wrap(consistency, "unet_output", lambda: "student" if torch.is_grad_enabled() else "target")
        wrap(consistency, "update_ema", "EMA")
        wrap(Accelerator, "backward", "backward")
        wrap(Accelerator, "clip_grad_norm_", "clip")
        wrap(AcceleratedOptimizer, "step", "optimizer")
        batches = Progress.batches

        def watched(progress: Progress, loader: Any, *others: Any) -> Iterator[Any]:
            # An error's traceback may hold the loader's iterator: then ending it would take five seconds per worker.
            stack.callback(loader.close)
            data = batches(progress, loader, *others)
            while True:
                with self.part("data"):
                    batch = next(data)
                yield batch

        stack.enter_context(mock.patch.object(Progress, "batches", watched))


def at_steps(function: Callable[[int], None], stack: ExitStack) -> None:
    """Calls `function` with 1, 2, … at the end of each optimizer step of the program, until `stack` ends."""
    step, numbers = Progress.step, iter(range(1, 10**9))

    def counted(self: Progress, grad_norm: torch.Tensor) -> None:
        step(self, grad_norm)
        function(next(numbers))

    stack.enter_context(mock.patch.object(Progress, "step", counted))


class OnePicture:
    """Makes a step one on a single picture, without gradient checkpointing and compiled code, once it is `on`."""

    def __init__(self, stack: ExitStack):
        self._stack = stack
        self._on = False
        self._trained: Any = None
        apply, batches = unets.apply_speed_flags, Progress.batches

        def noting(flags: Any, trained: Any, *others: Any) -> None:
            self._trained = trained
            apply(flags, trained, *others)

        def cut(progress: Progress, loader: Any, *others: Any) -> Iterator[Any]:
            for batch in batches(progress, loader, *others):
                sliced = {k: v[:1] if isinstance(v, (list, torch.Tensor)) else v for k, v in batch.items()}
                yield sliced if self._on else batch

        stack.enter_context(mock.patch.object(unets, "apply_speed_flags", noting))
        stack.enter_context(mock.patch.object(Progress, "batches", cut))

    def on(self) -> None:
        self._on = True
        self._trained.disable_gradient_checkpointing()
        torch.backends.cudnn.benchmark = False  # would try every kernel on shapes that come once
        if "torch._dynamo" in sys.modules:
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))


# What one process measures.


@dataclass(frozen=True)
class Plan:
    """Steps of a variant: warm-up, timed in one piece, timed part by part; and torch.compile's backend."""

    warmup: int
    steps: int
    part_steps: int
    backend: str = compiling.BACKEND


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Inside, a program's `main` runs as in a process of its own; what it has set for the process is undone after it.

    Accelerate's state is shared by all accelerators of a process. PyTorch's compiler counts and caches versions of
    functions, not of the networks that they belong to. Signals stay this command's: Ctrl-C ends it, not one variant.
    """
    states, package = (AcceleratorState, GradientState, PartialState), logging.getLogger("lcm_distill")
    switches = [
        (torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
    ]  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name in switches]
    level = package.level
    for state in states:
        state._reset_state()
    try:
        with mock.patch.dict(os.environ), mock.patch.object(stopping, "SIGNALS", ()):
            yield
    finally:
        for state in states:
            state._reset_state()
        for owner, name, value in before:
            setattr(owner, name, value)
        package.setLevel(level)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """What this process and its children write goes into `log`, by their file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in enumerate(kept, 1):
            os.dup2(original, descriptor)
            os.close(original)


def measure(kind: str, variant: Variant, argv: list[str], plan: Plan, flops: bool = False) -> dict[str, Any]:
    """Milliseconds of a step and of its parts, peak memory in bytes, seconds to the end of the first step.

    With `flops` also those of a step on one picture, by part, or why they could not be counted.
    """
    program, family = modules(kind)

    def now() -> float:
        wait()
        return time.perf_counter()

    watch, times, parts = Watch(now), dict[str, float](), dict[str, float]()
    counter, peak, lost = flop_counter(), [0], ""
    timed = plan.warmup + plan.steps

    def boundary(step: int) -> None:
        if step == 1:
            times["first"] = now()
        if step == plan.warmup:
            times["start"] = now()
            forget_peak()
        if step == timed:
            times["total"] = now()
            peak[0] = peak_memory()
            watch.on = True
        if step == timed + plan.part_steps:
            times["parts"] = now()
            parts.update({name: 1e3 * watch.parts[name] / plan.part_steps for name in PARTS if watch.parts[name]})
            if not flops:
                raise Done
            watch.parts.clear()
            watch.read = lambda: float(counter.get_total_flops())
            one_picture.on()
            stack.enter_context(counter)
        if step == timed + plan.part_steps + 1:
            raise Done

    with as_before(), ExitStack() as stack:
        variant.apply(program, stack)
        stack.enter_context(mock.patch.object(compiling, "BACKEND", plan.backend))
        one_picture = OnePicture(stack)
        watch.attach(program, family, stack)
        at_steps(boundary, stack)
        began = time.perf_counter()
        try:
            program.main([*argv, *variant.flags, "--max_train_steps", "1000000"])
            raise RuntimeError("the program ended before its steps were taken")
        except Done:
            pass
        except Exception as error:
            if "parts" not in times:
                raise
            traceback.print_exc()
            lost = f"{type(error).__name__}: {error}".partition("\n")[0]
    result = {
        "first_step_s": times["first"] - began,
        "step_ms": 1e3 * (times["total"] - times["start"]) / plan.steps,
        "step_in_parts_ms": 1e3 * (times["parts"] - times["total"]) / plan.part_steps,
        "parts_ms": parts,
        "peak_memory_bytes": peak[0],
    }
    if lost:
        result["flops_lost"] = lost
    elif flops:
        result["flops"] = {name: watch.parts[name] for name in PARTS if watch.parts[name]}
    return result


def add_each(parser: argparse.ArgumentParser) -> None:
    """The flag that names optimisations to turn off one by one."""
    parser.add_argument(
        "--each",
        nargs="*",
        choices=OPTIMISATIONS,
        metavar="NAME",
        help=f"also with each one turned off, or those named, of: {', '.join(OPTIMISATIONS)}",
    )


def modules(kind: str) -> tuple[Any, Any]:
    """The program of a `kind`, and its family's module."""
    program = importlib.import_module(f"train_lcm_distill_{kind}_wds")
    return program, program.family


# Results.


def summarise(rounds: list[dict[str, Any]], pictures: int, floor_ms: float | None) -> dict[str, Any]:
    """Medians over the rounds of one variant; a step trains on so many `pictures`."""
    middle = {
        name: statistics.median(r[name] for r in rounds)
        for name in rounds[0]
        if isinstance(rounds[0][name], (int, float))
    }
    parts = {name: statistics.median(r["parts_ms"].get(name, 0) for r in rounds) for name in rounds[0]["parts_ms"]}
    rest = {"rest": middle["step_in_parts_ms"] - sum(parts.values())} if parts else {}
    return {
        "pictures_per_second": round(1e3 * pictures / middle["step_ms"], 3),
        "step_ms": round(middle["step_ms"], 2),
        "step_ms_of_each_round": [round(r["step_ms"], 2) for r in rounds],
        "parts_ms": {name: round(value, 2) for name, value in (parts | rest).items()},
        "peak_memory_gb": round(middle["peak_memory_bytes"] / 1e9, 2),
        "first_step_s": round(middle["first_step_s"], 1),
        "share_of_matrix_rate": floor_ms and round(floor_ms / middle["step_ms"], 3),
    }


def collect(taken: dict[str, list[dict[str, Any]]], pictures: int, tflops_per_picture: float | None) -> dict[str, Any]:
    """What the rounds so far say of the device's matrix rate, the floor, and each variant."""
    rates = [one["matrix_rate"] for rounds in taken.values() for one in rounds]
    rate = statistics.median(rates) if rates else None
    floor_ms = 1e15 * tflops_per_picture * pictures / rate if tflops_per_picture and rate else None
    return {
        "matrix_tflops": rate and round(rate / 1e12, 4),
        "floor_ms": floor_ms and round(floor_ms, 3),
        "variants": {name: summarise(rounds, pictures, floor_ms) for name, rounds in taken.items() if rounds},
    }


def against(variant: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """How much longer a variant's step takes: the median over rounds, each against the reference's of that round."""
    pairs = zip(variant["step_ms_of_each_round"], (reference or {}).get("step_ms_of_each_round", []), strict=False)
    ratios = [mine / other for mine, other in pairs]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def line(name: str, variants: dict[str, Any]) -> str:
    """What is known of a variant, in a line."""
    v = variants[name]
    words = [f"{v['pictures_per_second']:.4g} pictures/s"]
    if name != ALL_ON and (ratio := against(v, variants.get(ALL_ON))):
        words.append(f"{ratio} times the step of {ALL_ON}")
    if v["share_of_matrix_rate"] is not None:
        words.append(f"{v['share_of_matrix_rate']:.1%} of the matrix rate")
    words += [f"{v['step_ms']:.4g} ms a step", f"peak {v['peak_memory_gb']:.2f} GB"]
    words.append(f"first step after {v['first_step_s']:.1f} s")
    return f"{name}: {', '.join(words)}"


def table(results: dict[str, Any]) -> str:
    """Markdown of everything in a results file."""
    lines = [
        "# Training steps",
        "",
        "Made by `python -m benchmarks.train_step`; benchmarks/README.md says how to read it. Times are milliseconds a "
        "step.",
    ]
    for title, result in results.items():
        hardware = result["hardware"]
        where = result["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}, {result['threads']} threads"
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        lines += [
            "",
            f"## {title}",
            "",
            f"`{result['command']}`, {result['date']}, commit {result['commit'] or 'unknown'}; {where}; {versions}.",
            f"Medians of {result['rounds']} rounds of {result['steps']} steps.",
        ]
        if result["floor_ms"]:
            lines[-1] += (
                f" {result['tflops_per_picture']:.3g} TFLOP a picture at the measured {result['matrix_tflops']:.4g} "
                f"TFLOP/s: the floor is {result['floor_ms']:.4g} ms a step."
            )
        if peak_of := result.get("peak_of"):
            lines[-1] += f" Peak GB: {peak_of}."
        parts = [name for name in (*PARTS, "rest") if any(name in v["parts_ms"] for v in result["variants"].values())]
        numbers = ["pictures/s", "step", "quickest", f"times {ALL_ON}", "of the floor's rate", "peak GB"]
        columns = ["variant", *numbers, "to the first step", *parts]
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for name, v in result["variants"].items():
            share = "" if v["share_of_matrix_rate"] is None else f"{v['share_of_matrix_rate']:.0%}"
            cells = [name, f"{v['pictures_per_second']:.4g}", f"{v['step_ms']:.4g}"]
            cells += [f"{min(v['step_ms_of_each_round']):.4g}", against(v, result["variants"].get(ALL_ON))]
            cells += [share, f"{v['peak_memory_gb']:.2f}", f"{v['first_step_s']:.1f} s"]
            cells += [f"{v['parts_ms'][part]:.4g}" if part in v["parts_ms"] else "" for part in parts]
            lines.append("| " + " | ".join(cells) + " |")
        for what in ("failed", "left_out"):
            words = what.replace("_", " ").capitalize()
            lines += [f"\n{words}: {name}: {why}" for name, why in result.get(what, {}).items()]
        if unfinished := result.get("unfinished"):
            lines.append(f"\nNot finished: {unfinished}")
    return "\n".join(lines) + "\n"


# The command.


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This command's flags, and the rest, which are the program's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError(text)
        return number

    parser.add_argument("--program", choices=PROGRAMS, default="sd", help="which of the four (sd)")
    parser.add_argument("--teacher", choices=["toy", *RESOLUTIONS], default="toy", help="shapes (toy)")
    parser.add_argument(
        "--teachers", type=Path, metavar="FOLDER", help="where random teachers are kept for the next command (nowhere)"
    )
    parser.add_argument("--resolution", type=int, help="(the teacher's own)")
    parser.add_argument("--train_batch_size", type=int, default=4, help="(4)")
    parser.add_argument("--mixed_precision", choices=DTYPES, default="no", help="(no)")
    parser.add_argument("--steps", type=positive, default=10, help="timed in one piece, each round (10)")
    parser.add_argument("--part_steps", type=positive, default=5, help="timed part by part, each round (5)")
    parser.add_argument("--warmup", type=positive, default=3, help="steps before that (3)")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each variant (3)")
    parser.add_argument("--straightforward", action="store_true", help="also with every optimisation turned off")
    parser.add_argument(
        "--public", type=Path, metavar="FOLDER", help="also the program of the same name in there: Diffusers' example"
    )
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="also with these flags of the program"
    )
    parser.add_argument(
        "--again", action="store_true", help="also each --variant in a process of its own, for what is cached by then"
    )
    add_each(parser)
    parser.add_argument(
        "--backend",
        default=compiling.BACKEND,
        help="torch.compile's, where variants are compiled; eager generates no code, to try a command on a CPU "
        f"({compiling.BACKEND})",
    )
    parser.add_argument("--no_flops", action="store_true", help="leave out the count of FLOPs, and so the floor")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="start no variant that would end later than so long after the start"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="and a table beside it; other results stay")
    return parser.parse_known_args(argv)


def find_teacher(name: str, folder: Path, family: str) -> Path:
    """The toy's, or one with random weights, which is written into `folder` unless it is there."""
    if name == "toy":
        return ROOT / "toy" / "teachers" / family
    teacher = folder / name
    if not teacher.exists():
        unfinished = teacher.with_suffix(".unfinished")
        write_teacher(name, unfinished)
        unfinished.rename(teacher)
        free()
        say(f"wrote a random teacher: {name}")
    return teacher


def list_variants(args: argparse.Namespace, program_flags: Any) -> tuple[list[Variant], dict[str, str]]:
    """The variants in the order in which they run, and why others are left out."""
    left_out: dict[str, str] = {}
    present = [name for name, one in OPTIMISATIONS.items() if one.applies(program_flags)]
    variants = [Variant(ALL_ON)]
    if args.straightforward:
        variants.append(Variant(PLAIN, off=tuple(present)))
    for name, _, flags in (text.partition("=") for text in args.variant):
        variants.append(Variant(name, flags=tuple(flags.split())))
        if args.again:
            variants.append(Variant(f"{name}, again", flags=tuple(flags.split()), alone=True))
    if args.public:  # after ours: loading alone can take it longer than what is left
        if reason := public.obstacle(args.public, args.program):
            left_out[PUBLIC] = reason
        else:
            variants.append(Variant(PUBLIC))
    for name in args.each or OPTIMISATIONS if args.each is not None else ():
        if name in present:
            variants.append(Variant(f"without {name}", off=(name,)))
        elif args.each:
            left_out[f"without {name}"] = "a run with these flags has no such part on this device"
    return variants, left_out


class Session:
    """The variants of one command: runs them, prints and saves what they gave."""

    def __init__(self, args: argparse.Namespace, more: list[str], folder: Path):
        self._args, self._folder = args, folder
        resolution = args.resolution or RESOLUTIONS.get(args.teacher, 64)
        program, _ = modules(args.program)
        teacher = find_teacher(args.teacher, args.teachers or folder, "sdxl" if "sdxl" in args.program else "sd")
        make_shards(folder / "shards", shards=1, samples_per_shard=32, resolution=resolution)
        say("imports, teacher and shards are there")
        self._argv = [
            *("--pretrained_teacher_model", str(teacher), "--train_shards_path_or_url", str(folder / "shards")),
            *("--output_dir", str(folder / "out"), "--resolution", str(resolution), "--report_to", "none"),
            *("--mixed_precision", args.mixed_precision, "--train_batch_size", str(args.train_batch_size)),
            *("--seed", "0", "--logging_steps", "1000000", "--validation_prompts", "a circle"),
            *("--learning_rate", "1e-6", *more),
        ]
        self._public_argv = [
            *("--pretrained_teacher_model", str(teacher), "--resolution", str(resolution), "--seed", "0"),
            *("--mixed_precision", args.mixed_precision, "--train_batch_size", str(args.train_batch_size)),
            *("--cast_teacher_unet", "--learning_rate", "1e-6", "--dataloader_num_workers", "1", *more),
        ]
        flags = program.parse_args(self._argv)
        self._accumulation = flags.launch.gradient_accumulation_steps
        self._pictures = args.train_batch_size * self._accumulation
        self._dtype = DTYPES[flags.launch.mixed_precision]
        self._plan = Plan(args.warmup, args.steps, args.part_steps, args.backend)
        self._flops: dict[str, float] | None = None
        self._last = 0.0
        self.variants, left_out = list_variants(args, flags)
        self._taken: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in self.variants}
        self.failed: dict[str, str] = {}
        title = f"{args.program}, {args.teacher} at {resolution}, batch {args.train_batch_size}, {args.mixed_precision}"
        self.title = " ".join([title + ",", *more]) if more else title
        self.result: dict[str, Any] = provenance("benchmarks.train_step", sys.argv[1:]) | {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "flags": self._argv[6:],
            "rounds": args.rounds,
            "steps": args.steps,
            "peak_of": PEAK_OF,
            "tflops_per_picture": None,
            "gflops_by_part": {},
            "failed": self.failed,
            "left_out": left_out,
        }
        for name, why in left_out.items():
            say(f"{name}: left out: {why}")

    def run(self) -> None:
        for number in range(1, self._args.rounds + 1):
            for variant in self.variants:
                if variant.name in self.failed or variant.name in self.result["left_out"]:
                    continue
                if self._args.seconds and elapsed() + self._last > self._args.seconds:
                    self._leave_out(variant, number)
                    continue
                self.save(unfinished=f"{variant.name}, round {number}")
                start = time.monotonic()
                reason = self._take(variant)
                if reason:
                    self.failed[variant.name] = reason
                    say(f"{variant.name}: failed: {reason}")
                else:
                    self._last = time.monotonic() - start
                self.save()
                if not reason:
                    say(line(variant.name, self.result["variants"]))
                if reason and (lost := lost_device()):
                    self.failed |= {v.name: lost for v in self.variants if not self._taken[v.name]} | self.failed
                    return self.save()

    def _leave_out(self, variant: Variant, number: int) -> None:
        if self._taken[variant.name]:
            return
        self.result["left_out"][variant.name] = "no time was left"
        say(f"{variant.name}: no time is left for it")
        self.save()

    def _take(self, variant: Variant) -> str:
        """Measures a variant once; returns why it failed, or nothing."""
        log, plan = self._folder / "program.log", self._plan
        out = ["--output_dir", str(self._folder / f"out-{time.monotonic_ns()}")]  # a new run's, each time
        counts = self._flops is None and not self._args.no_flops
        if torch.cuda.is_available() and (held := torch.cuda.memory_allocated()) > 2e8:
            say(f"{held / 1e9:.2f} GB of the GPU are still held: they count in the next peak")
        try:
            rate = matrix_rate(self._dtype)
            with quiet(log):
                try:
                    if variant.name == PUBLIC:
                        argv = [*self._public_argv, *out]
                        shards = self._folder / "shards"
                        left = self._args.seconds - elapsed() if self._args.seconds else None
                        taken = public.measure(self._args.public, self._args.program, argv, shards, plan, left)
                    elif variant.alone:
                        given = (self._args.program, variant, [*self._argv, *out], plan)
                        taken = alone(measure, *given, start="spawn")
                    else:
                        taken = measure(self._args.program, variant, [*self._argv, *out], plan, counts)
                except BaseException:
                    traceback.print_exc()
                    raise
        except (Exception, SystemExit) as error:
            print(f"{log.read_text()[-3000:]}", file=sys.stderr, flush=True)
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        finally:
            log.write_text("")
            free()
        if lost := taken.pop("flops_lost", None):
            say(f"FLOPs could not be counted: {lost}")
        self._flops = taken.pop("flops", self._flops)
        self._taken[variant.name].append(taken | {"matrix_rate": rate})
        return ""

    def save(self, unfinished: str | None = None) -> None:
        """Each time: who is stopped in the middle keeps what was measured."""
        flops = self._flops or {}
        tflops_per_picture = sum(flops.values()) / self._accumulation / 1e12 if flops else None
        self.result |= {
            "tflops_per_picture": tflops_per_picture and round(tflops_per_picture, 6),
            "gflops_by_part": {name: round(value / 1e9, 3) for name, value in flops.items()},
            "unfinished": unfinished,
            **collect(self._taken, self._pictures, tflops_per_picture),
        }
        if self._args.output:
            keep(self._args.output, {self.title: self.result}, table)


def lost_device() -> str:
    """Why nothing more can run on the GPU in this process, after some of its errors; or nothing."""
    try:
        wait()
    except RuntimeError as error:
        return f"the GPU is lost to this process: {error}".partition("\n")[0]
    return ""


def main() -> None:
    args, more = parse()
    with tempfile.TemporaryDirectory() as temporary:
        session = Session(args, more, Path(temporary))
        session.run()
    print(table({session.title: session.result}))
    sys.exit(1 if session.failed else 0)


if __name__ == "__main__":
    faulthandler.enable(file=os.dup(2))  # a crash is seen although the program's own output is put aside
    main()
