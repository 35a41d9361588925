"""Whole runs that meet hostile checkpoints and values: the four programs."""

import shutil
from pathlib import Path

import pytest
from pickle_bombs import plant
from test_programs import PROGRAMS, family

from lcm_distill.errors import DivergenceError, UsageError
from lcm_distill.run.checkpoint import list_checkpoints
from lcm_distill.run.record import digests_of, read_record, write_record

STRAY = ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "pytorch_model.bin", "scheduler.bin", "scaler.pt")


def sign(path: Path) -> None:
    record = {name: value for name, value in read_record(path).items() if name not in ("files", "sha256")}
    write_record(path, record, {name: digest for name, digest in digests_of(path).items() if name != "run.json"})


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_resumed_run_unpickles_nothing(program, command, run, tmp_path):
    """`custom_checkpoint_0.pkl` was executed, in a dry run too."""
    options = {"family": family(program), "dm_weight": 0.5, "dm_rank": 2} | (
        {"lora_rank": 2} if "lora" in program else {}
    )
    options |= {"num_validation_images": 0, "validation_teacher_steps": 0}
    run(program, command(steps=1, **options))
    (path,), marker = list_checkpoints(tmp_path / "out"), tmp_path / "executed"
    assert not list(path.glob("custom_checkpoint*"))
    for name in STRAY:
        plant(path / name, marker)
    for file in list(path.rglob("*.safetensors")):
        plant(file.with_suffix(".bin"), marker)
    options |= {"resume_from_checkpoint": "latest", "dry_run": True}
    run(program, command(steps=2, **options))  # none of them is a file of the checkpoint
    pickles = ["optimizer.bin", "random_states_0.pkl", "stream-0.pt", "fake_score/training.pt"]
    for name in pickles:
        before = (path / name).read_bytes()
        plant(path / name, marker)
        with pytest.raises(UsageError, match=f"is damaged: {name} has changed"):
            run(program, command(steps=2, **options))
        (path / name).write_bytes(before)
    for name in pickles:
        plant(path / name, marker)
    sign(path)
    with pytest.raises(UsageError, match="is damaged"):
        run(program, command(steps=2, **options))
    assert not marker.exists()


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("learning_rate", [1e38, 1e30])
def test_a_learning_rate_that_ruins_the_weights_leaves_no_checkpoint_of_them_and_no_result(
    learning_rate, command, run, tmp_path
):
    """A checkpoint with infinite weights was saved and called the last good one, and such a model was the result."""
    run("train_lcm_distill_sd_wds", command(steps=1, num_validation_images=0))
    shutil.rmtree(tmp_path / "out" / "unet")
    options = {"learning_rate": learning_rate, "lr_warmup_steps": 0, "num_validation_images": 0, "logging_steps": 100}
    with pytest.raises(DivergenceError, match="not written|not finite"):
        run("train_lcm_distill_sd_wds", command(steps=2, resume_from_checkpoint="latest", **options))
    assert not (tmp_path / "out" / "unet").exists()
