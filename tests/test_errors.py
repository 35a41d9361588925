"""Errors for a user are messages with an exit code."""

import pytest

from lcm_distill.errors import DivergenceError, UsageError, run_program


def test_errors_for_users_are_messages_with_exit_codes(capsys):
    for error, code in ((UsageError("--flag: mend it"), 2), (DivergenceError("loss is nan at step 3"), 1)):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            run_program(main)
        assert stopped.value.code == code
        assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == 130 and "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_an_interrupted_command_speaks_of_no_checkpoint(capsys):
    def interrupt():
        raise KeyboardInterrupt

    for go_on, said in (([""], "interrupted\n"), ([], "interrupted; go on from the last checkpoint")):
        with pytest.raises(SystemExit) as stopped:
            run_program(interrupt, *go_on)
        assert stopped.value.code == 130 and capsys.readouterr().err.startswith(said)
