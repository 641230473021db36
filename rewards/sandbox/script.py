"""The side of the untrusted code, for programs that read standard input: run one as `python solution.py` would.

Nothing here decides anything: the code under test can change all of it, and gains nothing but wrong answers.
"""

import atexit
import builtins
import io
import os
import sys
import threading
from typing import Any

from mua_rl.rewards.sandbox import candidate

OUT_OF_MEMORY_STATUS = 77
"""Exit status of a script that ended with a MemoryError; it serves the verdict's reason only."""

_DEVICES = {"/dev/null": 2}  # where a sandbox's standard error goes
for _fd, _name in enumerate(("/dev/stdin", "/dev/stdout", "/dev/stderr")):
    _DEVICES |= {_name: _fd, f"/dev/fd/{_fd}": _fd, f"/proc/self/fd/{_fd}": _fd}


def run_script(job: dict[str, Any], stdin_fd: int, stdout_fd: int) -> None:
    """Run `job["source"]` on the given standard input and output; never returns."""
    os.dup2(stdin_fd, 0)
    os.dup2(stdout_fd, 1)
    os.closerange(stdin_fd, stdout_fd + 1)
    builtins.open = io.open = _open
    module = candidate.new_module("__main__")
    status = 0
    try:
        candidate.load(job, module)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except MemoryError:
        status = OUT_OF_MEMORY_STATUS
    except BaseException:
        status = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as at interpreter exit: wait for threads, run exit hooks
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    os._exit(status & 0xFF)


_open_file = open


def _open(file: Any, *args: Any, **kwargs: Any) -> Any:
    """`open`, in a sandbox that has no /dev: its standard streams go by their names there too."""
    name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""
    fd = _DEVICES.get(name) if isinstance(name, str) else None
    return _open_file(file if fd is None else os.dup(fd), *args, **kwargs)
