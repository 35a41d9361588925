"""What only a GPU can show: `pytest -m gpu`."""

import math

import pytest
import torch

import train_lcm_distill_sd_wds as program
from lcm_distill.progress import Progress

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("cast", [False, True])
def test_every_precision_trains_and_draws(precision, cast, command, run, monkeypatch):
    losses = []
    log = Progress.log

    def recording(*args):
        values = log(*args)
        losses.append(values["loss"])
        return values

    monkeypatch.setattr(Progress, "log", recording)
    run(program.__name__, command(steps=4, mixed_precision=precision, cast_teacher_unet=cast))
    assert len(losses) >= 4 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_no_sync_on_a_step_that_does_not_log(precision, command, run, monkeypatch):
    """PyTorch raises at whatever makes the host wait for the device between two logged steps."""
    step, log = Progress.step, Progress.log

    def watch(self):
        step(self)
        torch.cuda.set_sync_debug_mode("error")

    def unwatched(*args):
        torch.cuda.set_sync_debug_mode("default")
        return log(*args)

    monkeypatch.setattr(Progress, "step", watch)
    monkeypatch.setattr(Progress, "log", unwatched)
    try:
        run(program.__name__, command(steps=6, logging_steps=5, checkpointing_steps=6, mixed_precision=precision))
    finally:
        torch.cuda.set_sync_debug_mode("default")
