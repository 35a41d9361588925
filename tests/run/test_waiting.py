"""Runs that wait: for data workers that hang, for ranks that are stopped, and what a signal saves meanwhile."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from test_programs import result, same

from lcm_distill.data import loader as loader_module
from lcm_distill.data import stream as stream_module
from lcm_distill.run import watch as watch_module
from lcm_distill.run.checkpoint import list_checkpoints
from lcm_distill.run.progress import Progress
from lcm_distill.run.watch import Watch

PROGRAM = "train_lcm_distill_sd_wds"
OPTIONS = {"steps": 4, "learning_rate": 1e-3, "num_validation_images": 0, "validation_teacher_steps": 0}
pytestmark = pytest.mark.hostile("signals")


def hang_after(monkeypatch, samples):
    """After so many samples, whoever prepares one hangs."""
    prepare, count = stream_module.prepare_sample, iter(range(1, 10_000))

    def hanging(*args, **options):
        while next(count) > samples:
            time.sleep(1000)
        return prepare(*args, **options)

    monkeypatch.setattr(stream_module, "prepare_sample", hanging)


def signal_when_named(monkeypatch, caplog, number, steps=0):
    """Sends this process a signal once the run has said that it waits for data, after so many steps."""
    done, step = [], Progress.step

    def counting(self, grad_norm):
        step(self, grad_norm)
        done.append(len(caplog.records))

    monkeypatch.setattr(Progress, "step", counting)
    monkeypatch.setattr(watch_module, "NAMED_AFTER", 0.5)
    monkeypatch.setattr(watch_module, "EVERY", 0.1)
    ended = threading.Event()

    def look():
        while not ended.wait(0.05):
            since = done[steps - 1] if steps and len(done) >= steps else 0 if not steps else 10_000
            if any("waiting for data for" in record.getMessage() for record in list(caplog.records)[since:]):
                os.kill(os.getpid(), number)
                return

    threading.Thread(target=look, daemon=True).start()
    return ended


@pytest.mark.parametrize(
    ("workers", "accumulated", "samples", "number"),
    [(1, 1, 5, signal.SIGTERM), (0, 1, 5, signal.SIGINT), (1, 2, 7, signal.SIGUSR1), (0, 2, 11, signal.SIGTERM)],
)
def test_a_hanging_read_is_named_and_a_signal_saves_at_once_and_exactly(
    workers, accumulated, samples, number, command, run, tmp_path, monkeypatch, caplog
):
    """There was no message, SIGTERM waited for ever, and a second one lost all since the last checkpoint."""
    options = OPTIONS | {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulated}
    lora = {"lora_rank": 2, "lora_dropout": 0.3} if accumulated > 1 else {}
    program = "train_lcm_distill_lora_sd_wds" if lora else PROGRAM
    options |= lora
    done = samples // (2 * accumulated)
    run(program, command("whole", **options))
    caplog.clear()
    with monkeypatch.context() as patch:
        hang_after(patch, samples)
        ended = signal_when_named(patch, caplog, number, steps=done)
        run(program, command("out", **options))
        ended.set()
    said = [record.getMessage() for record in caplog.records if "waiting for data for" in record.getMessage()][-1]
    who = "data worker 0 of 1 (process " if workers else "the main process, which reads "
    assert who in said and ".tar" in said and "A signal (Ctrl-C, SIGTERM) saves" in said
    assert f"{number.name}: stopped after step {done}; resume with" in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [f"checkpoint-{done}"]
    run(program, command("out", resume_from_checkpoint="latest", **options))
    assert same(result(tmp_path / "out"), result(tmp_path / "whole"))


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(command, run, tmp_path, monkeypatch, caplog):
    hang_after(monkeypatch, 1)
    ended = signal_when_named(monkeypatch, caplog, signal.SIGTERM)
    run(PROGRAM, command(dataloader_num_workers=2, **OPTIONS))
    ended.set()
    assert list_checkpoints(tmp_path / "out") == []
    assert "SIGTERM: stopped before the first step of this launch; launch it again" in caplog.text


def test_the_time_limit_ends_a_wait_too(command, run, tmp_path, monkeypatch, caplog):
    for workers in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(watch_module, "EVERY", 0.1)
            hang_after(patch, 5)
            run(PROGRAM, command(f"out{workers}", dataloader_num_workers=workers, max_train_time="4s", **OPTIONS))
        assert "--max_train_time 0:00:04 is over: stopped after step 2" in caplog.text
        assert [path.name for path in list_checkpoints(tmp_path / f"out{workers}")] == ["checkpoint-2"]
        caplog.clear()


def test_a_stopped_worker_ends_with_the_run(command, run, tmp_path, monkeypatch, caplog):
    """SIGTERM waits in a stopped process, and the exit waited for it for ever."""
    stopped, done = [], Progress.step

    def stopping(self, grad_norm):
        if not stopped:
            stopped.append(self._loader._iterator._workers[0])
            os.kill(stopped[0].pid, signal.SIGSTOP)
        done(self, grad_norm)

    monkeypatch.setattr(Progress, "step", stopping)
    monkeypatch.setattr(loader_module, "_JOIN", 0.5)
    ended = signal_when_named(monkeypatch, caplog, signal.SIGTERM, steps=1)
    run(PROGRAM, command(dataloader_num_workers=1, **OPTIONS | {"steps": 100}))
    ended.set()
    stopped[0].join(timeout=10)
    assert not stopped[0].is_alive() and f"data worker 0 of 1 (process {stopped[0].pid})" in caplog.text
    assert len(list_checkpoints(tmp_path / "out")) == 1


def test_waiting_is_said_at_ever_longer_intervals(monkeypatch):
    watch = Watch.__new__(Watch)
    watch._named = {}
    said = [second for second in range(0, 4000, 7) if watch._is_time("data", second)]
    assert [round(second / 60) for second in said] == [1, 2, 4, 8, 16, 32, 64][: len(said)] and len(said) == 7


def test_between_two_steps_only_what_a_step_needs_is_drawn_again():
    """The state of PyTorch's generator belongs to the step, with several batches a step."""
    from lcm_distill.run.run import _BeforeStep

    accelerator = SimpleNamespace(step=4)
    before = _BeforeStep({}, 0, 2, {"cpu": torch.get_rng_state()})
    first = torch.rand(3)
    before.restore(accelerator)
    assert torch.equal(torch.rand(3), first) and accelerator.step == 2
