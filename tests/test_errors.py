"""Errors for a user are messages with an exit code."""

import logging
import pickle

import pytest

from lcm_distill.errors import DivergenceError, SaveError, UsageError, WorkerError, run_program, shown


def test_errors_for_users_are_messages_with_exit_codes(capsys):
    for error, code in ((UsageError("--flag: fix it"), 2), (DivergenceError("loss is nan at step 3"), 1)):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            run_program(main)
        assert stopped.value.code == code
        assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupted_run_gets_the_flag_that_resumes_it(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == 130 and "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_the_hint_after_an_interrupt_can_be_left_out(capsys):
    def interrupt():
        raise KeyboardInterrupt

    for hint, message in (([""], "interrupted\n"), ([], "interrupted; --resume_from_checkpoint latest resumes")):
        with pytest.raises(SystemExit) as stopped:
            run_program(interrupt, *hint)
        assert stopped.value.code == 130 and capsys.readouterr().err.startswith(message)


EVIL = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202etxt.exe\u2066\ud800\u200b\x7f\x00"


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("kind", [UsageError, DivergenceError, SaveError, WorkerError])
def test_messages_hold_nothing_that_a_terminal_obeys(kind):
    """Names of files can be anything: escape sequences cleared the screen, or typed into it."""
    error = kind(f"IMAGES: {EVIL}: fix it.\n\tnaïve 猫 👩\u200d🚀 …")
    assert str(error) == f"IMAGES: {shown(EVIL)}: fix it.\n\tnaïve 猫 👩\u200d🚀 …"
    assert shown(EVIL).isprintable() and str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.hostile("folders")
def test_warnings_of_commands_hold_nothing_that_a_terminal_obeys(capsys):
    logger = logging.getLogger("lcm_distill.test")
    logger.handlers, logger.propagate = [], False
    try:
        run_program(lambda: logger.warning("%s: retrying", EVIL))
    finally:
        logger.propagate = True
    assert capsys.readouterr().err == f"{shown(EVIL)}: retrying\n"
