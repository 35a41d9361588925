"""Errors that are meant for the user of a program: printed as one message, without a traceback."""

import logging
import re
import sys
from collections.abc import Callable

from lcm_distill import launcher, redaction

# What a terminal obeys instead of showing it: control characters, among them those that begin escape sequences, marks
# that reverse the direction of text, and halves of characters. Line feeds and tabs stay.
_NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)


def shown(text: str) -> str:
    """`text` as it may be printed, with "?" for each character that a terminal would obey: names can be anything."""
    return _NOT_SHOWN.sub("?", text)


class ShownFormatter(logging.Formatter):
    """Formats log lines as they may be `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class _Message(Exception):
    """An error whose message is `shown`."""

    def __init__(self, message: str = ""):
        super().__init__(shown(message))


class UsageError(_Message, ValueError):
    """A flag, a path, a shard or a checkpoint that cannot work; the message names the flag and the remedy."""


class DivergenceError(_Message, RuntimeError):
    """Loss, gradients or, in a dry run, validation are not finite; the message has the step and what to try."""


class SaveError(_Message, RuntimeError):
    """A checkpoint or the result cannot be written; the message has what was saved before and what to do."""


class WorkerError(_Message, RuntimeError):
    """The processes that load data have failed: no memory or shared memory is left. The message has the remedy."""


def brief(error: BaseException) -> str:
    """A library's error in one line: its class and the first line of its message, or two if that only introduces."""
    first, *others = (str(error).strip() or "-").splitlines()
    if first.endswith(":") and others:  # "Error(s) in loading state_dict for UNet2DConditionModel:"
        first = f"{first} {others[0].strip()}"
    return f"{type(error).__name__}: {first[:300]}"


def run_program(
    main: Callable[[], None],
    resume_hint: str = "; --resume_from_checkpoint latest resumes from the last checkpoint, if there is one",
) -> None:
    """Runs a program's `main`; an error meant for its user is printed as a message, without the traceback.

    The exit code is then 2 for a `UsageError` and 1 for the others. After Ctrl-C, "interrupted" and `resume_hint` are
    printed and the exit code is 130. What is printed has no secrets; the process ends with its launcher.
    """
    if logging.lastResort is not None:  # prints the warnings of commands, which set up no logging
        logging.lastResort.setFormatter(ShownFormatter())
    redaction.install()
    launcher.watch()
    try:
        main()
    except (UsageError, DivergenceError, SaveError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print(f"interrupted{resume_hint}", file=sys.stderr)
        sys.exit(130)
