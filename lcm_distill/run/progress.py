"""The values of a run while it trains: on the progress bar, in the trackers and in the journal."""

import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lcm_distill.bars import progress_bar
from lcm_distill.data.loader import ShardLoader
from lcm_distill.data.stream import DropCounter
from lcm_distill.distributed.fsdp import gather
from lcm_distill.errors import DivergenceError, WorkerError
from lcm_distill.run.checkpoint import where_to_resume
from lcm_distill.run.journal import Journal
from lcm_distill.run.launch import describe_launch
from lcm_distill.run.report import write_report
from lcm_distill.run.trackers import log_values

logger = logging.getLogger(__name__)


_MOST_SKIPPED = 50  # each skipped step halves the loss scale, which reaches zero long before


class Progress:
    """The progress bar, and averages over the batches since the last `log`; only `log` waits for the device.

    Every rank has one and calls every method. `total` and `initial` are optimizer steps; `output_dir` is the folder of
    the run's checkpoints. Logged values also go into the `journal`.
    """

    def __init__(self, accelerator: Accelerator, journal: Journal, *, total: int, initial: int, output_dir: str):
        self._accelerator = accelerator
        self._journal = journal
        self._output_dir = output_dir
        self._total, self._initial = total, initial
        self._bar = progress_bar(
            "steps", unit="step", total=total, initial=initial, disable=not accelerator.is_main_process
        )
        self._dropped = DropCounter()
        self._warned_at = 0
        self._intervals = 0
        self._warned_of_waiting = False
        self._loader: ShardLoader | None = None
        self._waiting = _GPUWaiting() if accelerator.device.type == "cuda" else _Waiting()
        self._loss = torch.zeros((), device=accelerator.device)
        self._grad_norm = torch.zeros((), device=accelerator.device)
        self._skipped = 0
        self._reset()

    def _reset(self) -> None:
        self._loss.zero_()
        self._grad_norm.zero_()
        self._values: dict[str, tuple[torch.Tensor, int]] = {}
        self._batches_since_log, self._pictures, self._steps = 0, 0, 0
        self._start = time.perf_counter()

    def batches(
        self, loader: ShardLoader, on_failure: Callable[[WorkerError], None] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """The batches of `loader`, without end; the time that the device waits for each counts as waiting for data.

        When the loader's workers fail, `on_failure` is called, which may raise, and this process reads what follows;
        without it, the `WorkerError` is raised. The workers stop when the iterator ends, or with `close`.
        """
        self._loader = loader
        data = iter(loader)
        try:
            while True:
                with self._waiting:
                    try:
                        batch = next(data)
                    except WorkerError as failure:
                        if on_failure is None:
                            raise
                        on_failure(failure)
                        data = loader.rest()
                        batch = next(data)
                self._dropped.update(batch)
                yield batch
        finally:
            loader.close()

    def add(self, loss: torch.Tensor, pictures: int) -> None:
        """Counts one batch: its loss (a scalar on the device) and its number of pictures."""
        self._loss += loss.detach()
        self._batches_since_log += 1
        self._pictures += pictures

    @property
    def has_steps(self) -> bool:
        """Whether there was an optimizer step since the last `log`."""
        return self._steps > 0

    def add_values(self, values: Mapping[str, torch.Tensor]) -> None:
        """Counts further values of one batch, scalars on the device; of each, `log` logs the mean."""
        for name, value in values.items():
            total, count = self._values.get(name, (torch.zeros_like(self._loss), 0))
            self._values[name] = total + value.detach(), count + 1

    def step(self, grad_norm: torch.Tensor) -> None:
        """Counts an optimizer step; `grad_norm` is the gradients' norm before clipping."""
        self._grad_norm = torch.maximum(self._grad_norm, gather(grad_norm.detach()))  # a NaN stays
        self._skipped = 0
        self._steps += 1
        self._bar.update()

    def skip(self, global_step: int) -> None:
        """Counts a skipped optimizer step (fp16: a gradient overflowed, and the loss scale was lowered)."""
        self._skipped += 1
        if not torch.isfinite(self._loss) or self._skipped >= _MOST_SKIPPED:
            raise DivergenceError(
                f"the gradients are not finite after step {global_step}, {self._skipped} times in a row, "
                f"the loss is {float(self._loss) / max(1, self._batches_since_log)}. {self._remedy()}"
            )

    def log(self, global_step: int, lr_scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
        """Logs the values since the last call to the bar, the trackers and the journal, and returns them.

        They are `loss` and those of `add_values` (means over batches and ranks), `grad_norm` (the largest, before
        clipping), `lr`, `samples_per_second` (all ranks) and `data_wait` (a share, 0 to 1). `DivergenceError` if a loss
        or the gradients are not finite.
        """
        mean = float(self._mean(self._loss, self._batches_since_log))
        others = {name: float(self._mean(total, count)) for name, (total, count) in self._values.items()}
        elapsed = time.perf_counter() - self._start  # only now has the device finished the steps that were queued
        values = {
            "loss": mean,
            **others,
            "grad_norm": float(self._grad_norm),
            "lr": float(lr_scheduler.get_last_lr()[0]),
            "samples_per_second": self._pictures * self._accelerator.num_processes / elapsed,
            "data_wait": self._waiting.take() / elapsed,
        }
        self._reset()
        for name in ("loss", *others, "grad_norm"):
            if not math.isfinite(values[name]):
                raise DivergenceError(f"{name} is {values[name]} at step {global_step}. {self._remedy(*others)}")
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4g}, lr {values['lr']:.2e}, {values['samples_per_second']:.1f} pictures/s, "
            f"{values['data_wait']:.0%} waiting for data"
        )
        log_values(self._accelerator, values, global_step)
        self._journal.log(values, global_step)
        self._warn_of_waiting(values["data_wait"])
        dropped = sum(self._dropped.total().values())
        if dropped and dropped >= 2 * self._warned_at:  # each time twice as many
            self._warned_at = dropped
            logger.warning("samples dropped so far%s: %d (%s)", self._of_ranks(), dropped, self._dropped)
        return values

    def _mean(self, total: torch.Tensor, count: int) -> torch.Tensor:
        """The mean over `count` batches and all ranks."""
        return self._accelerator.reduce(total / max(1, count), reduction="mean")

    def _warn_of_waiting(self, data_wait: float) -> None:
        """Warns once if most of an interval was spent waiting for data, unless it is the first, when workers start."""
        self._intervals += 1
        if data_wait <= 0.5 or self._intervals == 1 or self._warned_of_waiting or self._loader is None:
            return
        self._warned_of_waiting = True
        logger.warning(
            "%.0f%% of the time is spent waiting for data: raise --dataloader_num_workers (now %d) if CPU cores are "
            "idle, or, if the shards hold pictures, encode them once with python -m lcm_distill.encode_shards",
            100 * data_wait,
            self._loader.num_workers,
        )

    def record(self, values: Mapping[str, float], global_step: int) -> None:
        """Logs the `values` that validation measured, and writes the report, which shows its pictures."""
        if values:
            log_values(self._accelerator, values, global_step)
            self._journal.log(values, global_step)
        self._write_report()

    def _write_report(self) -> None:
        if self._journal.enabled:
            write_report(self._output_dir)

    def _remedy(self, *values: str) -> str:
        where = where_to_resume(self._output_dir)
        rates = "--learning_rate" + (", a lower --dm_weight or --dm_learning_rate" if "dm_loss" in values else "")
        return f"{where} with a lower {rates}, a lower --max_grad_norm, or --mixed_precision bf16 instead of fp16."

    def _of_ranks(self) -> str:
        return " on this process" if self._accelerator.num_processes > 1 else ""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this context (a checkpoint, validation) is left out of the speed."""
        float(self._loss)  # waits for the steps that are queued on a GPU, whose time does count
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def close(self, global_step: int, reason: str | None) -> None:
        """Closes the bar, the journal and the data loader, and logs how many samples all ranks dropped, and why.

        If `global_step` is not the run's last, the `reason` is logged, with how to resume.
        """
        self._bar.close()
        self._journal.end(global_step, reason)
        self._write_report()
        if self._loader is not None:
            self._loader.close()
        total = sum((Counter(dropped) for dropped in gather_object([self._dropped.total()])), Counter())
        if total:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in total.most_common())
            logger.warning("samples dropped: %d (%s)", total.total(), reasons)
        if self._initial == global_step < self._total:
            logger.info("%s: stopped before the first step of this launch; launch it again to train", reason)
        elif global_step < self._total:
            logger.info("%s: stopped after step %d; resume with --resume_from_checkpoint latest", reason, global_step)


class _Waiting:
    """Adds up the seconds that are spent in its `with` blocks."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self._seconds += time.perf_counter() - self._start

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _GPUWaiting(_Waiting):
    """Adds up how long the GPU had nothing to do meanwhile: the host, which runs ahead of it, may wait at no cost.

    Nothing is queued between a block's two events, so that the time between them is the GPU's, idle. Reading it waits
    for nothing: only events that have happened are read, in `take`, after `log` has waited for the device, all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        self._begin = self._event()

    def __exit__(self, *error: Any) -> None:
        self._blocks.append((self._begin, self._event()))
        self._read()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        while self._blocks and self._blocks[0][1].query():
            begin, end = self._blocks.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3

    def take(self) -> float:
        self._read()
        return super().take()


def start_progress(
    accelerator: Accelerator,
    output_dir: str,
    run: Mapping[str, Any],
    *,
    steps: int,
    global_step: int,
    argv: Sequence[str] | None,
    dry_run: bool = False,
) -> Progress:
    """The `Progress` of a launch from `global_step` to `steps`, with its journal in `output_dir`.

    `run` and `argv` are those of `describe_launch`. A `dry_run` has no journal.
    """
    journal = Journal(
        output_dir,
        describe_launch(accelerator, run, steps=steps, argv=argv),
        global_step=global_step,
        enabled=accelerator.is_main_process and not dry_run,
    )
    return Progress(accelerator, journal, total=steps, initial=global_step, output_dir=output_dir)
