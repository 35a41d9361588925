"""Do memory and file descriptors of a long run stay as they are?

    python -m benchmarks.long_run --output benchmarks/results/long_run-cpu.json       # 5,000 steps: half an hour
    python -m benchmarks.long_run --program lora_sdxl --steps 500 --interval 1

A program trains in the toy world with data workers, validations and checkpoints, while this process looks every few
seconds at it and its workers: memory that is theirs alone (USS), open file descriptors, threads, by optimizer step.
A line for each tenth of the run has the medians. The first tenth is left out of the verdict: exit status 1 if main
process or workers then grow by more than --tolerance, or end with more descriptors or threads than they had.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.measuring import write
from benchmarks.provenance import ROOT, provenance
from toy.compare import TEACHERS
from toy.demo import PROGRAMS
from toy.make_shards import make_shards

KEYS = ("main_mb", "workers_mb", "main_files", "workers_files", "main_threads")


def look(process: psutil.Process) -> dict[str, float]:
    """Memory (MB, 10⁶ bytes), file descriptors and threads of the process, and of its children together."""
    found = dict.fromkeys(KEYS, 0.0)
    for each in [process, *process.children(recursive=True)]:
        part = "main" if each == process else "workers"
        found[f"{part}_mb"] += each.memory_full_info().uss / 1e6
        found[f"{part}_files"] += each.num_fds()
        if part == "main":
            found["main_threads"] = each.num_threads()
    return found


def last_step(journal: Path) -> int:
    """The last optimizer step in a run's journal, 0 if there is none yet."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines[-3:]), default=0)


def tenths(looks: list[dict[str, float]], steps: int) -> list[dict[str, float]]:
    """The medians of each tenth of the run's steps in which it was looked at."""
    rows = []
    for tenth in range(10):
        own = [each for each in looks if tenth * steps <= 10 * each["step"] < (tenth + 1) * steps and each["step"]]
        if own:
            rows.append({key: statistics.median(each[key] for each in own) for key in ("step", *KEYS)})
    return rows


def growth(rows: list[dict[str, float]], key: str) -> float:
    """By which factor the last row is larger than the second."""
    return rows[-1][key] / rows[1][key] if rows[1][key] else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", choices=PROGRAMS, default="lora_sd")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two looks (5)")
    parser.add_argument("--tolerance", type=float, default=0.03, help="share by which memory may grow (0.03)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    looks: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_shards(folder / "shards", shards=6, samples_per_shard=256, seed=1)
        every = max(1, args.steps // 50)
        command = [
            *(sys.executable, str(ROOT / f"train_lcm_distill_{args.program}_wds.py")),
            *("--pretrained_teacher_model", str(TEACHERS[args.program.removeprefix("lora_")])),
            *("--train_shards_path_or_url", str(folder / "shards"), "--output_dir", str(folder / "run")),
            *("--resolution", "64", "--train_batch_size", "1", "--max_train_steps", str(args.steps), "--seed", "5"),
            *("--checkpointing_steps", str(every), "--checkpoints_total_limit", "2", "--learning_rate", "1e-5"),
            *("--dataloader_num_workers", str(args.workers), "--shuffle_window", "64", "--random_flip"),
            *("--validation_steps", str(every), "--num_validation_images", "1", "--validation_inference_steps", "1"),
            *("--validation_teacher_steps", "2", "--validation_prompts", "a small red circle on a black background"),
            *("--report_to", "tensorboard", "--logging_steps", "5", "--keep_best"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        start = time.perf_counter()
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(args.interval)
            try:
                looks.append(
                    {"step": last_step(folder / "run" / "training.jsonl"), **look(psutil.Process(process.pid))}
                )
            except psutil.Error:  # it, or a child, ended meanwhile
                continue
        if process.returncode:
            sys.exit((folder / "log").read_text()[-3000:])
        seconds = time.perf_counter() - start
    rows = tenths(looks, args.steps)
    print("| " + " | ".join(["step", *(key.replace("_", " ") for key in KEYS)]) + " |")
    print("|--:" * (len(KEYS) + 1) + "|")
    for row in rows:
        print("| " + " | ".join(f"{row[key]:.0f}" for key in ("step", *KEYS)) + " |")
    grown = {key: growth(rows, key) for key in KEYS}
    if args.output:
        result = provenance("benchmarks.long_run", sys.argv[1:])
        write(args.output, json.dumps(result | {"seconds": seconds, "rows": rows, "growth": grown}, indent=2) + "\n")
    print(json.dumps(grown))
    allowed = {key: 1 + args.tolerance * key.endswith("_mb") for key in KEYS}
    sys.exit(any(grown[key] > allowed[key] for key in KEYS))


if __name__ == "__main__":
    main()
