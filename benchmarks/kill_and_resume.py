"""Kill a run again and again, resume it each time, and see whether it ends as if nothing had happened.

    python -m benchmarks.kill_and_resume                              # four programs, 0 and 2 workers: 15 minutes
    python -m benchmarks.kill_and_resume --programs sd --workers 0 --kills 4
    python -m benchmarks.kill_and_resume --programs sd --ranks 2 --phases checkpoints loading validation export

For each program, number of workers and phase: one run to the end; then the same run with `--resume_from_checkpoint
latest`, ended by SIGKILL at `--kills` moments. Those of the phase "checkpoints" are half where it hurts most (while a
checkpoint is written, renamed, while an older one is removed), half by the clock; those of "loading", "validation" and
"export" are within that part of a run, those of "loading" at several checkpoints. With `--ranks` above 1 the run is
split by FSDP2 over as many processes, and one or all of them are killed. At every moment the newest checkpoint must be
whole, the weights at the end must be those of the run that was never killed, bit for bit, and no process may be left. A
JSON line has the result of each; exit status 1 if they are not, or if a run was over before its last kill (give it more
`--steps`).
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measuring import write
from benchmarks.provenance import provenance
from lcm_distill.run.checkpoint import list_checkpoints
from toy.make_shards import make_shards

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("sd", "sdxl", "lora_sd", "lora_sdxl")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(target: str, call: int, action: Callable[[], None], *, after: bool = False) -> Callable[[], None]:
    """Prepares a process for `action` at the `call`-th call of a function, `package.module:Class.function`."""

    def prepare() -> None:
        module, _, path = target.partition(":")
        owner = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function, count = getattr(owner, name), iter(range(1, 10**6))

        def watched(*args: object, **options: object) -> object:
            mine = next(count)
            if mine == call and not after:
                action()
            result = function(*args, **options)
            if mine == call and after:
                action()
            return result

        setattr(owner, name, watched)

    return prepare


def die_at(target: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """Prepares a process to kill itself at the `call`-th call of a function, `package.module:Class.function`."""
    return at_call(target, call, die, after=after)


def die_within(target: str, seconds: float, *, after: bool = False) -> Callable[[], None]:
    """Prepares a process to kill itself so many `seconds` after the first call of a function began, or ended."""
    return at_call(target, 1, lambda: threading.Timer(seconds, die).start(), after=after)


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


# The moments of each phase, each made from a random generator. Those with "clock" in their names are for any rank, the
# others for the first, which alone writes and removes.
PHASES: dict[str, dict[str, Callable[[random.Random], Callable[[], None]]]] = {
    "checkpoints": {
        "half of a file of the checkpoint written": lambda _: die_in_the_middle_of_a_file,
        "half of an older checkpoint removed": lambda _: die_in_the_middle_of_a_removal,
        "checkpoint written, not synced": lambda _: die_at("lcm_distill.run.checkpoint:_sync_to_disk", 1),
        "checkpoint synced, not renamed": lambda _: die_at("lcm_distill.run.checkpoint:_sync_to_disk", 1, after=True),
        "checkpoint renamed, nothing removed": lambda _: die_at("lcm_distill.run.checkpoint:Checkpoints._prune", 1),
        "older checkpoint renamed, not removed": lambda _: die_at("shutil:rmtree", 1),
        "second checkpoint about to be begun": lambda _: die_at("lcm_distill.run.checkpoint:Checkpoints.save", 2),
        "parts of the checkpoint about to be written": lambda _: die_at(
            "lcm_distill.run.checkpoint:Checkpoints._save_parts", 1
        ),
        "networks written, optimizer not": lambda _: die_at(
            "lcm_distill.run.checkpoint:Checkpoints._save_parts", 2, after=True
        ),
        "state loaded, no step taken": lambda _: die_at("lcm_distill.run.checkpoint:Checkpoints.load", 1, after=True),
    },
    "loading": {
        "folder held, nothing read": lambda _: die_at("lcm_distill.run.run:Run.inspect", 1),
        "models loading, by the clock": lambda rng: die_within(
            "lcm_distill.run.run:Run.inspect", rng.uniform(0, 2), after=True
        ),
        "models loaded, checkpoint not": lambda _: die_at("lcm_distill.run.checkpoint:Checkpoints.load", 1),
        "checkpoint loading, by the clock": lambda rng: die_within(
            "lcm_distill.run.checkpoint:Checkpoints.load", rng.uniform(0, 0.3)
        ),
        "batches opening, by the clock": lambda rng: die_within("lcm_distill.run.run:Run.batches", rng.uniform(0, 0.3)),
    },
    "validation": {
        "pictures about to be generated": lambda rng: die_at(
            "lcm_distill.run.validation:Validation.__call__", rng.randint(1, 2)
        ),
        "some rows generated": lambda rng: die_at(
            "lcm_distill.run.validation:Validation._latents", rng.randint(1, 4), after=True
        ),
        "grid about to be written": lambda rng: die_at(
            "lcm_distill.run.validation:Validation._write", rng.randint(1, 2)
        ),
        "grid written, distances not": lambda rng: die_at(
            "lcm_distill.run.validation:Validation._write", rng.randint(1, 2), after=True
        ),
        "generating, by the clock": lambda rng: die_within(
            "lcm_distill.run.validation:Validation.__call__", rng.uniform(0, 0.5)
        ),
    },
    "export": {
        "last checkpoint written, result not begun": lambda _: die_at("lcm_distill.run.run:Run.finish", 1, after=True),
        "weights written, scheduler not": lambda _: die_at("diffusers:LCMScheduler.save_pretrained", 1),
        "scheduler written, card not": lambda _: die_at("diffusers:LCMScheduler.save_pretrained", 1, after=True),
        "result written": lambda _: die_at("lcm_distill.run.run:Run.end", 1),
        "writing, by the clock": lambda rng: die_within(
            "lcm_distill.run.run:Run.finish", rng.uniform(0, 0.5), after=True
        ),
    },
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def start(
    program: str, argv: list[str], log: Path, prepare: Callable[[], None], rank: int, world: dict[str, str]
) -> int:
    """The pid of a new process, in a session of its own, that runs the program as `rank` of `world`, variables."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if world:
            os.environ |= world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
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
    return pid


