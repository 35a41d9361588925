"""What a run measures while it trains."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from lcm_distill.errors import DivergenceError
from lcm_distill.run.journal import Journal
from lcm_distill.run.progress import Progress, _GPUWaiting


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


class Clock:
    """A clock that only stands where it is set."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class SlowLoader:
    """A batch after each of so many seconds of the `clock`."""

    num_workers = 3

    def __init__(self, seconds, clock):
        self.seconds, self.clock = seconds, clock

    def __iter__(self):
        for seconds in itertools.chain(self.seconds, itertools.repeat(0)):
            self.clock.now += seconds
            yield {"worker": 0, "dropped": {}}

    def close(self):
        pass


@pytest.mark.parametrize(
    "seconds, warned_at",
    [
        ([4, 0, 4, 4], [3]),
        ([4, 0, 0, 0], []),  # the first interval, in which workers start
        ([0, 0.9, 0.9, 0.9], []),
    ],
)
def test_a_run_that_waits_for_data_is_warned_once(seconds, warned_at, tmp_path, caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lcm_distill.run.progress.time", clock)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=True, num_processes=1, reduce=lambda value, reduction: value,
        log=lambda *given, **more: None, trackers=[],
    )  # fmt: skip
    progress = Progress(accelerator, Journal(tmp_path, {}, enabled=False), total=9, initial=0, output_dir="")
    warnings = []
    for step, _ in zip(range(1, 5), progress.batches(SlowLoader(seconds, clock)), strict=False):
        clock.now += 1  # the step itself
        progress.add(torch.tensor(1.0), 2)
        progress.step(torch.tensor(1.0))
        values = progress.log(step, SimpleNamespace(get_last_lr=lambda: [1.0]))
        assert values["data_wait"] == pytest.approx(seconds[step - 1] / (seconds[step - 1] + 1))
        warnings += [(step, record.message) for record in caplog.records]
        caplog.clear()
    assert [step for step, _ in warnings] == warned_at
    for _, message in warnings:
        assert "--dataloader_num_workers (now 3)" in message and "lcm_distill.encode_shards" in message


def test_a_gpu_waits_for_data_only_while_it_has_nothing_to_do(monkeypatch):
    """By the host's clock a GPU that was idle for 10 ms of 410 looked as if it had waited for all of them."""
    host, device = Clock(), Clock()  # the device's: when it will have done what is queued

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now = max(device.now, host.now)

        def query(self):
            return self.at <= host.now

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = _GPUWaiting()
    for work, wait in ((0.5, 0.41), (0.5, 0.3), (0.1, 0.4)):
        device.now = max(device.now, host.now) + work
        host.now += 0.1  # to queue it
        with waiting:
            host.now += wait
    host.now = max(host.now, device.now)
    # Idle from .50 to .51, not at all, and from 1.11 to 1.41.
    assert waiting.take() == pytest.approx(0.01 + 0 + 0.3)
    assert waiting.take() == 0
