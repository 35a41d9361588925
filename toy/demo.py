"""The whole story on a laptop: shards, a distillation of a toy teacher, the comparison.

    make demo          or: python -m toy.demo
    python -m toy.demo --programs sd lora_sd sdxl lora_sdxl --recipes plain few --output_dir runs/all     # some hours
    … the same with --resume: goes on where the last one was stopped

Draws a few thousand captioned pictures as WebDataset shards, runs `train_lcm_distill_sd_wds.py` (or the programs
that are named) on them through `accelerate launch` as a user would, then draws teacher, untrained control and
students side by side. Everything lands in the output folder: `evaluation.png`, `evaluation.md`, the README's picture
and table (`evaluation.jpg`, `wide_table.md`), and what a program made in a folder of its name, with the recipe's after
it if that is not "plain".
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from lcm_distill import flags
from lcm_distill.machine import usable_cores
from lcm_distill.run import journal
from toy import compare
from toy.make_shards import make_shards
from toy.recipes import RECIPES, Stage

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("sd", "lora_sd", "sdxl", "lora_sdxl")
SHARDS = 8


def distil(program: str, stage: Stage, shards: Path, output_dir: Path, initial: Path | None = None) -> None:
    """Runs one of the four programs on its toy teacher, as a user would from a shell; it begins from `initial`.

    A run that is in `output_dir` goes on from its last checkpoint; a finished one ends at once. `SystemExit` if it is
    stopped: programs that are asked to stop save a checkpoint and exit with success, but have no result.
    """
    threads = str(usable_cores())
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads),
        str(ROOT / f"train_lcm_distill_{program}_wds.py"),
        *("--pretrained_teacher_model", str(compare.TEACHERS[program.removeprefix("lora_")])),
        *("--train_shards_path_or_url", str(shards)),
        *("--output_dir", str(output_dir)),
        *stage.argv(program),
        *(("--init_student", str(initial)) if initial else ()),
        *("--num_validation_images", "2", "--validation_steps", "100", "--seed", "0", "--report_to", "tensorboard"),
        *("--checkpointing_steps", "100", "--checkpoints_total_limit", "1", "--resume_from_checkpoint", "latest"),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    launches, _ = journal.read_journal(output_dir / journal.NAME)
    end = launches[-1]["end"]
    if end["global_step"] < stage.steps:
        raise SystemExit(f"{output_dir}: {end['reason']}; the same demo with --resume goes on there")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=["sd"], help="what to run (default: sd)")
    parser.add_argument("--output_dir", type=lambda text: Path(flags.path(text)), default=Path("runs/demo"))
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=["plain"],
        help="how (toy/recipes.py): plain (default), few, for one and two steps, …",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage (default: the recipe's)")
    parser.add_argument("--count", type=int, default=192, help="pictures in each row of the comparison")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what a demo with the same flags, stopped, has left in --output_dir (default: remove it)",
    )
    args = parser.parse_args(argv)
    started = time.perf_counter()

    if args.output_dir.exists() and not args.resume:
        shutil.rmtree(args.output_dir)
    shards = args.output_dir / "shards"
    if len(list(shards.glob("*.tar"))) < SHARDS:
        print("1/3 drawing captioned pictures into shards", flush=True)
        make_shards(shards, shards=SHARDS, samples_per_shard=512, seed=0)

    students = []
    for program, recipe in itertools.product(dict.fromkeys(args.programs), dict.fromkeys(args.recipes)):
        name = program if recipe == "plain" else f"{program}-{recipe}"
        stages = [replace(stage, steps=args.steps or stage.steps) for stage in RECIPES[recipe]]
        outputs = [args.output_dir / f"{name}-stage-{number}" for number in range(1, len(stages))]
        outputs.append(args.output_dir / name)
        for stage, initial, output in zip(stages, [None, *outputs], outputs, strict=False):
            script = f"train_lcm_distill_{program}_wds.py"
            print(f"2/3 distilling the toy teacher with {script} into {output}: {stage.steps} steps", flush=True)
            distil(program, stage, shards, output, initial)
        students.append(str(outputs[-1]))

    print(f"3/3 drawing the comparison, {args.count} pictures a row", flush=True)
    compare.main(["--student", *students, "--output_dir", str(args.output_dir), "--count", str(args.count)])
    print(f"{time.perf_counter() - started:.0f} s in all; the results are in {args.output_dir}")


if __name__ == "__main__":
    main()
