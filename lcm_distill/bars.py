"""How far a long piece of work is, and when it ends: a bar in a terminal, lines at intervals everywhere else.

    with progress_bar("packing", unit="picture", total=1000) as bar:
        bar.update()
        say("one row is done")                      # above the bar

Where stderr is no terminal (a log file, a cluster's scheduler, a pipe), a bar's carriage returns would make one line of
a whole run. There a line is printed after ten seconds, then at growing intervals of at most a minute, and at the end;
work that takes less than ten seconds prints none.
"""

import sys
from typing import Any

from tqdm.auto import tqdm

from lcm_distill.errors import shown

FIRST, LONGEST = 10.0, 60.0  # seconds between two lines, at first and at most
_BAR = "{l_bar}{bar}| {n_fmt} of {total_fmt} [{elapsed} elapsed, {remaining} left, {pace}{postfix}]"
_LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {elapsed} elapsed, {remaining} left, {pace}{postfix}"
_WITHOUT_TOTAL = "{desc}: {n_fmt}, {elapsed} elapsed, {pace}{postfix}"


class Bar(tqdm):
    """tqdm's bar, with a pace that reads well for fast and slow work, and a `total` that may come later."""

    _format = _BAR

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        done, seconds = values["n"] - values["initial"], values["elapsed"]
        rate = values["rate"] or (done / seconds if seconds else 0)
        pace = f"{rate:.3g} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s per {self.unit}" if rate else "?"
        return values | {"pace": pace, "bar_format": self._format if self.total else _WITHOUT_TOTAL}


class _Lines(Bar):
    """A bar that is printed line by line, at growing intervals."""

    mininterval: float
    _format = _LINE

    def __init__(self, **options: Any):
        interval = {"mininterval": FIRST, "maxinterval": float("inf"), "miniters": 1, "delay": FIRST}
        super().__init__(**options, **interval, file=_Printed(), position=0)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        super().display(msg, 0)
        self.mininterval = min(LONGEST, 1.5 * self.mininterval)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)  # for the next line


class _Printed:
    """A file for tqdm: each state of the bar becomes a line on stderr."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            print(shown(line), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress_bar(
    desc: str,
    *,
    unit: str,
    total: float | None = None,
    initial: int = 0,
    position: int | None = None,
    leave: bool = True,
    delay: float = 0,
    disable: bool = False,
) -> Bar:
    """A bar, to be used as a context manager or closed; with a `total` it says how long the rest will take.

    `unit` is one of what is counted, `initial` how many were done before, `position` the line of the terminal.
    `leave`: it stays when it is closed. It is not shown before `delay` seconds.
    """
    options: dict[str, Any] = dict(desc=desc, unit=unit, total=total, initial=initial, leave=leave, disable=disable)
    if sys.stderr.isatty():
        return Bar(**options, position=position, delay=delay, dynamic_ncols=True)
    return _Lines(**options)


def say(text: str) -> None:
    """Prints a line of text to stdout, above the bars if there are any."""
    tqdm.write(shown(text), file=sys.stdout)
    sys.stdout.flush()
