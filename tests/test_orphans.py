"""Processes that lose another one: a launcher that dies while models load, a rank that is stopped, orphaned workers."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import environment, free_port, wait_for
from test_many_processes import SCRIPT, step_of

from lcm_distill.run.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.hostile("signals")

# The program, with changes to be made before it begins.
PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
sys.argv[0] = {script!r}
{change}
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""
SLOW_LOADING = """
import diffusers
load = diffusers.UNet2DConditionModel.from_pretrained
def slowly(*args, **options):
    print("loading", flush=True)
    time.sleep(1000)
diffusers.UNet2DConditionModel.from_pretrained = slowly
"""
SOON_NAMED = """
from lcm_distill.run import watch
watch.NAMED_AFTER, watch._SILENT, watch._GRACE = 4.0, 5.0, 2.0
"""


def start(argv, tmp_path, change="", launcher=("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), script=SCRIPT, change=change))
    log = open(tmp_path / "log.txt", "w")
    launched = subprocess.Popen(
        [sys.executable, *launcher, str(program), *argv], cwd=tmp_path, env=environment(), stdout=log, stderr=log
    )
    _started.append(launched)
    return launched


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _end_what_was_started():
    yield
    for launched in _started:
        if launched.poll() is None:  # a test has failed
            for process in [*psutil.Process(launched.pid).children(recursive=True), launched]:
                process.kill()
    _started.clear()


def log(tmp_path):
    return (tmp_path / "log.txt").read_text()


def family(launched):
    return [child for child in psutil.Process(launched.pid).children(recursive=True)]


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(processes, seconds):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    alive = [process for process in alive if not has_ended(process)]
    for process in alive:
        process.kill()
    assert not alive, alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_dies_while_models_load_takes_its_process_with_it(number, command, tmp_path):
    """`accelerate launch` passes SIGTERM on to nobody. The orphan noted its parent, by then init, before its loop, and
    trained to its end."""
    launched = start(command(steps=2000), tmp_path, SLOW_LOADING)
    wait_for(lambda: "loading" in log(tmp_path), launched, tmp_path / "log.txt", 240)
    orphans = family(launched)
    assert orphans
    launched.send_signal(number)
    launched.wait(timeout=30)
    wait_until_gone(orphans, 15)
    assert "the launcher has died" in log(tmp_path)


def test_a_launcher_that_dies_while_training_leaves_a_checkpoint_and_no_process(command, tmp_path):
    """Its data workers and its tracker's process end, too."""
    options = {"steps": 2000, "checkpointing_steps": 1000, "dataloader_num_workers": 2, "report_to": "wandb"}
    launched = start(command(**options), tmp_path)
    journal = tmp_path / "out" / "training.jsonl"
    wait_for(
        lambda: journal.exists() and '"step": 2' in journal.read_text(), launched, tmp_path / "log.txt", seconds=240
    )

    everyone = family(launched)
    assert any("wandb" in " ".join(process.cmdline()) for process in everyone) and len(everyone) >= 4
    launched.kill()
    launched.wait()
    wait_until_gone(everyone, 60)
    (last,) = list_checkpoints(tmp_path / "out")
    assert f"the launcher has died: stopped after step {step_of(last)['global_step']}" in log(tmp_path)


def test_data_workers_that_hang_do_not_outlive_a_killed_run(command, tmp_path):
    change = """
import os
import lcm_distill.data.stream as stream
prepare, count = stream.prepare_sample, iter(range(1000))
def hanging(*args, **options):
    while next(count) > 6:
        time.sleep(1000)
    return prepare(*args, **options)
stream.prepare_sample = hanging
"""
    launched = start(command(steps=2000, dataloader_num_workers=2), tmp_path, change)
    journal = tmp_path / "out" / "training.jsonl"
    wait_for(
        lambda: journal.exists() and '"step": 2' in journal.read_text(), launched, tmp_path / "log.txt", seconds=240
    )
    (main,) = psutil.Process(launched.pid).children()
    workers = main.children(recursive=True)
    assert len(workers) >= 2
    main.kill()
    launched.wait(timeout=30)
    wait_until_gone(workers, 15)


