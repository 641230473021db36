"""A command line that fails in a known way says so in one line and exits with a code of its own."""

import errno
import os

import pytest

from mua_rl.errors import Diverged, UserError
from mua_rl.exits import run_command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such rank"), 2),
        (Diverged("at step 7"), 3),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2),
        (RuntimeError("serializing: No space left on device (os error 28)"), 2),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 2),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), 2),
    ],
)
def test_known_failures_are_one_line_and_an_exit_code(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert str(error) in printed
    assert len(printed.splitlines()) == 1


def test_an_unknown_failure_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))


def test_an_interrupted_command_says_so_and_exits_as_shells_expect(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "mua_rl: interrupted."
