"""How Accelerate is started."""

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from lcm_distill.errors import UsageError
from lcm_distill.flags import LaunchFlags
from lcm_distill.run.accelerator import start_accelerator


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("from_config", [False, True])
def test_fp16_without_a_gpu_is_refused(from_config, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if from_config:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match="--mixed_precision fp16 needs a GPU"):
        start_accelerator(LaunchFlags(output_dir="x", mixed_precision=None if from_config else "fp16"), [])


@pytest.fixture()
def given(monkeypatch):
    """Lists the keyword arguments of each accelerator made; none is made, and nothing is written."""
    made = []
    stand_in = SimpleNamespace(is_main_process=False, mixed_precision="no", distributed_type="NO")
    monkeypatch.setattr("lcm_distill.run.accelerator.Accelerator", lambda **options: made.append(options) or stand_in)
    return made


def test_the_flags_reach_accelerate(given):
    flags = LaunchFlags(output_dir="x", logging_dir="y", mixed_precision="bf16", gradient_accumulation_steps=3)
    start_accelerator(flags, ["wandb"])
    start_accelerator(LaunchFlags(output_dir="x", dry_run=True), ["wandb"])
    assert [options["mixed_precision"] for options in given] == ["bf16", None]
    assert [options["gradient_accumulation_steps"] for options in given] == [3, 1]
    assert [options["log_with"] for options in given] == [["wandb"], None]
    assert (given[0]["project_config"].project_dir, given[0]["project_config"].logging_dir) == ("x", "x/y")


def test_local_rank_reaches_the_launcher_s_variable(given, monkeypatch):
    for before, expected in ((None, "3"), ("1", "1")):
        monkeypatch.setattr("os.environ", {"LOCAL_RANK": before} if before else {})
        start_accelerator(LaunchFlags(output_dir="x", local_rank=3), [])
        assert os.environ["LOCAL_RANK"] == expected


def test_ranks_wait_while_the_main_process_generates_and_writes(given):
    """NCCL aborted the run after ten minutes: fifty steps of an SDXL teacher for dozens of prompts take longer."""
    start_accelerator(LaunchFlags(output_dir="x"), [])
    (handler,) = given[0]["kwargs_handlers"]
    assert handler.to_kwargs() == {"timeout": timedelta(hours=1)}
