"""A worker's part of a sweep: plan, take what waits, run it, write it down, until nothing is left."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.backend import Backend, Stopped
from mua_rl.sweep.csv_study import CSVStudy
from mua_rl.sweep.search import Plan
from mua_rl.sweep.study import Study

POLL_SECONDS = 1.0

OnOutcome = Callable[[Trial, TrialResult], None]


def work(
    study: Study | CSVStudy,
    plans: Sequence[Plan],
    backend: Backend,
    on_outcome: OnOutcome,
    deadline: float,
    stop: threading.Event,
) -> bool:
    """Run trials until the plans want no more, by whichever workers.

    Args:
        on_outcome: Called with each trial that this worker has run.
        deadline: `time.monotonic()` after which nothing new is started.
        stop: Ends the work when it is set.

    Returns:
        Whether all is done, rather than that time was up or the work stopped.
    """
    while time.monotonic() < deadline and not stop.is_set():
        study.reap()
        if not study.plan(plans):
            return True
        trials = study.claim(backend.at_once, backend.group)
        if not trials:  # other workers run what there is
            stop.wait(POLL_SECONDS)
            continue
        try:
            outcomes = backend.run(trials)
        except BaseException:  # an interruption too: the trials can go to others at once
            for trial in trials:
                study.release(trial)
            raise
        for trial, outcome in zip(trials, outcomes, strict=True):
            if study.finish(trial, outcome):
                on_outcome(trial, outcome)
    return False


def work_together(
    study: Study | CSVStudy,
    plans: Sequence[Plan],
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
            return work(study, plans, backends[0], on_outcome, deadline, stop)
        with ThreadPoolExecutor(len(backends)) as pool:
            futures = [pool.submit(work, study, plans, backend, on_outcome, deadline, stop) for backend in backends]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
    failures = [failure for future in futures if (failure := future.exception())]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
        raise failure  # the cause rather than what it stopped
    return all(future.result() for future in futures)
