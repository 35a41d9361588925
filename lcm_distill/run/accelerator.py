"""How a run starts: the accelerator, its precision and seed."""

import contextlib
import logging
import os
import random
import sys
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from lcm_distill.distributed.fsdp import settle_engine
from lcm_distill.distributed.zero import ZeroAccelerator, asks_for_deepspeed
from lcm_distill.environment import check_writable
from lcm_distill.errors import UsageError
from lcm_distill.flags import LaunchFlags

# Ranks wait that long for one another. The main process draws and writes alone, which takes more than the ten minutes
# after which NCCL would give the run up; a rank that has died ends it at once, by the launcher.
_PATIENCE = timedelta(hours=1)


def start_accelerator(launch: LaunchFlags, trackers: list[str], *, can_split: bool = False) -> Accelerator:
    """Accelerate's engine as the flags want it, and a logger that speaks on the main process only.

    A dry run has no trackers and writes nothing; for others the output folder is made. `can_split`: the program can
    split what it trains over the ranks (FSDP, ZeRO). `UsageError` for a precision that the device does not have, an
    engine that is not supported, a folder that cannot be written to.
    """
    if launch.local_rank != -1:
        os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))  # from launchers that pass it as a flag alone
    disable_progress_bar()  # transformers draws one for every network that it loads
    engine = ZeroAccelerator if asks_for_deepspeed() else Accelerator
    accelerator = engine(
        mixed_precision=launch.mixed_precision,
        gradient_accumulation_steps=launch.gradient_accumulation_steps,
        log_with=None if launch.dry_run or not trackers else trackers,
        project_config=ProjectConfiguration(
            project_dir=launch.output_dir, logging_dir=str(Path(launch.output_dir) / launch.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    # From here on the precision may also come from `accelerate config`.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed_precision fp16 needs a GPU; on the CPU take bf16 or no.")
    if accelerator.mixed_precision == "fp8":
        raise UsageError("--mixed_precision: fp8 (from `accelerate config`) is not for this program; pass bf16.")
    settle_engine(accelerator, can_split=can_split)
    if torch.cuda.is_available():  # said either way: PyTorch's own default is off for products, on for convolutions
        torch.backends.cuda.matmul.allow_tf32 = launch.allow_tf32
        # In mixed precision the convolutions left are those of a VAE that is in float32 for its range, which TF32 has.
        torch.backends.cudnn.allow_tf32 = launch.allow_tf32 or accelerator.mixed_precision != "no"
    if accelerator.is_main_process and not launch.dry_run:
        check_writable(launch.output_dir)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[_AroundProgressBar()]
    )
    logging.getLogger("lcm_distill").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


def inference_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen networks: that of the mixed precision, float32 without."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def autocast_over(accelerator: Accelerator, weights: torch.dtype) -> AbstractContextManager:
    """The run's autocast for a network whose weights are float32; nothing for one that is in half precision itself.

    Such a network computes as it does in the pipelines. Under autocast GPUs would do its norms in float32 and write
    that to memory, to be rounded before the next product all the same.
    """
    return accelerator.autocast() if weights == torch.float32 else contextlib.nullcontext()


def settle_seed(seed: int | None) -> int:
    """`seed`, or one drawn on the main process; the same on every rank. Libraries' global generators are seeded."""
    chosen = broadcast_object_list([random.SystemRandom().randrange(2**31) if seed is None else seed])[0]
    set_seed(chosen)
    return chosen


class _AroundProgressBar(logging.Handler):
    """Writes log lines above the progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
