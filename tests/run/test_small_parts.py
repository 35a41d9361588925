"""Randomness, tar headers, the plan, trackers and grids."""

import copy
import logging
import os
import random
import tarfile
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from hostile_shards import header
from PIL import Image

from lcm_distill.data.tar import _PLAIN, _parse
from lcm_distill.environment import check_writable, choose_device, memory_errors
from lcm_distill.errors import DivergenceError, UsageError, run_program
from lcm_distill.run import plan as plan_module
from lcm_distill.run.accelerator import start_accelerator
from lcm_distill.run.journal import Journal
from lcm_distill.run.optim import build_lr_scheduler, build_optimizer, keeping_hyperparameters
from lcm_distill.run.plan import plan_training
from lcm_distill.run.progress import Progress
from lcm_distill.run.randomness import BatchGenerators
from lcm_distill.run.trackers import parse_trackers
from lcm_distill.sampling.grid import labelled_grid, shown

# --- randomness


def test_a_batch_s_draws_depend_on_seed_rank_and_batch_alone():
    def numbers(seed=0, rank=0, batch=0):
        generator = BatchGenerators(seed, rank, "cpu").at(batch)
        return tuple(torch.rand(4, generator=generator).tolist() + torch.rand(4).tolist())

    torch.rand(100)
    assert numbers() == numbers()
    others = {numbers(seed=1), numbers(rank=1), numbers(batch=1), numbers(seed=1, rank=1), numbers()}
    assert len(others) == 5
    one = BatchGenerators(0, 0, "cpu")
    one.at(0), one.at(1)
    assert torch.rand(4, generator=one.at(5)).tolist() == list(numbers(batch=5)[:4])


# --- tar headers


