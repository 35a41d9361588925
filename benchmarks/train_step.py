"""How fast is a training step, where does its time go, and how far is that from what the device could do?

    python -m benchmarks.train_step --straightforward                     # the toy, against the plain step: a minute
    python -m benchmarks.train_step --program lora_sd --teacher half --straightforward --each
    python -m benchmarks.train_step --program sdxl --teacher sdxl --train_batch_size 8 --mixed_precision bf16 \\
        --straightforward --variant compile=--compile --output benchmarks/results/train_step-gpu.json
        --gradient_checkpointing --use_8bit_adam        # flags that are not this command's are the program's

What runs is the program's own `main`, on a teacher of the real shapes with random weights (`benchmarks/
architectures.py`) or on the toy's, and toy pictures of the right size. Its functions are wrapped by clocks; nothing of
the step is written down here a second time, but for what `--straightforward` puts in place of the optimisations.

Each variant is a process of its own, and they take turns, round after round. First come warm-up steps, then `--steps`
whose total time is taken without waiting for the device in between, then `--part_steps` in which every part waits for
the device before and after: those give the milliseconds per part. Numbers are medians over the rounds. FLOPs are
counted in a step of one picture without gradient checkpointing (products, convolutions and attention), the device's
matrix rate by a large product in the run's precision: the floor is their quotient. benchmarks/README.md says how
to read it all.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import RESOLUTIONS, write_teacher
from benchmarks.provenance import ROOT, provenance
from lcm_distill.models import unets
from lcm_distill.objective import consistency
from lcm_distill.objective.schedule import per_sample
from lcm_distill.run.progress import Progress
from toy.make_shards import make_shards

PROGRAMS = ("sd", "sdxl", "lora_sd", "lora_sdxl")
PARTS = ("data", "VAE", "text", "teacher", "target", "student", "backward", "clip", "optimizer", "EMA")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# What the plain step does in place of each optimisation.


def two_teacher_passes(program: Any) -> None:
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

    consistency.guided_prediction = torch.no_grad()(guided)  # type: ignore[assignment]


def ema_per_tensor(program: Any) -> None:
    @torch.no_grad()
    def update(target, source, decay):  # type: ignore
        for mine, other in zip(target, source, strict=True):
            mine.mul_(decay).add_(other, alpha=1 - decay)

    consistency.update_ema = update


def optimizer_not_fused(program: Any) -> None:
    build = program.build_optimizer
    program.build_optimizer = lambda *given, **options: build(*given, **options | {"fused": False})


def sync_every_step(program: Any) -> None:
    step = Progress.step

    def waiting(self: Progress, grad_norm: torch.Tensor) -> None:
        float(self._loss)
        step(self, grad_norm)

    Progress.step = waiting  # type: ignore[method-assign]


def default_memory_format(program: Any) -> None:
    unets.CHANNELS_LAST = ()


def autocast_everywhere(program: Any) -> None:
    program.autocast_over = lambda accelerator, weights: accelerator.autocast()


# Each by what it turns off: a patch of the program, or a flag.
OPTIMISATIONS: dict[str, Callable[[Any], None] | list[str]] = {
    "one teacher pass": two_teacher_passes,
    "low-precision frozen U-Net": ["--no-cast_teacher_unet"],
    "half networks without autocast": autocast_everywhere,
    "channels-last on GPUs": default_memory_format,
    "fused EMA": ema_per_tensor,
    "fused optimizer": optimizer_not_fused,
    "no sync": sync_every_step,
}


class Variant:
    """A way to run the program: which optimisations are off, and flags of its own."""

    def __init__(self, name: str, off: tuple[str, ...] = (), flags: tuple[str, ...] = ()):
        self.name = name
        self._patches = [what for o in off if not isinstance(what := OPTIMISATIONS[o], list)]
        self.flags = [*flags, *(flag for o in off if isinstance(what := OPTIMISATIONS[o], list) for flag in what)]

    def apply(self, program: Any) -> None:
        for patch in self._patches:
            patch(program)


# Clocks around the parts of a step.


class Done(BaseException):
    """Enough steps are taken."""


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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

    def wrap(self, owner: Any, function: str, name: str | Callable[[], str]) -> None:
        original = getattr(owner, function)

        def watched(*given: Any, **options: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return original(*given, **options)

        setattr(owner, function, watched)

    def attach(self, program: Any, family: Any) -> None:
        """To the functions that a program calls in a step, where it finds them."""
        self.wrap(program, "batch_latents", "VAE")
        self.wrap(family, "batch_conditioning", "text")
        self.wrap(consistency, "guided_prediction", "teacher")
        self.wrap(consistency, "unet_output", lambda: "student" if torch.is_grad_enabled() else "target")
        self.wrap(consistency, "update_ema", "EMA")
        self.wrap(Accelerator, "backward", "backward")
        self.wrap(Accelerator, "clip_grad_norm_", "clip")
        self.wrap(AcceleratedOptimizer, "step", "optimizer")
        batches = Progress.batches

        def watched(progress: Progress, loader: Any) -> Iterator[Any]:
            data = batches(progress, loader)
            while True:
                with self.part("data"):
                    batch = next(data)
                yield batch

        Progress.batches = watched  # type: ignore[method-assign, assignment]


def at_steps(function: Callable[[int], None]) -> None:
    """Calls `function` with 1, 2, … at the end of each optimizer step of the program."""
    step, numbers = Progress.step, iter(range(1, 10**9))

    def counted(self: Progress, grad_norm: torch.Tensor) -> None:
        step(self, grad_norm)
        function(next(numbers))

    Progress.step = counted  # type: ignore[method-assign]


# What one process measures.


def measure(kind: str, variant: Variant, argv: list[str], warmup: int, steps: int, part_steps: int) -> dict[str, Any]:
    """Milliseconds of a step and of its parts, peak memory in bytes, seconds to the end of the first step."""
    program, family = modules(kind)
    variant.apply(program)

    def now() -> float:
        wait()
        return time.perf_counter()

    watch, times, peak = Watch(now), dict[str, float](), [0]

    def boundary(step: int) -> None:
        if step == 1:
            times["first"] = now()
        if step == warmup:
            times["start"] = now()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        if step == warmup + steps:
            times["total"] = now()
            peak[0] = peak_memory()
            watch.on = True
        if step == warmup + steps + part_steps:
            times["parts"] = now()
            raise Done

    watch.attach(program, family)
    at_steps(boundary)
    began = time.perf_counter()
    with contextlib.suppress(Done):
        program.main([*argv, *variant.flags, "--max_train_steps", "1000000"])
    parts = {name: 1e3 * watch.parts[name] / part_steps for name in PARTS if watch.parts[name]}
    return {
        "first_step_s": times["first"] - began,
        "step_ms": 1e3 * (times["total"] - times["start"]) / steps,
        "step_in_parts_ms": 1e3 * (times["parts"] - times["total"]) / part_steps,
        "parts_ms": parts,
        "peak_memory_bytes": peak[0],
        "matrix_rate": matrix_rate(argv),
    }


def peak_memory() -> int:
    """On the GPU what its tensors took at most in the timed steps; on the CPU the process's, from its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def flop_counter() -> FlopCounterMode:
    """Counts products, convolutions and attention, the CPU's fused attention and products added in place too."""

    def attention(query, key, *rest, out_shape=None, **options):  # type: ignore
        (*batch, heads, q, dim), k = query, key[-2]
        return 4 * torch.Size(batch).numel() * heads * q * k * dim

    def attention_backward(grad, query, key, *rest, out_shape=None, **options):  # type: ignore
        return 5 * attention(query, key) // 2  # two products again, of which one is recomputed, and three new ones

    def product_added(summed, a, b, *rest, out_shape=None, **options):  # type: ignore
        return 2 * a.numel() * b[-1]

    names = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            names._scaled_dot_product_flash_attention_for_cpu: attention,
            names._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
            names.addmm_: product_added,
            names.baddbmm_: product_added,
        },
    )


