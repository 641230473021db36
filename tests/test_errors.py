"""A command line that fails in a known way says so in one line and exits with a code of its own."""

import pytest

from mua_rl.errors import Diverged, UserError, exit_on_user_error


@pytest.mark.parametrize(("error", "code"), [(UserError("no such rank"), 2), (Diverged("at step 7"), 3)])
def test_known_failures_are_one_line_and_an_exit_code(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(main)
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert str(error) in printed
    assert len(printed.splitlines()) == 1
