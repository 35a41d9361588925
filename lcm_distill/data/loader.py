"""The loader of a stream's batches: its data workers, its state, and what happens when workers fail.

When a worker is killed, or finds no shared memory for its batch, the loader's iterator raises a `WorkerError`.
`ShardLoader.rest` then reads what follows in the main process, so that a step can be finished and saved.
"""

import atexit
import contextlib
import functools
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torchdata.stateful_dataloader import StatefulDataLoader

from lcm_distill.data.preparation import Preparation
from lcm_distill.data.raw import printable
from lcm_distill.data.stream import MAX_BLOCK_BYTES, ShardStream, SharingError, StreamIterator, new_reading, new_tally
from lcm_distill.errors import UsageError, WorkerError, brief
from lcm_distill.flags import StreamingFlags
from lcm_distill.launcher import end_with
from lcm_distill.redaction import install

logger = logging.getLogger(__name__)

PREFETCHED = 2  # batches that each worker has ready, or is making
SHARED_MEMORY = "/dev/shm"  # where Linux keeps it
_POLL = 0.5  # seconds between two looks at whether to go on waiting for workers
_JOIN = 2.0  # seconds in which workers that may hang have to end


class Interrupted(BaseException):
    """Waiting for a batch was given up. The loader cannot be iterated further; its state before the wait is right.

    No `Exception`, since the stream counts those of a shard as its damage, and reads on.
    """


