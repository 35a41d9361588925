"""Folders and files that one living process has for itself: locks of the kernel (flock), which end with their process.

    lock = FolderLock.take("out", "--output_dir out", "train_lcm_distill_sd_wds")     # `UsageError` if it is in use

A lock's file says who holds it. It is never a sign by itself: after a kill the file stays, and blocks nobody. A file of
that name that says something else is locked, but stays as it is.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lcm_distill import launcher
from lcm_distill.errors import UsageError

logger = logging.getLogger(__name__)

NAME = ".lock"
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # the last, since it may be a pipe
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # the second is how NFS says it
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF)

_open: set[int] = set()  # the descriptors of this process's locks
_taken: dict[str, "FolderLock"] = {}  # by the folder


def _close_in_child() -> None:
    """A lock lasts until all copies of its descriptor are closed: it must not outlive its process in a data worker."""
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()
    _taken.clear()


os.register_at_fork(after_in_child=_close_in_child)


class FolderLock:
    """The lock of a folder, held until `release` or the end of the process. Forked children do not hold it.

    Where the file system knows no locks, a warning says so, and nothing is locked.
    """

    def __init__(self, folder: Path, descriptor: int | None, made: Iterable[Path] = ()):
        self._folder = folder
        self._descriptor = descriptor
        self._is_ours = descriptor is not None and _is_lock(descriptor)  # else the file is not written, nor removed
        self._made = list(made)  # folders that did not exist before, the innermost first

    @classmethod
    def take(cls, folder: str | os.PathLike, given: str, user: str) -> "FolderLock":
        """Locks `folder`, which is created, for the `user`, a program's name; `given` is how a message names it.

        `UsageError`, which says by whom, if another process has it. A lock that this process has already is its
        own: that of an earlier run that has ended by an error. Also `UsageError` if it cannot be written.
        """
        folder = Path(folder)
        try:
            made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
            folder.mkdir(parents=True, exist_ok=True)
            if earlier := _taken.pop(os.path.realpath(folder), None):
                earlier._close()
                made = [*earlier._made, *made]
            lock = cls(folder, _lock(folder / NAME, fcntl.LOCK_EX, given), made)
            if lock._descriptor is not None and lock._is_ours:
                record = {"program": user, "pid": os.getpid(), "host": platform.node(), "launcher": launcher.PARENT}
                record |= {"since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
                os.ftruncate(lock._descriptor, 0)
                os.pwrite(lock._descriptor, json.dumps(record).encode() + b"\n", 0)
        except OSError as error:
            raise UsageError(f"{given} cannot be written to ({error}); give another folder.") from None
        _taken[os.path.realpath(folder)] = lock
        return lock

    @classmethod
    def join(cls, folder: str | os.PathLike, given: str) -> "FolderLock":
        """Another process of the run whose main process has called `share`: the folder is in use until both end."""
        folder = Path(folder)
        if earlier := _taken.pop(os.path.realpath(folder), None):
            earlier._close()
        try:
            folder.mkdir(parents=True, exist_ok=True)  # another machine may not see it yet
            lock = cls(folder, _lock(folder / NAME, fcntl.LOCK_SH, given))
        except OSError as error:
            raise UsageError(f"{given} cannot be locked ({error}); give another folder.") from None
        _taken[os.path.realpath(folder)] = lock
        return lock

    def share(self) -> None:
        """Lets the other processes of this run `join`; `take` is still refused to all others."""
        if self._descriptor is not None:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:  # the kernel unlocks first: another process was quicker
                raise UsageError(f"{self._folder} is in use: another process has just locked it.") from None

    def release(self, *, remove: bool = True) -> None:
        """Unlocks the folder; with `remove` also removes the lock's file, and folders made for it that are empty.

        Of several processes that have the lock, only the last may remove it.
        """
        if self._descriptor is not None and self._is_ours and remove:
            with contextlib.suppress(OSError):
                (self._folder / NAME).unlink()
                for folder in self._made:
                    folder.rmdir()
        _taken.pop(os.path.realpath(self._folder), None)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            _open.discard(self._descriptor)
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None


@contextlib.contextmanager
def holding_folder(folder: Path, given: str, user: str) -> Iterator[None]:
    """`FolderLock.take` for the block."""
    lock = FolderLock.take(folder, given, user)
    try:
        yield
    finally:
        lock.release()


def _lock(path: Path, kind: int, given: str) -> int | None:
    """A descriptor of the file that holds the lock; None if there are no locks. `UsageError` if another has it."""
    while True:
        writable = True
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _OPEN, 0o666)
        except PermissionError:  # another user's, perhaps left by a kill
            descriptor, writable = os.open(path, os.O_RDONLY | _OPEN), False
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            # Whoever had it may have removed the file meanwhile: then another process locks a new one.
            same = os.path.samestat(os.fstat(descriptor), os.lstat(path))
            if same and not writable and _is_lock(descriptor):
                path.unlink()
                same = False
        except FileNotFoundError:
            same = False
        except OSError as error:
            try:
                if error.errno in _HELD:
                    raise UsageError(f"{given} is in use: {_describe_holder(descriptor)}") from None
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning(
                    "%s: its file system has no locks (%s); make sure that no other run writes there",
                    given,
                    error.strerror,
                )
                return None
            finally:
                os.close(descriptor)
        if same:
            _open.add(descriptor)
            return descriptor
        os.close(descriptor)


def try_lock(file: IO[Any]) -> bool:
    """Locks an open file until it is closed, unless another process has it locked; whether that is so or is unknown."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD
    return True


def is_locked(path: Path) -> bool:
    """Whether another process, or this one, holds the lock of a file; False if that cannot be known."""
    try:
        with open(path, "rb+") as file:
            return not try_lock(file)
    except OSError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    """What the lock's file says about its holder; {} if that cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(os.pread(descriptor, 10_000, 0))
        return found if isinstance(found, dict) else {}
    return {}


def _is_lock(descriptor: int) -> bool:
    """Whether the file is a lock, or empty: other files may have the same name, or be linked under it."""
    return os.fstat(descriptor).st_size == 0 or "pid" in _read(descriptor)


def _describe_holder(descriptor: int) -> str:
    """Who holds the lock, and what to do about it, as sentences."""
    record = _read(descriptor)
    elsewhere = "Give another folder, or wait until it has ended."
    pid, host = record.get("pid"), record.get("host")
    if not isinstance(pid, int) or isinstance(pid, bool):
        return f"another process holds its lock {NAME}. {elsewhere}"
    who = f"{record.get('program')}, process {pid} on {host}, has had it since {record.get('since')}"
    if host != platform.node():
        return f"{who}. {elsewhere}"
    if _is_alive(pid):
        parent = record.get("launcher")
        if isinstance(parent, int) and _parent_of(pid) not in (parent, None):
            return (
                f"{who}. Its launcher has died, so it saves a checkpoint and ends after its step: wait for that, or "
                f"end it with kill -9 {pid}."
            )
        return f"{who}. {elsewhere}"
    others = [other for other in _holders(descriptor) if _is_alive(other)]
    named = f"process{'es' * (len(others) > 1)} {', '.join(map(str, others))}" if others else "another process"
    end = f" or end it with kill {' '.join(map(str, others))}" if others else ""
    return f"{who}. That process has died, but {named} of the same run is still alive: wait until it has ended,{end}."


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True


def _parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _holders(descriptor: int) -> list[int]:
    """The processes of this machine that hold a lock of the file, where the system lists them."""
    inode, found = os.fstat(descriptor).st_ino, []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                found.append(int(fields[4]))
    return sorted({pid for pid in found if pid > 0})