def test_a_header_says_what_tarfile_reads_in_it():
    def outcome(read, block):
        try:
            info = read(block)
        except tarfile.HeaderError as error:
            return type(error), str(error)
        return info.name, info.size, info.type, info.isreg()

    rng = random.Random(0)
    starts = [header(name, size, prefix=prefix) for name in ("a.jpg", "\xff/b" * 25) for size in (0, 77, 8**11 - 1)
              for prefix in (b"", b"folder", b"\xff" * 155)]  # fmt: skip
    starts += [header("a/", kind=kind, magic=magic) for kind in (b"\0", b"0", b"5", b"L", b"S", b"x")
               for magic in (b"ustar\x0000", b"ustar  \0", b"\0" * 8)]  # fmt: skip
    starts += [header("a", 8**12), header("a", -5), header("a", more={329: b"0000001\0" * 2}), bytes(512)]
    plain = read = 0
    for _ in range(6000):
        block = bytearray(rng.choice(starts))
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            block[rng.choice((rng.randrange(512), rng.randrange(100, 158), rng.randrange(329, 346)))] = rng.choice(
                b"\0 017789-+_oxa/\x80\xc3\xff"
            )
        if rng.random() < 0.7:  # else the sum is wrong, if anything was changed
            total = sum(block) - sum(block[148:156]) + 256
            block[148:156] = rng.choice((b"%06o\0 ", b"%06o \0", b"%07o\0", b" %5o\0 ")) % total
        expected = outcome(lambda block: tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"), bytes(block))
        assert outcome(_parse, bytes(block)) == expected, bytes(block)
        plain += _PLAIN.match(block, 100) is not None
        read += len(expected) == 4
    assert 500 < plain < 4000 and 2000 < read < 5500


# --- the plan


def plan(**more):
    flags = {
        "max_steps": None, "epochs": 3, "samples": lambda: 100, "batch_size": 8, "learning_rate": 0.5,
        "scale_lr": False,
    }  # fmt: skip
    return plan_training(SimpleNamespace(gradient_accumulation_steps=2, num_processes=2), **flags | more)


def test_length_of_a_run():
    assert plan().steps == 3 * 4  # 100 pictures, 32 a step: 4 steps an epoch
    assert plan(max_steps=7).steps == 7
    assert plan(max_steps=7, samples=lambda: 1 / 0).steps == 7  # counting is not asked for
    with pytest.raises(UsageError, match="--max_train_steps"):
        plan(samples=lambda: None)


def test_scale_lr_reaches_the_learning_rate():
    """The public programs scale it after the optimizer exists: nothing happens."""
    assert plan(scale_lr=True).learning_rate == 0.5 * 32 and plan().learning_rate == 0.5


# --- optimizer


def test_8bit_adam_is_bitsandbytes_and_close_to_adamw():
    pytest.importorskip("bitsandbytes")
    results = []
    for use_8bit in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(128, 128)
        start = layer.weight.detach().clone()
        optimizer = build_optimizer(
            layer.parameters(), learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.1, epsilon=1e-8, use_8bit=use_8bit
        )
        for _ in range(5):
            optimizer.zero_grad()
            (layer(torch.randn(16, 128)) - 1).square().mean().backward()
            optimizer.step()
        results.append(layer.weight.detach())
        assert ("bitsandbytes" in type(optimizer).__module__) == use_8bit
    full, eight = results
    assert 0 < (full - eight).norm() < 0.1 * (full - start).norm()


def test_an_overflowed_step_is_known_to_be_left_out(monkeypatch):
    """A fused AdamW leaves an overflowed update out inside its kernel: the step then counted as taken."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(
        [parameter], learning_rate=1.0, betas=(0.9, 0.99), weight_decay=0, epsilon=1e-8, fused=False
    )
    wrapped = AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu"))
    for gradient, skipped in ((float("inf"), True), (1.0, False)):
        wrapped.scaler.scale(torch.ones(1))
        parameter.grad = torch.full_like(parameter, gradient)
        wrapped.step()
        assert wrapped.step_was_skipped == skipped and torch.equal(parameter.detach(), torch.ones(4)) == skipped


def test_settings_of_the_flags_outlive_a_checkpoint_s():
    """A learning rate changed for a resume was announced, then overwritten by the checkpoint's."""

    def make(rate, decay):
        optimizer = build_optimizer(
            [torch.nn.Parameter(torch.ones(1))], learning_rate=rate, betas=(0.9, 0.99), weight_decay=decay, epsilon=1e-8
        )
        return optimizer, build_lr_scheduler("linear", optimizer, warmup=3, steps=10)

    optimizer, scheduler = make(0.3, 0.1)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    state = optimizer.state_dict(), scheduler.state_dict()
    for rate, decay in ((0.3, 0.1), (0.7, 0.0)):
        again, course = make(rate, decay)
        with keeping_hyperparameters(again, course):
            again.load_state_dict(state[0])
            course.load_state_dict(state[1])
        group = again.param_groups[0]
        assert group["weight_decay"] == decay and course.last_epoch == 5
        assert group["lr"] == course.get_last_lr()[0] == pytest.approx(rate * 5 / 7)
        course.step()
        assert group["lr"] == pytest.approx(rate * 4 / 7)
    optimizer, scheduler = make(0.3, 0.1)
    with pytest.raises(UsageError, match="--lr_scheduler polynomial"):
        build_lr_scheduler("polynomial", make(1e-8, 0)[0], warmup=0, steps=5)


@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_a_resumed_optimizer_is_as_fused_as_the_precision_wants_it(before, after):
    """After fp16 a run in bf16 stayed with the slow optimizer, which the checkpoint had brought along."""

    def make(fused):
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        options = {"learning_rate": 0.1, "betas": (0.9, 0.99), "weight_decay": 0, "epsilon": 1e-8}
        optimizer = build_optimizer([parameter], **options, fused=fused)
        return optimizer, build_lr_scheduler("constant", optimizer, warmup=0, steps=10)

    optimizer, scheduler = make(before)
    optimizer.step()
    again, course = make(after)
    with keeping_hyperparameters(again, course):
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        course.load_state_dict(scheduler.state_dict())
    assert again.param_groups[0]["fused"] is (True if after else None)  # False is one tensor at a time on a GPU
    again.step()
    optimizer.step()
    (mine,), (other,) = again.param_groups[0]["params"], optimizer.param_groups[0]["params"]
    assert again.state[mine]["step"] == 2
    assert torch.allclose(again.state[mine]["exp_avg"], optimizer.state[other]["exp_avg"])


def test_learning_rate_warms_up_by_optimizer_steps():
    optimizer = build_optimizer(
        [torch.nn.Parameter(torch.ones(1))], learning_rate=1.0, betas=(0.9, 0.99), weight_decay=0, epsilon=1e-8
    )
    scheduler = build_lr_scheduler("cosine", optimizer, warmup=4, steps=8)
    rates = []
    for _ in range(8):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0, abs=1e-9)


# --- trackers and the accelerator


def test_trackers_are_parsed_and_checked():
    assert parse_trackers("none") == [] == parse_trackers(None)
    assert parse_trackers("tensorboard,wandb") == ["tensorboard", "wandb"] == parse_trackers("wandb tensorboard")[::-1]
    assert {"tensorboard", "wandb"} <= set(parse_trackers("all"))
    with pytest.raises(UsageError, match="--report_to tensorbord.*tensorboard"):
        parse_trackers("tensorbord")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("from_config", [False, True])