def count_flops(kind: str, argv: list[str]) -> dict[str, float]:
    """FLOPs by part of one step on one picture, of each micro-batch its share."""
    program, family = modules(kind)
    torch.compiler.set_stance("force_eager")

    counter = flop_counter()
    watch = Watch(lambda: float(counter.get_total_flops()))
    watch.on = True
    watch.attach(program, family)

    def stop(step: int) -> None:
        raise Done

    at_steps(stop)
    with contextlib.suppress(Done), counter:
        program.main([*argv, "--train_batch_size", "1", "--no-gradient_checkpointing"])
    return {name: watch.parts[name] for name in PARTS if watch.parts[name]}


def matrix_rate(argv: list[str]) -> float:
    """FLOP/s of a large square product in the run's precision, the median of many."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[argv[argv.index("--mixed_precision") + 1]]
    # Processors without bf16 products emulate them: one of 2048 takes them half a minute.
    size = 8192 if device == "cuda" else 2048 if dtype == torch.float32 else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < (40 if device == "cuda" else 8) and (len(seconds) < 4 or sum(seconds) < 10):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def modules(kind: str) -> tuple[Any, Any]:
    """The program of a `kind`, and its family's module."""
    program = importlib.import_module(f"train_lcm_distill_{kind}_wds")
    return program, program.family


