"""A single-threaded, pre-imported interpreter that forks one confined child per execution.

It is started by exec with an empty environment, so it holds nothing of the trainer's memory; it never runs untrusted
code nor sees any: sources go to the child in a file descriptor. It ends, and the kernel ends all below it, when the
trainer does, however that ends.

Control messages (SOCK_SEQPACKET): to the zygote, b"R" with file descriptors starts an execution, b"K" kills it; each
execution is answered by one wait status (4 bytes, signed, native order) once the child and all it started are gone.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import site
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from mua_rl.rewards.sandbox import candidate, isolation, script, seccomp, tester

# What solutions import; anything else of the standard library is read from the disk, in each execution.
_PRELOADED = (
    "abc", "array", "base64", "bisect", "calendar", "cmath", "collections", "collections.abc", "contextlib", "copy",
    "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools",
    "json", "math", "numbers", "operator", "queue", "random", "re", "statistics", "string", "struct", "textwrap",
    "threading", "time", "types", "typing", "unicodedata", "unittest", "zlib",
)  # fmt: skip

_NOT_LOADED = {"__main__", "antigravity", "idlelib", "test", "tests", "this", "tkinter", "turtle", "turtledemo"}

_FIRST_FD = 3  # where a child finds what it was given
_SPARE_FD = 48  # above all that a zygote has open, below RLIMIT_NOFILE


def main() -> None:
    """Run a zygote as the configuration in `sys.argv[1]` says; see `worker.Zygote` for its keys."""
    config: dict[str, Any] = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["control"])
    os.environ.clear()
    sys.argv[:] = sys.orig_argv[:] = [""]
    try:
        _preload(config)
        child_setup = _isolate(config, control)
    except (isolation.Unavailable, ImportError, OSError) as error:
        control.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    os.dup2(1, 2)  # up to here the trainer has read what went to stderr; from now on it is /dev/null, like stdout
    control.send(json.dumps({"ready": os.getpid(), "reads_confined": config.get("reads_confined", True)}).encode())
    candidate.rehearse()
    gc.collect()
    gc.freeze()  # children then write to fewer shared pages
    gc.disable()
    _serve(config, control, child_setup)


def _preload(config: dict[str, Any]) -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    site.setquit()  # `exit` and `quit`, which an interpreter without its site module lacks
    sys.path.extend(config["search_paths"])
    for name in config["modules"]:
        importlib.import_module(name)
    for key in [name for name in sys.modules if name.split(".")[0] == "__main__"]:
        del sys.modules[key]


def _load_with_submodules(name: str) -> None:
    if name.rpartition(".")[2] in _NOT_LOADED:
        return
    try:
        module = importlib.import_module(name)
    except Exception:  # it belongs to another system, or lacks a library
        return
    for submodule in pkgutil.iter_modules(getattr(module, "__path__", ())):
        _load_with_submodules(f"{name}.{submodule.name}")


def _open_to_all(folder: str) -> bool:
    parts = folder.split("/")
    return all(os.stat("/".join(parts[: n + 1]) or "/").st_mode & 0o005 == 0o005 for n in range(len(parts)))


def _readable_folders(config: dict[str, Any]) -> list[str]:
    """The standard library and the packages asked for: all that a sandbox may read."""
    folders = [os.path.dirname(os.__file__), os.path.dirname(getattr(array, "__file__", os.__file__))]
    for name in config["modules"]:
        module = sys.modules[name.split(".")[0]]
        if getattr(module, "__path__", None):
            folder = next(iter(module.__path__))
            folders += [folder, f"{folder}.libs"]
    folders = sorted({os.path.abspath(folder) for folder in folders if os.path.isdir(folder)})
    return [f for f in folders if not any(f.startswith(g + "/") and "-packages" not in f for g in folders if g != f)]


def _isolate(config: dict[str, Any], control: socket.socket) -> Callable[[], None]:
    """Isolate this process; returns what a child calls, last, before it runs anything untrusted."""
    if not seccomp.supported():
        raise isolation.Unavailable(f"no seccomp filter for {os.uname().machine}: x86_64 and aarch64 are known")
    program = seccomp.build_filter()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("1000")  # when memory runs out, the kernel is to take sandboxes, not the trainer
    if config["isolation"] == "process":
        own_id = isolation.unused_host_id() if os.geteuid() == 0 else None
        isolation.hide_memory()
        folders = _readable_folders(config)
        config["reads_confined"] = isolation.confine_reads(folders)
        capability = 0
        if own_id and not all(map(_open_to_all, folders)):  # an interpreter under /root, mode 0700
            capability = isolation.reading_capability() if config["reads_confined"] else 0
            if not capability:  # children will not be able to load anything more
                for name in [*sys.stdlib_module_names, *config["modules"]]:
                    _load_with_submodules(name)
        isolation.set_limits(config["memory_bytes"], config["threads"] if own_id else None)

        def confine_process() -> None:
            isolation.drop_to(own_id, capability)
            isolation.limit_cpu_time(config["cpu_seconds"])
            isolation.forbid_system_calls(program)

        return confine_process

    folders = _readable_folders(config)
    second_id = isolation.enter_namespaces(folders)
    _become_first_process(control)
    isolation.die_with_parent()
    isolation.hide_memory()
    faults = isolation.inspect_namespaces(folders)
    if faults:
        raise isolation.Unavailable("; ".join(faults))
    isolation.set_limits(config["memory_bytes"], config["threads"])

    def confine() -> None:
        isolation.drop_privileges(second_id)
        isolation.limit_cpu_time(config["cpu_seconds"])
        isolation.forbid_system_calls(program)

    return confine


def _become_first_process(control: socket.socket) -> None:
    """Go on as process 1 of the new pid namespace; the outer process just waits for it."""
    child = os.fork()
    if child == 0:
        return
    control.close()
    os.closerange(_FIRST_FD, 256)
    isolation.hide_memory()
    os.waitpid(child, 0)
    os._exit(0)


def _serve(config: dict[str, Any], control: socket.socket, confine: Callable[[], None]) -> None:
    strong = config["isolation"] == "strong"
    own_pids = os.pidfd_open(os.getpid()) if strong else -1
    watch = select.poll()
    watch.register(control, select.POLLIN)
    watch.register(config["trainer"], select.POLLIN)  # readable once the trainer has ended, even by SIGKILL
    child, child_fd = 0, -1
    while True:
        events = {fd for fd, _ in watch.poll()}
        if child_fd in events:
            watch.unregister(child_fd)
            os.close(child_fd)
            _, status = os.waitpid(child, 0)
            child, child_fd = 0, -1
            _send_status(control, status)
        if config["trainer"] in events:
            _end(child)
        if control.fileno() not in events:
            continue
        try:
            message, fds, _, _ = socket.recv_fds(control, 16, 8)
        except OSError:
            _end(child)
        if message == b"K":
            if child:
                os.kill(child, signal.SIGKILL)
        elif message[:1] == b"R" and not child:
            child = _fork_child(message[1:2], fds, confine, own_pids)
            for fd in fds:
                os.close(fd)
            child_fd = os.pidfd_open(child)
            watch.register(child_fd, select.POLLIN)
        else:
            _end(child)


def _send_status(control: socket.socket, status: int) -> None:
    with contextlib.suppress(OSError):
        control.send(struct.pack("=i", status))


def _end(child: int) -> None:
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os._exit(0)


def _fork_child(role: bytes, fds: list[int], confine: Callable[[], None], own_pids: int) -> int:
    """Fork into a new pid namespace: when the child ends, the kernel kills whatever it has started."""
    if own_pids >= 0:
        isolation.unshare(isolation.NEWPID)
    child = os.fork()
    if child == 0:
        try:
            _run_child(role, fds, confine)
        finally:
            os._exit(70)
    if own_pids >= 0:
        isolation.set_namespace(own_pids, isolation.NEWPID)
    return child


def _run_child(role: bytes, fds: list[int], confine: Callable[[], None]) -> None:
    """Leave only the given file descriptors, in order from 3, and /dev/null as 0, 1 and 2; then take on the role."""
    held = [os.dup2(fd, _SPARE_FD + i) for i, fd in enumerate(fds)]
    os.closerange(_FIRST_FD, _SPARE_FD)
    for i, fd in enumerate(held):
        os.dup2(fd, _FIRST_FD + i)
    os.closerange(_SPARE_FD, 256)
    gc.enable()  # what was there at the fork stays frozen
    gc.set_threshold(10_000, 20, 20)  # most programs end before there is anything to collect
    confine()
    if role == b"T":
        tester.serve(_FIRST_FD)
        return
    with os.fdopen(_FIRST_FD, "rb") as file:
        job = json.loads(file.read())
    if role == b"S":
        script.run_script(job, stdin_fd=_FIRST_FD + 1, stdout_fd=_FIRST_FD + 2)
    elif role == b"C":
        candidate.serve_calls(job, channel_fd=_FIRST_FD + 1)
