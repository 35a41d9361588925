"""The run's journal `training.jsonl`: every logged value, one JSON object a line, for any tool and for the report.

    {"launch": {"program": …, "flags": …, "command": …, "global_step": 0, …}}   the run was started, or resumed
    {"step": 10, "time": 1763715600.0, "loss": 0.031, "lr": 1e-06, …}           values; a step may have several lines
    {"end": {"global_step": 400, "time": …, "reason": "SIGTERM"}}               the launch ended, without being killed

It holds no secrets: tokens, commands and URL queries are left out.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAME = "training.jsonl"


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
            old = list(_lines(self._path)) if global_step and self._path.exists() else []
            kept = [line for line in old if line.get("step", 0) <= global_step]
            with open(partial, "wb") as file:
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
    """The journal's complete lines; those that are incomplete or not an object are skipped."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step", 0), int):
                yield line


def read_journal(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the launches, the lines with values) of a training.jsonl, oldest first; `OSError` if it cannot be read.

    A launch that was not killed has its last line under "end". Lines of steps after the one that a later launch resumed
    at are left out, even where they are still in the file (its disk was full).
    """
    launches: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for line in _lines(Path(path)):
        if isinstance(launch := line.get("launch"), dict):
            start = launch.get("global_step", 0)
            launches.append(launch)
            entries = [entry for entry in entries if entry["step"] <= start]
        elif launches and isinstance(end := line.get("end"), dict):
            launches[-1]["end"] = end
        elif "step" in line:
            entries.append(line)
    return launches, entries
