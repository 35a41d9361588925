"""The public Diffusers example programs beside ours: a copy of theirs runs as it is, and its steps are clocked.

    python -m benchmarks.train_step --straightforward --public FOLDER

FOLDER has `train_lcm_distill_sd_wds.py` and the like, of Diffusers' `examples/consistency_distillation`. Each runs in a
process of its own, which this module starts it in:

    python -m benchmarks.public RESULT.json WARMUP STEPS SCRIPT FLAGS…

A step is the time from one step of the optimizer to the next.
"""

import importlib.util
import io
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from accelerate.optimizer import AcceleratedOptimizer

from benchmarks.measuring import forget_peak, peak_memory, wait
from benchmarks.provenance import ROOT

if TYPE_CHECKING:
    from benchmarks.train_step import Plan

NEEDED = ("webdataset", "torchvision")
_LIMIT = 120  # seconds: SDXL's networks are made on the CPU, at random, before they are loaded
_ENDLESS = "1000000"


def script(folder: Path, kind: str) -> Path:
    return folder / f"train_lcm_distill_{kind}_wds.py"


def obstacle(folder: Path, kind: str) -> str:
    """Why the public program of a `kind` cannot run here, or nothing."""
    if not script(folder, kind).is_file():
        return f"--public {folder} has no {script(folder, kind).name}"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"it needs {' and '.join(missing)}, not installed here" if missing else ""


def write_shard(source: Path, target: Path, samples: int) -> None:
    """One shard of so many `samples`, those of the toy shards in the folder `source` again and again.

    The public programs end with an error at the end of a shard (with webdataset 0.2.96 or newer), and those for SDXL
    leave out pictures whose JSON does not say that they are large and free of watermarks.
    """
    with tarfile.open(next(source.glob("*.tar"))) as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        content = {name: file.read() for name, file in files.items() if file is not None}
    keys = sorted({name.partition(".")[0] for name in content})
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 1024)
    about = json.dumps(sizes | {"pwatermark": 0.0}).encode()
    with tarfile.open(target, "w") as tar:
        for number in range(samples):
            key = keys[number % len(keys)]
            for end, data in (("jpg", content[f"{key}.jpg"]), ("txt", content[f"{key}.txt"]), ("json", about)):
                member = tarfile.TarInfo(f"{number:06d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measure(
    folder: Path, kind: str, argv: list[str], shards: Path, plan: "Plan", seconds: float | None = None
) -> dict[str, Any]:
    """Milliseconds of a step, peak memory in bytes, seconds to the end of the first step, which include the imports.

    `argv` are the flags that both programs have, `shards` the toy's. `RuntimeError` if it fails or takes longer
    than two minutes, or than so many `seconds`.
    """
    work = shards.with_name("public")
    work.mkdir(exist_ok=True)
    batch = int(argv[argv.index("--train_batch_size") + 1])
    # Its buffer takes two samples for each that it yields until it has a thousand; batches wait in the workers.
    samples = 2 * batch * (plan.warmup + plan.steps + 20) + 200
    write_shard(shards, work / "shard.tar", samples)
    result = work / "result.json"
    result.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "benchmarks.public", str(result), str(plan.warmup), str(plan.steps)),
        *(str(script(folder, kind).resolve()), *argv, "--train_shards_path_or_url", str(work / "shard.tar")),
        *("--max_train_steps", _ENDLESS, "--max_train_samples", _ENDLESS, "--validation_steps", _ENDLESS),
        *("--checkpointing_steps", _ENDLESS),
    ]
    said = work / "output.txt"
    with said.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        limit = _LIMIT if seconds is None else max(1.0, min(_LIMIT, seconds))
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the public program took more than {limit:.0f} s") from None
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()
        print(said.read_text(), file=sys.stderr)
    if not result.exists():
        errors = re.findall(r"^[\w.]*(?:Error|Exception|: error): .*", said.read_text(), re.MULTILINE) or ["no message"]
        reason = f"the public program ended with status {status} before its steps were taken: {errors[-1]}"
        raise RuntimeError(reason)
    return json.loads(result.read_text())


def main() -> None:
    began = psutil.Process().create_time()
    result, warmup, steps, path, *argv = sys.argv[1:]
    start, end = int(warmup), int(warmup) + int(steps)
    times: dict[str, float] = {}
    original, numbers = AcceleratedOptimizer.step, iter(range(1, 10**9))

    def step(self: AcceleratedOptimizer, *given: Any, **options: Any) -> Any:
        answer = original(self, *given, **options)
        if not self.gradient_state.sync_gradients:
            return answer
        number = next(numbers)
        if number in (1, start, end):
            wait()
        if number == 1:
            times["first"] = time.time() - began
        if number == start:
            times["start"] = time.perf_counter()
            forget_peak()
        if number == end:
            ms = 1e3 * (time.perf_counter() - times["start"]) / (end - start)
            taken = {"first_step_s": times["first"], "step_ms": ms, "step_in_parts_ms": ms, "parts_ms": {}}
            Path(result).write_text(json.dumps(taken | {"peak_memory_bytes": peak_memory()}))
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(0)  # its loader's threads would be waited for
        return answer

    AcceleratedOptimizer.step = step  # type: ignore[method-assign]
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
