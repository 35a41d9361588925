"""The plan of a run: its number of steps and its learning rate, computed from the flags and logged."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lcm_distill.errors import UsageError
from lcm_distill.export.usage import unlike_other_programs
from lcm_distill.flags import DistillationFlags, LengthFlags, OptimizationFlags
from lcm_distill.run.checkpoint import changed_flags

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """`steps` optimizer steps of `pictures` each: batch_size × accumulation × processes."""

    steps: int
    learning_rate: float
    batch_size: int
    accumulation: int
    processes: int

    @property
    def pictures(self) -> int:
        return self.batch_size * self.accumulation * self.processes


def plan_training(
    accelerator: Accelerator,
    length: LengthFlags,
    optimization: OptimizationFlags,
    *,
    batch_size: int,
    count_samples: Callable[[], int | None],
    last_step: int | None = None,
) -> TrainingPlan:
    """Computes the plan; its length is `last_step`, else --max_train_steps, else --num_train_epochs.

    An epoch is --max_train_samples, or the number that `count_samples` returns. The batches of an optimizer step are
    the accelerator's: ACCELERATE_GRADIENT_ACCUMULATION_STEPS, where it is set, overrides the flag. --scale_lr
    multiplies the learning rate by the pictures of a step. `UsageError` if the length is unknown (`count_samples`
    returns None).
    """
    accumulation, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    pictures = batch_size * accumulation * processes
    steps = last_step or length.max_train_steps
    if steps is None:
        counted = length.max_train_samples or count_samples()
        if counted is None:
            raise UsageError(
                "--max_train_steps: the length of the run is unknown, since only local shards can be counted; "
                "give --max_train_steps, or --max_train_samples with --num_train_epochs."
            )
        steps = length.num_train_epochs * -(-counted // pictures)
    return TrainingPlan(
        steps=steps,
        learning_rate=optimization.learning_rate * (pictures if optimization.scale_lr else 1),
        batch_size=batch_size,
        accumulation=accumulation,
        processes=processes,
    )


def warn_of_public_defaults(flags: Mapping[str, Any]) -> None:
    """Logs a warning if a full student is to be trained at the default learning rate; `flags` are all, by name.

    The defaults are those of the public programs, whose own example commands give a full U-Net others.
    """
    if "lora_rank" in flags or flags.get("learning_rate") != OptimizationFlags.learning_rate:
        return
    left, better = f"--learning_rate {flags['learning_rate']:g}", "--learning_rate 1e-6"
    if flags.get("loss_type") == DistillationFlags.loss_type:
        left, better = f"{left} and --loss_type {flags['loss_type']}", f"{better} --loss_type huber"
    logger.warning(
        "%s: the default, as in the public programs, where it suits a LoRA; recommended for a full U-Net: %s",
        left,
        better,
    )


def log_plan(
    plan: TrainingPlan,
    accelerator: Accelerator,
    trained: torch.nn.Module,
    run: Mapping[str, Any],
    *,
    checkpoint: Path | None,
    resumed: Mapping[str, Any],
) -> None:
    """Logs the plan, and which flags have changed since the checkpoint that is resumed."""
    first = resumed.get("global_step", 0)
    if not checkpoint:
        warn_of_public_defaults(run["flags"])
    if checkpoint:
        logger.info("resumed from %s at step %d", checkpoint, first)
        for change in changed_flags(resumed, run["flags"]):
            logger.info("changed since the checkpoint: %s", change)
    elif run["flags"].get("resume_from_checkpoint"):
        logger.info("no checkpoint in %s yet: starting a new run", run["flags"]["output_dir"])
    logger.info(
        "steps %d to %d, each of %d pictures (%d per device × %d accumulated × %d devices), learning rate %.3g",
        first,
        plan.steps,
        plan.pictures,
        plan.batch_size,
        plan.accumulation,
        plan.processes,
        plan.learning_rate,
    )
    logger.info(
        "training %.1f M parameters; seed %d; precision %s; device %s; data workers %d",
        sum(p.numel() for p in trained.parameters() if p.requires_grad) / 1e6,
        run["seed"],
        accelerator.mixed_precision,
        accelerator.device,
        run["flags"]["dataloader_num_workers"],
    )
    flags = run["flags"]
    sampler = {
        "original_inference_steps": flags.get("num_ddim_timesteps", 50),
        "timestep_scaling": flags.get("timestep_scaling_factor", 10.0),
    }
    if warning := unlike_other_programs(sampler):
        logger.warning("--num_ddim_timesteps, --timestep_scaling_factor: %s.", warning)
    if first >= plan.steps:
        logger.info(
            "this run is finished: it is at step %d, its length is %d; raise --max_train_steps (or --num_train_epochs)",
            first,
            plan.steps,
        )
