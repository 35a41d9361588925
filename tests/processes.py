"""Processes that begin with the libraries imported, which takes about five seconds of a core.

Where a test is not about a launcher, its processes are forked from one (multiprocessing's fork server, one for each
process of the suite) that has imported the programs and has done nothing else.
"""

import atexit
import contextlib
import faulthandler
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Of every process that a test starts, on the CPU; without the service that a run in this process has started."""
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return own | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen | ForkServerProcess, log: Path, seconds: float = 120
) -> None:
    """Waits until `condition` holds; fails with the end of `log` when `process` ends before, or after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        code = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        assert code is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)


@functools.cache
def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([path.stem for path in ROOT.glob("train_lcm_distill_*_wds.py")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the server has no other path
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


_started: list[ForkServerProcess] = []


def start(
    script: str | Path, argv: Sequence[str], log: Path, rank: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A process that runs `script` with the arguments `argv`, in the folder of `log`, to which it writes.

    `rank` is what a launcher adds to a rank's environment.
    """
    process = _fork_server().Process(target=_run, args=(str(script), [*argv], str(log), environment() | (rank or {})))
    process.start()
    _started.append(process)
    return process


def start_ranks(script: str | Path, argv: Sequence[str], log: Path) -> list[ForkServerProcess]:
    """Two of them that are the ranks of one job; both write to `log`."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [start(script, argv, log, rank) for rank in ranks]


def wait(processes: Sequence[ForkServerProcess], log: Path, seconds: float = 300) -> list[int]:
    """Their exit codes; if they have not ended after so many `seconds`, each writes its stack, and the test fails.

    The stacks are asked for from here. `faulthandler.dump_traceback_later` in a process reads the frames of a thread
    that goes on running: on busy cores about one process in a hundred died of a segmentation fault over it.
    """
    until = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0.0, until - time.monotonic()))
    if any(process.exitcode is None for process in processes):
        _end([psutil.Process(process.pid) for process in processes if process.exitcode is None])
        raise AssertionError(f"not ended after {seconds} s: {log.read_text()[-20000:]}")
    return [process.exitcode or 0 for process in processes]


def end_all() -> None:
    """Kills those that a test which failed has left; the suite's end would wait for them."""
    for process in _started:
        process.kill()
        process.join()
    _started.clear()


def _end(processes: Sequence[psutil.Process]) -> None:
    """Ends them; each writes its stack before."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        time.sleep(2)


def _run(script: str, argv: list[str], log: str, variables: dict[str, str]) -> None:
    multiprocessing.set_start_method(None, force=True)  # the platform's, not this process's own
    os.environ.clear()
    os.environ.update(variables)
    with open(log, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(Path(log).parent)
    faulthandler.enable()
    sys.argv = [script, *argv]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes leave them out
