"""Runs that stop early or lose something: signals, the time limit, a full disk, trackers that fail."""

import argparse
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_programs import result, same

from lcm_distill import flags, launcher
from lcm_distill.errors import SaveError
from lcm_distill.run import checkpoint as checkpoint_module
from lcm_distill.run import stopping as stopping_module
from lcm_distill.run.checkpoint import list_checkpoints
from lcm_distill.run.progress import Progress
from lcm_distill.run.stopping import Stopping
from lcm_distill.run.trackers import log_values

PROGRAM = "train_lcm_distill_sd_wds"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("11.5h", 41400), ("90m", 5400), ("30 s", 30), ("3600", 3600), ("01:00:05", 3605), ("1-02:00:00", 93600)],
)
def test_times_as_people_and_clusters_write_them(text, seconds):
    assert flags.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1h", "1:00", "soon", "00:00:00", "nan", "inf"])
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a time"):
        flags.duration(text)


def signal_after(monkeypatch, number, step):
    """Sends a signal to this process while the optimizer step `step` is under way."""
    count = iter(range(1, 1000))
    done = Progress.step

    def sending(self, grad_norm):
        if next(count) == step:
            os.kill(os.getpid(), number)
        done(self, grad_norm)

    monkeypatch.setattr(Progress, "step", sending)


@pytest.mark.hostile("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves_and_the_resumed_run_is_bitwise_the_same(
    number, command, run, tmp_path, monkeypatch, caplog
):
    options = {"steps": 4, "learning_rate": 1e-3, "dataloader_num_workers": 1}
    before = signal.getsignal(number)
    run(PROGRAM, command("whole", **options))
    assert "stopped after" not in caplog.text
    with monkeypatch.context() as patch:
        signal_after(patch, number, 2)
        run(PROGRAM, command("out", **options))
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert not (tmp_path / "out" / "unet").exists()
    assert f"{number.name}: stopped after step 2; resume with --resume_from_checkpoint latest" in caplog.text
    assert signal.getsignal(number) is before
    run(PROGRAM, command("out", resume_from_checkpoint="latest", **options))
    assert same(result(tmp_path / "whole"), result(tmp_path / "out"))


