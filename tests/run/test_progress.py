"""What a run measures while it trains."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from lcm_distill.errors import DivergenceError
from lcm_distill.run.journal import Journal
from lcm_distill.run.progress import Progress


def test_gradients_that_never_become_finite_end_the_run(tmp_path):
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=False, num_processes=1)
    journal = Journal(tmp_path, {}, enabled=False)
    progress = Progress(accelerator, journal, total=5, initial=0, output_dir=str(tmp_path))
    progress.add(torch.tensor(1.0), 2)
    for _ in range(49):
        progress.skip(3)
    with pytest.raises(DivergenceError, match="after step 3, 50 times"):
        progress.skip(3)
    progress.add(torch.tensor(float("nan")), 2)
    with pytest.raises(DivergenceError, match="loss is nan"):
        progress.skip(3)


def test_gradients_that_are_not_finite_are_not_checkpointed(tmp_path):
    """With a finite loss a gradient can still be NaN, and then the weights are."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=False, num_processes=1, reduce=lambda value, reduction: value
    )
    journal = Journal(tmp_path, {}, enabled=False)
    progress = Progress(accelerator, journal, total=5, initial=0, output_dir=str(tmp_path))
    progress.add(torch.tensor(1.0), 2)
    for norm in (1.0, float("nan"), 2.0):
        progress.step(torch.tensor(norm))
    with pytest.raises(DivergenceError, match="grad_norm is nan at step 3"):
        progress.log(3, SimpleNamespace(get_last_lr=lambda: [1.0]))


def test_speed_counts_the_steps_that_the_device_has_yet_to_do(tmp_path):
    """On a GPU the clock was read when they were queued: with --logging_steps 1 it measured how fast Python is."""

    class Queued:
        def __float__(self):  # waits for the device
            time.sleep(0.3)
            return 1.0

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=False, num_processes=1, reduce=lambda value, reduction: Queued(),
        log=lambda *given, **more: None, trackers=[],
    )  # fmt: skip
    progress = Progress(accelerator, Journal(tmp_path, {}, enabled=False), total=5, initial=0, output_dir="")
    progress.add(torch.tensor(1.0), 3)
    progress.step(torch.tensor(1.0))
    values = progress.log(1, SimpleNamespace(get_last_lr=lambda: [1.0]))
    assert values["samples_per_second"] <= 3 / 0.3
    progress.add(torch.tensor(1.0), 3)
    progress._loss = Queued()
    start = time.perf_counter()
    with progress.paused():
        assert time.perf_counter() - start >= 0.3  # what was queued is no pause
    progress._loss = torch.tensor(1.0)
    assert progress.log(2, SimpleNamespace(get_last_lr=lambda: [1.0]))["samples_per_second"] <= 3 / 0.6


class SlowLoader:
    """A batch after each of so many seconds."""

    num_workers = 3

    def __init__(self, seconds):
        self.seconds = seconds

    def __iter__(self):
        for seconds in itertools.chain(self.seconds, itertools.repeat(0)):
            time.sleep(seconds)
            yield {"worker": 0, "dropped": {}}

    def close(self):
        pass


@pytest.mark.parametrize(
    "seconds, idle, warned_at",
    [
        ([0.4, 0, 0.4, 0.4], True, [3]),
        ([0.4, 0, 0, 0], True, []),  # the first interval, in which workers start
        ([0, 0.02, 0.02, 0.02], True, []),
        ([0, 0.4, 0.4, 0.4], False, []),  # a GPU that is busy all the time
    ],
)
def test_a_run_that_waits_for_data_is_warned_once(seconds, idle, warned_at, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lcm_distill.run.progress._is_idle", lambda device: idle)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=True, num_processes=1, reduce=lambda value, reduction: value,
        log=lambda *given, **more: None, trackers=[],
    )  # fmt: skip
    progress = Progress(accelerator, Journal(tmp_path, {}, enabled=False), total=9, initial=0, output_dir="")
    warnings = []
    for step, _ in zip(range(1, 5), progress.batches(SlowLoader(seconds)), strict=False):
        time.sleep(0.1)  # the step itself
        progress.add(torch.tensor(1.0), 2)
        progress.step(torch.tensor(1.0))
        progress.log(step, SimpleNamespace(get_last_lr=lambda: [1.0]))
        warnings += [(step, record.message) for record in caplog.records]
        caplog.clear()
    assert [step for step, _ in warnings] == warned_at
    for _, message in warnings:
        assert "--dataloader_num_workers (now 3)" in message and "lcm_distill.encode_shards" in message
