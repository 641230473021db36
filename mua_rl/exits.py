"""How a command ends: its exit code, and the one line that says why."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn

from mua_rl.errors import CannotLearn, Diverged, EngineFailed, PolicyWorse, Unscored, UserError, one_line


class ExitCode(IntEnum):
    """The exit codes of every command; shells see them as plain numbers."""

    OK = 0
    """The command did what it was asked to do."""
    UNUSABLE = 2
    """Something that was given cannot be used, or the disk takes no more."""
    DIVERGED = 3
    """The run left the finite numbers."""
    ENGINE_FAILED = 4
    """The inference engine failed; the run goes on with `--resume`."""
    WORSE = 5
    """The policy ended worse than it began."""
    UNSCORED = 6
    """No step could teach anything: no reward gave a score, for example."""
    STOPPED = 7
    """The run was stopped, since it could not learn any more."""
    INTERRUPTED = 130
    """The command was interrupted from the keyboard, as shells have it."""


_MAIN_FIRST_SECONDS = 10.0
_CURES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "have it made writable"}
"""What helps where a disk is full, a quota is used up, or a file system can only be read."""


def run_command(main: Callable[[], None], after_interrupt: str = "") -> None:
    """Run `main`; end an unusual run with one line on stderr and its own exit code.

    Args:
        main: The command.
        after_interrupt: How a command goes on that was interrupted; "" where there is no such way.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a locale that has no α, an α is no reason to end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        code = ExitCode.UNSCORED if isinstance(error, Unscored) else ExitCode.UNUSABLE
        leave(f"mua_rl: error: {error}", code)
    except Diverged as error:
        leave(f"mua_rl: the run diverged: {error}; try a quarter of the learning rate with --lr.", ExitCode.DIVERGED)
    except CannotLearn as error:
        leave(f"mua_rl: the run was stopped: {error}.", ExitCode.STOPPED)
    except PolicyWorse as error:
        leave(f"mua_rl: {error}", ExitCode.WORSE)
    except EngineFailed as error:
        leave(f"mua_rl: {error}; go on with --resume and the run folder.", ExitCode.ENGINE_FAILED)
    except KeyboardInterrupt:
        leave("; ".join(filter(None, ["mua_rl: interrupted", after_interrupt])) + ".", ExitCode.INTERRUPTED)
    except Exception as error:  # whatever writes reports a full disk in an exception of its own kind
        cure = next((cure for number, cure in _CURES.items() if os.strerror(number) in str(error)), None)
        if cure is None:
            raise
        onward = "go on with --resume where a run has begun, else by the same command"
        leave(f"mua_rl: error: {one_line(error)}: {cure}, and {onward}.", ExitCode.UNUSABLE)


def leave(message: str, code: ExitCode) -> NoReturn:
    """Print one line for all processes of a run and exit.

    The launcher ends the other processes when the main one has spoken. Where it does not, the fault is this process's
    alone, and it speaks after a while.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_MAIN_FIRST_SECONDS)
    print(message, file=sys.stderr)
    sys.exit(code)