class ShardLoader(StatefulDataLoader):
    """A `StatefulDataLoader` that can also load the state of a run with other ranks, workers or shards.

    Its iterator ends with a `WorkerError` when its workers fail, and ends them; `rest` is then what would have
    followed. It raises `Interrupted`, and ends them, when `give_up`, which is asked now and then while it waits for its
    workers, returns True. A handler of signals may raise it, too: a worker that is stopped while it hands over a batch
    lets this process hang.
    """

    give_up: Callable[[], bool] | None = None
    given_up = False  # whether it was

    may_exit: torch.Tensor  # bool, shared with the workers: whether they obey SIGTERM
    reports: Connection  # a worker sends why it ends itself
    position: dict | None = None  # the state after the last batch; None before there are workers, unless one was loaded
    _rest: int | None = None  # batches that `rest` has yielded; None: it is not used

    def __iter__(self) -> Iterator[dict]:
        """Yields the batches. `StreamError` if the shards give none, `WorkerError` if the workers fail."""
        if not self.num_workers:
            try:
                yield from super().__iter__()
            except Interrupted:
                self.given_up = True
                raise
            return
        try:
            # As many as torchdata's iterator makes: if one of its own fails, it prints a traceback when it is freed.
            del [multiprocessing.Queue() for _ in range(self.num_workers + 2)][:]
            batches = super().__iter__()
            self.position = super().state_dict()
            batches._timeout = _POLL  # not earlier: it would be one for the workers' start, too
        except Exception as error:  # noqa: BLE001 - semaphores, processes and their memory raise nearly anything
            self._fail(error)
        with _WorkerDeaths() as deaths:
            while True:
                try:
                    with deaths.awaited():
                        batch = self._await(batches)
                    self.position = super().state_dict()
                except Interrupted:
                    self.given_up = True
                    self.close()
                    raise
                except Exception as error:  # noqa: BLE001 - so do workers, their queue and its memory
                    self._fail(error)
                yield batch

    def _await(self, batches: Iterator[dict]) -> dict:
        """The workers' next batch, however long it takes, unless the wait is given up."""
        while True:
            if self.give_up is not None and self.give_up():
                raise Interrupted
            try:
                return next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                pinning = getattr(batches, "_pin_memory_thread", None)
                if pinning is not None and not pinning.is_alive():
                    raise RuntimeError("Pin memory thread exited unexpectedly") from None

    @property
    def reads_here(self) -> bool:
        """Whether this process reads, not workers."""
        return not self.num_workers or self._rest is not None

    def describe_wait(self) -> str:
        """Whom the next batch is waited for, and which shard that is reading."""
        worker, who = 0, "the main process"
        if not self.reads_here:
            who = ""
            with contextlib.suppress(AttributeError, KeyError, IndexError, TypeError):  # names of torchdata's
                iterator = self._iterator
                worker = iterator._task_info[iterator._rcvd_idx][0]
                process = iterator._workers[worker]
                who = f"data worker {worker} of {self.num_workers} (process {process.pid})"
        if not who:
            return "the data workers, which are starting"
        shard = -1 if self.dataset.reading is None else int(self.dataset.reading[worker])
        return f"{who}, which reads {printable(self.dataset.shards[shard]) if shard >= 0 else 'no shard yet'}"

    def _fail(self, error: Exception) -> NoReturn:
        """Raises a `WorkerError` for `error`, or `error` itself if it is not about processes and memory."""
        of_code = str(error).startswith("Caught ") and not isinstance(error, (SharingError, MemoryError))
        if of_code or isinstance(error, (UsageError, AssertionError)):
            raise error
        with _WorkerDeaths():  # others may die meanwhile, and no later: whoever handles the error is not to hear of it
            message = self._describe(error)
            self.close()
            raise WorkerError(message) from None

    def rest(self) -> Iterator[dict]:
        """Yields the batches after the last one, read by this process, bit for bit those of the workers, which it ends.

        For a run whose workers have failed: it is slow, but needs no shared memory. `state_dict` follows it.
        """
        self.close()
        count, first, skipped = self.num_workers, 0, 0
        streams = [StreamIterator(self.dataset, worker=worker, workers=count) for worker in range(count)]
        if self.position is not None:
            snapshot, skipped = self.position[_SNAPSHOT], self.position[_AFTER_SNAPSHOT]
            for stream, state in zip(streams, _find_states(snapshot), strict=True):
                stream.load_state_dict(state)
            first = snapshot[_LAST_WORKER] + 1
        self._rest = 0
        in_turn = (next(streams[turn % count]) for turn in itertools.count(first))
        for batch in islice(in_turn, skipped, None):
            self._rest += 1
            yield batch

    def state_dict(self) -> dict:
        """The state after the last batch."""
        if self._rest is None:
            return super().state_dict()
        # A loader that is given this state leaves out so many batches after the snapshot.
        position = self.position
        return {} if position is None else position | {_AFTER_SNAPSHOT: position[_AFTER_SNAPSHOT] + self._rest}

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly after the batch at which `state_dict` was called.

        If ranks, workers, shards, seed or shuffle window are not those of the saved run, that position does not
        exist: then it continues at the start of the saved epoch, and logs a warning.
        """
        saved = list(_find_states(state))
        layout = self.dataset.layout(self.num_workers)
        changed = {
            f"{name} {of_worker['layout'].get(name)} -> {value}"
            for of_worker in saved
            for name, value in layout.items()
            if of_worker["layout"].get(name) != value
        }
        if saved and not changed:
            self.position = state if self.num_workers else None
            return super().load_state_dict(state)
        super().load_state_dict({})
        self.dataset.start_epoch = min((of_worker["epoch"] for of_worker in saved), default=0)
        logger.warning(
            "The shard stream cannot continue exactly where it was saved (%s); it continues at the start of epoch %d, "
            "so some samples come a second time.",
            ", ".join(sorted(changed)) or "the saved state has no position",
            self.dataset.start_epoch,
        )

    def close(self) -> None:
        """Ends the worker processes now, instead of at garbage collection; `state_dict` stays valid.

        Otherwise, if the traceback of an error holds the iterator, its queues may be destroyed before it is: then,
        at some later time, five seconds are spent waiting for each worker.
        """
        if self._iterator is not None and self.num_workers:
            with _WorkerDeaths():  # one that fails only now does not matter
                self.may_exit.fill_(True)
                workers = getattr(self._iterator, "_workers", [])
                if self.given_up:
                    _end_processes(workers)
                self._iterator._shutdown_workers()
                _end_processes([worker for worker in workers if worker.is_alive()])  # else the exit waits for them

    def _describe(self, error: BaseException) -> str:
        """Why the workers have failed with `error`, with the remedy."""
        report, workers = "", getattr(self._iterator, "_workers", [])
        if not isinstance(error, SharingError):  # connections of a process that dies end just before it
            ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:  # its end is near, and only then there is an exit code
                    worker.join(timeout=_JOIN)
        while self.reports.poll():
            report = self.reports.recv()
        exits = [worker.exitcode for worker in workers if worker.exitcode]
        return describe_failure(error, report, exits, self.num_workers, self.dataset.shuffle_window)


def _end_processes(workers: Sequence[Any]) -> None:
    """Ends workers that may hang in a read, or are stopped, which only SIGKILL ends."""
    for worker in workers:
        worker.terminate()
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=_JOIN if workers else 0)
    until = time.monotonic() + _JOIN
    for worker in workers:
        worker.join(timeout=max(0.0, until - time.monotonic()))
        if worker.is_alive():
            worker.kill()


# The names of these parts in the state of a `StatefulDataLoader`.
_SNAPSHOT, _LAST_WORKER, _AFTER_SNAPSHOT = "_snapshot", "_last_yielded_worker_id", "_steps_since_snapshot"


class _WorkerDeaths:
    """Lets torch report a worker's death only where a batch is awaited.

    Its handler of SIGCHLD raises wherever the main thread is, in the middle of an optimizer's step, too, which leaves
    weights that are neither those before nor those after the step. The loader's iterator has to exist before.
    """

    def __enter__(self) -> "_WorkerDeaths":
        self._report: Any = signal.getsignal(signal.SIGCHLD)
        self._awaited = False
        self._set(self._on_death)
        return self

    def _set(self, handler: Any) -> None:
        if callable(self._report) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)

    def _on_death(self, number: int, frame: Any) -> None:
        if self._awaited:
            self._report(number, frame)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, a worker that has died, now or since the last time, raises torch's RuntimeError."""
        self._awaited = True
        try:
            if callable(self._report):
                self._report(signal.SIGCHLD, None)
            yield
        finally:
            self._awaited = False

    def __exit__(self, *error: Any) -> None:
        if signal.getsignal(signal.SIGCHLD) == self._on_death:
            self._set(self._report)


