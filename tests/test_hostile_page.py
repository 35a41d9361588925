"""tests/HOSTILE.md lists every test of hostile input, with its number of cases."""

import pytest
from hostile import COLLECTED, KINDS, PAGE, count_cases, find_tests, read_cases, render

MANUAL = '''"""A file of tests."""
import pytest

pytestmark = [pytest.mark.skipif(False, reason=""), pytest.mark.hostile("disks")]

@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.hostile("shards")
def test_a_tar_of_zeros(n):
    """Zeros to its end:
    61 samples were missing.

    More.
    """

def test_the_reader_s_memory_is_full():
    pass
'''


def test_the_page_is_current(request):
    """`python -m tests.hostile` writes it. The cases of a file are compared where pytest has collected all of it."""
    tests, cases = find_tests(), read_cases(PAGE.read_text(encoding="utf-8"))
    whole, counted = request.config.stash[COLLECTED]
    collected = {name: number for name, number in count_cases(counted).items() if name[0] in whole}
    assert set(collected) <= {test.name for test in tests}, "the marker is for functions and files, not for one case"
    missing = [test.name for test in tests if test.name not in cases | collected]
    assert not missing, f"run python -m tests.hostile: {missing}"
    assert PAGE.read_text(encoding="utf-8") == render(tests, cases | collected), "run python -m tests.hostile"
    assert {kind for test in tests for kind in test.kinds} == set(KINDS)


def test_marked_tests_are_found_in_their_source(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "test_it.py").write_text(MANUAL)
    zeros, full = find_tests(tmp_path)
    assert zeros == (
        ("run/test_it.py", "test_a_tar_of_zeros"),
        ("disks", "shards"),
        "A tar of zeros: Zeros to its end: 61 samples were missing.",
    )
    assert full == (("run/test_it.py", "test_the_reader_s_memory_is_full"), ("disks",), "The reader's memory is full")
    cases = {zeros.name: 2, full.name: 1}
    page = render([zeros, full], cases)
    assert "2 tests with 3 cases" in page and "| 1 | 2 |" in page and "| 2 | 3 |" in page
    assert read_cases(page) == cases


@pytest.mark.parametrize("given", ['("tars")', "()", "", '("shards", "disks")'])
def test_a_kind_that_is_none_is_refused(tmp_path, given):
    (tmp_path / "test_it.py").write_text(f"@pytest.mark.hostile{given}\ndef test_it():\n    pass\n")
    with pytest.raises(ValueError, match="test_it.py: test_it: hostile takes one of shards, "):
        find_tests(tmp_path)
