"""Which flags of a command are read, for the tests that none is declared in vain."""

import argparse
import dataclasses
import inspect
import re
from types import ModuleType

from lcm_distill import flags
from lcm_distill.models.teacher import Teacher


def unread_flags(command: ModuleType, parsed: argparse.Namespace) -> set[str]:
    """The flags in `parsed` that neither the command nor the part of the package that takes their group reads."""
    source = inspect.getsource(command)
    read = set(re.findall(r"\bargs\.(\w+)", source))
    teacher_flags = {field.name for field in dataclasses.fields(flags.TeacherFlags)}
    if "Teacher.from_flags(flags.take(flags.TeacherFlags, args))" in source:
        read |= teacher_flags & set(re.findall(r"\bflags\.(\w+)", inspect.getsource(Teacher.from_flags)))
    return set(vars(parsed)) - read
