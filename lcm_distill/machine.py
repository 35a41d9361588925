"""What a process may use of the machine, where a container, a job or `taskset` gives it a part: memory and cores."""

import contextlib
import os
from pathlib import Path


def machine_memory() -> int:
    """Bytes of memory of this machine, or fewer if this process's cgroup (a container, a job) may use fewer."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds in ("", "memory"):  # of version 2, of version 1
                root = Path("/sys/fs/cgroup", kinds)
                name = "memory.limit_in_bytes" if kinds else "memory.max"
                inside = root / group.lstrip("/")
                for folder in (inside, *inside.parents):
                    with contextlib.suppress(OSError, ValueError):  # "max"
                        limits.append(int((folder / name).read_text()))
                    if folder == root:
                        break
    return min((limit for limit in limits if limit > 0), default=0)


def usable_cores() -> int:
    """How many CPU cores this process may run on. Linux knows that; of other systems, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
