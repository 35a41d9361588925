"""Several processes and machines: two ranks are one of twice the batch, signals, a rank that dies, two launches.

All on gloo. tests/test_programs.py has the plain run of two ranks and its resume.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import environment, free_port, start, start_ranks, wait, wait_for
from safetensors.torch import load_file
from small_teachers import TOY

from lcm_distill.data import loader as data_loader
from lcm_distill.data.loader import make_loader
from lcm_distill.data.stream import ShardStream
from lcm_distill.run.checkpoint import list_checkpoints
from lcm_distill.run.randomness import BatchGenerators

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_lcm_distill_sd_wds.py")


def launch(argv, tmp_path, name="log", launcher=None):
    """A launcher's process that starts the program, by default torchrun's with two ranks."""
    launcher = launcher or ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    log = open(tmp_path / f"{name}.txt", "w")
    return subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, *argv], cwd=tmp_path, env=environment(), stdout=log, stderr=log
    )


def train_on_two_ranks(argv, tmp_path, name="log"):
    log = tmp_path / f"{name}.txt"
    assert wait(start_ranks(SCRIPT, argv, log), log) == [0, 0], log.read_text()[-3000:]


def step_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "run.json").read_text())


class _Alternating:
    """The batches of two ranks in turn, as one process would have to see them."""

    def __init__(self, loaders):
        self.loaders = loaders

    def __iter__(self):
        iterators = [iter(loader) for loader in self.loaders]
        while True:
            for iterator in iterators:
                yield next(iterator)

    def state_dict(self):
        return {}

    def close(self):
        pass


# With so large an ε a step is proportional to the gradient: a sum of gradients is not their mean.
MATCHING = {"dm_weight": 0.5, "dm_steps": 2, "dm_rank": 8, "dm_learning_rate": 0.03, "learning_rate": 0.03}
MATCHING |= {"adam_epsilon": 0.1, "max_grad_norm": 100}


@pytest.mark.parametrize("matching", [{}, MATCHING], ids=["", "matching"])
def test_two_ranks_of_a_batch_train_as_one_of_twice_the_batch(
    matching, command, run, tmp_path, small_teacher, monkeypatch
):
    """The same samples and draws in one process, by accumulation: the same weights to rounding.

    With distribution matching those of the fake score too, which sees both ranks' answers, or both batches'.
    """
    options = {"steps": 3, "learning_rate": 1e-4, "num_validation_images": 1} | matching
    train_on_two_ranks(command("two", **options), tmp_path)

    def both(**arguments):
        return [ShardStream(**arguments | {"rank": rank, "world_size": 2}) for rank in (0, 1)]

    at = BatchGenerators.at
    monkeypatch.setattr(data_loader, "ShardStream", both)
    monkeypatch.setattr(data_loader, "make_loader", lambda streams, num_workers: _Alternating([*map(_loader, streams)]))
    monkeypatch.setattr(
        BatchGenerators,
        "at",
        lambda self, batch: at(BatchGenerators(self.seed, batch % 2, self._generator.device), batch // 2),
    )
    run("train_lcm_distill_sd_wds", command("one", gradient_accumulation_steps=2, **options))
    for name in ("unet", "unet_target"):
        one, two = (
            load_file(tmp_path / where / name / "diffusion_pytorch_model.safetensors") for where in ("one", "two")
        )
        before = load_file(Path(small_teacher) / "unet/diffusion_pytorch_model.safetensors")
        moved = max(float((one[key] - before[key].float()).abs().max()) for key in before)
        worst = max(float((one[key] - two[key]).abs().max()) for key in one)
        assert worst < 0.05 * moved, (worst, moved)  # Adam divides rounding of tiny gradients by themselves
    if matching:
        saved = "checkpoint-3/fake_score/fake_score.safetensors"
        one, two = (load_file(tmp_path / where / saved) for where in ("one", "two"))
        changed = [name for name in one if "lora_A" not in name]  # zero at the start
        assert one.keys() == two.keys() and "time_embedding.cond_proj.weight" in changed
        moved = max(float(one[name].abs().max()) for name in changed)
        worst = max(float((one[name] - two[name]).abs().max()) for name in one)
        assert moved > 0.01 and worst < 1e-3 * moved, (worst, moved)


def _loader(stream):
    return make_loader(stream, 0)


@pytest.mark.hostile("signals")
def test_sigterm_to_the_launcher_saves_on_every_rank(command, tmp_path):
    options = {"steps": 2000, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    launched = launch(command(**options), tmp_path)
    out = tmp_path / "out"
    wait_for(lambda: list_checkpoints(out), launched, tmp_path / "log.txt")
    launched.send_signal(signal.SIGTERM)
    launched.wait(timeout=60)
    (last,) = list_checkpoints(out)
    assert step_of(last)["processes"] == 2 and {p.name for p in last.glob("stream-*.pt")} == {
        "stream-0.pt",
        "stream-1.pt",
    }
    log = (tmp_path / "log.txt").read_text()
    message = f"stopped after step {step_of(last)['global_step']}; resume with --resume_from_checkpoint latest"
    assert message in log, log[-3000:]


@pytest.mark.hostile("signals")
def test_the_death_of_one_rank_ends_the_job_in_bounded_time(command, tmp_path):
    launched = launch(command(steps=2000, checkpointing_steps=2), tmp_path)
    wait_for(lambda: list_checkpoints(tmp_path / "out"), launched, tmp_path / "log.txt")
    ranks = [child for child in psutil.Process(launched.pid).children() if SCRIPT in child.cmdline()]
    assert len(ranks) == 2
    started = time.monotonic()
    ranks[1].kill()
    assert launched.wait(timeout=90) != 0
    assert time.monotonic() - started < 60
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.hostile("signals")
def test_a_killed_worker_of_one_rank_ends_all_ranks_with_a_checkpoint(command, tmp_path):
    """The others waited for that rank's gradients until the launcher ended them; nothing was saved."""
    options = {"steps": 2000, "dataloader_num_workers": 1, "num_validation_images": 0, "validation_teacher_steps": 0}
    log = tmp_path / "log.txt"
    ranks = start_ranks(SCRIPT, command(**options), log)
    journal = tmp_path / "out" / "training.jsonl"
    wait_for(lambda: journal.exists() and '"step": 2' in journal.read_text(), ranks[0], log, seconds=240)
    for worker in psutil.Process(ranks[1].pid).children():
        worker.kill()
    assert wait(ranks, log, seconds=240) == [0, 1]  # the other one was asked to stop
    (last,) = list_checkpoints(tmp_path / "out")
    assert step_of(last)["processes"] == 2 and len(list(last.glob("stream-*.pt"))) == 2
    steps = step_of(last)["global_step"]
    text = log.read_text()
    assert "error: --dataloader_num_workers 1: a data worker was killed (SIGKILL), most" in text, text[-3000:]
    assert f"The run is saved at step {steps}: resume with --resume_from_checkpoint latest" in text
    assert "Traceback" not in text, text[-3000:]
    resumed = command(**options | {"steps": steps + 1}, resume_from_checkpoint="latest")
    train_on_two_ranks(resumed, tmp_path, "again")
    assert "cannot continue exactly" not in (tmp_path / "again.txt").read_text()


