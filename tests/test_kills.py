"""A short form of benchmarks/kill_and_resume.py."""

import json

import pytest
from processes import ROOT, start, wait

pytestmark = pytest.mark.hostile("signals")


def challenged(tmp_path, *options: str) -> dict:
    """The result of the benchmark, with one program and five kills."""
    log, output = tmp_path / "log.txt", tmp_path / "result.json"
    options = (*options, "--workers", "0", "--kills", "5", "--output", str(output))
    assert wait([start(ROOT / "benchmarks" / "kill_and_resume.py", options, log)], log) == [0], log.read_text()[-3000:]
    ((result,),) = [launch["runs"] for launch in json.loads(output.read_text())["launches"]]
    assert result["bitwise_equal"] and result["killed"] == 5
    return result


@pytest.mark.parametrize("program, more", [("sd", ["--steps", "16"]), ("lora_sd", ["--steps", "12", "--matching"])])
def test_a_run_killed_where_it_hurts_ends_as_if_nothing_had_happened(program, more, tmp_path):
    """SIGKILL in the middle of a checkpoint's file, of the removal of an older one, and between: bitwise the same."""
    result = challenged(tmp_path, "--programs", program, *more)
    assert {"half of a file of the checkpoint written", "half of an older checkpoint removed"} <= {
        moment["moment"] for moment in result["moments"] if moment["killed"]
    }


def test_kills_while_a_run_loads_meet_a_checkpoint(tmp_path):
    """Without one a run that is to die when it is loaded trained to its end, and all later kills met that end."""
    result = challenged(tmp_path, "--programs", "sd", "--phases", "loading", "--steps", "12")
    assert {moment["newest"] for moment in result["moments"]} <= {f"checkpoint-{step}" for step in range(2, 12, 2)}
