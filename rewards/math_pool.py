"""A pool of killable processes that run Math-Verify (`math_worker.py`).

Works from any thread and any process: time limits are kept here, by SIGKILL from outside, not by signals inside. The
workers are fresh interpreters, not forks of the trainer, so they hold none of its memory, locks or CUDA context.
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
from pathlib import Path
from typing import Final

from mua_rl.errors import UserError

PAIR_SECONDS: Final = 2.0
"""Wall-clock limit for one pair; an honest comparison takes a few milliseconds to a tenth of a second."""

WORKER_MEMORY_BYTES: Final = 1 << 30
"""Address-space limit of a worker; Math-Verify itself maps about 150 MB."""

_START_SECONDS: Final = 120.0
_WORKER_FILE: Final = Path(__file__).with_name("math_worker.py")


class GraderFault(RuntimeError):
    """The grader itself does not work (a worker cannot start): no verdict can be given, and none is made up."""


class _Worker:
    """One process. Not thread-safe: the pool hands it to one thread at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # -P: the worker's own folder must not be on its path, where this package's math.py would shadow Python's.
        command = [sys.executable, "-P", str(_WORKER_FILE), str(seconds), str(WORKER_MEMORY_BYTES)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        if self._read_reply(_START_SECONDS) != "ready":
            self.kill()
            stderr = self._process.stderr.read() if self._process.stderr else b""
            reason = stderr.decode(errors="replace")[-2000:].strip() or "no reply"
            raise GraderFault(f"the Math-Verify worker did not start: {reason}")
        if self._process.stderr:
            self._process.stderr.close()

    def judge(self, gold: str, answer: str) -> str:
        """The worker's verdict, or "timeout", or "died"; after the last two the worker is dead."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            verdict = self._read_reply(self._seconds)
        except OSError:  # the worker was killed between two pairs
            verdict = "died"
        if verdict in ("timeout", "died"):
            self.kill()
        return verdict

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def _read_reply(self, seconds: float) -> str:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        data = b""
        while not data.endswith(b"\n"):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return "timeout"
            chunk = os.read(descriptor, 4096)
            if not chunk:
                return "died"
            data += chunk
        return json.loads(data)


class MathPool:
    """Judges pairs on up to `workers` processes, started when first needed and replaced when killed.

    Args:
        workers: Most processes at once; default half of the cores this process may use, at least one, at most eight.
        seconds: Wall-clock limit for one pair.
    """

    def __init__(self, workers: int | None = None, seconds: float = PAIR_SECONDS) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or min(8, max(1, cores // 2))
        self.seconds = seconds
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.workers)
        self._owner = os.getpid()
        atexit.register(self.close)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """A verdict name for each (gold, answer) pair, in order: a worker's, "timeout" or "killed".

        Raises:
            GraderFault: A worker cannot be started.
        """
        if len(pairs) <= 1 or self.workers == 1:
            return [self._judge_one(pair) for pair in pairs]
        with ThreadPoolExecutor(min(self.workers, len(pairs))) as threads:
            return list(threads.map(self._judge_one, pairs))

    def close(self) -> None:
        """End the idle workers. The pool can be used again; it starts new ones."""
        if os.getpid() != self._owner:  # a fork's copy of the pool must not kill its parent's workers
            return
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.kill()

    def _judge_one(self, pair: tuple[str, str]) -> str:
        with self._slots:
            verdict = "died"
            for _ in range(2):  # a worker killed from outside is not the answer's fault: one more try
                worker = self._take()
                verdict = worker.judge(*pair)
                if verdict != "died":
                    break
            if verdict not in ("timeout", "died"):
                with self._lock:
                    self._idle.append(worker)
            return "killed" if verdict == "died" else verdict

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Worker(self.seconds)


_shared: MathPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> MathPool:
    """The pool of this process, made at first use; `MUA_RL_MATH_WORKERS` sets its size."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = MathPool(_workers_from_environment())
        return _shared


def _forget_after_fork() -> None:
    # A forked child makes its own pool: it cannot share the pipes, and another thread may have held the lock.
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _workers_from_environment() -> int | None:
    value = os.environ.get("MUA_RL_MATH_WORKERS")
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UserError(f"MUA_RL_MATH_WORKERS={value!r} is not a positive whole number.")
    return int(value)