def describe_failure(
    error: BaseException, report: str, exits: Sequence[int], workers: int, shuffle_window: int = 1000
) -> str:
    """Why data workers have failed, in a message with the remedy.

    Args:
        error: what the main process found.
        report: what a worker found, if it did.
        exits: the exit codes of those that died; of one that died of a signal, the signal's negative number.
        workers: how many there were.
    """
    given, fewer = f"--dataloader_num_workers {workers}", "pass a smaller --dataloader_num_workers"
    found = report or (str(error) if isinstance(error, SharingError) else brief(error))
    if re.search("Too many open files|ancdata", found):
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{given}: too many files are open at once ({found}). Raise the limit, {most} (ulimit -n), or {fewer}."
    if isinstance(error, SharingError) or -signal.SIGBUS in exits or re.search(_SHARING, found):
        return (
            f"{given}: the data workers have no shared memory left ({'SIGBUS' if -signal.SIGBUS in exits else found}"
            f"{_size_of_shared_memory()}). Start the container with more, such as docker run --shm-size 8g, or {fewer} "
            "or --train_batch_size."
        )
    killed = -signal.SIGKILL in exits or "signal: Killed" in found
    if killed or isinstance(error, MemoryError) or re.search("Cannot allocate|temporarily unavailable", found):
        what = "was killed (SIGKILL), most likely since memory ran out" if killed else f"has no memory ({found})"
        return (
            f"{given}: a data worker {what}. Give the job more memory, or {fewer} or --shuffle_window (now "
            f"{shuffle_window}: each worker keeps so many samples, up to {MAX_BLOCK_BYTES // 2**20} MiB)."
        )
    how = signal.Signals(-exits[0]).name if exits and exits[0] < 0 else found
    return f"{given}: a data worker has failed ({how}). To see why, pass --dataloader_num_workers 0, which is slower."


# In what torch and multiprocessing raise where shared memory is missing: files that do not fit, cannot be opened, …
_SHARING = re.compile("shared memory|shm|No space left|mmap|Bus error|Function not implemented|Permission denied")


def _size_of_shared_memory() -> str:
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY)
        return f"; {SHARED_MEMORY} has {usage.total / 1e6:.3g} MB, of which {usage.free / 1e6:.3g} are free"
    return ""


