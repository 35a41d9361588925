"""The output folder: it overwrites nothing that no run has made, and one run has it at a time."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lcm_distill.data.sources import local_path
from lcm_distill.errors import UsageError
from lcm_distill.export.weights import UPLOADED
from lcm_distill.flags import SHARDS_FLAG, TEACHER_FLAG, VAE_FLAG
from lcm_distill.locks import FolderLock
from lcm_distill.run import journal

# What a run writes, apart from what gets a new name each time (logs) and what is hidden.
_WRITTEN = (
    *UPLOADED,
    "README.md",
    "target/*",
    journal.NAME,
    "report.html",
    "validation/step-*",
    "checkpoint-*",
    "abandoned-checkpoint-*",
)
# Flags with models that a run reads: it must not overwrite them.
_MODELS = (TEACHER_FLAG, "--teacher_config", VAE_FLAG, "--init_student")


def check_folder(output_dir: str, flags: Mapping[str, Any]) -> None:
    """`UsageError` if a run with these flags would overwrite what no run has made, or a model that it reads.

    A run's own folder, an empty one, and other people's files that it does not touch (logs, hidden files) are fine.
    """
    folder, ours = Path(output_dir), is_run(output_dir)
    out = os.path.realpath(folder)
    for flag in _MODELS:
        value = flags.get(flag.removeprefix("--"))
        if not value or (flag == "--init_student" and ours and flags.get("resume_from_checkpoint")):
            continue  # the student is not read again
        model = os.path.realpath(value)
        inside = _is_inside(out, model) or _is_inside(model, out)
        if out == model:
            what = "is the folder" if os.path.isdir(model) else "has the name"
        elif os.path.isfile(model):
            if not any(Path(model) == path for path in _written(folder)):
                continue
            what = "would overwrite the file"
        elif os.path.isdir(model) and inside and not ours:
            what = "is inside the folder" if _is_inside(out, model) else "contains the folder"
        else:
            continue
        raise UsageError(
            f"--output_dir {output_dir} {what} of {flag} {value}, which a run must not write to: give a folder of its "
            "own. (A checkpoint that is there already can be resumed with --resume_from_checkpoint and its path.)"
        )
    if not ours and (foreign := [path.relative_to(out).as_posix() for path in _written(folder)]):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UsageError(
            f"--output_dir {output_dir} holds files that no run has made and that this one would overwrite "
            f"({', '.join(foreign[:3])}{more}): give a new or empty folder, or move them away."
        )


def check_shards_apart(output_dir: str, shards: Sequence[str]) -> None:
    """`UsageError` if the output folder is one that holds `shards`, unless it is already a run's."""
    out = os.path.realpath(output_dir)
    folders = {os.path.dirname(path) or "." for path in map(local_path, shards) if path is not None}
    if any(os.path.realpath(folder) == out for folder in folders) and not is_run(output_dir):
        raise UsageError(
            f"--output_dir {output_dir} is the folder of the shards ({SHARDS_FLAG}), which a run must not write to: "
            "give a folder of its own."
        )


def is_run(output_dir: str | Path) -> bool:
    """Whether a training program has written into the folder: its journal, or a checkpoint, says so."""
    folder = Path(output_dir)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(folder / journal.NAME, "rb") as file:
            line = json.loads(file.readline(10_000_000))
        if isinstance(line, dict) and isinstance(line.get("launch"), dict):
            return True
    for pattern in ("checkpoint-*", "abandoned-checkpoint-*"):
        for path in folder.glob(f"{pattern}/run.json"):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                record = json.loads(path.read_bytes())
                if isinstance(record, dict) and "global_step" in record:
                    return True
    return False


def _written(folder: Path) -> Iterable[Path]:
    """The files and folders in `folder` that a run would overwrite, with resolved names."""
    out = Path(os.path.realpath(folder))
    with contextlib.suppress(OSError):
        return sorted({path for pattern in _WRITTEN for path in out.glob(pattern) if not path.name.startswith(".")})
    return []


def _is_inside(path: str, folder: str) -> bool:
    return path != folder and os.path.commonpath([path, folder]) == folder


def hold_folder(accelerator: Accelerator, output_dir: str, program: str, *, create: bool) -> FolderLock | None:
    """Locks the output folder for this run, until its last process ends; every rank calls it.

    Without `create`, a folder that does not exist is not locked: then the result is None. `UsageError`, on every rank,
    if another run has it.
    """
    given, lock = f"--output_dir {output_dir}", None
    refusal, held = "", False
    if accelerator.is_main_process and (create or os.path.isdir(output_dir)):
        try:
            lock, held = FolderLock.take(output_dir, given, program), True
            if accelerator.num_processes > 1:
                lock.share()
        except UsageError as error:
            refusal = str(error)
    refusal, held = broadcast_object_list([refusal, held])
    if refusal:
        raise UsageError(refusal)
    if held and not accelerator.is_main_process:
        lock = FolderLock.join(output_dir, given)
    return lock
