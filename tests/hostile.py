"""The page of what hostile input the tests try, from the tests with the marker `hostile(kind)`.

    python -m tests.hostile             # writes tests/HOSTILE.md; commit it with the tests

A kind is one of `KINDS`. The marker stands above a test's function, or as `pytestmark` at the beginning of its file; a
test may have several. Names and sentences come from the source, the numbers of cases from pytest.
"""

import ast
import contextlib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS / "HOSTILE.md"
KINDS = {
    "shards": "tars and encoded shards that are damaged, cut short, huge, or written to harm",
    "servers": "hosts of shards and models, and commands, that break off, stall, refuse, or send something else",
    "pictures": "files that are no picture, expand to gigabytes, or mean something else than they seem to",
    "checkpoints": "checkpoints and journals that are incomplete, foreign or edited",
    "teachers": "teachers and students that hold code, do not fit, or are of another kind",
    "folders": "paths, links, names and folders that are not what they should be",
    "signals": "kills, interrupts, and processes that die",
    "disks": "full disks, files that cannot be written, memory that runs out",
}
_LINE = re.compile(r"- (\d+) × .* \(`(\w+)`\)")
_FILE = re.compile(r"`tests/(.*)`")

Name = tuple[str, str]  # of a test: its file in `tests/`, its function


class Test(NamedTuple):
    """A marked test: which kinds of input it tries, and what it does in a sentence."""

    name: Name
    kinds: tuple[str, ...]
    sentence: str

    __test__ = False  # for pytest


def find_tests(folder: Path = TESTS) -> list[Test]:
    """The marked tests, by file and in its order. `ValueError` for a marker without one of `KINDS`."""
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.hostile" not in text:
            continue
        module, file = ast.parse(text), path.relative_to(folder).as_posix()
        own = [node.value for node in module.body if isinstance(node, ast.Assign) and _names(node) == ["pytestmark"]]
        for function in module.body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test"):
                if kinds := list(dict.fromkeys(_kinds([*own, *function.decorator_list], f"{file}: {function.name}"))):
                    found.append(Test((file, function.name), tuple(kinds), _sentence(function)))
    return found


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _kinds(marks: Iterable[ast.expr], where: str) -> list[str]:
    kinds = []
    for mark in marks:
        for node in ast.walk(mark):
            if isinstance(node, ast.Attribute) and node.attr == "hostile":
                calls = [call for call in ast.walk(mark) if isinstance(call, ast.Call) and call.func is node]
                given = [getattr(kind, "value", None) for call in calls for kind in call.args]
                if len(given) != 1 or given[0] not in KINDS:
                    raise ValueError(f"{where}: hostile takes one of {', '.join(KINDS)}, not {given}")
                kinds += given
    return kinds


def _sentence(function: ast.FunctionDef) -> str:
    """The function's name in words, then the first paragraph of its docstring, in one line."""
    words = re.sub(r"\b(\w+) s\b", r"\1's", function.name.removeprefix("test_").replace("_", " ")).capitalize()
    text = " ".join((ast.get_docstring(function) or "").partition("\n\n")[0].split())
    return f"{words}: {text}" if text else words


def render(tests: Iterable[Test], cases: Mapping[Name, int]) -> str:
    """The page; `cases` has how many cases each test has."""
    tests = list(tests)
    of_kind = {kind: [test for test in tests if kind in test.kinds] for kind in KINDS}
    total = sum(cases[test.name] for test in tests)
    lines = [
        "# What hostile input the tests try",
        "",
        "Made from the tests by `python -m tests.hostile`; run it again after changing one that is marked `hostile`.",
        f"{len(tests)} tests with {total:,} cases; `python -m pytest -m hostile` runs them. A test of two kinds is in "
        "both lists.",
        "",
        "| kind | what it is | tests | cases |",
        "|---|---|--:|--:|",
    ]
    for kind, found in of_kind.items():
        number = sum(cases[test.name] for test in found)
        lines.append(f"| [{kind}](#{kind}) | {KINDS[kind]} | {len(found)} | {number:,} |")
    for kind, found in of_kind.items():
        lines += ["", f"## {kind}"]
        file = ""
        for test in found:
            if test.name[0] != file:
                file = test.name[0]
                lines += ["", f"`tests/{file}`", ""]
            lines.append(f"- {cases[test.name]} × {test.sentence} (`{test.name[1]}`)")
    return "\n".join(lines) + "\n"


def read_cases(page: str) -> dict[Name, int]:
    """How many cases each test has, as a page says."""
    cases, file = {}, ""
    for line in page.splitlines():
        if match := _FILE.fullmatch(line):
            file = match[1]
        elif match := _LINE.fullmatch(line):
            cases[file, match[2]] = int(match[1])
    return cases


def count_cases(items: Iterable[pytest.Item]) -> dict[Name, int]:
    """How many cases each marked test has, of what pytest has collected."""
    marked = (item for item in items if item.get_closest_marker("hostile"))
    return Counter((item.path.relative_to(TESTS).as_posix(), getattr(item, "originalname", "")) for item in marked)


# What a session collected: the files of which it is all, and the items.
COLLECTED = pytest.StashKey[tuple[set[str], list[pytest.Item]]]()


class _Collector:
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = list(items)


def main() -> None:
    tests = find_tests()
    collector = _Collector()
    os.chdir(TESTS.parent)
    files = sorted({f"tests/{file}" for file, _ in (test.name for test in tests)})
    with contextlib.redirect_stdout(io.StringIO()) as said:  # it lists what it collects
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], [collector])
    if status:
        sys.exit(said.getvalue())
    PAGE.write_text(render(tests, count_cases(collector.items)), encoding="utf-8")
    print(f"{PAGE}: {len(tests)} tests")


if __name__ == "__main__":
    main()
