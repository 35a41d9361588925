"""The description of a launch for the journal, and the command that resumes its run."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from lcm_distill.environment import device_name, versions
from lcm_distill.redaction import public_flags

_LINE = 100  # characters of a line of the command, unless a single flag is longer


def describe_launch(
    accelerator: Accelerator, run: Mapping[str, Any], *, steps: int, argv: Sequence[str] | None
) -> dict[str, Any]:
    """What the journal records of a launch: `run`'s program, seed and public flags, and the run's number of `steps`.

    Also the command that resumes the run, the folder to run it in, the package versions and the machine. `argv` are the
    arguments of the program's `main`, None for the shell's command line.
    """
    words = sys.argv if argv is None else [f"{run['program']}.py", *argv]
    return {
        **{name: run[name] for name in ("program", "seed", "flags")},
        "steps": steps,
        "command": resume_command(words),
        "folder": os.getcwd(),
        "versions": versions(),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpu cores": os.cpu_count(),
            "device": device_name(accelerator.device),
            "processes": accelerator.num_processes,
            "mixed precision": str(accelerator.mixed_precision),
        },
    }


def resume_command(argv: Sequence[str]) -> str:
    """The shell command, over several lines, that resumes the run whose `sys.argv` was `argv`.

    Tokens are left out; commands and URL queries in the shards are cut to "…", as in `public_flags`. The launcher's
    own options (`accelerate launch --num_processes 4 …`) do not reach a program, so they are not included.
    """
    groups: list[list[str]] = []  # each a flag and its values
    for word in argv[1:]:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
    pieces = []
    for first, *values in groups:
        flag, equals, value = first.partition("=")
        name = flag.removeprefix("--")
        if name == "resume_from_checkpoint" or not public_flags({name: ""}):
            continue
        shown = [str(public_flags({name: text})[name]) for text in ([value] if equals else []) + values]
        words = [f"{flag}={shown[0]}", *shown[1:]] if equals else [flag, *shown]
        pieces.append(shlex.join(words))
    lines = [f"accelerate launch {shlex.quote(argv[0])}"]
    for piece in [*pieces, "--resume_from_checkpoint latest"]:
        if len(lines[-1]) + len(piece) < _LINE:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"    {piece}")
    return " \\\n".join(lines)