def check_shared_memory(flags: StreamingFlags, preparation: Preparation, processes: int = 1) -> None:
    """`UsageError` if the batches that workers keep ready do not fit into this machine's shared memory.

    `processes` is how many ranks have workers on this machine. A container has only 64 MB unless it is given more.
    Systems without /dev/shm are not checked.
    """
    workers, encoding = flags.dataloader_num_workers or 0, preparation.encoding
    if encoding is None:
        sample = 3 * preparation.resolution**2
    else:
        sample = 2 * sum(map(math.prod, [encoding.moments, *encoding.embeddings.values()]))  # float16
    batch = PREFETCHED * processes * sample * flags.train_batch_size  # for each worker of a process
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return
    if usage.total and batch * workers > usage.free:
        raise UsageError(
            f"--dataloader_num_workers {workers}: the data workers keep up to {batch * workers / 1e6:.3g} MB of "
            f"batches in shared memory{f' (of {processes} processes)' if processes > 1 else ''}, but {SHARED_MEMORY} "
            f"has only {usage.free / 1e6:.3g} MB free. Start the container with more (docker run --shm-size "
            f"{math.ceil(2 * batch * workers / 2**30)}g), or pass --dataloader_num_workers {usage.free // batch}"
            f"{' or a smaller --train_batch_size' if flags.train_batch_size > 1 else ''}."
        )


def _find_states(state: object) -> Iterator[dict]:
    """The states of all `StreamIterator`s in a loader's state, whose structure depends on the number of workers."""
    if isinstance(state, dict):
        if "layout" in state:
            yield state
        else:
            for value in state.values():
                yield from _find_states(value)


def open_loader(
    flags: StreamingFlags, shards: list[str], preparation: Preparation, seed: int, accelerator: Accelerator
) -> ShardLoader:
    """A loader over this process's share of the `ShardStream` that the flags describe, its workers' number included."""
    assert flags.dataloader_num_workers is not None  # `Run` chooses it
    stream = ShardStream(
        shards=shards,
        preparation=preparation,
        batch_size=flags.train_batch_size,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_bad_fraction=flags.max_bad_fraction,
        shuffle_window=flags.shuffle_window,
        resampled=flags.resampled_shards,
    )
    return make_loader(stream, flags.dataloader_num_workers)


def make_loader(stream: ShardStream, num_workers: int) -> ShardLoader:
    """A loader over the stream, to be iterated once, since it is endless. Its state is that after the last batch.

    Tensors are pinned if there is a CUDA device. Nothing is drawn from torch's global generator.

    Args:
        num_workers: processes that read and decode; with 0 this process does.
    """
    if num_workers < 0:
        raise UsageError(f"--dataloader_num_workers is {num_workers}; give 0 or more.")
    may_exit = torch.zeros((), dtype=torch.bool)
    reports, report = multiprocessing.Pipe(duplex=False)
    try:
        stream.tally = new_tally(num_workers)
        stream.reading = new_reading(num_workers)
        if num_workers:
            may_exit.share_memory_()
    except RuntimeError as error:
        raise WorkerError(describe_failure(error, brief(error), [], num_workers)) from None
    atexit.register(may_exit.fill_, True)  # before multiprocessing ends the workers
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata 0.11 calls what torch 2.13 deprecates
        loader = ShardLoader(
            stream,
            batch_size=None,
            worker_init_fn=functools.partial(_prepare_worker, may_exit, report, os.getpid()),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=PREFETCHED if num_workers else None,
            # The workers of an endless stream live as long as its only iterator. Making them persistent adds nothing,
            # and with pinned memory each then costs five seconds at exit.
            persistent_workers=False,
            generator=torch.Generator(),  # otherwise creating the iterator draws from the global one
        )
    loader.may_exit, loader.reports = may_exit, reports
    return loader


def _prepare_worker(may_exit: torch.Tensor, report: Connection, parent: int, worker: int) -> None:
    """Ignores signals to all processes of a job, since the run handles them and needs data for its last step.

    Also ends the worker, with a `report`, when the thread that sends its batches fails, and when its `parent` dies:
    torch looks for that only between two batches, and a read may hang.
    """
    install()  # where processes do not inherit it
    signal.set_wakeup_fd(-1)  # the main process's
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if may_exit else None)

    def end(error: BaseException, batch: object) -> NoReturn:
        report.send(brief(error))
        os._exit(1)

    # The method only prints a traceback, and the batch is lost: the main process would wait for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
    # Only the thread that hands out memory calls it, with an error that the main process, which asked, has too.
    sys.excepthook = lambda *error: None
