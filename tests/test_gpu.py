"""What only a GPU can show: `pytest -m gpu`."""

import gc
import math

import pytest
import torch
from test_programs import PROGRAMS, captured_losses, check_channels_last, family

from benchmarks.fake_step import Case, build
from benchmarks.memory import compute
from lcm_distill import encode_shards
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.shards import expand_shards
from lcm_distill.data.stream import ShardStream
from lcm_distill.distributed import compiling
from lcm_distill.models.teacher import Teacher
from lcm_distill.run.progress import Progress

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Restores what a run sets for the whole process, and starts no data workers: dozens of runs go at once."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", torch.backends.cuda.matmul.allow_tf32)
    monkeypatch.setattr("lcm_distill.run.accelerator._WORKERS", 0)


@pytest.mark.parametrize(
    "precision, cast",
    [
        ("no", "cast_teacher_unet"),
        ("fp16", "cast_teacher_unet"),
        ("fp16", "no-cast_teacher_unet"),
        ("bf16", "cast_teacher_unet"),
        ("bf16", "no-cast_teacher_unet"),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_precision_trains_and_generates(program, precision, cast, command, run, monkeypatch):
    losses = []
    log = Progress.log

    def recording(*args):
        values = log(*args)
        losses.append(values["loss"])
        return values

    monkeypatch.setattr(Progress, "log", recording)
    options = {"mixed_precision": precision, "gradient_checkpointing": True, cast: True}
    run(program, command(family=family(program), steps=4, **options))
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
        run(program, command(family=family(program), steps=6, **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_teacher_in_parts_is_the_teacher_at_once(program, command, run, monkeypatch):
    losses = captured_losses(monkeypatch)
    for number, rows in enumerate((None, 2, 1)):
        run(program, command(f"out{number}", family=family(program), steps=1, teacher_batch_size=rows))
    assert [loss for _, loss in losses] == pytest.approx([losses[0][1]] * 3, rel=1e-3)


@pytest.mark.parametrize("program", PROGRAMS)
def test_convolutions_have_channels_last_weights(program, command, run, monkeypatch):
    options = {"family": family(program), "steps": 1, "mixed_precision": "bf16", "channels_last": True}
    check_channels_last(program, command(**options), run, monkeypatch)


@pytest.mark.parametrize("program", ["sd", "lora_sd"])
def test_a_checkpoint_resumes_in_another_memory_format(program, command, run, tmp_path):
    """Moments that are taken in the wrong order are off by about their own size, or crash the fused optimizer."""
    options = {"family": "sd", "learning_rate": 1e-3, "checkpointing_steps": 2, "mixed_precision": "no"}
    program = f"train_lcm_distill_{program}_wds"
    run(program, command("last", steps=4, channels_last=True, **options))
    where = str(tmp_path / "last" / "checkpoint-2")
    run(program, command("other", steps=4, resume_from_checkpoint=where, **options))
    moments = []
    for name in ("last", "other"):
        state = torch.load(tmp_path / name / "checkpoint-4" / "optimizer.bin", weights_only=True, map_location="cpu")
        moments.append([values["exp_avg"] for values in state["state"].values()])
    formats = {m.is_contiguous() for m in moments[0] if m.dim() == 4 and min(m.shape[1:]) > 1}
    assert False in formats and all(m.is_contiguous() for m in moments[1])
    for expected, resumed in zip(*moments, strict=True):
        assert (resumed - expected).norm() < 0.02 * expected.norm() + 1e-8


@pytest.mark.parametrize(
    "case, limit",
    [
        (Case("lora_sdxl", "sdxl", gradient_checkpointing=True), 16e9),
        (Case("lora_sdxl", "sdxl", train_batch_size=4, gradient_checkpointing=True), 24e9),
        (Case("lora_sd", "sd15", gradient_checkpointing=True), 8e9),
    ],
    ids=["16 GB", "24 GB", "8 GB"],
)
def test_a_step_fits_and_takes_what_was_computed(case, limit):
    if torch.cuda.get_device_properties(0).total_memory < 1.1 * limit:
        pytest.skip("the GPU is too small for the networks while they are made")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build(case, lambda part: None, "cuda")
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < limit - 1.5e9  # for CUDA itself and gaps
    computed = compute(case)["peak"] * 1e9
    assert 0.9 * computed < peak < 1.05 * computed + 1e9  # and workspaces of convolutions


@pytest.mark.parametrize("program, mode", [("sd", "regional"), ("lora_sdxl", "regional"), ("lora_sd", "whole")])
def test_compiled_code_trains_as_eager_code(program, mode, command, run, monkeypatch, tmp_path):
    """By the real code generator; tests/distributed/test_compiling.py has the rest."""
    monkeypatch.setattr(compiling, "BLOCKS", ("BasicTransformerBlock",))  # for time's sake
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    losses = captured_losses(monkeypatch)
    options = {"family": family(program), "mixed_precision": "bf16", "learning_rate": 1e-5, "steps": 3}
    options |= {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    run(f"train_lcm_distill_{program}_wds", command("eager", **options))
    eager = [loss for _, loss in losses]
    losses.clear()
    run(f"train_lcm_distill_{program}_wds", command("compiled", **options, compile=mode))
    assert len(losses) == 3 and [loss for _, loss in losses] == pytest.approx(eager, rel=0.05)
    assert any((tmp_path / "cache").iterdir())


def test_encoding_waits_for_a_batch_only_to_write_it(shards, teacher, tmp_path, monkeypatch):
    """And what is written then is what a CPU writes, to rounding."""
    encode = encode_shards._encode_batch

    def unwatched(*given):
        encode(*given)  # what is loaded at the first use does wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return encode(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(encode_shards, "_encode_batch", unwatched)
    found = {}
    preparation = Preparation(resolution=64, random_flip=True)
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        given = dict(teacher=Teacher(teacher), preparation=preparation, captions=True, device=device, batch_size=5)
        encode_shards.encode_shards(expand_shards(shards), out, **given)
        written = expand_shards(str(out))
        known = inspect_shards(written, preparation).preparation
        found[device] = next(iter(ShardStream(shards=written, preparation=known, batch_size=24, seed=0)))
    for name in ("moments", "encoder_hidden_states"):
        torch.testing.assert_close(found["cuda"][name], found["cpu"][name], rtol=0.05, atol=0.05)
