"""What do recipes for students of few steps reach in the toy world, and what do they cost?

    python -m benchmarks.few_steps --output benchmarks/results/few_steps.json         # every recipe: many hours
    python -m benchmarks.few_steps --recipes plain few --programs sd lora_sd --seeds 0 1 2

A recipe (`toy.recipes`) is one run of a program or two, the second begun from the first's student. Each stage runs the
program's own `main`, one thread, in a process of its own; its CPU seconds are those of that process without
validation, so that a busy machine stretches them less than a clock. `cost` is their sum over those of the recipe
"plain" with the same program: run it first, on the same machine. Then the student generates with one step to eight:
caption accuracy, Fréchet distance, and how diverse the pictures of one caption are.
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
BASIS = "plain"  # the recipe whose cost is 1


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


def summary(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: the mean of each program and recipe over its seeds, accuracies with their range."""
    titles = ["program, recipe", "seeds", "cost", "accuracy at 1", "2", "4", "8", "Fréchet at 1", "2", "4", "8"]
    lines = ["| " + " | ".join([*titles, "diversity at 1"]) + " |", "|---" * 12 + "|"]
    for key in dict.fromkeys((run["program"], run["recipe"]) for run in runs):
        own = [run for run in runs if (run["program"], run["recipe"]) == key]
        basis = [run["seconds"] for run in runs if (run["program"], run["recipe"]) == (key[0], BASIS)]
        cost = statistics.mean(run["seconds"] for run in own) / statistics.mean(basis) if basis else None
        cells = [", ".join(key), str(len(own)), "" if cost is None else f"{cost:.1f}"]
        for steps in map(str, STEPS):
            values = [run["metrics"][steps]["caption_accuracy"] for run in own]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        for steps in map(str, STEPS):
            cells.append(f"{statistics.mean(run['metrics'][steps]['frechet_distance'] for run in own):.0f}")
        diverse = [run["metrics"]["1"].get("diversity") for run in own]  # None if no caption has two pictures
        cells.append("" if None in diverse else f"{statistics.mean(diverse):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    result = provenance("benchmarks.few_steps", sys.argv[1:]) | {"runs": []}
    shards = args.folder / "shards"
    if not shards.exists():
        make_shards(shards, shards=8, samples_per_shard=512, seed=0)
    for seed in args.seeds:  # a first seed of everything comes first
        for program in args.programs:
            for recipe in args.recipes:
                seconds: list[float] = []
                output: str | None = None
                for number, stage in enumerate(RECIPES[recipe], 1):
                    initial, output = output, str(args.folder / f"{program}-{recipe}-{seed}-{number}")
                    seconds.append(alone(train, program, stage, seed, str(shards), output, initial))
                metrics = alone(assess, program, output, args.count, STEPS)
                run = {"program": program, "recipe": recipe, "seed": seed, "seconds": sum(seconds), "metrics": metrics}
                result["runs"].append(run | {"stages": seconds})
                print(json.dumps(run), flush=True)
                if args.output:
                    write(args.output, json.dumps(result, indent=2) + "\n")
    print(summary(result["runs"]))


if __name__ == "__main__":
    main()