@pytest.mark.hostile("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_loses_nothing(number, command, run, tmp_path, monkeypatch, caplog):
    """It ended the run at once, in the middle of a step or of saving: all since the last checkpoint was lost."""
    monkeypatch.setattr(stopping_module, "_ECHO", 0.05)
    step, save = Progress.step, checkpoint_module.Checkpoints.save

    def interrupting(self, grad_norm):
        for _ in range(3):
            os.kill(os.getpid(), number)
            time.sleep(0.06)
        step(self, grad_norm)

    def interrupted(self, *args, **options):
        os.kill(os.getpid(), number)
        return save(self, *args, **options)

    monkeypatch.setattr(Progress, "step", interrupting)
    monkeypatch.setattr(checkpoint_module.Checkpoints, "save", interrupted)
    run(PROGRAM, command(steps=4))
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert f"{number.name}: stopped after step 1; resume with --resume_from_checkpoint latest" in caplog.text
    assert "another signal does not make that faster" in caplog.text


def test_the_echo_of_a_signal_is_not_another_one(monkeypatch, caplog):
    stopping = Stopping(Accelerator(cpu=True), None)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # from the launcher
    assert stopping.requested() and stopping.reason == "SIGINT" and len(caplog.records) == 1
    stopping.close()


def test_the_time_limit_stops_a_run(command, run, tmp_path, caplog):
    run(PROGRAM, command(steps=500, max_train_time="1s"))
    (last,) = list_checkpoints(tmp_path / "out")
    assert "--max_train_time 0:00:01 is over: stopped after step" in caplog.text
    assert 0 < json.loads((last / "run.json").read_text())["global_step"] < 500


@pytest.mark.hostile("signals")
def test_the_launcher_s_death_stops_a_run(monkeypatch):
    monkeypatch.setattr(launcher, "PARENT", os.getppid())
    stopping = Stopping(Accelerator(cpu=True), None)
    assert not stopping.requested()
    monkeypatch.setattr(launcher, "PARENT", os.getppid() + 1)
    assert stopping.requested() and stopping.reason == "the launcher has died"
    stopping.close()


@pytest.mark.hostile("signals")
def test_workers_leave_signals_to_the_run(command, run, tmp_path, monkeypatch, caplog):
    """A job's signal reaches every process: a loader's worker that died of it took the run down with it."""
    done = Progress.step

    def sending(self, grad_norm):
        for worker in self._loader._iterator._workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        time.sleep(0.1)
        done(self, grad_norm)

    monkeypatch.setattr(Progress, "step", sending)
    run(PROGRAM, command(steps=8, dataloader_num_workers=2))
    assert (tmp_path / "out" / "unet").exists()


# ------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.hostile("disks")
def test_a_checkpoint_that_cannot_be_written_is_logged_and_tried_again(command, run, tmp_path, monkeypatch, caplog):
    """The disk is full at steps 2 and 3: both are logged, nothing incomplete is left, 1 is kept until 4 exists."""
    save = torch.save
    full = {"at": False}

    def failing(*args, **options):
        if full["at"]:
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    original = checkpoint_module.Checkpoints.save

    def switching(self, global_step, *args, **options):
        full["at"] = global_step in (2, 3)
        result = original(self, global_step, *args, **options)
        names = [path.name for path in list_checkpoints(tmp_path / "out")]
        assert (
            names == {1: ["checkpoint-1"], 2: ["checkpoint-1"], 3: ["checkpoint-1"], 4: ["checkpoint-4"]}[global_step]
        )
        assert not list((tmp_path / "out").glob(".checkpoint-*"))
        return result

    monkeypatch.setattr(torch, "save", failing)
    monkeypatch.setattr(checkpoint_module.Checkpoints, "save", switching)
    run(PROGRAM, command(steps=4, checkpointing_steps=1, checkpoints_total_limit=1))
    errors = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    assert len(errors) == 2 and "No space left" in errors[0] and "checkpoint-1. Free disk space" in errors[1]


@pytest.mark.hostile("disks")
def test_a_run_that_stops_on_a_full_disk_names_its_last_checkpoint(command, run, tmp_path, monkeypatch):
    run(PROGRAM, command(steps=1))
    with monkeypatch.context() as patch:
        signal_after(patch, signal.SIGTERM, 1)
        patch.setattr(torch, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SaveError, match="checkpoint-2 could not be written .*No space.* is .*checkpoint-1"):
            run(PROGRAM, command(steps=4, resume_from_checkpoint="latest"))
    run(PROGRAM, command(steps=2, resume_from_checkpoint="latest"))
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.hostile("disks")
def test_a_result_that_cannot_be_written_is_in_the_last_checkpoint(command, run, tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel

    save = UNet2DConditionModel.save_pretrained

    def failing(self, folder, *args, **options):
        if "checkpoint" in str(folder):
            return save(self, folder, *args, **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "save_pretrained", failing)
        with pytest.raises(SaveError, match="result could not be written .*No space.*--resume_from_checkpoint latest"):
            run(PROGRAM, command(steps=1))
    run(PROGRAM, command(steps=1, resume_from_checkpoint="latest"))
    assert (tmp_path / "out" / "unet" / "config.json").exists()


# ---------------------------------------------------------------------------------------------------- trackers


@pytest.mark.hostile("servers")
def test_a_tracker_that_raises_is_removed_and_the_run_continues(command, run, tmp_path, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    calls = []

    def failing(self, values, step=None, **options):
        calls.append(step)
        raise ConnectionError("gone")

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    run(PROGRAM, command(steps=3, report_to="tensorboard"))
    assert calls == [1] and (tmp_path / "out" / "unet").exists()
    assert "the tracker tensorboard failed (ConnectionError: gone)" in caplog.text


def test_the_other_trackers_still_receive_values(caplog):
    received = []
    bad = SimpleNamespace(name="bad", log=lambda *a, **k: 1 / 0)
    good = SimpleNamespace(name="good", log=lambda values, step: received.append(step))
    accelerator = SimpleNamespace(trackers=[bad, good])
    log_values(accelerator, {"loss": 1.0}, 1)
    log_values(accelerator, {"loss": 1.0}, 2)
    assert received == [1, 2] and accelerator.trackers == [good]


def test_a_resumed_run_continues_the_same_tracker_run(command, run, tmp_path, monkeypatch):
    """wandb's run by its id; tensorboard's curve without the points after the checkpoint."""
    wandb = pytest.importorskip("wandb")
    started = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or init(**options))
    options = {"report_to": "wandb,tensorboard", "checkpointing_steps": 1}
    run(PROGRAM, command(steps=1, **options))
    known = json.loads((tmp_path / "out" / "checkpoint-1" / "run.json").read_text())["trackers"]["wandb"]
    first = len(started)  # offline, Accelerate 1.12 starts wandb twice in a launch
    run(PROGRAM, command(steps=2, resume_from_checkpoint="latest", **options))
    assert first and not any("id" in options for options in started[:first])
    assert started[first:] and all(o["id"] == known and o["resume"] == "allow" for o in started[first:])
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "run.json").read_text())["trackers"]["wandb"] == known

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "out" / "logs").glob("text2image*")
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_stopping_works_outside_the_main_thread():
    """Only the main thread can handle signals; a notebook's worker thread has to do without."""
    found = []

    def elsewhere():
        stopping = Stopping(Accelerator(cpu=True), 0.0)
        found.append(stopping.requested())
        stopping.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [True]
