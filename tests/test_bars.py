"""How far long work is: bars in a terminal, lines at intervals elsewhere."""

import io
import re

import pytest
from tqdm import std

from lcm_distill import bars


class Clock:
    """tqdm's clock, which stands where it is set."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(std, "time", lambda: self.now)


@pytest.fixture()
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture()
def screen(monkeypatch):
    """stderr; `screen(True)` makes it a terminal."""

    def make(terminal: bool) -> io.StringIO:
        file = io.StringIO()
        file.isatty = lambda: terminal
        monkeypatch.setattr("sys.stderr", file)
        return file

    return make


def test_a_file_gets_lines_at_growing_intervals_and_no_carriage_return(clock, screen):
    """In a cluster's log a run was one line of 200,000 characters, and `tail -f` showed none of it."""
    log, seen = screen(False), []
    with bars.progress_bar("packing", unit="picture", total=2000) as bar:
        for second in range(1, 201):
            clock.now += 1
            bar.update(10)
            if len(log.getvalue().splitlines()) > len(seen):
                seen.append(second)
    lines = log.getvalue().splitlines()
    gaps = [later - earlier for earlier, later in zip(seen, seen[1:], strict=False)]
    assert seen[0] == 10 and gaps == sorted(gaps) and 10 < gaps[0] < gaps[-1] <= 60
    assert "\r" not in log.getvalue() and len(lines) == len(seen) + 1
    assert lines[0] == "packing: 100 of 2000 (5 %), 00:10 elapsed, 03:10 left, 10 pictures/s"
    assert lines[-1] == "packing: 2000 of 2000 (100 %), 03:20 elapsed, 00:00 left, 10 pictures/s"


def test_short_work_prints_no_line(clock, screen):
    log = screen(False)
    with bars.progress_bar("encoding", unit="picture") as bar:
        for _ in range(9):
            clock.now += 1
            bar.update()
    assert log.getvalue() == ""


def test_a_total_may_come_later_and_values_wait_for_the_next_line(clock, screen):
    log = screen(False)
    with bars.progress_bar("encoding", unit="picture", leave=False) as bar:
        clock.now += 20
        bar.update(5)
        bar.set_postfix_str("loss 0.5")
        bar.total = 10
        clock.now += 40
        bar.update(1)
    first, second = log.getvalue().splitlines()  # without `leave` there is no last one
    assert first == "encoding: 5, 00:20 elapsed, 4 s per picture"
    timed = r"encoding: 6 of 10 \(60 %\), 01:00 elapsed, \d\d:\d\d left, \S+ s per picture, loss 0.5"
    assert re.fullmatch(timed, second)


def test_a_terminal_gets_a_bar_and_text_stands_above_it(clock, screen, capsys):
    terminal = screen(True)
    with bars.progress_bar("steps", unit="step", total=4) as bar:
        clock.now += 2
        bar.update(2)
        bars.say("a row is done \x1b[2J")
    assert capsys.readouterr().out == "a row is done ?[2J\n"
    states = terminal.getvalue().split("\r")
    half = r"steps:  50%\|.*\| 2 of 4 \[00:02 elapsed, 00:02 left, 1 steps/s\]"
    assert any(re.search(half, state) for state in states)


def test_a_process_that_is_not_the_main_one_shows_nothing(clock, screen):
    for terminal in (True, False):
        log = screen(terminal)
        with bars.progress_bar("steps", unit="step", total=4, disable=True) as bar:
            clock.now += 100
            bar.update()
            bar.set_postfix_str("loss 1")
        assert log.getvalue() == ""
