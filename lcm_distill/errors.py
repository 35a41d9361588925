"""Errors that are meant for the user of a program: printed as one message, without a traceback."""

import sys
from collections.abc import Callable

from lcm_distill import launcher, redaction


class UsageError(ValueError):
    """A flag, a path, a shard or a checkpoint that cannot work; the message names the flag and the remedy."""


class DivergenceError(RuntimeError):
    """Loss, gradients or, in a dry run, validation are not finite; the message has the step and what to try."""


class SaveError(RuntimeError):
    """A checkpoint or the result cannot be written; the message has what was saved before and what to do."""


class WorkerError(RuntimeError):
    """The processes that load data have failed: no memory or shared memory is left. The message has the remedy."""


def brief(error: BaseException) -> str:
    """A library's error in one line: its class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


def run_program(
    main: Callable[[], None],
    resume_hint: str = "; --resume_from_checkpoint latest resumes from the last checkpoint, if there is one",
) -> None:
    """Runs a program's `main`; an error meant for its user is printed as a message, without the traceback.

    The exit code is then 2 for a `UsageError` and 1 for the others. After Ctrl-C, "interrupted" and `resume_hint` are
    printed and the exit code is 130. What is printed has no secrets; the process ends with its launcher.
    """
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
