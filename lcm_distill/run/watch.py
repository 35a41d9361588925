"""Looks after a run from a thread of its own, since the main thread may hang: in a read, or for another rank.

It says for what a run waits, after a minute and then at ever longer intervals: a data worker by its number and shard,
a rank that does not answer (stopped, or on a machine that cannot be reached). A signal that comes while a rank does not
answer can not be seen by the main thread, which waits for that rank inside compiled code: then what can be saved is
saved from here, without the others' help, and the process ends.
"""

import contextlib
import io
import json
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from accelerate import Accelerator

from lcm_distill import launcher
from lcm_distill.data.loader import ShardLoader
from lcm_distill.run.stopping import SIGNALS, Stopping

logger = logging.getLogger(__name__)

EVERY = 1.0  # seconds between two looks
NAMED_AFTER = 60.0  # seconds after which a run says what it waits for; then after twice as many, and so on
_SILENT = 8.0  # seconds without a sign of life after which a rank does not answer
_GRACE = 5.0  # seconds that the main thread has to react to a signal
_ANSWERS = 3.0  # seconds in which the other ranks hand in their streams' states
_SAVING = 240.0  # seconds for which the other ranks wait for the checkpoint


class Rescue(Protocol):
    """What a run can save while its main thread hangs."""

    def position(self) -> tuple[int, Mapping[str, Any]] | str:
        """The step and this rank's stream state that belong to the weights, or why these cannot be saved."""

    def save_alone(self, streams: Mapping[int, Mapping[str, Any]]) -> Path | None:
        """Saves them without the other ranks, on the main process, with the states of those that handed one in."""