def test_fp16_without_a_gpu_is_refused(from_config, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if from_config:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match="--mixed_precision fp16 needs a GPU"):
        start_accelerator(
            output_dir="x", logging_dir="logs", trackers=[], gradient_accumulation_steps=1, allow_tf32=False,
            mixed_precision=None if from_config else "fp16",
        )  # fmt: skip


def test_local_rank_reaches_the_launcher_s_variable(monkeypatch):
    monkeypatch.setattr(
        "lcm_distill.run.accelerator.Accelerator",
        lambda **_: SimpleNamespace(is_main_process=False, mixed_precision="no", distributed_type="NO"),
    )
    options = {"output_dir": "x", "logging_dir": "logs", "trackers": [], "mixed_precision": "no"}
    for before, expected in ((None, "3"), ("1", "1")):
        monkeypatch.setattr("os.environ", {"LOCAL_RANK": before} if before else {})
        start_accelerator(**options, gradient_accumulation_steps=1, allow_tf32=False, local_rank=3)
        assert os.environ["LOCAL_RANK"] == expected


def test_ranks_wait_while_the_main_process_draws_and_writes(monkeypatch):
    """NCCL gave a run up after ten minutes: fifty steps of an SDXL teacher for some dozens of prompts take longer."""
    given = []
    monkeypatch.setattr(
        "lcm_distill.run.accelerator.Accelerator",
        lambda *, kwargs_handlers, **_: (
            given.extend(kwargs_handlers)
            or SimpleNamespace(is_main_process=False, mixed_precision="no", distributed_type="NO")
        ),
    )
    start_accelerator(
        output_dir="x", logging_dir="logs", trackers=[], mixed_precision="no", gradient_accumulation_steps=1,
        allow_tf32=False,
    )  # fmt: skip
    (handler,) = given
    assert handler.to_kwargs() == {"timeout": timedelta(hours=1)}


def test_errors_for_users_are_messages_with_exit_codes(capsys):
    for error, code in ((UsageError("--flag: mend it"), 2), (DivergenceError("loss is nan at step 3"), 1)):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            run_program(main)
        assert stopped.value.code == code
        assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == 130 and "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--output_dir .*file"):
        check_writable(str(tmp_path / "file"))
    check_writable(str(tmp_path / "new" / "folder"))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_gradients_that_never_become_finite_end_the_run(tmp_path):
    accelerator = SimpleNamespace(device="cpu", is_main_process=False, num_processes=1)
    journal = Journal(tmp_path, {}, enabled=False)
    progress = Progress(accelerator, journal, total=5, initial=0, output_dir=str(tmp_path))
    progress.add(torch.tensor(1.0), 2)
    for _ in range(49):
        progress.skip(3)
    with pytest.raises(DivergenceError, match="after step 3, 50 times"):
        progress.skip(3)
    progress.add(torch.tensor(float("nan")), 2)
    with pytest.raises(DivergenceError, match="loss is nan"):
        progress.skip(3)


def test_gradients_that_are_not_finite_are_not_checkpointed(tmp_path):
    """With a finite loss a gradient can still be NaN, and then the weights are."""
    accelerator = SimpleNamespace(
        device="cpu", is_main_process=False, num_processes=1, reduce=lambda value, reduction: value
    )
    journal = Journal(tmp_path, {}, enabled=False)
    progress = Progress(accelerator, journal, total=5, initial=0, output_dir=str(tmp_path))
    progress.add(torch.tensor(1.0), 2)
    for norm in (1.0, float("nan"), 2.0):
        progress.step(torch.tensor(norm))
    with pytest.raises(DivergenceError, match="grad_norm is nan at step 3"):
        progress.log(3, SimpleNamespace(get_last_lr=lambda: [1.0]))


def test_speed_counts_the_steps_that_the_device_has_yet_to_do(tmp_path):
    """On a GPU the clock was read when they were queued: with --logging_steps 1 it told how fast Python is."""

    class Queued:
        def __float__(self):  # waits for the device
            time.sleep(0.3)
            return 1.0

    accelerator = SimpleNamespace(
        device="cpu", is_main_process=False, num_processes=1, reduce=lambda value, reduction: Queued(),
        log=lambda *given, **more: None, trackers=[],
    )  # fmt: skip
    progress = Progress(accelerator, Journal(tmp_path, {}, enabled=False), total=5, initial=0, output_dir="")
    progress.add(torch.tensor(1.0), 3)
    progress.step(torch.tensor(1.0))
    values = progress.log(1, SimpleNamespace(get_last_lr=lambda: [1.0]))
    assert values["samples_per_second"] <= 3 / 0.3
    progress.add(torch.tensor(1.0), 3)
    progress._loss = Queued()
    start = time.perf_counter()
    with progress.paused():
        assert time.perf_counter() - start >= 0.3  # what was queued is no pause
    progress._loss = torch.tensor(1.0)
    assert progress.log(2, SimpleNamespace(get_last_lr=lambda: [1.0]))["samples_per_second"] <= 3 / 0.6


