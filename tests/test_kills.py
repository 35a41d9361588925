"""A short form of benchmarks/kill_and_resume.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.hostile("signals")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("program, more", [("sd", ["--steps", "16"]), ("lora_sd", ["--steps", "12", "--matching"])])
def test_a_run_killed_where_it_hurts_ends_as_if_nothing_had_happened(program, more):
    """SIGKILL in the middle of a checkpoint's file, of the removal of an older one, and between: bitwise the same."""
    command = [sys.executable, "-m", "benchmarks.kill_and_resume"]
    options = ["--programs", program, "--workers", "0", "--kills", "5", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + options, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["bitwise_equal"] and result["killed"] == 5
    assert {"half of a file of the checkpoint written", "half of an older checkpoint removed"} <= {
        moment["moment"] for moment in result["moments"] if moment["killed"]
    }


def test_kills_while_a_run_loads_meet_a_checkpoint():
    """Without one a run that is to die when it is loaded trained to its end, and all later kills met that end."""
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", "--programs", "sd", "--workers", "0"]
    command += ["--phases", "loading", "--kills", "5", "--steps", "12"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["bitwise_equal"] and {moment["newest"] for moment in result["moments"]} <= {
        f"checkpoint-{step}" for step in range(2, 12, 2)
    }
