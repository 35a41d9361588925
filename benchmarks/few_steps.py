"""What do recipes for students of few steps reach in the toy world, and what do they cost?

    python -m benchmarks.few_steps --output benchmarks/results/few_steps.json         # every recipe: many hours
    python -m benchmarks.few_steps --recipes few --programs sd lora_sd --seeds 0 1 2

A recipe (`toy.recipes`) is one run of a program or two, the second begun from the first's student. Each stage runs the
program's own `main`, one thread, in a process of its own; its CPU seconds are those of that process without
validation, so that a busy machine stretches them less than a clock. `cost` is their sum in runs of the recipe "plain":
first stages are consistency distillation alone, so that their seconds per step are plain's. At the end the student of
each stage generates with one step to eight: caption accuracy, Fréchet distance, and how diverse the pictures of one
caption are. Stages that are in the --output or in a --known file, with the same flags, are not trained again; each
keeps the command and the commit that trained it.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.assess import assess
from benchmarks.measuring import alone, write
from benchmarks.provenance import provenance
from toy.compare import TEACHERS
from toy.demo import PROGRAMS
from toy.make_shards import make_shards
from toy.recipes import RECIPES, Stage

STEPS = (1, 2, 4, 8)


def train(program: str, stage: Stage, seed: int, shards: str, output: str, initial: str | None) -> float:
    """Runs one stage; its CPU seconds."""
    torch.set_num_threads(1)
    shutil.rmtree(output, ignore_errors=True)  # a finished run that is resumed would cost nothing
    argv = [
        *("--pretrained_teacher_model", str(TEACHERS[program.removeprefix("lora_")])),
        *("--train_shards_path_or_url", shards, "--output_dir", output, "--seed", str(seed)),
        *("--num_validation_images", "0", "--report_to", "none", "--checkpointing_steps", "1000000"),
        *stage.argv(program),
        *(("--init_student", initial) if initial else ()),
    ]
    start = time.process_time()
    importlib.import_module(f"train_lcm_distill_{program}_wds").main(argv)
    return time.process_time() - start


def cost(run: dict[str, Any], stages: int) -> float:
    """The CPU seconds of the first `stages` of a run in those that the recipe "plain" takes with its program."""
    seconds = [stage["seconds"] for stage in run["stages"][:stages]]
    per_step = seconds[0] / RECIPES[run["recipe"]][0].steps
    return sum(seconds) / (per_step * RECIPES["plain"][0].steps)


def summary(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: the means over seeds, by program, recipe and stage; accuracies with their range."""
    titles = ["program, recipe", "seeds", "cost", "accuracy at 1", "2", "4", "8", "Fréchet at 1", "2", "4", "8"]
    lines = ["| " + " | ".join([*titles, "diversity at 1"]) + " |", "|---" * 12 + "|"]
    for program, recipe in dict.fromkeys((run["program"], run["recipe"]) for run in runs):
        own = [run for run in runs if (run["program"], run["recipe"]) == (program, recipe)]
        for number in range(1, len(own[0]["stages"]) + 1):
            name = f"{program}, {recipe}" + f", stage {number}" * (len(own[0]["stages"]) > 1)
            metrics = [run["stages"][number - 1]["metrics"] for run in own]
            cells = [name, str(len(own)), f"{statistics.mean(cost(run, number) for run in own):.1f}"]
            for steps in map(str, STEPS):
                values = [each[steps]["caption_accuracy"] for each in metrics]
                cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            for steps in map(str, STEPS):
                cells.append(f"{statistics.mean(each[steps]['frechet_distance'] for each in metrics):.0f}")
            diverse = [each["1"].get("diversity") for each in metrics]  # None if no caption has two pictures
            cells.append("" if None in diverse else f"{statistics.mean(diverse):.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def done(run: dict[str, Any]) -> tuple[int, int]:
    """How many stages of a run are trained, and how many of them assessed: of equal runs, the greatest is kept."""
    return len(run["stages"]), sum("metrics" in stage for stage in run["stages"])


def find(runs: list[dict[str, Any]], program: str, recipe: str, seed: int) -> dict[str, Any]:
    """The run among `runs`, with the stages that had the flags that the recipe has now; one without stages if new."""
    run: dict[str, Any] = {"program": program, "recipe": recipe, "seed": seed, "stages": []}
    for old in runs:
        if all(old[key] == run[key] for key in ("program", "recipe", "seed")):
            usable: list[dict[str, Any]] = []
            for trained, stage in zip(old["stages"], RECIPES[recipe], strict=False):
                if trained["flags"] != stage.argv(program):
                    break
                usable.append(trained)
            run = max(run, run | {"stages": usable}, key=done)
    return run


def rest(before: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of `before` that are not among `runs`, each once."""

    def key(run: dict[str, Any]) -> tuple[str, str, int]:
        return run["program"], run["recipe"], run["seed"]

    others: dict[tuple[str, str, int], dict[str, Any]] = {}
    for run in before:
        others[key(run)] = max(others.get(key(run), run), run, key=done)
    return [run for name, run in others.items() if name not in set(map(key, runs))]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="(all)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--count", type=int, default=192, help="pictures in each row (192)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/few_steps"), help="of shards and students (runs/few_steps)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--known",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE.json",
        help="earlier outputs, as of two that trained side by side: their stages are taken over",
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    earlier = [args.output] if args.output and args.output.exists() else []
    before = [run for file in [*earlier, *args.known] for run in json.loads(file.read_text())["runs"]]
    source = provenance("benchmarks.few_steps", sys.argv[1:])
    origin = {key: source[key] for key in ("command", "commit", "dirty", "date")}
    runs: list[dict[str, Any]] = []

    def save() -> None:
        if args.output:
            result = source | {"runs": runs + rest(before, runs)}
            write(args.output, json.dumps(result, indent=2) + "\n")

    shards = args.folder / "shards"
    if not shards.exists():
        make_shards(shards, shards=8, samples_per_shard=512, seed=0)
    for seed in args.seeds:  # a first seed of everything comes first
        for program in args.programs:
            for recipe in args.recipes:
                run = find(before, program, recipe, seed)
                runs.append(run)
                initial: str | None = None
                for number, stage in enumerate(RECIPES[recipe]):
                    output = str(args.folder / f"{program}-{recipe}-{seed}-{number + 1}")
                    if len(run["stages"]) == number:
                        seconds = alone(train, program, stage, seed, str(shards), output, initial)
                        run["stages"].append(
                            {"folder": output, "flags": stage.argv(program), "seconds": seconds} | origin
                        )
                        print(f"{output}: {seconds:.0f} CPU seconds", flush=True)
                        save()
                    initial = output
    for program in args.programs:
        stages = [stage for run in runs if run["program"] == program for stage in run["stages"]]
        new = [stage for stage in stages if "metrics" not in stage]
        found = alone(assess, program, [stage["folder"] for stage in new], args.count, STEPS) if new else []
        for stage, metrics in zip(new, found, strict=True):
            stage["metrics"] = metrics
        save()
    print(summary(runs))


if __name__ == "__main__":
    main()
