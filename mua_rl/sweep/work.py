"""A worker's part of a sweep: plan, take what waits, run it, write it down, until nothing is left."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.backend import Backend, Stopped
from mua_rl.sweep.search import Search
from mua_rl.sweep.study import Study

POLL_SECONDS = 1.0

OnOutcome = Callable[[Trial, TrialResult], None]


def work(
    study: Study,
    searches: Sequence[Search],
    backend: Backend,
    on_outcome: OnOutcome,
    deadline: float,
    stop: threading.Event,
) -> bool:
    """Run trials until the searches want no more, by whichever workers.

    Args:
        on_outcome: Called with each trial that this worker has run.
        deadline: `time.monotonic()` after which nothing new is started.
        stop: Ends the work when it is set.

    Returns:
        Whether all is done, rather than that time was up or the work stopped.
    """
    while time.monotonic() < deadline and not stop.is_set():
        study.reap()
        if not study.plan(searches):
            return True
        claims = study.claim(backend.at_once, backend.group)
        if not claims:  # other workers run what there is
            stop.wait(POLL_SECONDS)
            continue
        try:
            outcomes = backend.run([claim.trial for claim in claims])
        except BaseException:  # an interruption too: the trials can go to others at once
            for claim in claims:
                study.release(claim)
            raise
        for claim, outcome in zip(claims, outcomes, strict=True):
            if study.finish(claim, outcome):
                on_outcome(claim.trial, outcome)
    return False


def work_together(
    study: Study,
    searches: Sequence[Search],
    backends: Sequence[Backend],
    on_outcome: OnOutcome,
    deadline: float,
    stop: threading.Event,
) -> bool:
    """One worker for each backend, in this process; the first that fails ends them all.

    Args:
        stop: The one that the backends listen to.
        Others: As `work`.

    Returns:
        As `work`.

    Raises:
        UserError: As `Backend.run`.
    """
    with study.heartbeat():
        if len(backends) == 1:  # in the main thread, where signals and their timeouts work
            return work(study, searches, backends[0], on_outcome, deadline, stop)
        with ThreadPoolExecutor(len(backends)) as pool:
            futures = [pool.submit(work, study, searches, backend, on_outcome, deadline, stop) for backend in backends]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
    failures = [failure for future in futures if (failure := future.exception())]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
        raise failure  # the cause rather than what it stopped
    return all(future.result() for future in futures)