def alone(function: Callable[..., Any], *given: Any) -> Any:
    """What `function` returns, in a process of its own; `RuntimeError` with its message if it fails.

    A fork imports nothing twice, but cannot use a GPU that a library has looked at before. So that forks can use
    PyTorch's threads, this process must not.
    """
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+") as said:
        process = context.Process(target=_send, args=(theirs, said.name, function, given))
        process.start()
        theirs.close()
        try:
            good, result = ours.recv()
        except EOFError:
            good, result = False, "it died without a word: killed, perhaps for its memory"
        process.join()
        if not good:
            print(said.read(), file=sys.stderr)
            raise RuntimeError(result)
    return result


def _send(connection: Connection, said: str, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        connection.send((True, function(*given)))
    except BaseException as error:
        traceback.print_exc()
        connection.send((False, f"{type(error).__name__}: {error}"))
    connection.close()
    os._exit(0)  # a program that was left in the middle has threads and workers, which would be waited for


# Results.


def summarise(rounds: list[dict[str, Any]], pictures: int, floor_ms: float | None) -> dict[str, Any]:
    """Medians over the rounds of one variant; a step trains on so many `pictures`."""
    middle = {
        name: statistics.median(r[name] for r in rounds)
        for name in rounds[0]
        if isinstance(rounds[0][name], (int, float))
    }
    parts = {name: statistics.median(r["parts_ms"].get(name, 0) for r in rounds) for name in rounds[0]["parts_ms"]}
    rest = middle["step_in_parts_ms"] - sum(parts.values())
    return {
        "pictures_per_second": round(1e3 * pictures / middle["step_ms"], 3),
        "step_ms": round(middle["step_ms"], 2),
        "step_ms_of_each_round": [round(r["step_ms"], 2) for r in rounds],
        "parts_ms": {name: round(value, 2) for name, value in parts.items()} | {"rest": round(rest, 2)},
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


def keep(output: Path, results: dict[str, Any]) -> None:
    """Writes them into the file, and all that is in it into the table beside it."""
    everything = (json.loads(output.read_text()) if output.exists() else {}) | results
    output.write_text(json.dumps(everything, indent=2) + "\n")
    output.with_suffix(".md").write_text(table(everything))


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
        parts = [name for name in (*PARTS, "rest") if any(name in v["parts_ms"] for v in result["variants"].values())]
        numbers = ["pictures/s", "step", "quickest", "times all on", "of the floor's rate", "peak GB"]
        columns = ["variant", *numbers, "to the first step", *parts]
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for name, v in result["variants"].items():
            share = "" if v["share_of_matrix_rate"] is None else f"{v['share_of_matrix_rate']:.0%}"
            cells = [name, f"{v['pictures_per_second']:.4g}", f"{v['step_ms']:.4g}"]
            cells += [f"{min(v['step_ms_of_each_round']):.4g}", against(v, result["variants"].get("all on"))]
            cells += [share, f"{v['peak_memory_gb']:.2f}", f"{v['first_step_s']:.1f} s"]
            lines.append("| " + " | ".join(cells + [f"{v['parts_ms'].get(part, 0):.4g}" for part in parts]) + " |")
        lines += [f"\nFailed: {name}: {why}" for name, why in result["failed"].items()]
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This command's flags, and the rest, which are the program's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--program", choices=PROGRAMS, default="sd", help="which of the four (sd)")
    parser.add_argument("--teacher", choices=["toy", *RESOLUTIONS], default="toy", help="shapes (toy)")
    parser.add_argument(
        "--teachers", type=Path, metavar="FOLDER", help="where random teachers are kept for the next command (nowhere)"
    )
    parser.add_argument("--resolution", type=int, help="(the teacher's own)")
    parser.add_argument("--train_batch_size", type=int, default=4, help="(4)")
    parser.add_argument("--mixed_precision", choices=DTYPES, default="no", help="(no)")
    parser.add_argument("--steps", type=int, default=10, help="timed in one piece, each round (10)")
    parser.add_argument("--part_steps", type=int, default=5, help="timed part by part, each round (5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before that (3)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant (3)")
    parser.add_argument("--straightforward", action="store_true", help="also with every optimisation turned off")
    parser.add_argument(
        "--each",
        nargs="*",
        choices=OPTIMISATIONS,
        metavar="NAME",
        help=f"also with each one turned off, or those named, of: {', '.join(OPTIMISATIONS)}",
    )
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="also with these flags of the program"
    )
    parser.add_argument("--no_flops", action="store_true", help="leave out the count of FLOPs, and so the floor")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="and a table beside it; other results stay")
    return parser.parse_known_args(argv)