def attempt(
    program: str,
    argv: list[str],
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    seconds: float | None = None,
    *,
    ranks: int = 1,
    victims: Sequence[int] = (0,),
) -> dict[int, int]:
    """Runs the program to its end; the wait status of each process by its pid, the first rank's first.

    The `victims`, ranks, are prepared, or killed after `seconds` if they are given. When one process of several has
    died, the others get SIGTERM, and half a minute later SIGKILL, as torchrun does.
    """
    world = {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        world = size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | FSDP
    pids = [
        start(program, argv, log, prepare if rank in victims else lambda: None, rank, world) for rank in range(ranks)
    ]
    statuses: dict[int, int] = {}
    kill_at = None if seconds is None else time.monotonic() + seconds
    last: float | None = None
    while len(statuses) < ranks:
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = status
        running = [pid for pid in pids if pid not in statuses]
        now = time.monotonic()
        if kill_at is not None and now > kill_at:
            for rank in victims:
                if pids[rank] in running:
                    os.kill(pids[rank], signal.SIGKILL)
            kill_at = None
        elif any(statuses.values()) and last is None:
            last = now + 30
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        elif last is not None and now > last:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return {pid: statuses[pid] for pid in pids}


def living(sessions: Collection[int]) -> list[str]:
    """The processes of the `sessions`, of those of Linux, that still run: pid and command of each."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(f"{path.name} {(path / 'comm').read_text().strip()}")
    return found


def was_killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def digest(output_dir: Path) -> str:
    """Of the weights that a finished run leaves, and of its fake score's if it has one."""
    found = hashlib.sha256()
    names = ("unet", "unet_target", "adapter", "target", f"{list_checkpoints(output_dir)[-1].name}/fake_score")
    for path in sorted(path for name in names for path in (output_dir / name).glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):  # not the file: safetensors shuffles its metadata
            found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def challenge(
    kind: str, workers: int, phase: str, kills: int, steps: int, folder: Path, seed: int, matching: bool, ranks: int
) -> dict:
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
    sessions: set[int] = set()

    def run(output: str, *how: Any, victims: Sequence[int] = (0,)) -> list[int]:
        ended = attempt(program, argv(output), log, *how, ranks=ranks, victims=victims)
        sessions.update(ended)
        return list(ended.values())

    began = time.perf_counter()
    assert not any(run("quiet")), log.read_text()[-3000:]
    quiet_seconds = time.perf_counter() - began
    rng = random.Random(seed)
    names = list(PHASES[phase])
    outcomes = []
    for number in range(kills):
        if phase == "loading" and number % len(names) == 0:  # each round loads another checkpoint
            assert was_killed(run("killed", die_at("lcm_distill.run.checkpoint:Checkpoints.save", 2))[0])
        by_clock = phase == "checkpoints" and number % 2
        name = names[(number // 2 if phase == "checkpoints" else number) % len(names)]
        victims = [0]
        if by_clock or "clock" in name:
            victims = rng.choice([[rank] for rank in range(ranks)] + [list(range(ranks))])
        if by_clock:
            seconds = rng.uniform(0.02, 0.16) * quiet_seconds
            name = f"after {seconds:.2f} s"
            statuses = run("killed", lambda: None, seconds, victims=victims)
        else:
            statuses = run("killed", PHASES[phase][name](rng), victims=victims)
        killed = all(was_killed(statuses[rank]) for rank in victims)
        if not killed and any(statuses):
            sys.exit(f"{program}: {name}: ended by itself with status {statuses}:\n{log.read_text()[-3000:]}")
        whole = list_checkpoints(folder / "killed")
        outcomes.append({"moment": name, "killed": killed, "newest": whole[-1].name if whole else None})
        if ranks > 1:
            others = [status for rank, status in enumerate(statuses) if rank not in victims]
            outcomes[-1] |= {"ranks": victims, "others_ended_in_time": not any(map(was_killed, others))}
    assert not any(run("killed")), log.read_text()[-3000:]
    patience = time.monotonic() + 30  # data workers look every few seconds whether their run is there
    while (left := living(sessions)) and time.monotonic() < patience:
        time.sleep(0.2)
    return {
        "program": program,
        "ranks": ranks,
        "workers": workers,
        "matching": matching,
        "steps": steps,
        "phase": phase,
        "killed": sum(outcome["killed"] for outcome in outcomes),
        "bitwise_equal": digest(folder / "quiet") == digest(folder / "killed"),
        "left": left,
        "moments": outcomes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=["checkpoints"])
    parser.add_argument("--ranks", type=int, default=1, help="more than one: with FSDP2, for the full students")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--matching", action="store_true", help="with distribution matching")
    parser.add_argument("--seed", type=int, default=0, help="of the moments by the clock")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="adds the results to those in the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for program in args.programs:  # once, for all the processes to come
        importlib.import_module(f"train_lcm_distill_{program}_wds")
    results: list[dict[str, Any]] = []
    launches = json.loads(args.output.read_text())["launches"] if args.output and args.output.exists() else []
    launch = provenance("benchmarks.kill_and_resume", sys.argv[1:])
    for program, workers, phase in itertools.product(args.programs, args.workers, args.phases):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_shards(folder / "shards", shards=3 * args.ranks, samples_per_shard=16, seed=1)
            results.append(
                challenge(program, workers, phase, args.kills, args.steps, folder, args.seed, args.matching, args.ranks)
            )
        print(json.dumps(results[-1]), flush=True)
        if args.output:  # after each: what ends this process does not end what was found
            write(args.output, json.dumps({"launches": [*launches, launch | {"runs": results}]}, indent=2) + "\n")
    good = all(run["bitwise_equal"] and run["killed"] == args.kills and not run["left"] for run in results)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
