"""One budget of memory for the large pictures that the processes of a machine decode at the same time.

    with BUDGET.share(need): ...                    # waits until so many bytes are free; at once for a small picture

Eight data workers that each meet a picture of a gigabyte would need eight. What they decode at the same time may take
an eighth of the memory of the machine (or of the container) together, and at least `LEAST`; small pictures do not
count, and cost nothing. The processes are all of one user that have the same folder for temporary files.

Each `UNIT` of the budget is a byte of a lock file, and who decodes holds locks on as many bytes as it needs (POSIX
record locks). The kernel releases the locks of a process that ends, however it ends. They belong to a process, not to a
file descriptor, so that forked processes exclude each other too; the threads of a process share a table instead. Where
such a file cannot be had, the budget holds within each process.
"""

import contextlib
import logging
import math
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator

from lcm_distill.machine import machine_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

UNIT = 64 * 2**20  # bytes
SMALL = 128 * 2**20  # who needs less, takes no share
LEAST = 2 * 2**30  # a picture of the largest size that is read by default, and a second
MOST_UNITS = 4096  # 256 GiB: more than the processes of any machine decode at once
PART_OF_MEMORY = 1 / 8
# Seconds without any process finishing a picture after which the budget is not waited for any longer: a process that
# was stopped keeps its share.
PATIENCE = 60.0
_POLL = 0.03  # seconds between two attempts, about
_STAMP = 8  # bytes at the start of the file, which change whenever a share is returned


class Budget:
    """The bytes that all processes may use together; `share` takes some of them for a while.

    Args:
        path: of the lock file; None: in the folder for temporary files, one for each user.
        units: how many `UNIT`s there are; None: by the machine's memory.
    """

    def __init__(self, path: str | None = None, units: int | None = None):
        self._path, self._given_units = path, units
        self._opened = False
        self._file: int | None = None
        self._units = 0
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """What belongs to a process: a forked child has none of its parent's shares, and no thread holds its mutex."""
        self._mutex = threading.Lock()
        self._mine: set[int] = set()

    def open(self) -> None:
        """Opens the lock file, if it is not open yet.

        Called before data workers are forked, which then inherit it: reading shards opens no file for writing.
        """
        with self._mutex:  # of the threads that come at the same time, none goes on before its size is known
            if self._opened:
                return
            memory = machine_memory()
            by_memory = int(max(LEAST, memory * PART_OF_MEMORY)) // UNIT
            self._units = self._given_units or min(by_memory, MOST_UNITS)
            try:
                self._file = _open_own(self._path or _default_path())
            except OSError as error:
                logger.debug("no lock file for large pictures: %s", error)
            self._opened = True

    @contextlib.contextmanager
    def share(self, nbytes: int) -> Iterator[None]:
        """Inside, `nbytes` of the budget are taken, or all of it if they are more."""
        if nbytes < SMALL:
            yield
            return
        taken = self._wait_for(nbytes)
        try:
            yield
        finally:
            self._give_back(taken)

    def _wait_for(self, nbytes: int) -> list[int]:
        self.open()
        count = min(math.ceil(nbytes / UNIT), self._units)
        patience_ends, stamp = time.monotonic() + PATIENCE, self._read_stamp()
        while True:
            taken = self._take(count)
            if len(taken) == count:
                return taken
            self._release(taken)
            if (latest := self._read_stamp()) != stamp:
                patience_ends, stamp = time.monotonic() + PATIENCE, latest
            if time.monotonic() > patience_ends:
                logger.warning(
                    "a picture that takes %.3g MB is decoded beyond the budget of %.3g MB for large pictures, after "
                    "%g s in which no other process finished one",
                    nbytes / 1e6,
                    self._units * UNIT / 1e6,
                    PATIENCE,
                )
                return []
            time.sleep(_POLL * (0.5 + os.getpid() % 16 / 16))  # not all at the same time, and nothing is drawn

    def _take(self, count: int) -> list[int]:
        """Up to `count` free units."""
        taken: list[int] = []
        with self._mutex:
            for unit in range(self._units):
                if len(taken) == count:
                    break
                if unit not in self._mine and self._lock(unit):
                    self._mine.add(unit)
                    taken.append(unit)
        return taken

    def _lock(self, unit: int) -> bool:
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _STAMP + unit)
        except (BlockingIOError, PermissionError):  # another process has it
            return False
        except OSError as error:  # a file system without locks
            logger.debug("no locks for large pictures: %s", error)
            self._file = None
        return True

    def _release(self, units: list[int]) -> None:
        with self._mutex:
            for unit in units:
                self._mine.discard(unit)
                if self._file is not None:
                    with contextlib.suppress(OSError):
                        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _STAMP + unit)

    def _give_back(self, units: list[int]) -> None:
        self._release(units)
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, time.time_ns().to_bytes(_STAMP, "little"), 0)

    def _read_stamp(self) -> bytes:
        if self._file is not None:
            with contextlib.suppress(OSError):
                return os.pread(self._file, _STAMP, 0)
        return b""


def _default_path() -> str:
    return os.path.join(tempfile.gettempdir(), f"lcm_distill-{os.getuid()}.lock")


def _open_own(path: str) -> int:
    """Opens a file of this user for locks; `OSError` if it cannot be, or if it is another's, or no regular file."""
    if fcntl is None:
        raise OSError("this system has no record locks")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.open(path, flags, 0o600)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(file)
        raise OSError(f"{path} is not a file of this user")
    return file


BUDGET = Budget()
