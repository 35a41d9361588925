"""What only a GPU can show: `pytest -m gpu`."""

import math

import pytest
import torch

from lcm_distill.progress import Progress

PROGRAMS = [f"train_lcm_distill_{kind}_wds" for kind in ("sd", "sdxl", "lora_sd", "lora_sdxl")]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("cast", ["cast_teacher_unet", "no-cast_teacher_unet"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_precision_trains_and_draws(program, precision, cast, command, run, monkeypatch):
    losses = []
    log = Progress.log

    def recording(*args):
        values = log(*args)
        losses.append(values["loss"])
        return values

    monkeypatch.setattr(Progress, "log", recording)
    family = "sdxl" if "sdxl" in program else "sd"
    run(
        program, command(family=family, steps=4, mixed_precision=precision, gradient_checkpointing=True, **{cast: True})
    )
    assert len(losses) >= 4 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_sync_on_a_step_that_does_not_log(program, precision, command, run, monkeypatch):
    """PyTorch raises at whatever makes the host wait for the device between two logged steps."""
    step, log = Progress.step, Progress.log

    def watch(self, grad_norm):
        step(self, grad_norm)
        torch.cuda.set_sync_debug_mode("error")

    def unwatched(*args):
        torch.cuda.set_sync_debug_mode("default")
        return log(*args)

    monkeypatch.setattr(Progress, "step", watch)
    monkeypatch.setattr(Progress, "log", unwatched)
    try:
        options = {"logging_steps": 5, "checkpointing_steps": 6, "mixed_precision": precision, "w_max": 7}
        run(program, command(family="sdxl" if "sdxl" in program else "sd", steps=6, **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
