"""The exceptions that command lines turn into a single clear line: unusable input, and a run that diverged."""

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130
"""The exit code of a command that was interrupted from the keyboard, as shells have it."""
_MAIN_FIRST = 10.0  # seconds
_DISK = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "have it made writable"}
"""What helps where a disk is full, a quota is used up, or a file system can only be read."""


class UserError(ValueError):
    """Input that cannot be used. The message names the fault and the cure, in one sentence or two."""


class Diverged(RuntimeError):
    """Training has left the finite numbers; the message says where."""


def one_line(error: object, most: int = 400) -> str:
    """What an error of somebody else's says, on one line of at most so many characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= most else f"{line[:most]} …"


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; print a `UserError` as one line on stderr and exit with code 2, a `Diverged` likewise with code 3.

    A disk that takes no more is the user's too: whatever writes says so in an exception of its own kind.
    """
    try:
        main()
    except UserError as error:
        _leave(f"mua_rl: error: {error}", 2)
    except Diverged as error:
        _leave(f"mua_rl: the run diverged: {error}; try a quarter of the learning rate with --lr.", 3)
    except KeyboardInterrupt:
        _leave("mua_rl: interrupted.", INTERRUPTED)
    except Exception as error:
        cure = next((cure for number, cure in _DISK.items() if os.strerror(number) in str(error)), None)
        if cure is None:
            raise
        onward = "go on with --resume where a run has begun, else by the same command"
        _leave(f"mua_rl: error: {one_line(error)}: {cure}, and {onward}.", 2)


def _leave(message: str, code: int) -> NoReturn:
    """One line for all processes of a run: the launcher ends the others when the main one has spoken.

    Where it does not, the fault is this process's alone, and it speaks.
    """
    from mua_rl import processes

    if not processes.is_main():
        time.sleep(_MAIN_FIRST)
    print(message, file=sys.stderr)
    sys.exit(code)