class Watch:
    """A context manager around the training; `during` says what the main thread does."""

    def __init__(self, accelerator: Accelerator, stopping: Stopping, loader: ShardLoader, rescue: Rescue):
        self._rank, self._ranks = accelerator.process_index, accelerator.num_processes
        self._stopping, self._loader, self._rescue = stopping, loader, rescue
        self.doing: tuple[str, int, float] = ("start", 0, time.monotonic())  # what, at which step, since when
        self._named: dict[str, float] = {}  # when something is said next, in seconds of waiting
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._signalled: float | None = None  # when a signal came
        self._store: Any = None
        self._beats = 0
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # each rank's last sign of life, and when it changed
        self._signals: tuple[socket.socket, socket.socket] | None = None
        self._previous_signals = -1

    @contextlib.contextmanager
    def during(self, what: str, step: int) -> Iterator[None]:
        """Inside, the main thread does this: "data", "agree", "step", "saving" or "validating"."""
        before = self.doing[:2]
        self.doing = (what, step, time.monotonic())
        try:
            yield
        finally:
            self.doing = (*before, time.monotonic())

    def __enter__(self) -> "Watch":
        if self._ranks > 1:
            with contextlib.suppress(Exception):  # of PyTorch's own, without a name for others
                store: Any = torch.distributed.distributed_c10d._get_default_store()
                store = store.clone()  # a connection that is not in use
                self._store = torch.distributed.PrefixStore("lcm_distill/watch", store)
            if threading.current_thread() is threading.main_thread():
                self._signals = socket.socketpair()
                for end in self._signals:
                    end.setblocking(False)
                # Python's handlers run in the main thread alone, and there between two lines of Python.
                self._previous_signals = signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        if self._signals is not None:
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(self._previous_signals)
            for end in self._signals:
                end.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _look(self) -> None:
        failures = 0
        while not self._ended.is_set():  # the first time at once: a rank that is stopped soon has said who it is
            try:
                self._look_once(time.monotonic())
                failures = 0
            except Exception as error:  # noqa: BLE001 - the store of a process that has ended, for one
                failures += 1
                logger.debug("watch: %s", error)
                if failures >= 3:
                    self._store = None
            self._ended.wait(EVERY)

    def _look_once(self, now: float) -> None:
        what, step, since = self.doing
        waited = now - since
        if what == "data":
            if not self._loader.given_up:
                self._stopping.interrupt()
            if self._is_time("data", waited):
                self._say(
                    "waiting for data for %.0f s, by now: %s. A signal (Ctrl-C, SIGTERM) saves a checkpoint and stops",
                    waited,
                    self._loader.describe_wait(),
                )
        else:
            self._named.pop("data", None)
        if self._store is None:
            return
        self._read_signals(now)
        self._beats += 1
        beat = {"beat": self._beats, "what": what, "step": step, "waited": round(waited), "pid": os.getpid()}
        self._store.set(f"beat/{self._rank}", json.dumps(beat | {"host": platform.node()}))
        if self._signalled is None and waited < NAMED_AFTER / 2:
            self._heard.clear()
            self._named.pop("ranks", None)
            return
        silent = self._find_silent(now)
        answering = [rank for rank in range(self._ranks) if rank not in silent]
        if not silent or what == "data":
            return
        if self._rank == answering[0] and self._is_time("ranks", waited):
            logger.error(
                "step %d is not done after %.0f s, since %s: stopped (SIGSTOP, a debugger), or its machine cannot be "
                "reached. This run waits for it. A signal (SIGTERM, Ctrl-C) saves what can be saved and ends the run",
                step,
                waited,
                self._name(silent),
            )
        if self._signalled is not None and now - self._signalled >= _GRACE and waited >= _GRACE:
            self._save_alone(silent, answering)

    def _is_time(self, about: str, waited: float) -> bool:
        """Whether it is time to say what is waited for, again."""
        due = self._named.get(about, NAMED_AFTER)
        if waited < due:
            return False
        while due <= waited:
            due *= 2
        self._named[about] = due
        return True

    def _say(self, message: str, *values: Any) -> None:
        if self._ranks > 1:
            message, values = f"rank %d: {message}", (self._rank, *values)
        logger.log(logging.WARNING if self._rank == 0 else logging.ERROR, message, *values)

    def _read_signals(self, now: float) -> None:
        if self._signals is not None:
            with contextlib.suppress(BlockingIOError, OSError):
                if set(self._signals[0].recv(1000)) & set(SIGNALS) and self._signalled is None:
                    self._signalled = now
        if self._signalled is None and launcher.has_died():
            self._signalled = now

    def _find_silent(self, now: float) -> list[int]:
        """The ranks that have given no sign of life for a while, of which this one has looked for them."""
        for rank in range(self._ranks):
            key = f"beat/{rank}"
            beat = json.loads(self._store.get(key)) if self._store.check([key]) else {}
            if rank not in self._heard or beat != self._heard[rank][0]:
                self._heard[rank] = beat, now
        return [rank for rank, (_, when) in self._heard.items() if rank != self._rank and now - when >= _SILENT]

    def _name(self, ranks: list[int]) -> str:
        beats = {rank: self._heard[rank][0] for rank in ranks}
        names = [f"rank {rank} (process {beats[rank].get('pid')} on {beats[rank].get('host')})" for rank in ranks]
        return f"{', '.join(names)} {'does' if len(ranks) == 1 else 'do'} not answer"

    def _save_alone(self, silent: list[int], answering: list[int]) -> None:
        """Saves what can be saved without the `silent` ranks, and ends this process."""
        problem = None
        try:
            if 0 in silent:
                problem = f"{self._name([0])}, and it is the one that writes checkpoints"
            else:
                problem = self._save_with(answering)
        except Exception as error:  # noqa: BLE001 - a full disk, a store that has ended
            problem = f"{type(error).__name__}: {error}"
        if problem is not None and self._rank == answering[0]:
            logger.error(
                "%s. The steps since the last checkpoint cannot be saved (%s); resume with "
                "--resume_from_checkpoint latest",
                self._name(silent),
                problem,
            )
        os._exit(1)

    def _save_with(self, answering: list[int]) -> str | None:
        position = self._rescue.position()
        if self._rank != 0:
            file = io.BytesIO()
            torch.save([] if isinstance(position, str) else [position[0], dict(position[1])], file)
            self._store.set(f"stream/{self._rank}", file.getvalue())
            until = time.monotonic() + _SAVING
            while time.monotonic() < until and not self._store.check(["saved"]):
                time.sleep(0.2)
            return None
        if isinstance(position, str):
            self._store.set("saved", "no")
            return position
        step, own = position
        streams, until = {0: own}, time.monotonic() + _ANSWERS
        while len(streams) < len(answering) and time.monotonic() < until:
            for rank in set(answering) - streams.keys():
                if self._store.check([f"stream/{rank}"]):
                    found = torch.load(io.BytesIO(self._store.get(f"stream/{rank}")), weights_only=True)
                    streams[rank] = found[1] if found and found[0] == step else {}
            time.sleep(0.1)
        saved = self._rescue.save_alone({rank: state for rank, state in streams.items() if state})
        self._store.set("saved", "yes")
        if saved is None:
            return "see above"
        logger.error(
            "stopped after step %d without the ranks that do not answer; resume with --resume_from_checkpoint latest",
            step,
        )
        return None
