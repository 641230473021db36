"""A pool of workers that grades programs from any thread of the trainer."""

import atexit
import logging
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from mua_rl.errors import UserError
from mua_rl.rewards.faults import BadRow, GraderFault
from mua_rl.rewards.sandbox import selftest
from mua_rl.rewards.sandbox.row import Row
from mua_rl.rewards.sandbox.settings import Settings
from mua_rl.rewards.sandbox.verdict import Reason, Verdict
from mua_rl.rewards.sandbox.worker import Died, TestsDied, Worker

_log = logging.getLogger(__name__)

MAX_SOURCE_BYTES: Final = 1 << 20
"""Longest program that is run; a longer one is an error without being run."""


class Pool:
    """Workers, one for each core unless told otherwise. Use as a context manager, or `close` it.

    The first worker tests its own sandbox before anything is graded.

    Raises:
        UserError: The isolation asked for cannot be had here, or a protection does not hold. Nothing weaker is taken
            in its stead.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._lock = threading.Lock()
        self._closed = False
        self._process_id = os.getpid()
        self._workers: set[Worker] = set()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # None: a place whose worker is yet to start
        self.size = self.settings.workers or len(os.sched_getaffinity(0))
        first = self._start_worker()
        try:
            _test_sandbox(first)
        except BaseException:
            first.close()
            raise
        if not first.programs.reads_confined:
            _log.warning("this kernel has no Landlock: programs can read every file that this account can")
        for _ in range(self.size - 1):
            self._idle.put(None)
        self._idle.put(first)
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="code-reward")
        atexit.register(self.close)

    def run(self, source: str, row: Row, fraction: bool = False) -> Verdict:
        """Grade one program; from any thread, waiting for an idle worker.

        Args:
            source: The program, as text: nothing of it is parsed or compiled in this process.
            row: Its tests.
            fraction: Go on after a failed test, to count those passed.

        Returns:
            A verdict, `Reason.CRASHED` if the program's run broke its sandbox or its tests' process twice.

        Raises:
            BadRow: The tests themselves cannot be run.
            GraderFault: The sandbox fails, also on a program that does nothing.
        """
        if len(source) > MAX_SOURCE_BYTES:
            return Verdict(Reason.ERROR, detail=f"more than {MAX_SOURCE_BYTES} characters of code")
        worker = self._idle.get()
        fault: Died | None = None
        try:
            for _ in range(2):
                try:
                    worker = worker or self._start_worker()
                    return worker.run(source, row, fraction)
                except TestsDied as error:
                    fault = error
                except Died as error:
                    fault, broken, worker = error, worker, None
                    self._discard(broken)
                except BadRow:
                    raise
                except BaseException:  # whatever state that leaves the worker in
                    broken, worker = worker, None
                    self._discard(broken)
                    raise
            if worker is None:
                worker = self._start_serving_worker(fault)
        finally:
            self._idle.put(worker)
        _log.warning("the sandbox failed twice on one program, which gets 0 (%s): %.200r", fault, source)
        return Verdict(Reason.CRASHED, detail=f"the sandbox failed twice on it: {fault or 'a zygote died'}")

    def _start_serving_worker(self, fault: Died | None) -> Worker:
        """A new worker, tried on a harmless program: some programs break sandboxes, and some sandboxes are broken."""
        worker = self._start_worker()
        try:
            worker.run(selftest.HARMLESS, selftest.HARMLESS_ROW, seconds=10.0)
        except Died as error:
            self._discard(worker)
            raise GraderFault(f"the sandbox failed twice on one program: {fault or 'a zygote died'}") from error
        return worker

    def grade(self, jobs: Sequence[tuple[str, Row]], fraction: bool = False) -> list[Verdict | BadRow]:
        """Grade many programs on all workers, identical ones once; the order is that of `jobs`.

        Raises:
            GraderFault: The sandbox failed.
        """
        futures = {}
        for job in jobs:
            if job not in futures:
                futures[job] = self._threads.submit(self._run_or_bad_row, *job, fraction)
        return [futures[job].result() for job in jobs]

    def _run_or_bad_row(self, source: str, row: Row, fraction: bool) -> Verdict | BadRow:
        try:
            return self.run(source, row, fraction)
        except BadRow as error:
            return error

    def _start_worker(self) -> Worker:
        worker = Worker(self.settings)
        with self._lock:
            if not self._closed:
                self._workers.add(worker)
                return worker
        worker.close()
        raise GraderFault("the pool is closed")

    def _discard(self, worker: Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._workers.discard(worker)
            worker.close()

    def close(self) -> None:
        """End all sandboxes; executions in progress fail. In a fork of the process that made the pool: nothing."""
        if os.getpid() != self._process_id:
            return
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        atexit.unregister(self.close)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _test_sandbox(worker: Worker) -> None:
    isolation = worker.settings.isolation
    threads_limited = isolation == "strong" or os.geteuid() == 0
    try:
        missing = [
            name
            for name, row in selftest.probe_rows(isolation, threads_limited).items()
            if not worker.run(selftest.PROBE, row, seconds=10.0).ok
        ]
        if worker.run(selftest.SLEEPER, selftest.SLEEPER_ROW, seconds=0.2).reason is not Reason.TIMEOUT:
            missing.append("time beyond its limit")
    except (BadRow, Died) as error:
        raise GraderFault(f"the sandbox's self-test did not run: {error or 'a zygote died'}") from error
    if missing:
        raise UserError(
            f"the {isolation} sandbox does not keep programs from: {', '.join(missing)}. Nothing is graded in it."
        )
