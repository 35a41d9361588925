"""Kill a run again and again, resume it each time, and see whether it ends as if nothing had happened.

    python -m benchmarks.kill_and_resume                              # four programs, 0 and 2 workers: 15 minutes
    python -m benchmarks.kill_and_resume --programs sd --workers 0 --kills 4

For each program and number of workers: one run to the end; then the same run with `--resume_from_checkpoint latest`,
ended by SIGKILL at `--kills` moments, half of them where it hurts most (while a checkpoint is written, renamed, while
an older one is removed), half by the clock. At every moment the newest checkpoint must be whole, and the weights
at the end must be those of the run that was never killed, bit for bit. A JSON line has the result; exit status 1 if
they are not, or if a run was over before its last kill (give it more `--steps`).
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from lcm_distill.run.checkpoint import list_checkpoints
from toy.make_shards import make_shards

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("sd", "sdxl", "lora_sd", "lora_sdxl")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(target: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """Prepares a process to kill itself at the `call`-th call of a function, `package.module:Class.function`."""

    def prepare() -> None:
        module, _, path = target.partition(":")
        owner = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function, count = getattr(owner, name), iter(range(1, 10**6))

        def deadly(*args: object, **options: object) -> object:
            mine = next(count)
            if mine == call and not after:
                die()
            result = function(*args, **options)
            if mine == call:
                die()
            return result

        setattr(owner, name, deadly)

    return prepare


def die_in_the_middle_of_a_removal() -> None:
    def half(folder: object, *args: object, **options: object) -> None:
        files = sorted(path for path in Path(str(folder)).rglob("*") if path.is_file())
        for path in files[: len(files) // 2]:
            path.unlink()
        die()

    shutil.rmtree = half  # type: ignore[assignment]


def die_in_the_middle_of_a_file() -> None:
    save = torch.save

    def half(obj: object, file: object, *args: object, **options: object) -> None:
        save(obj, file, *args, **options)  # type: ignore[arg-type]
        with open(str(file), "r+b") as written:
            written.truncate(os.path.getsize(str(file)) // 2)
        die()

    torch.save = half  # type: ignore[assignment]


MOMENTS: dict[str, Callable[[], None]] = {
    "half of a file of the checkpoint written": die_in_the_middle_of_a_file,
    "half of an older checkpoint removed": die_in_the_middle_of_a_removal,
    "checkpoint written, not synced": die_at("lcm_distill.run.checkpoint:_sync_to_disk", 1),
    "checkpoint synced, not renamed": die_at("lcm_distill.run.checkpoint:_sync_to_disk", 1, after=True),
    "checkpoint renamed, nothing removed": die_at("lcm_distill.run.checkpoint:Checkpoints._prune", 1),
    "older checkpoint renamed, not removed": die_at("shutil:rmtree", 1),
    "second checkpoint about to be begun": die_at("lcm_distill.run.checkpoint:Checkpoints.save", 2),
    "parts of the checkpoint about to be written": die_at("lcm_distill.run.checkpoint:Checkpoints._save_parts", 1),
    "networks written, optimizer not": die_at("lcm_distill.run.checkpoint:Checkpoints._save_parts", 2, after=True),
    "state loaded, no step taken": die_at("lcm_distill.run.checkpoint:Checkpoints.load", 1, after=True),
}


def attempt(program: str, argv: list[str], log: Path, prepare: Callable[[], None], seconds: float | None) -> int:
    """Runs the program in a process of its own, killed after `seconds` if they are given; its wait status."""
    pid = os.fork()
    if pid == 0:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            prepare()
            importlib.import_module(program).main(argv)
            status = 0
        finally:
            os._exit(status)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)


def digest(output_dir: Path) -> str:
    """Of the weights that a finished run leaves, and of its fake score's if it has one."""
    found = hashlib.sha256()
    names = ("unet", "unet_target", "adapter", "target", f"{list_checkpoints(output_dir)[-1].name}/fake_score")
    for path in sorted(path for name in names for path in (output_dir / name).glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):  # not the file: safetensors shuffles its metadata
            found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def challenge(kind: str, workers: int, kills: int, steps: int, folder: Path, seed: int, matching: bool) -> dict:
    """One program: a quiet run, a killed one, and what became of both."""
    program = f"train_lcm_distill_{kind}_wds"

    def argv(output: str) -> list[str]:
        more = ["--lora_rank", "4", "--ema_decay", "0.9"] if kind.startswith("lora") else []
        more += ["--dm_weight", "0.5", "--dm_rank", "4", "--dm_learning_rate", "1e-3"] if matching else []
        return [
            *("--pretrained_teacher_model", str(ROOT / "toy" / "teachers" / kind.removeprefix("lora_"))),
            *("--train_shards_path_or_url", str(folder / "shards"), "--output_dir", str(folder / output)),
            *("--resolution", "64", "--train_batch_size", "2", "--max_train_steps", str(steps), "--seed", "5"),
            *("--checkpointing_steps", "2", "--checkpoints_total_limit", "1", "--learning_rate", "1e-3"),
            *("--dataloader_num_workers", str(workers), "--shuffle_window", "8", "--random_flip"),
            *("--validation_steps", "5", "--num_validation_images", "1", "--validation_inference_steps", "1"),
            *("--validation_teacher_steps", "2"),
            *("--validation_prompts", "a circle", "--report_to", "tensorboard", "--logging_steps", "1", *more),
            *("--resume_from_checkpoint", "latest"),
        ]

    log = folder / "log.txt"
    start = time.perf_counter()
    assert attempt(program, argv("quiet"), log, lambda: None, None) == 0, log.read_text()[-3000:]
    quiet_seconds = time.perf_counter() - start
    rng = random.Random(seed)
    moments: list[tuple[str, Callable[[], None], float | None]] = []
    names = list(MOMENTS)
    for number in range(kills):
        if number % 2 == 0:
            name = names[number // 2 % len(names)]
            moments.append((name, MOMENTS[name], None))
        else:
            seconds = rng.uniform(0.02, 0.22) * quiet_seconds
            moments.append((f"after {seconds:.2f} s", lambda: None, seconds))
    outcomes = []
    for name, prepare, after in moments:
        status = attempt(program, argv("killed"), log, prepare, after)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status != 0:
            sys.exit(f"{program}: {name}: ended by itself with status {status}:\n{log.read_text()[-3000:]}")
        whole = list_checkpoints(folder / "killed")
        outcomes.append({"moment": name, "killed": killed, "newest": whole[-1].name if whole else None})
    assert attempt(program, argv("killed"), log, lambda: None, None) == 0, log.read_text()[-3000:]
    return {
        "program": program,
        "workers": workers,
        "matching": matching,
        "steps": steps,
        "killed": sum(outcome["killed"] for outcome in outcomes),
        "bitwise_equal": digest(folder / "quiet") == digest(folder / "killed"),
        "moments": outcomes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--matching", action="store_true", help="with distribution matching")
    parser.add_argument("--seed", type=int, default=0, help="of the moments by the clock")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for program in args.programs:  # once, for all the processes to come
        importlib.import_module(f"train_lcm_distill_{program}_wds")
    good = True
    for program in args.programs:
        for workers in args.workers:
            with tempfile.TemporaryDirectory() as temporary:
                make_shards(Path(temporary) / "shards", shards=3, samples_per_shard=16, seed=1)
                result = challenge(program, workers, args.kills, args.steps, Path(temporary), args.seed, args.matching)
            good = good and result["bitwise_equal"] and result["killed"] == args.kills
            print(json.dumps(result), flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