# --- pictures


def test_grid_holds_every_picture_where_it_belongs():
    colours = [["red", "green"], ["blue", "black"]]
    rows = [(f"row {i}", [Image.new("RGB", (32, 32), c) for c in line]) for i, line in enumerate(colours)]
    grid = labelled_grid(rows, columns=["one", "a long heading of two lines"], size=48)
    found = {grid.getpixel((x, y)) for x in range(grid.width) for y in range(grid.height)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= found
    x, y = next((x, y) for y in range(grid.height) for x in range(grid.width) if grid.getpixel((x, y)) == (255, 0, 0))
    assert grid.getpixel((x + 60, y)) == (0, 128, 0) and grid.getpixel((x, y + 60)) == (0, 0, 255)


def test_a_smaller_picture_is_smoothed_and_a_larger_one_keeps_its_pixels():
    """Grids of large pictures left pixels out: a fine pattern came out black or white instead of grey."""
    stripes = Image.new("L", (64, 64))
    stripes.putdata([255 * (x % 2) for _ in range(64) for x in range(64)])
    assert {value // 16 for _, value in shown(stripes, 16).crop((2, 2, 14, 14)).getcolors()} <= {7, 8}
    large = shown(stripes, 256)
    assert {value for _, value in large.getcolors()} == {0, 255} and large.size == (256, 256)
    assert shown(stripes, 64) is stripes


# --- commands that draw


@pytest.mark.parametrize(
    "there, device, dtype, expected",
    [((), None, None, ("cpu", torch.float32)), ((), "cpu", "bf16", ("cpu", torch.bfloat16)),
     (("cuda", "mps"), None, None, ("cuda", torch.float16)), (("mps",), None, None, ("mps", torch.float16)),
     (("cuda",), "cuda:1", "bf16", ("cuda:1", torch.bfloat16)), (("cuda",), "cpu", None, ("cpu", torch.float32)),
     (("mps",), None, "fp32", ("mps", torch.float32))],
)  # fmt: skip
def test_commands_draw_on_the_best_device_there_is(there, device, dtype, expected, monkeypatch):
    for name in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda name=name: name in there)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device(device, dtype) == (torch.device(expected[0]), expected[1])


@pytest.mark.parametrize(
    "there, device, dtype, words",
    [((), "cuda", None, "--device cuda: .* there is cpu"), ((), "gpu", None, "--device gpu is no device"),
     (("cuda",), "mps", None, "there is cuda, cpu"), (("cuda",), "cuda:2", None, "the last GPU here is cuda:1"),
     (("cuda",), "meta", None, "--device meta"), (("cuda",), "cpu", "fp16", "--dtype fp16 needs a GPU")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused(there, device, dtype, words, monkeypatch):
    for name in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda name=name: name in there)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UsageError, match=words):
        choose_device(device, dtype)


def test_a_full_memory_is_told_with_its_remedy():
    with pytest.raises(UsageError, match="Tried 2 GiB.*: take less"), memory_errors("take less"):
        raise torch.OutOfMemoryError("Tried 2 GiB\nand more")
    with pytest.raises(KeyError), memory_errors("take less"):
        raise KeyError


def test_an_interrupted_command_speaks_of_no_checkpoint(capsys):
    def interrupt():
        raise KeyboardInterrupt

    for go_on, said in (([""], "interrupted\n"), ([], "interrupted; go on from the last checkpoint")):
        with pytest.raises(SystemExit) as stopped:
            run_program(interrupt, *go_on)
        assert stopped.value.code == 130 and capsys.readouterr().err.startswith(said)


# --- what is shared


def test_announcement_says_when_a_run_is_finished(caplog):
    accelerator = SimpleNamespace(mixed_precision="no", device="cpu")
    run = {"seed": 1, "flags": {"lr": 2, "output_dir": "o"}}
    with caplog.at_level(logging.INFO):
        plan_module.announce(
            plan(max_steps=5), accelerator, torch.nn.Linear(2, 2), run,
            checkpoint="c", resumed={"global_step": 5, "flags": {"lr": 1}},
        )  # fmt: skip
    assert "finished" in caplog.text and "--lr: 1 → 2" in caplog.text
