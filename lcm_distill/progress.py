"""What a run says while it trains: the mean loss, pictures per second, the share of time spent on data."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from lcm_distill.errors import DivergenceError


class Meter:
    """Averages over the batches since the last `read`; only `read` waits for the device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._loss = torch.zeros((), device=accelerator.device)
        self._reset()

    def _reset(self) -> None:
        self._loss.zero_()
        self._batches, self._pictures, self._waited = 0, 0, 0.0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside this context is time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, loss: torch.Tensor, pictures: int) -> None:
        """Counts one batch: its loss (a scalar on the device) and its number of pictures."""
        self._loss += loss.detach()
        self._batches += 1
        self._pictures += pictures

    def read(self, global_step: int) -> dict[str, float]:
        """`loss` (mean over batches and ranks), `samples_per_second` (all ranks), `data_wait` (share, 0 to 1).

        All ranks must call it. `DivergenceError` if the loss is not finite.
        """
        mean = self._accelerator.reduce(self._loss / max(1, self._batches), reduction="mean")
        elapsed = time.perf_counter() - self._start
        values = {
            "loss": float(mean),
            "samples_per_second": self._pictures * self._accelerator.num_processes / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self._reset()
        if not math.isfinite(values["loss"]):
            raise DivergenceError(
                f"the loss is {values['loss']} at step {global_step}. Resume from the last checkpoint with a lower "
                "--learning_rate, a lower --max_grad_norm or --mixed_precision bf16 in place of fp16."
            )
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this context (a checkpoint, validation) does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
