"""The run's journal `training.jsonl`: every logged value, one JSON object a line, for any tool and for the report.

    {"launch": {"program": …, "flags": …, "command": …, "global_step": 0, …}}   the run was started, or resumed
    {"step": 10, "time": 1763715600.0, "loss": 0.031, "lr": 1e-06, …}           values; a step may have several lines
    {"end": {"global_step": 400, "time": …, "reason": "SIGTERM"}}               the launch ended, without being killed

It holds no secrets: tokens, commands and URL queries are left out.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lcm_distill.errors import shown

logger = logging.getLogger(__name__)

NAME = "training.jsonl"

_MAX_STEP = 2**53  # beyond it, JavaScript's numbers are not exact
_MAX_TIME = 253_402_300_800  # the year 10000, which calendars do not reach
_MAX_LINE = 2**22  # characters; a launch has some thousands
_MOST_ITEMS = 1000  # of a mapping or a list in a launch
_MOST_BRACKETS = 200  # of a line; ours have fewer than 50


class Journal:
    """Writes `output_dir/training.jsonl`. A disk error is logged once and never ends the run.

    The constructor adds `launch` (`describe_launch`) with the time and `global_step`, the step that the run is at: 0
    for a new run, which starts a new file. Lines of later steps, which a killed run wrote after the checkpoint that is
    resumed, are dropped, and so is an incomplete last line: each step is in the file once. A journal that is not
    `enabled` (on other ranks, in a dry run) writes nothing.
    """

    def __init__(
        self, output_dir: str | Path, launch: Mapping[str, Any], *, global_step: int = 0, enabled: bool = True
    ):
        self._path = Path(output_dir) / NAME
        self.enabled = enabled
        self._failed = False
        if enabled:
            self._begin({"launch": {**launch, "started": time.time(), "global_step": global_step}}, global_step)

    def log(self, values: Mapping[str, float], global_step: int) -> None:
        """Adds a line with the step, the time and `values`; those that are not finite become null."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append({"step": global_step, "time": time.time(), **numbers})

    def end(self, global_step: int, reason: str | None = None) -> None:
        """Records that the launch ended after `global_step`; if that is not the run's last step, `reason` says why."""
        self._append({"end": {"global_step": global_step, "time": time.time(), "reason": reason}})

    def _begin(self, launch: dict[str, Any], global_step: int) -> None:
        partial = self._path.with_name(f".{NAME}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            old = list(_lines(self._path)) if global_step and self._path.is_file() else []
            kept = [line for line in old if line.get("step", 0) <= global_step]
            partial.unlink(missing_ok=True)
            with open(partial, "xb") as file:  # a new file: not what a link of this name points to
                file.writelines(_as_line(line) for line in [*kept, launch])
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path)
        except OSError as error:
            self._report(error)

    def _append(self, line: dict[str, Any]) -> None:
        if not self.enabled:
            return
        torn = b"\n" if self._failed else b""  # part of the failed line may be in the file: begin a new one
        try:
            with open(self._path, "ab") as file:
                file.write(torn + _as_line(line))
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        if not self._failed:
            logger.error("%s could not be written (%s): values are missing in it; the run continues", self._path, error)
        self._failed = True


def finite(value: Any) -> Any:
    """A copy for JSON, which has no NaN and no infinity: None in their place, text for what it has no type for."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def _as_line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(line)).encode() + b"\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's complete lines; those that are incomplete, not an object or of no possible step are skipped."""
    with open(path, encoding="utf-8", errors="replace") as file:
        while text := file.readline(_MAX_LINE):
            if text.count("[") + text.count("{") > _MOST_BRACKETS:  # one in another, they exhaust the stack later
                continue
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and ("step" not in line or _step(line["step"]) is not None):
                yield line


def read_journal(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the launches, the lines with values) of a training.jsonl, oldest first; `OSError` if it cannot be read.

    A launch that was not killed has its last line under "end". Lines of steps after the one that a later launch resumed
    at are left out, even where they are still in the file (its disk was full).

    Anyone may have written the file. What is returned has the types that `Journal` writes: a launch's `global_step` and
    `steps` are whole numbers from 0, its `started` is a time, its other values are text, or mappings of text, numbers
    and lists of them; a line's `time` is a time and its other values are finite floats, text or None. What is of
    another kind is left out.
    """
    launches: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for line in _lines(Path(path)):
        if isinstance(launch := line.get("launch"), dict):
            launches.append(_clean_launch(launch))
            start = launches[-1]["global_step"]
            entries = [entry for entry in entries if entry["step"] <= start]
        elif launches and isinstance(end := line.get("end"), dict):
            last = _step(end.get("global_step")), _time(end.get("time"))
            if None not in last:
                reason = _clean_text(end.get("reason"))
                launches[-1]["end"] = {"global_step": last[0], "time": last[1], "reason": reason or None}
        elif "step" in line:
            entries.append(_clean_entry(line))
    return launches, entries


def _step(value: Any) -> int | None:
    """A whole number of steps, or None."""
    return value if type(value) is int and 0 <= value < _MAX_STEP else None


def _time(value: Any) -> float | None:
    """Seconds since 1970 that a calendar shows, or None."""
    number = _number(value)
    return number if number is not None and 0 <= number < _MAX_TIME else None


def _number(value: Any) -> float | None:
    """A finite float, or None."""
    if type(value) in (int, float):
        with contextlib.suppress(OverflowError):
            return float(value) if math.isfinite(value) else None
    return None


def _clean_text(value: Any) -> str:
    return shown(value) if isinstance(value, str) else ""


def _clean_launch(launch: dict[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {"global_step": _step(launch.get("global_step")) or 0}
    if (started := _time(launch.get("started"))) is not None:
        clean["started"] = started
    if steps := _step(launch.get("steps")):
        clean["steps"] = steps
    if (seed := _step(launch.get("seed"))) is not None:
        clean["seed"] = seed
    clean |= {name: _clean_text(launch.get(name)) for name in ("program", "command", "folder") if name in launch}
    for name in ("flags", "versions", "machine"):
        if isinstance(found := launch.get(name), dict):
            clean[name] = {shown(key): _clean_value(value) for key, value in list(found.items())[:_MOST_ITEMS]}
    return clean


def _clean_value(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, list):
        return ["…" if isinstance(item, list) else _clean_value(item) for item in value[:_MOST_ITEMS]]
    return value if value is None or isinstance(value, bool) or _number(value) is not None else "…"


def _clean_entry(line: dict[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {"step": line["step"]}
    if (moment := _time(line.get("time"))) is not None:
        clean["time"] = moment
    for name, value in line.items():
        if name in ("step", "time"):
            continue
        if value is None or isinstance(value, str):
            clean[shown(name)] = value
        elif (number := _number(value)) is not None:
            clean[shown(name)] = number
    return clean
