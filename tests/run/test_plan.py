"""The plan: the number of steps, the learning rate, and what is logged of them."""

import logging
from types import SimpleNamespace

import pytest
import torch

from lcm_distill import flags
from lcm_distill.errors import UsageError
from lcm_distill.flags import LengthFlags, OptimizationFlags
from lcm_distill.run.plan import log_plan, plan_training


def plan(*, samples=lambda: 100, scale_lr=False, last_step=None, **length):
    """The plan of two processes that accumulate two batches of 8: 32 pictures a step."""
    return plan_training(
        SimpleNamespace(gradient_accumulation_steps=2, num_processes=2),
        LengthFlags(**{"num_train_epochs": 3} | length),
        OptimizationFlags(learning_rate=0.5, scale_lr=scale_lr),
        batch_size=8,
        count_samples=samples,
        last_step=last_step,
    )


def test_number_of_steps():
    assert plan().steps == 3 * 4  # 100 pictures, 32 a step: 4 steps an epoch
    assert plan(max_train_steps=7).steps == 7
    assert plan(max_train_steps=7, samples=lambda: 1 / 0).steps == 7  # nothing is counted
    assert plan(max_train_samples=33, samples=lambda: 1 / 0).steps == 3 * 2
    assert plan(max_train_steps=7, last_step=9).steps == 9
    with pytest.raises(UsageError, match="--max_train_steps"):
        plan(samples=lambda: None)


def test_scale_lr_reaches_the_learning_rate():
    """The public programs scale it after the optimizer exists: nothing happens."""
    assert plan(scale_lr=True).learning_rate == 0.5 * 32 and plan().learning_rate == 0.5


def test_a_finished_run_and_changed_flags_are_logged(caplog):
    accelerator = SimpleNamespace(mixed_precision="no", device="cpu")
    run = {"seed": 1, "flags": {"lr": 2, "output_dir": "o", "dataloader_num_workers": 3}}
    with caplog.at_level(logging.INFO):
        log_plan(
            plan(max_train_steps=5), accelerator, torch.nn.Linear(2, 2), run,
            checkpoint="c", resumed={"global_step": 5, "flags": {"lr": 1}},
        )  # fmt: skip
    assert "finished" in caplog.text and "--lr: 1 → 2" in caplog.text
    assert "data workers 3" in caplog.text


NEEDED = ["--pretrained_teacher_model", "x"]


@pytest.mark.parametrize(
    "student, argv, words",
    [(flags.FullStudentFlags, [], ["--learning_rate 0.0001 and --loss_type l2", "1e-6 --loss_type huber"]),
     (flags.FullStudentFlags, ["--loss_type", "huber"], ["--learning_rate 0.0001:", "--learning_rate 1e-6"]),
     (flags.FullStudentFlags, ["--learning_rate", "1e-6"], []),
     (flags.FullStudentFlags, ["--learning_rate", "8e-6", "--loss_type", "huber"], []),
     (flags.LoraFlags, [], [])],
)  # fmt: skip
@pytest.mark.parametrize("family", [flags.SD, flags.SDXL])
def test_a_full_student_at_the_public_defaults_is_warned_of_once(family, student, argv, words, caplog):
    """They are the flags' defaults, since the public command lines run unchanged; a full U-Net wants others."""
    parsed = flags.parse(None, [*NEEDED, *argv], defaults=family, student=student)
    accelerator = SimpleNamespace(mixed_precision="no", device="cpu")
    run = {"seed": 1, "flags": parsed.flat()}
    log_plan(plan(), accelerator, torch.nn.Linear(2, 2), run, checkpoint=None, resumed={})
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == bool(words) and all(word in warnings[0] for word in words)
    caplog.clear()
    log_plan(plan(), accelerator, torch.nn.Linear(2, 2), run, checkpoint="c", resumed={"global_step": 1, "flags": {}})
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