def find_teacher(name: str, folder: Path, family: str) -> Path:
    """The toy's, or one with random weights, which is written into `folder` unless it is there."""
    if name == "toy":
        return ROOT / "toy" / "teachers" / family
    teacher = folder / name
    if not teacher.exists():
        print(f"writing a random teacher: {name}", flush=True)
        unfinished = teacher.with_suffix(".unfinished")
        alone(write_teacher, name, unfinished)
        unfinished.rename(teacher)
    return teacher


def main() -> None:
    args, more = parse()
    variants = [Variant("all on")]
    for name, _, flags in (text.partition("=") for text in args.variant):
        variants.append(Variant(name, flags=tuple(flags.split())))
    off = args.each or OPTIMISATIONS if args.each is not None else ()
    variants += [Variant(f"without {name}", off=(name,)) for name in off]
    variants += [Variant("straightforward", off=tuple(OPTIMISATIONS))] if args.straightforward else []

    family = "sdxl" if "sdxl" in args.program else "sd"
    resolution = args.resolution or RESOLUTIONS.get(args.teacher, 64)
    modules(args.program)
    title = f"{args.program}, {args.teacher} at {resolution}, batch {args.train_batch_size}, {args.mixed_precision}"
    title = " ".join([title + ",", *more]) if more else title
    result: dict[str, Any] = provenance("benchmarks.train_step", sys.argv[1:])
    taken: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = find_teacher(args.teacher, args.teachers or folder, family)
        make_shards(folder / "shards", shards=1, samples_per_shard=32, resolution=resolution)
        argv = [
            *("--pretrained_teacher_model", str(teacher), "--train_shards_path_or_url", str(folder / "shards")),
            *("--output_dir", str(folder / "out"), "--resolution", str(resolution), "--report_to", "none"),
            *("--mixed_precision", args.mixed_precision, "--train_batch_size", str(args.train_batch_size)),
            *("--seed", "0", "--logging_steps", "1000000", "--validation_prompts", "a circle"),
            *("--learning_rate", "1e-6", *more),
        ]
        accumulation = modules(args.program)[0].parse_args(argv).launch.gradient_accumulation_steps
        pictures = args.train_batch_size * accumulation
        flops: dict[str, float] = {}
        if not args.no_flops:
            try:
                flops = alone(count_flops, args.program, argv)
            except RuntimeError as error:
                print(f"FLOPs could not be counted: {error}", flush=True)
        tflops_per_picture = sum(flops.values()) / accumulation / 1e12 if flops else None
        result |= {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "flags": argv[6:],
            "rounds": args.rounds,
            "steps": args.steps,
            "tflops_per_picture": tflops_per_picture and round(tflops_per_picture, 6),
            "gflops_by_part": {name: round(value / 1e9, 3) for name, value in flops.items()},
            "failed": failed,
        }
        for number in range(1, args.rounds + 1):
            for variant in variants:
                if variant.name in failed:
                    continue
                given = (args.program, variant, argv, args.warmup, args.steps, args.part_steps)
                try:
                    taken[variant.name].append(alone(measure, *given))
                    ms = taken[variant.name][-1]["step_ms"]
                    print(f"  round {number}, {variant.name}: {ms:.2f} ms a step", flush=True)
                except RuntimeError as error:
                    failed[variant.name] = str(error).partition("\n")[0]
                result |= collect(taken, pictures, tflops_per_picture)
                if args.output:  # each time: who is stopped in the middle keeps what was measured
                    keep(args.output, {title: result})
    print(table({title: result}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
