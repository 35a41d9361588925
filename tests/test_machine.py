"""What a process may use of the machine."""

import os
import subprocess
import sys

import pytest

from lcm_distill.machine import machine_memory, usable_cores


def test_the_machine_s_memory():
    assert 2**28 < machine_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux gives a process some of the cores")
def test_cores_that_the_process_may_not_use_do_not_count():
    """With one of 64 cores, packing started 64 processes and the demo 64 threads."""
    assert usable_cores() == len(os.sched_getaffinity(0))
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from lcm_distill import machine as m"
    code += "; print(m.usable_cores())"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout == "1\n"


def test_a_system_that_hides_which_cores_are_ours_has_all(monkeypatch):
    """Only Linux has `sched_getaffinity`: elsewhere every run on a GPU would end in an AttributeError."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores() == 3
