"""What measures the training step: it runs the programs' own step, and its numbers are those of closed forms."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import fake_step, memory, train_step
from benchmarks.architectures import UNETS, build_vae
from benchmarks.fake_step import Case, build
from benchmarks.memory import Tally, compute

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = UNet2DConditionModel.load_config(ROOT / "toy/teachers/sd/unet")
TINY = {name: value for name, value in _CONFIG.items() if name[0] != "_" and name != "time_cond_proj_dim"}


def test_a_step_is_timed_part_by_part_beside_the_plain_one(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--program", "sd", "--straightforward"]
    command += ["--rounds", "1", "--steps", "1", "--part_steps", "1", "--warmup", "1", "--train_batch_size", "2"]
    command += ["--output", str(output), "--gradient_checkpointing", "--mixed_precision", "no"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((title, result),) = json.loads(output.read_text()).items()
    assert title == "sd, toy at 64, batch 2, no, --gradient_checkpointing"
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


def test_what_was_measured_outlives_a_variant_that_fails_and_a_kill(tmp_path, monkeypatch, capsys):
    """A command that ran into its time limit, or whose first variant failed, left no result at all."""
    output, rounds = tmp_path / "result.json", []

    def measured(function, *given):
        if function is not train_step.measure:
            return {"student": 1e9}
        if given[1].name != "all on":
            raise RuntimeError("no memory\nand so on")
        rounds.append(json.loads(output.read_text()) if output.exists() else None)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        times = {"first_step_s": 1.0, "step_ms": 10.0 * len(rounds), "step_in_parts_ms": 30.0, "matrix_rate": 1e12}
        return times | {"parts_ms": {"student": 5.0}, "peak_memory_bytes": 1e9}

    monkeypatch.setattr(train_step, "alone", measured)
    monkeypatch.setattr(sys, "argv", ["train_step", "--straightforward", "--output", str(output)])
    with pytest.raises(KeyboardInterrupt):
        train_step.main()
    ((_, result),) = json.loads(output.read_text()).items()
    assert result["variants"]["all on"]["step_ms_of_each_round"] == [10, 20] and result["floor_ms"] == 4
    assert result["failed"] == {"straightforward": "no memory"}
    assert "Failed: straightforward: no memory" in output.with_suffix(".md").read_text()
    assert rounds[0] is None and len(rounds[1]["sd, toy at 64, batch 4, no"]["variants"]) == 1


def test_ratios_are_of_the_same_round():
    """On a machine that slows down between rounds medians of each variant say less than their ratios."""
    reference = {"step_ms_of_each_round": [10, 100, 20]}
    assert train_step.against({"step_ms_of_each_round": [15, 150, 30]}, reference) == "1.50"
    assert train_step.against({"step_ms_of_each_round": [15]}, reference) == "1.50"
    assert train_step.against({"step_ms_of_each_round": [15]}, None) == ""


def test_every_command_for_the_gpu_is_one(tmp_path):
    """None of them can run here: at least their flags are those that the commands and the programs have."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done >> "$SAID"\necho >> "$SAID"\n')
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 143771\n")
    for script in (fake, smi):
        script.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(fake), "SAID": str(tmp_path / "said")}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    subprocess.run(command, env=environment | {"RESULTS": str(tmp_path)}, check=True, capture_output=True, timeout=60)
    lines = (tmp_path / "said").read_text().splitlines()
    calls = [line.split("\0")[1:-1] for line in lines]
    assert [words[0] for words in calls] == [
        *["benchmarks.train_step"] * 2, "pytest", "benchmarks.real_size_run", *["benchmarks.train_step"] * 2
    ]  # fmt: skip
    for module, *words in calls:
        if module == "benchmarks.train_step":
            args, more = train_step.parse(words)
            program, _ = train_step.modules(args.program)
            variants = [flag for text in args.variant for flag in text.partition("=")[2].split()]
            program.parse_args(["--pretrained_teacher_model=x", "--train_shards_path_or_url=x", *more, *variants])


def test_a_command_for_the_gpu_that_takes_too_long_is_killed_with_its_children(tmp_path):
    """A training child outlived its parent, wrote a checkpoint, and ran beside the next measurement."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/bash\ntrap '' TERM\n(trap '' TERM; echo $BASHPID > {tmp_path}/child; touch $TMPDIR/kept; sleep 60) &\n"
        "sleep 60\n"
    )
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "RESULTS": str(tmp_path), "LIMIT": "2", "TMPDIR": str(tmp_path)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "tests", "program"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "tests (status 137)" in done.stdout and "no time left" in done.stdout
    child = int((tmp_path / "child").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert not list(tmp_path.glob("tmp.*"))


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
    monkeypatch.setattr(fake_step, "build_text_encoders", lambda name: [])
    monkeypatch.setattr(memory, "GB", 1)
    case = Case("sd", "half", resolution=256, train_batch_size=2, mixed_precision="no")
    plain = compute(case)
    size = sum(p.numel() for p in UNet2DConditionModel(**TINY, time_cond_proj_dim=256).parameters()) * 4
    teacher = sum(p.numel() for p in UNet2DConditionModel(**TINY).parameters()) * 4
    vae = sum(p.numel() for p in build_vae("half").parameters()) * 4
    assert plain["rest"] == pytest.approx(4 * size + teacher + vae, rel=0.01)  # student, target, AdamW's two
    assert plain["parts"]["optimizer"] == pytest.approx(plain["rest"] + size, rel=0.1)  # and the gradients
    less = compute(Case(**vars(case) | {"gradient_checkpointing": True, "use_8bit_adam": True}))
    assert less["rest"] == pytest.approx(plain["rest"] - 2 * size + size / 2, rel=0.02)
    assert less["parts"]["student"] - less["rest"] < 0.5 * (plain["parts"]["student"] - plain["rest"])
    with Tally() as tally:  # and the same of tensors that are there
        build(case, tally.begin)()
    for part, size in plain["parts"].items():
        assert tally.peaks[part] == pytest.approx(size, rel=0.02), part
