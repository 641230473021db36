"""A study of one process that is kept in a sweep's CSV alone: what the scripts of the reproductions go on with."""

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mua_rl.analysis.rows import SweepRow, append, read_all
from mua_rl.run.machine import machine
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.search import Plan


class CSVStudy:
    """What `mua_rl.sweep.work` asks of a study; its threads share it, and trials that the CSV has are not repeated.

    Args:
        path: The CSV, which may have runs of other sweeps too.
        key: The algorithm, the task and the base of the sweep, which tell its rows from those.
        device: What trains, as PyTorch calls it; for the column `machine`.
    """

    def __init__(self, path: Path, key: tuple[str, str, str], device: str | None = None) -> None:
        self.path, self.key, self.machine = path, key, machine(device)
        self.lock = threading.Lock()
        self.waiting: list[Trial] = []
        self.running: list[Trial] = []

    def rows(self) -> list[SweepRow]:
        """The sweep's rows, each run once.

        Raises:
            UserError: The CSV cannot be read.
        """
        rows = read_all([self.path]) if self.path.exists() else []
        return [row for row in rows if (row.algorithm, row.task, row.base) == self.key]

    def outcomes(self) -> dict[Trial, TrialResult]:
        """What the trials have reached so far."""
        return {row.trial: row.result for row in self.rows()}

    def plan(self, plans: Sequence[Plan]) -> bool:
        """See `Study.plan`."""
        with self.lock:
            outcomes, busy = self.outcomes(), {trial.spec for trial in (*self.waiting, *self.running)}
            idle = [plan for plan in plans if plan.spec not in busy]
            self.waiting += [trial for plan in idle for trial in plan.next_trials(outcomes)]
            self.waiting.sort(key=lambda trial: trial.spec.rank or 0)  # a group is padded to its largest rank
            return bool(self.waiting or self.running)

    def claim(self, at_most: int, group: Callable[[Trial], Hashable]) -> list[Trial]:
        """See `Study.claim`."""
        with self.lock:
            trials = [trial for trial in self.waiting if group(trial) == group(self.waiting[0])][:at_most]
            self.waiting = [trial for trial in self.waiting if trial not in trials]
            self.running += trials
            return trials

    def finish(self, trial: Trial, outcome: TrialResult) -> bool:
        """See `Study.finish`."""
        append(self.path, [SweepRow(*self.key, trial, outcome, self.machine)])
        self.release(trial)
        return True

    def release(self, trial: Trial) -> None:
        """See `Study.release`."""
        with self.lock:
            self.running.remove(trial)

    def reap(self) -> None:
        """See `Study.reap`: all workers are threads of this process."""

    def heartbeat(self) -> AbstractContextManager:
        """See `Study.heartbeat`."""
        return nullcontext()
