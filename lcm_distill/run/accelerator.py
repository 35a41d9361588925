"""Starts Accelerate: the engine, its precision, the logger and the seed."""

import contextlib
import logging
import os
import random
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    get_int_from_env,
    set_seed,
)
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from lcm_distill.distributed.fsdp import configure_engine
from lcm_distill.distributed.zero import ZeroAccelerator, asks_for_deepspeed
from lcm_distill.environment import check_writable
from lcm_distill.errors import UsageError, shown
from lcm_distill.flags import LaunchFlags
from lcm_distill.machine import usable_cores

# How long ranks wait for each other. The main process generates pictures and writes files alone, which takes longer
# than NCCL's default of ten minutes; when a rank dies, the launcher ends the others at once.
_TIMEOUT = timedelta(hours=1)

_WORKERS = 4
_LOCAL_RANKS = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]


def start_accelerator(launch: LaunchFlags, trackers: list[str], *, can_split: bool = False) -> Accelerator:
    """Accelerate's engine with the settings of the flags; sets up logging, with INFO on the main process only.

    A dry run has no trackers. Nothing is written yet. `can_split`: the program can split what it trains over the ranks
    (FSDP, ZeRO). `UsageError` for a precision that the device does not have, an engine that is not supported, an output
    folder that cannot be written to.
    """
    if launch.local_rank != -1:
        os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))  # some launchers pass it only as a flag
    disable_progress_bar()  # transformers shows one for each network that it loads
    engine = ZeroAccelerator if asks_for_deepspeed() else Accelerator
    accelerator = engine(
        mixed_precision=launch.mixed_precision,
        gradient_accumulation_steps=launch.gradient_accumulation_steps,
        log_with=None if launch.dry_run or not trackers else trackers,
        project_config=ProjectConfiguration(
            project_dir=launch.output_dir, logging_dir=str(Path(launch.output_dir) / launch.logging_dir)
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_TIMEOUT),
            # Otherwise DDP sums copies of the gradients, which are a second set: 10.3 GB for a full SDXL student.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    # From here on the precision may also come from `accelerate config`.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    if accelerator.mixed_precision == "fp8":
        raise UsageError("--mixed_precision: fp8 (from `accelerate config`) is not supported; pass bf16.")
    configure_engine(accelerator, can_split=can_split)
    if torch.cuda.is_available():
        # In mixed precision the only float32 products and convolutions are those of SDXL's own VAE, which is in float32
        # for its range, and TF32 has that too: schedule, solver, loss and optimizer go element by element. PyTorch's
        # default is off for products and on for convolutions, so both are set in any case.
        tf32 = launch.allow_tf32 or accelerator.mixed_precision != "no"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        # cuDNN tries its kernels at the first call with each shape. A run's shapes never change, apart from a last,
        # smaller batch of validation pictures, for which they are tried once more.
        torch.backends.cudnn.benchmark = True
    if accelerator.is_main_process and not launch.dry_run:
        check_writable(launch.output_dir)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[_AroundProgressBar()]
    )
    logging.getLogger("lcm_distill").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


def inference_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen networks: that of the mixed precision, or float32 without mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def autocast_over(accelerator: Accelerator, weights: torch.dtype) -> AbstractContextManager:
    """The run's autocast for a network with float32 `weights`; no autocast for one in half precision.

    A network in half precision computes as it does in the pipelines. Under autocast a GPU would compute its norms in
    float32 and write the result to memory, only to round it before the next matrix product.
    """
    return accelerator.autocast() if weights == torch.float32 else contextlib.nullcontext()


def choose_seed(seed: int | None) -> int:
    """`seed`, or one drawn on the main process, the same on every rank; seeds the libraries' global generators."""
    chosen = broadcast_object_list([random.SystemRandom().randrange(2**31) if seed is None else seed])[0]
    set_seed(chosen)
    return chosen


def choose_workers(workers: int | None, accelerator: Accelerator, resumed: Mapping[str, Any]) -> int:
    """`workers`, or for None as many processes as load data for a GPU: four, if this rank has cores for them.

    On other devices than CUDA that is 0: the main process loads. It is the same on every rank, as the stream needs it.
    The `resumed` checkpoint's number comes first, since the stream can only continue exactly with the same; with
    another number of ranks it cannot in any case.
    """
    if workers is None and resumed.get("processes") == accelerator.num_processes:
        workers = resumed.get("flags", {}).get("dataloader_num_workers")
    if workers is None and accelerator.device.type == "cuda":
        ranks = processes_here()
        workers = min(_WORKERS, usable_cores() // ranks)
    return broadcast_object_list([workers or 0])[0]


def processes_here() -> int:
    """How many of the run's processes are on this machine, as the launcher says; 1 without one."""
    return get_int_from_env(_LOCAL_RANKS, 1)


def end_training(accelerator: Accelerator) -> None:
    """`accelerator.end_training()`: ends the process group; without it exits abort now and then.

    DDP's C++ half holds the group, too. As the last to let go of it, when the program's variables are freed, it would
    wait for the group's threads with Python's lock in hand, while one of them may be waiting for that lock to free a
    tensor: neither would ever end. Python's own reference is freed without the lock, so it has to be the last.
    """
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    accelerator.end_training()
    for model in accelerator._models:
        if isinstance(model, DistributedDataParallel):
            model.reducer = model.logger = None  # type: ignore[assignment]
    del group


class _AroundProgressBar(logging.Handler):
    """Writes log lines above the progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(shown(self.format(record)), file=sys.stderr)
