"""The launcher of this process (`accelerate launch`, torchrun), noted when the package is imported, and its death.

When a launcher is killed, or ended by a signal that it does not pass on, its processes live on: they would hold the GPU
and train to their end, unseen. `watch` looks after it from the start of a program, before models are loaded: until a
run is under way there is nothing to lose, so the process ends at once; then the run decides (`on_death`).
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "tcsh", "csh", "ash", "tmux", "screen", "sshd", "systemd")
_EVERY = 1.0  # seconds between two looks


def _find() -> int | None:
    """The parent, if it launched this process; a shell, which may well end first, did not."""
    if any(name.startswith("TORCHELASTIC_") for name in os.environ):
        return os.getppid()
    if not any(name.startswith("ACCELERATE_") for name in os.environ):
        return None
    with contextlib.suppress(OSError):  # on Linux alone
        if Path(f"/proc/{os.getppid()}/comm").read_text().strip().partition(":")[0] in _SHELLS:
            return None  # the variables were exported there
    return os.getppid()


def _end() -> None:
    print("error: the launcher has died, so this process ends, too", file=sys.stderr, flush=True)
    os._exit(1)  # in the middle of compiled code, too


PARENT = _find()  # its process id; None without a launcher
_thread: threading.Thread | None = None
_action: Callable[[], None] | None = _end


def has_died() -> bool:
    """Whether this process was launched, and its launcher has died since."""
    return PARENT is not None and os.getppid() != PARENT


def watch() -> None:
    """Begins to look after the launcher, in a thread; may be called again. Without a launcher, does nothing."""
    global _thread
    if PARENT is not None and _thread is None:
        _thread = threading.Thread(target=_look, name="launcher", daemon=True)
        _thread.start()


def _look() -> None:
    while not has_died():
        time.sleep(_EVERY)
    if _action is not None:
        _action()


def on_death(action: Callable[[], None] | None) -> None:
    """What is done, in another thread, when the launcher has died: `action`, or nothing (None)."""
    global _action
    _action = action


def end_with(parent: int) -> None:
    """Ends this process, a worker, when its `parent` has died; called once."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()
