"""Stopping before the last step: on a signal, when the time is over, or when a rank asks for it.

Every rank stops after the same step.

After SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, which clusters send before they end a job, the step that is under way is
finished, then the program saves a checkpoint and exits. Between two steps, also while the next batch is waited for, it
does so at once. A further signal changes nothing: it never loses what the first one saves.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator

from lcm_distill import launcher
from lcm_distill.data.loader import Interrupted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO = 2.0  # seconds: one Ctrl-C arrives twice, from the terminal and from the launcher
_PATIENCE = timedelta(hours=1)  # how long ranks wait for each other's batches


class Stopping:
    """Listens for signals until `close`; every rank creates one before its first step.

    The run also stops `max_seconds` after that (None: no limit), and when its launcher has died.
    """

    def __init__(self, accelerator: Accelerator, max_seconds: float | None):
        self.reason: str | None = None
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._limit = max_seconds
        self._signalled = 0.0
        self._inside = False  # the main thread waits for a batch
        self._awaited = False  # and no signal has ended that yet
        self._poked = False  # the next signal is from `interrupt`
        self._previous_handlers: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        launcher.on_death(None)  # it is the run that stops; `wanted` looks
        # Ranks receive a signal at different times. They agree before each batch, over gloo, so that devices are not
        # waited for: none begins a step that another does not take part in.
        several = accelerator.num_processes > 1
        self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE) if several else None

    def stop(self, reason: str) -> None:
        """Asks for a stop, as a signal to this process does."""
        self.reason = self.reason or reason

    def wanted(self) -> bool:
        """Whether this rank wants to stop."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.stop(f"--max_train_time {timedelta(seconds=round(self._limit or 0))} is over")
        if launcher.has_died():
            self.stop("the launcher has died")
        return self.reason is not None

    def requested(self) -> bool:
        """Whether to stop after this step. Of several ranks none can know; they `agree` before the next batch."""
        return self._group is None and self.wanted()

    def agree(self, stop: bool) -> bool:
        """Whether any rank wants to `stop`: every rank calls it before each batch, and all get the same answer."""
        if self._group is None:
            return stop
        votes = torch.tensor([float(stop)])
        torch.distributed.all_reduce(votes, group=self._group)
        if votes > 0:
            self.stop("another process was asked to stop")
        return bool(votes > 0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a batch is awaited: a signal raises `Interrupted` out of it, wherever it hangs."""
        try:
            self._inside = self._awaited = True
            if self.wanted():
                raise Interrupted
            yield
        finally:
            self._inside = self._awaited = False

    def interrupt(self) -> None:
        """From another thread: ends the main thread's wait for a batch if this rank wants to stop.

        Again, too: what is raised while an object is freed gets lost. Not while the wait is already being ended.
        """
        if self._previous_handlers and self._inside and self.wanted():
            self._awaited = self._poked = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        poked, self._poked = self._poked and number == signal.SIGUSR1, False
        if not poked:
            self._note(number)
        if self._inside and self._awaited:
            self._awaited = False  # not in the middle of what this ends
            raise Interrupted

    def _note(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        first = self.reason is None
        if first:
            self.reason = name
        # Raised inside a write to the same stream, an error here would end the step.
        with contextlib.suppress(RuntimeError):
            if first and not self._awaited:
                logger.warning("%s: finishing the step, then saving a checkpoint", name)
            elif first:
                logger.warning("%s: no longer waiting for data, saving a checkpoint", name)
            elif self._signalled and now - self._signalled > _ECHO:
                logger.warning(
                    "%s: the step is still being finished, or saved; another signal does not make that faster. "
                    "SIGKILL (kill -9 %d) ends the run at once, and loses the steps since its last checkpoint",
                    name,
                    os.getpid(),
                )
        if first or now - self._signalled > _ECHO:
            self._signalled = now

    def close(self) -> None:
        """Stops listening; every rank calls it after its last step."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
