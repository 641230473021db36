"""A pool of killable processes for verifiers that may hang, crash or fill the memory on a policy's output.

Works from any thread and any process: time limits are kept here, by SIGKILL from outside, not by signals inside. The
workers are fresh interpreters, not forks of the trainer, so they hold none of its memory, locks or CUDA context. They
run the trusted libraries of this package's own verifiers; a policy's programs run in `mua_rl.rewards.sandbox` instead.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any, Final

from mua_rl.errors import UserError
from mua_rl.rewards.faults import GraderFault

REQUEST_SECONDS: Final = 2.0
"""Wall-clock limit for one request; an honest one takes a few milliseconds to a tenth of a second."""

WORKER_MEMORY_BYTES: Final = 1 << 30
"""Address-space limit of a worker; Math-Verify itself maps about 150 MB."""

_START_SECONDS: Final = 600.0
"""Loading takes a second, on a machine that is very busy a minute or two; a worker that fails ends at once."""


class Failure(StrEnum):
    """Why a request has no reply."""

    TIMEOUT = "timeout"
    """The reply took longer than the limit, twice."""
    KILLED = "killed"
    """The worker crashed on the request, twice."""
    MEMORY = "memory"
    """The worker reached its memory limit on the request."""
    ERROR = "error"
    """The verifier raised."""


def _is_fatal(reply: Any) -> bool:
    """Whether the worker did not outlive the request."""
    return reply is Failure.TIMEOUT or reply is Failure.KILLED


class _Worker:
    """One process. Not thread-safe: the pool hands it to one thread at a time."""

    def __init__(self, module: str, seconds: float) -> None:
        self._seconds = seconds
        # -P: no folder of ours on the worker's path, where rewards/math.py would shadow Python's.
        command = [sys.executable, "-P", "-m", module, str(seconds), str(WORKER_MEMORY_BYTES)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        if self._read_reply(_START_SECONDS) != "ready":
            self.kill()
            assert self.process.stderr is not None
            reason = self.process.stderr.read().decode(errors="replace")[-2000:].strip() or "no reply"
            raise GraderFault(f"the worker {module} did not start: {reason}")
        assert self.process.stderr is not None
        self.process.stderr.close()

    def ask(self, request: Any) -> Any:
        """The worker's reply, or a `Failure`; after a timeout or a crash the worker is dead."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            reply = self._read_reply(self._seconds)
        except OSError:  # the worker was killed between two requests
            reply = Failure.KILLED
        if _is_fatal(reply):
            self.kill()
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def _read_reply(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + seconds
        data = b""
        while not data.endswith(b"\n"):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return Failure.TIMEOUT
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return Failure.KILLED
            data += chunk
        reply = json.loads(data)
        return Failure(reply["failure"]) if "failure" in reply else reply["value"]


class WorkerPool:
    """Asks up to `workers` processes of one kind, started when first needed and replaced when killed.

    Args:
        module: The module that the workers run, which calls `mua_rl.rewards.worker_loop.serve`.
        workers: Most processes at once; default one for each core this process may use, at most 16. They run at a
            lower priority, and mostly while the trainer waits for them.
        seconds: Wall-clock limit for one request.
    """

    def __init__(self, module: str, workers: int | None = None, seconds: float = REQUEST_SECONDS) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.module = module
        self.workers = workers or min(16, cores)
        self.seconds = seconds
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.workers)
        self._owner = os.getpid()
        atexit.register(self.close)

    def ask(self, requests: Sequence[Any]) -> list[Any]:
        """The reply to each request, in order, or the `Failure` that it met.

        Args:
            requests: Values that JSON can carry.

        Raises:
            GraderFault: A worker cannot be started.
        """
        if len(requests) <= 1 or self.workers == 1:
            return [self._ask_one(request) for request in requests]
        with ThreadPoolExecutor(min(self.workers, len(requests))) as threads:
            return list(threads.map(self._ask_one, requests))

    def close(self) -> None:
        """End the idle workers. The pool can be used again; it starts new ones."""
        if os.getpid() != self._owner:  # a fork's copy of the pool must not kill its parent's workers
            return
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.kill()

    def _ask_one(self, request: Any) -> Any:
        with self._slots:
            worker = self._take()
            reply = worker.ask(request)
            if _is_fatal(reply):  # for the machine's load or from outside, perhaps: a new worker has one more try
                worker = _Worker(self.module, self.seconds)
                reply = worker.ask(request)
            if not _is_fatal(reply):
                with self._lock:
                    self._idle.append(worker)
            return reply

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Worker(self.module, self.seconds)


_shared: dict[str, WorkerPool] = {}
_shared_lock = threading.Lock()


def shared_pool(module: str) -> WorkerPool:
    """This process's pool of workers of one kind, made at first use; `MUA_RL_REWARD_WORKERS` sets its size."""
    with _shared_lock:
        if module not in _shared:
            _shared[module] = WorkerPool(module, _workers_from_environment())
        return _shared[module]


def _forget_after_fork() -> None:
    # A forked child makes its own pools: it cannot share the pipes, and another thread may have held the lock.
    global _shared, _shared_lock
    _shared, _shared_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _workers_from_environment() -> int | None:
    value = os.environ.get("MUA_RL_REWARD_WORKERS")
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UserError(f"MUA_RL_REWARD_WORKERS={value!r} is not a positive whole number.")
    return int(value)
