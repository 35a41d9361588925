"""Stopping before the last step: on a signal, when the time is over, or when a rank asks for it.

Every rank stops after the same step.

After SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, which clusters send before they end a job, the step is finished, then the
program saves a checkpoint and exits. A second signal ends it at once.
"""

import logging
import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO = 2.0  # seconds: one Ctrl-C arrives twice, from the terminal and from the launcher


class Stopping:
    """Listens for signals until `close`; every rank creates one before its first step.

    The run also stops `max_seconds` after that (None: no limit), and when its launcher has died.
    """

    def __init__(self, accelerator: Accelerator, max_seconds: float | None):
        self.reason: str | None = None
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._limit = max_seconds
        self._signalled = 0.0
        # When a launcher dies, its orphans would keep the GPU; without a launcher, the parent, a shell, may well end.
        launched = any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ)
        self._parent = os.getppid() if launched else None
        self._previous_handlers: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        # Ranks receive a signal at different steps. They agree over gloo, without waiting for the devices: what one of
        # them knows at a step, all of them act on at the next.
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def stop(self, reason: str) -> None:
        """Asks for a stop, as a signal to this process does."""
        self.reason = self.reason or reason

    def requested(self) -> bool:
        """Whether to stop after this step. Every rank calls it once after each step; all get the same answer."""
        if self._deadline is not None and time.monotonic() >= self._deadline and self.reason is None:
            self.reason = f"--max_train_time {timedelta(seconds=round(self._limit or 0))} is over"
        if self._parent is not None and os.getppid() != self._parent and self.reason is None:
            self.reason = "the launcher has died"
        if self._group is None:
            return self.reason is not None
        answer = self._settle()
        votes = torch.tensor([float(self.reason is not None)])
        self._pending = (torch.distributed.all_reduce(votes, group=self._group, async_op=True), votes)
        if answer and self.reason is None:
            self.reason = "another process was asked to stop"
        return answer

    def _settle(self) -> bool:
        if self._pending is None:
            return False
        work, votes = self._pending
        work.wait()
        self._pending = None
        return bool(votes > 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._signalled and now - self._signalled < _ECHO:
            return
        if self._signalled:
            self._restore()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
            return
        self._signalled, self.reason = now, name
        logger.warning("%s: finishing the step, then saving a checkpoint; a second signal ends the run at once", name)

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def close(self) -> None:
        """Stops listening; every rank calls it after its last step."""
        self._settle()
        self._restore()
