"""Errors for a user are messages with an exit code."""

import pytest

from lcm_distill.errors import DivergenceError, UsageError, run_program


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
