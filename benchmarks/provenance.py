"""What a result says about itself: command, commit, date, hardware, versions."""

import os
import platform
import shlex
import subprocess
from datetime import date
from pathlib import Path

import psutil

from lcm_distill.environment import versions

ROOT = Path(__file__).resolve().parents[1]


def provenance(module: str, arguments: list[str]) -> dict:
    """Where a result of `python -m module` comes from; `dirty` if the working tree was not that commit's.

    Both are None where there is no repository.
    """
    changed = _git("status", "--porcelain", "--", "*.py")
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware() -> dict:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
