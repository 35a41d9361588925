"""A run whose data workers fail: the step is finished and saved on every rank, then it ends with the remedy."""

import os
import signal

import pytest
from test_programs import result, same

from lcm_distill.data import stream as stream_module
from lcm_distill.errors import WorkerError
from lcm_distill.run.checkpoint import list_checkpoints
from lcm_distill.run.progress import Progress

pytestmark = pytest.mark.hostile("signals")

PROGRAM = "train_lcm_distill_sd_wds"
OPTIONS = {"steps": 4, "learning_rate": 1e-3, "dataloader_num_workers": 1, "num_validation_images": 0,
           "validation_teacher_steps": 0}  # fmt: skip
KILLED = r"^--dataloader_num_workers 1: a data worker was killed \(SIGKILL\), most likely since memory ran out\. Give "


def kill_at(monkeypatch, batch):
    """Kills the loader's worker after so many batches, while the training step of the last is under way."""
    done, counts = Progress.add, iter(range(1, 100))

    def adding(self, loss, pictures):
        if next(counts) == batch:
            os.kill(self._loader._iterator._workers[0].pid, signal.SIGKILL)
        done(self, loss, pictures)

    monkeypatch.setattr(Progress, "add", adding)


@pytest.mark.parametrize(("accumulated", "batch", "saved"), [(1, 1, 2), (2, 3, 2)])
def test_a_killed_worker_ends_the_run_with_a_checkpoint_that_continues_exactly(
    accumulated, batch, saved, command, run, tmp_path, monkeypatch, capfd
):
    """A RuntimeError was raised in the middle of a step; everything since the last checkpoint was lost."""
    options = OPTIONS | {"gradient_accumulation_steps": accumulated}
    run(PROGRAM, command("whole", **options))
    with monkeypatch.context() as patch:
        kill_at(patch, batch)
        with pytest.raises(WorkerError, match=rf"{KILLED}.* The run is saved at step {saved}: resume with --resume_"):
            run(PROGRAM, command("out", **options))
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [f"checkpoint-{saved}"]
    run(PROGRAM, command("out", resume_from_checkpoint="latest", **options))
    assert same(result(tmp_path / "out"), result(tmp_path / "whole"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_dies_in_the_last_step_changes_nothing(command, run, tmp_path, monkeypatch, caplog):
    options = OPTIONS | {"steps": 2, "gradient_accumulation_steps": 2}
    run(PROGRAM, command("whole", **options))
    kill_at(monkeypatch, 3)
    run(PROGRAM, command("out", **options))
    assert same(result(tmp_path / "out"), result(tmp_path / "whole"))
    assert "a data worker was killed" in caplog.text


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_worker_that_dies_before_the_first_step_ends_the_run_at_once(
    dry_run, command, run, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(stream_module, "prepare_sample", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerError, match=KILLED):
        run(PROGRAM, command("out", dry_run=dry_run, **OPTIONS))
    assert list_checkpoints(tmp_path / "out") == [] and "all work" not in caplog.text
