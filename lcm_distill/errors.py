"""What stops a run on purpose, told apart from faults of the program."""

import sys
from collections.abc import Callable


class UsageError(ValueError):
    """A flag, a path, a shard or a checkpoint that cannot work; the message names the flag and the remedy."""


class DivergenceError(RuntimeError):
    """The loss is not finite any more; the message says at which step, and what to try."""


class SaveError(RuntimeError):
    """What the run has to leave behind cannot be written; the message says what is there, and what to do."""


def brief(error: BaseException) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


def run_program(
    main: Callable[[], None], go_on: str = "; go on from the last checkpoint with --resume_from_checkpoint latest"
) -> None:
    """Runs a program's `main`; an error meant for its user is printed as a message, without the traceback.

    `go_on` is what to say after "interrupted" when Ctrl-C was pressed.
    """
    try:
        main()
    except (UsageError, DivergenceError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print(f"interrupted{go_on}", file=sys.stderr)
        sys.exit(130)