def test_two_machines_train_save_and_resume(command, tmp_path):
    """Two launches, as on two machines that share a disk, each with its --machine_rank."""
    for steps, more in ((2, {}), (4, {"resume_from_checkpoint": "latest"})):
        port = free_port()
        machines = []
        for rank in (0, 1):
            launcher = [
                *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"),
                *("--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
                *("--mixed_precision", "no", "--dynamo_backend", "no"),
            ]
            argv = command(steps=steps, learning_rate=1e-3, checkpointing_steps=2, **more)
            machines.append(launch(argv, tmp_path, f"machine{rank}", launcher))
        for rank, machine in enumerate(machines):
            assert machine.wait(timeout=200) == 0, (tmp_path / f"machine{rank}.txt").read_text()[-3000:]
    assert [step_of(path)["global_step"] for path in list_checkpoints(tmp_path / "out")] == [2, 4]
    assert step_of(tmp_path / "out" / "checkpoint-4")["processes"] == 2
    assert (tmp_path / "out" / "unet" / "config.json").exists()
    train_on_two_ranks(command("whole", steps=4, learning_rate=1e-3, checkpointing_steps=2), tmp_path)
    found = [load_file(tmp_path / where / "unet/diffusion_pytorch_model.safetensors") for where in ("out", "whole")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.hostile("disks")
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounting needs root")
def test_a_disk_that_fills_up_loses_nothing(command, tmp_path):
    """A real one, of 90 MB: some checkpoints fit, then none; the run logs it, keeps the last complete one, and ends."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        argv = command(steps=8, checkpointing_steps=1, report_to="tensorboard", pretrained_teacher_model=TOY / "sd")
        argv[argv.index("--output_dir") + 1] = str(disk / "out")
        log = tmp_path / "log.txt"
        codes = wait([start(SCRIPT, argv, log)], log)
        text = log.read_text()
        assert "could not be written" in text and "the run continues" in text and "Traceback" not in text, text[-3000:]
        whole = list_checkpoints(disk / "out")
        assert whole and f"the last complete one is {whole[-1]}" in text
        assert not list((disk / "out").glob(".checkpoint-*"))
        assert codes == [1] and "error: the result could not be written" in text, text[-3000:]
        # With free space again the same command continues from the last complete one to the end.
        for path in whole[:-1]:
            subprocess.run(["rm", "-r", str(path)], check=True)
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        more = [*argv, "--resume_from_checkpoint", "latest"]
        assert wait([start(SCRIPT, more, log)], log) == [0], log.read_text()[-3000:]
        assert (disk / "out" / "unet" / "config.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=False)
