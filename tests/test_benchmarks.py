"""What measures the training step: it runs the programs' own step, and its numbers are those of closed forms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import memory
from benchmarks.architectures import UNETS
from benchmarks.memory import Case, Tally, compute

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = UNet2DConditionModel.load_config(ROOT / "toy/teachers/sd/unet")
TINY = {name: value for name, value in _CONFIG.items() if name[0] != "_" and name != "time_cond_proj_dim"}


def test_a_step_is_timed_part_by_part_beside_the_plain_one(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--program", "sd", "--straightforward"]
    command += ["--rounds", "1", "--steps", "1", "--part_steps", "1", "--warmup", "1", "--train_batch_size", "2"]
    command += ["--output", str(output), "--gradient_checkpointing", "--mixed_precision", "bf16"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((title, result),) = json.loads(output.read_text()).items()
    assert title == "sd, toy at 64, batch 2, bf16, --gradient_checkpointing"
    parts = {"data", "VAE", "text", "teacher", "target", "student", "backward", "clip", "optimizer", "EMA"}
    for variant in ("all on", "straightforward"):
        times = result["variants"][variant]["parts_ms"]
        assert times.keys() == parts | {"rest"} and all(times[part] > 0 for part in parts)
        assert f"| {variant} |" in output.with_suffix(".md").read_text()
    # The teacher sees twice the batch; recomputation does not count.
    flops = result["gflops_by_part"]
    assert flops["student"] == flops["target"] == pytest.approx(flops["teacher"] / 2, rel=0.01)
    assert 1.8 < flops["backward"] / flops["student"] < 2.2
    assert result["floor_ms"] > 0 and result["matrix_tflops"] > 0


def test_memory_is_counted_from_when_a_tensor_is_made_until_it_is_gone():
    with Tally() as tally:
        kept = torch.zeros(1000)
        view = kept.view(10, 100)
        assert tally.peaks == {"": 4000}
        tally.begin("product")
        product = torch.zeros(2000) * 2
        del product
        tally.begin("after")
        assert tally.now == 4000 and view.numel() == 1000
        del kept
        assert tally.now == 4000  # the view still refers to it
        del view
    assert tally.now == 0
    assert tally.peaks == {"": 4000, "product": 4000 + 2 * 8000, "after": 4000}


def test_memory_of_a_step_is_that_of_its_weights_and_of_what_the_flags_say(monkeypatch):
    monkeypatch.setitem(UNETS, "half", TINY)  # SD's layout, quick
    monkeypatch.setattr(memory, "build_text_encoders", lambda name: [])
    monkeypatch.setattr(memory, "GB", 1)
    case = Case("sd", "half", resolution=256, train_batch_size=2, mixed_precision="no")
    plain = compute(case)
    size = sum(p.numel() for p in UNet2DConditionModel(**TINY, time_cond_proj_dim=256).parameters()) * 4
    teacher = sum(p.numel() for p in UNet2DConditionModel(**TINY).parameters()) * 4
    vae = sum(p.numel() for p in memory.build_vae("half").parameters()) * 4
    assert plain["rest"] == pytest.approx(4 * size + teacher + vae, rel=0.01)  # student, target, AdamW's two
    assert plain["parts"]["optimizer"] == pytest.approx(plain["rest"] + size, rel=0.1)  # and the gradients
    less = compute(Case(**vars(case) | {"gradient_checkpointing": True, "use_8bit_adam": True}))
    assert less["rest"] == pytest.approx(plain["rest"] - 2 * size + size / 2, rel=0.02)
    assert less["parts"]["student"] - less["rest"] < 0.5 * (plain["parts"]["student"] - plain["rest"])
    with Tally() as tally:  # and the same of tensors that are there
        memory.build(case, tally.begin)()
    for part, size in plain["parts"].items():
        assert tally.peaks[part] == pytest.approx(size, rel=0.02), part
