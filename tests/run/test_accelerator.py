"""How Accelerate is started."""

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from processes import start, start_ranks, wait

from lcm_distill.errors import UsageError
from lcm_distill.flags import LaunchFlags
from lcm_distill.run.accelerator import choose_workers, start_accelerator

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("precision, flag, tf32", [("no", False, False), ("no", True, True), ("bf16", False, True)])
def test_settings_of_cuda(precision, flag, tf32, monkeypatch):
    """TF32 is for SDXL's float32 VAE in mixed precision; full precision is full unless the flag says otherwise."""
    chosen = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: True),
        backends=SimpleNamespace(
            cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=not tf32)),
            cudnn=SimpleNamespace(allow_tf32=not tf32, benchmark=False),
        ),
    )
    stand_in = SimpleNamespace(
        is_main_process=False, mixed_precision=precision, distributed_type="NO", device=torch.device("cuda")
    )
    monkeypatch.setattr("lcm_distill.run.accelerator.Accelerator", lambda **options: stand_in)
    monkeypatch.setattr("lcm_distill.run.accelerator.torch", chosen)
    start_accelerator(LaunchFlags(output_dir="x", mixed_precision=precision, allow_tf32=flag), [])
    assert chosen.backends.cuda.matmul.allow_tf32 == chosen.backends.cudnn.allow_tf32 == tf32
    assert chosen.backends.cudnn.benchmark


def test_local_rank_reaches_the_launcher_s_variable(given, monkeypatch):
    for before, expected in ((None, "3"), ("1", "1")):
        monkeypatch.setattr("os.environ", {"LOCAL_RANK": before} if before else {})
        start_accelerator(LaunchFlags(output_dir="x", local_rank=3), [])
        assert os.environ["LOCAL_RANK"] == expected


def test_ranks_wait_while_the_main_process_generates_and_writes(given):
    """NCCL aborted the run after ten minutes: fifty steps of an SDXL teacher for dozens of prompts take longer."""
    start_accelerator(LaunchFlags(output_dir="x"), [])
    (handler,) = [one for one in given[0]["kwargs_handlers"] if isinstance(one, InitProcessGroupKwargs)]
    assert handler.to_kwargs() == {"timeout": timedelta(hours=1)}


TWO_RANKS = """
import copy, os, sys
import torch
from lcm_distill.flags import LaunchFlags
from lcm_distill.run.accelerator import choose_workers, start_accelerator

def loss(network, rank, step, part):
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + part)
    return network(torch.randn(3, 2, 4, 4, generator=generator)).square().mean()

accelerator = start_accelerator(LaunchFlags(output_dir=sys.argv[1], gradient_accumulation_steps=2), [])
rank = accelerator.process_index
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
network.to(memory_format=torch.channels_last)
alone = copy.deepcopy(network)
expected = torch.optim.SGD(alone.parameters(), lr=1.0)
ddp, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=1.0))
for step in range(3):
    for part in range(2):
        with accelerator.accumulate(ddp):
            accelerator.backward(loss(ddp, rank, step, part))
            if accelerator.sync_gradients:
                storages = {p.grad.untyped_storage().data_ptr() for p in network.parameters()}
                assert len(storages) == 1, "the gradients are copies of DDP's bucket"
                accelerator.clip_grad_norm_(ddp.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert all(p.grad is None for p in network.parameters())
    sum(loss(alone, r, step, part) / 4 for r in range(2) for part in range(2)).backward()
    assert torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1) > 0.1  # or nothing would be clipped
    expected.step()
    expected.zero_grad()
for ours, theirs in zip(network.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
open(os.path.join(sys.argv[1], f"done-{rank}"), "w").close()
"""


def test_ddp_s_buckets_are_the_gradients(tmp_path):
    """It held a second set of them: 10.3 GB with SDXL. Accumulation and clipping give what one process computes."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    log = tmp_path / "log.txt"
    assert wait(start_ranks(script, [str(tmp_path)], log), log) == [0, 0], log.read_text()[-3000:]
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


@pytest.mark.parametrize(
    "flag, device, cores, ranks, resumed, expected",
    [
        (0, "cuda", 16, 1, {}, 0),
        (7, "cpu", 1, 1, {}, 7),
        (None, "cuda", 16, 1, {}, 4),
        (None, "cuda", 16, 8, {}, 2),
        (None, "cuda", 4, 8, {}, 0),
        (None, "cpu", 16, 1, {}, 0),
        (None, "cuda", 16, 1, {"processes": 2, "flags": {"dataloader_num_workers": 0}}, 0),
        (None, "cpu", 16, 1, {"processes": 2, "flags": {"dataloader_num_workers": 3}}, 3),
        (3, "cuda", 16, 1, {"processes": 2, "flags": {"dataloader_num_workers": 5}}, 3),
        (None, "cuda", 16, 1, {"processes": 1, "flags": {"dataloader_num_workers": 7}}, 4),  # of other ranks
        (None, "cuda", 16, 1, {"processes": 2, "flags": {"dataloader_num_workers": None}}, 4),
        (None, "cuda", 16, 1, {"processes": 2, "flags": {}}, 4),  # a checkpoint that does not say
        (None, "cpu", 16, 1, {"processes": 2}, 0),
    ],
)
def test_workers_go_by_the_flag_then_the_checkpoint_then_the_machine(
    flag, device, cores, ranks, resumed, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=2)
    assert choose_workers(flag, accelerator, resumed) == expected


def test_every_rank_has_the_main_process_s_number_of_workers(monkeypatch):
    """The stream deals to ranks x workers: machines with different numbers of cores would read samples twice."""
    monkeypatch.setattr("lcm_distill.run.accelerator.broadcast_object_list", lambda own: [own[0] + 1])
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    assert choose_workers(2, accelerator, {}) == 3


def test_ranks_that_end_do_not_wait_for_each_other_s_lock(tmp_path):
    """Two ranks of a finished run did not end, about once in a hundred ends on busy cores: see `end_training`."""
    (tmp_path / "ends.py").write_text("""
import faulthandler, sys
from types import SimpleNamespace
import torch
from torch.nn.parallel import DistributedDataParallel
from lcm_distill.run.accelerator import end_training

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]

def train(number):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    model(torch.ones(2, 8)).sum().backward()
    for _ in range(2):
        torch.distributed.all_gather_object([None, None], [{"dropped": 1}])
        torch.distributed.all_reduce(torch.ones(1), async_op=True).wait()
    end_training(SimpleNamespace(_models=[model], end_training=torch.distributed.destroy_process_group))

for number in range(200):
    faulthandler.dump_traceback_later(40, exit=True)
    train(number)
faulthandler.cancel_dump_traceback_later()
""")
    log = tmp_path / "log.txt"
    ranks = [start(tmp_path / "ends.py", [str(rank), str(tmp_path)], log) for rank in (0, 1)]
    assert wait(ranks, log) == [0, 0], log.read_text()
