"""What a run measures while it trains."""

import time
from types import SimpleNamespace

import pytest
import torch

from lcm_distill.errors import DivergenceError
from lcm_distill.run.journal import Journal
from lcm_distill.run.progress import Progress


def test_gradients_that_never_become_finite_end_the_run(tmp_path):
    accelerator = SimpleNamespace(device="cpu", is_main_process=False, num_processes=1)
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
        device="cpu", is_main_process=False, num_processes=1, reduce=lambda value, reduction: value
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
        device="cpu", is_main_process=False, num_processes=1, reduce=lambda value, reduction: Queued(),
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