TWO_RANKS = ("-m", "torch.distributed.run", "--nproc_per_node=2")


def two_ranks(launched):
    found = [child for child in psutil.Process(launched.pid).children() if "program.py" in " ".join(child.cmdline())]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_and_a_signal_saves_what_can_be_saved(stopped, command, tmp_path):
    """The others waited for an hour, without a word; then nothing was saved since the last checkpoint."""
    options = {"steps": 20000, "checkpointing_steps": 3, "checkpoints_total_limit": 2, "num_validation_images": 0,
               "validation_teacher_steps": 0, "learning_rate": 1e-3}  # fmt: skip
    launcher = (*TWO_RANKS, f"--master_port={free_port()}")
    launched = start(command(**options), tmp_path, SOON_NAMED, launcher)
    out = tmp_path / "out"
    wait_for(lambda: list_checkpoints(out), launched, tmp_path / "log.txt", 240)
    ranks = two_ranks(launched)
    time.sleep(0.4)
    ranks[stopped].send_signal(signal.SIGSTOP)
    try:
        named = rf"rank {stopped} \(process {ranks[stopped].pid} on .*\) does not answer: stopped"
        wait_for(lambda: re.search(named, log(tmp_path)), launched, tmp_path / "log.txt", 60)
        lines = (out / "training.jsonl").read_text().splitlines()
        done = max(json.loads(line).get("step", 0) for line in lines)
        launched.send_signal(signal.SIGTERM)
        wait_for(lambda: has_ended(ranks[1 - stopped]), launched, tmp_path / "log.txt", 60)
        ranks[stopped].kill()  # torchrun would do it, after half a minute
        assert launched.wait(timeout=100) != 0
    finally:
        for process in ranks:
            if process.is_running():
                process.kill()
    last = step_of(list_checkpoints(out)[-1])
    if stopped == 0:  # it is the one that writes
        assert "rank 0" in log(tmp_path) and "The steps since the last checkpoint cannot be saved" in log(tmp_path)
        return
    assert done <= last["global_step"] <= done + 1, log(tmp_path)[-3000:]
    if last["global_step"] % 3:  # else the regular one is the last
        assert last["missing_streams"] == [1]
    again = start(
        command(**options | {"steps": last["global_step"] + 1}, resume_from_checkpoint="latest"), tmp_path, "", launcher
    )
    assert again.wait(timeout=240) == 0, log(tmp_path)[-3000:]


def test_a_rank_whose_worker_hangs_is_named_and_every_rank_saves_at_once(command, tmp_path):
    """The other ranks had begun the step, and waited for its gradients: a signal was heard by none of them."""
    change = (
        SOON_NAMED
        + """
import os
import lcm_distill.data.stream as stream
prepare, count = stream.prepare_sample, iter(range(10000))
def hanging(*args, **options):
    while next(count) > 6 and os.environ["RANK"] == "1":
        time.sleep(1000)
    return prepare(*args, **options)
stream.prepare_sample = hanging
"""
    )
    options = {"steps": 20000, "dataloader_num_workers": 1, "num_validation_images": 0, "validation_teacher_steps": 0}
    launcher = (*TWO_RANKS, f"--master_port={free_port()}")
    launched = start(command(**options), tmp_path, change, launcher)
    wait_for(lambda: "rank 1: waiting for data for" in log(tmp_path), launched, tmp_path / "log.txt", 240)
    assert "data worker 0 of 1 (process" in log(tmp_path)
    launched.send_signal(signal.SIGTERM)
    launched.wait(timeout=60)
    (last,) = list_checkpoints(tmp_path / "out")
    assert step_of(last)["global_step"] == 3 and "missing_streams" not in step_of(last), log(tmp_path)[-3000:]
    assert len(list(last.glob("stream-*.pt"))) == 2 and "stopped after step 3" in log(tmp_path)
