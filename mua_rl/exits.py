"""How a command ends: its exit code, and the one line that says why."""

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn

from mua_rl.errors import (
    CannotLearn,
    Diverged,
    EngineFailed,
    NoRate,
    PolicyWorse,
    Terminated,
    Unscored,
    UserError,
    one_line,
    without_password,
)


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
    NO_RATE = 8
    """The sweep has ended and found no learning rate."""
    INTERRUPTED = 130
    """The command was interrupted from the keyboard, as shells have it."""
    TERMINATED = 143
    """The run was ended by SIGTERM, as shells have it, and has saved a checkpoint where it had taken a step."""


_MAIN_FIRST_SECONDS = 10.0
_ROOM = "the disk takes no more: make room"
_LEAVE = "a file or folder cannot be written: have it made writable, or name another"
_UNWRITTEN = {
    os.strerror(errno.ENOSPC): _ROOM,
    os.strerror(errno.EDQUOT): _ROOM,
    os.strerror(errno.EFBIG): _ROOM,
    "database or disk is full": _ROOM,
    # What torch.save says of a full disk (pytorch#76108): the stream has failed, the archive is shorter than it thinks.
    "iostream error": _ROOM,
    ". unexpected pos": _ROOM,
    "PytorchStreamWriter failed": _ROOM,
    os.strerror(errno.EROFS): _LEAVE,
    "attempt to write a readonly database": _LEAVE,
}
"""What those who write say of a disk that takes no more, in exceptions of many kinds, and what helps."""
_FORBIDDEN = (errno.EACCES, errno.EPERM)


def run_command(main: Callable[[], None], after_interrupt: str = "") -> None:
    """Run `main`; end an unusual run with one line on stderr and its own exit code.

    Args:
        main: The command.
        after_interrupt: How a command goes on that was interrupted; "" where there is no such way.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a locale that has no α, an α is no reason to end a run
            stream.reconfigure(errors="backslashreplace")
    # PEFT imports bitsandbytes where it is installed, which warns of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
    except NoRate as error:
        leave(f"mua_rl: {error}", ExitCode.NO_RATE)
    except EngineFailed as error:
        leave(f"mua_rl: {error}; go on with --resume and the run folder.", ExitCode.ENGINE_FAILED)
    except Terminated as error:
        leave(f"mua_rl: {error}.", ExitCode.TERMINATED)
    except KeyboardInterrupt:
        leave("; ".join(filter(None, ["mua_rl: interrupted", after_interrupt])) + ".", ExitCode.INTERRUPTED)
    except Exception as error:
        cure = _cure(error)
        if cure is None:
            raise
        onward = "go on with --resume where a run has begun, else by the same command"
        leave(f"mua_rl: error: {cure}, and {onward} ({one_line(error)}).", ExitCode.UNUSABLE)


def _cure(error: BaseException) -> str | None:
    """What helps against an exception that says, or was raised over one that says, that something cannot be written."""
    while True:
        said = str(error)
        if isinstance(error, OSError) and error.errno in _FORBIDDEN and error.filename is not None:
            return _LEAVE
        if cure := next((cure for sign, cure in _UNWRITTEN.items() if sign in said), None):
            return cure
        inner = error.__cause__ or error.__context__
        if inner is None:
            return None
        error = inner


def leave(message: str, code: ExitCode) -> NoReturn:
    """Print one line for all processes of a run and exit.

    The launcher ends the other processes when the main one has spoken. Where it does not, the fault is this process's
    alone, and it speaks after a while.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_MAIN_FIRST_SECONDS)
    print(without_password(message), file=sys.stderr)
    sys.exit(code)
