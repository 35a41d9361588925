"""The output folder: it overwrites nothing that no run has made, and one run has it at a time."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lcm_distill.data.sources import local_path, open_regular
from lcm_distill.errors import UsageError
from lcm_distill.export.weights import UPLOADED
from lcm_distill.flags import SHARDS_FLAG, TEACHER_FLAG, VAE_FLAG
from lcm_distill.locks import FolderLock
from lcm_distill.run import journal
from lcm_distill.run.record import RECORD

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
_LONGEST = 10_000_000  # bytes that are read to see whether a run has written a file
# Flags with models that a run reads: it must not overwrite them.
_MODELS = (TEACHER_FLAG, "--teacher_config", VAE_FLAG, "--init_student")


def check_folder(output_dir: str, flags: Mapping[str, Any]) -> None:
    """`UsageError` if a run with these flags would overwrite what no run has made, or a model that it reads.

    A run's own folder, an empty one, and other people's files that it does not touch (logs, hidden files) are fine.
    """
    folder, ours = Path(output_dir), is_run(output_dir)
    out = os.path.realpath(folder)
    for above in (Path(out), *Path(out).parents):
        if _is_checkpoint(above):  # the run would begin anew there, and spoil it
            raise UsageError(
                f"--output_dir {output_dir} is {'' if above == Path(out) else 'in '}a checkpoint ({above}), which a "
                f"run must not write to: give its run's folder ({above.parent}), or a new one. "
                f"(--resume_from_checkpoint {above} resumes it.)"
            )
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
    if isinstance(_read_object(folder / journal.NAME, line=True).get("launch"), dict):
        return True
    with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be listed
        for pattern in ("checkpoint-*", "abandoned-checkpoint-*"):
            if any(map(_is_checkpoint, folder.glob(pattern))):
                return True
    return False


def _is_checkpoint(folder: Path) -> bool:
    return "global_step" in _read_object(folder / RECORD)


def _read_object(path: Path, *, line: bool = False) -> dict[str, Any]:
    """The JSON object in a file, or in its first `line`; {} without one, also for a pipe, which might block."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open_regular(str(path)) as file:
            found = json.loads(file.readline(_LONGEST) if line else file.read(_LONGEST))
        return found if isinstance(found, dict) else {}
    return {}


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
