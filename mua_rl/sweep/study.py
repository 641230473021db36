"""The study of a sweep: which trials wait, run and are done, kept by Optuna where many processes can share it.

Optuna stores and hands out; what is tried is decided in `mua_rl.sweep.search`. Each trial is one of Optuna's, enqueued
with fixed parameters. It is popped by one worker alone, which signs it and gives signs of life while it runs; a trial
whose worker is dead is given up, and planned anew. Optuna's own heartbeat and retry do not serve: they beat in
`Study.optimize` alone, and in no journal (`tests/test_sweep_study.py` shows it). Two workers that plan at once may
enqueue a trial twice: the earlier one counts.
"""

import fcntl
import itertools
import json
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from mua_rl.errors import UserError, one_line, without_password
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import differences
from mua_rl.sweep.search import Plan
from mua_rl.sweep.worker import Watch, Worker, heartbeat

ARM, OUTCOME, WORKER, SETTINGS, FACTS, SIGN = "arm", "outcome", "worker", "settings", "facts", "sign of life: "
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
PARAMETERS: dict[str, BaseDistribution] = {
    "rank": IntDistribution(0, 1_000_000),
    "init": CategoricalDistribution(["A", "B"]),
    "alpha_constant": FloatDistribution(0, 1e9),
    "alpha_exponent": FloatDistribution(-100, 100),
    "log2_lr": FloatDistribution(-100, 0),
    "seed": IntDistribution(0, 2**32),
}
"""What Optuna's own tools show of a trial; rank 0 is FFT."""


class Study:
    """A sweep's study, as one process sees it.

    Args:
        study: Optuna's.
        lock: Held while trials are planned and claimed. A database server needs none: Optuna locks its rows. On
            SQLite, which has no such locks, two processes would at times pop one trial.
    """

    def __init__(self, study: optuna.Study, lock: AbstractContextManager) -> None:
        self.study, self.lock = study, lock
        self.claims: dict[Trial, optuna.Trial] = {}
        self.worker = Worker.this_process()
        self.watch = Watch(self._signs)

    @classmethod
    def open(cls, location: str, name: str, settings: dict[str, Any]) -> "Study":
        """The study `name` at a storage URL of Optuna's or in a file, made where it is not there.

        Raises:
            UserError: It cannot be opened, or it is of runs with other settings.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                study_name=name,
                storage=location if "://" in location else _file_storage(Path(location)),
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(0),  # never used: every parameter is fixed
            )
        except Exception as error:  # of the file system, of Optuna, of SQLAlchemy or of a driver
            again = " (its password is not kept: give --study again, with --output_dir instead of --resume)"
            cure = again if ":***@" in location else ""
            shown = without_password(f"the study {location} cannot be opened: {one_line(error)}")
            raise UserError(f"{shown}{cure}.") from None
        settings = json.loads(json.dumps(settings))
        known = study.user_attrs.get(SETTINGS)
        if known is None:
            study.set_user_attr(SETTINGS, settings)
        elif differing := differences(known, settings):
            raise UserError(
                f"the study {name!r} in {without_password(location)} has runs with other settings ({differing}): "
                "choose another --study_name, or give the settings it has."
            )
        path = _file_of(location)
        return cls(study, _ProcessLock(path.with_name(f"{path.name}.claims")) if path else nullcontext())

    def facts(self, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the study knows of its base; found once, then kept."""
        if FACTS not in self.study.user_attrs:
            self.study.set_user_attr(FACTS, find())
        return self.study.user_attrs[FACTS]

    def outcomes(self) -> dict[Trial, TrialResult]:
        """What has been reached so far."""
        return _outcomes(self._trials())

    def machines(self) -> dict[Trial, str]:
        """What the trials that are done ran on."""
        done = self._trials(*ENDED)
        return {_trial(trial): trial.user_attrs[WORKER]["machine"] for trial in done if WORKER in trial.user_attrs}

    def counts(self) -> tuple[int, int]:
        """How many trials are done, and how many there are as far as planned."""
        trials = self._trials()
        return len(_outcomes(trials)), len({_trial(trial) for trial in trials if trial.state is not TrialState.FAIL})

    def plan(self, plans: Sequence[Plan]) -> bool:
        """Enqueue what the plans want next; a curve's next trials are decided when none of it is under way.

        Returns:
            Whether there is anything left to run or to wait for.
        """
        with self.lock:
            trials = self._trials()
            outcomes = _outcomes(trials)
            open_curves = {_trial(trial).spec for trial in trials if not trial.state.is_finished()}
            idle = [plan for plan in plans if plan.spec not in open_curves]
            planned = [trial for plan in idle for trial in plan.next_trials(outcomes)]
            for trial in planned:
                self.study.enqueue_trial(_parameters(trial), user_attrs={ARM: trial.as_dict()})
        return bool(open_curves or planned)

    def claim(self, at_most: int, group: Callable[[Trial], Hashable]) -> list[Trial]:
        """Take waiting trials, up to `at_most` of one group, for this worker alone."""
        trials: list[Trial] = []
        with self.lock:
            while len(trials) < at_most:
                waiting = self._trials(TrialState.WAITING)
                if not waiting or (trials and group(_trial(waiting[0])) != group(trials[0])):
                    break
                asked = self.study.ask(PARAMETERS)
                if ARM not in asked.user_attrs:  # others took what was waiting, and Optuna made one up
                    self.study.tell(asked, state=TrialState.FAIL)
                    break
                asked.set_user_attr(WORKER, asdict(self.worker))
                trial = Trial.from_dict(asked.user_attrs[ARM])
                if self._has_earlier(trial, asked.number):
                    self._end(asked.number, None)
                else:
                    self.claims[trial] = asked
                    trials.append(trial)
        return trials

    def finish(self, trial: Trial, outcome: TrialResult) -> bool:
        """Keep what a claimed trial has reached.

        Returns:
            Whether it counts: not where this worker was taken for dead, and the trial given to another.
        """
        claim = self.claims.pop(trial)
        try:
            claim.set_user_attr(OUTCOME, outcome.as_dict())
        except UpdateFinishedTrialError:
            return False
        return self._end(claim.number, outcome)

    def release(self, trial: Trial) -> None:
        """Give a claimed trial back that did not end, to be planned again."""
        self._end(self.claims.pop(trial).number, None)

    def reap(self) -> None:
        """Give up the trials of dead workers; one that had its outcome written down already is ended with it."""
        for trial in self._trials(TrialState.RUNNING):
            signature, outcome = trial.user_attrs.get(WORKER), trial.user_attrs.get(OUTCOME)
            # One that died before it could sign is known by its trial: it never gives a sign.
            worker = Worker(**signature) if signature else Worker(f"of trial {trial.number}", "", 0, "")
            if worker.name != self.worker.name and not self.watch.is_alive(worker):
                self._end(trial.number, TrialResult.from_dict(outcome) if outcome else None)

    def heartbeat(self) -> AbstractContextManager:
        """Signs of life of this worker, for as long as the context lasts."""
        count = itertools.count()
        return heartbeat(lambda: self.study.set_user_attr(SIGN + self.worker.name, next(count)))

    def _has_earlier(self, trial: Trial, number: int) -> bool:
        """Whether the same trial was enqueued before the one of a number, and not given up."""
        others = [other for other in self._trials() if other.number < number and other.state is not TrialState.FAIL]
        return any(_trial(other) == trial for other in others)

    def _signs(self) -> dict[str, Any]:
        return {k.removeprefix(SIGN): v for k, v in self.study.user_attrs.items() if k.startswith(SIGN)}

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials that were planned, in the order in which they were enqueued."""
        trials = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if ARM in trial.user_attrs]

    def _end(self, number: int, outcome: TrialResult | None) -> bool:
        """End a trial, without an outcome as failed; whether it was under way still."""
        try:
            if outcome is None:
                self.study.tell(number, state=TrialState.FAIL)
            elif outcome.is_good:
                self.study.tell(number, outcome.score)
            else:
                self.study.tell(number, state=TrialState.PRUNED)
        except (UpdateFinishedTrialError, ValueError):  # another worker has ended it
            return False
        return True


class _ProcessLock:
    """A lock that the kernel takes back from a process that dies with it, where Optuna's own wait half a minute."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.threads = threading.Lock()
        self.file: TextIO | None = None

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *details: object) -> None:
        self.release()

    def acquire(self) -> bool:
        """Wait for it."""
        self.threads.acquire()
        self.file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115  # closed by release
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let others have it."""
        assert self.file is not None
        self.file.close()
        self.threads.release()


def _file_storage(path: Path) -> optuna.storages.JournalStorage:
    """Optuna's journal in a file, mended where a crash has torn its last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _ProcessLock(path.with_name(f"{path.name}.lock"))
    with lock, open(path, "ab+") as journal:
        journal.seek(0)
        journal.truncate(journal.read().rfind(b"\n") + 1)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path.resolve()), lock))  # type: ignore[arg-type]


def _file_of(location: str) -> Path | None:
    """The file that a study is in, `None` for a database server."""
    if "://" not in location:
        return Path(location)
    kind, _, path = location.partition(":///")
    return Path(path.partition("?")[0]) if kind.startswith("sqlite") and path else None


def _trial(trial: FrozenTrial) -> Trial:
    return Trial.from_dict(trial.user_attrs[ARM])


def _outcomes(trials: Sequence[FrozenTrial]) -> dict[Trial, TrialResult]:
    return {_trial(trial): TrialResult.from_dict(trial.user_attrs[OUTCOME]) for trial in trials if trial.state in ENDED}


def _parameters(trial: Trial) -> dict[str, Any]:
    """The values of `PARAMETERS`."""
    spec = trial.spec
    return {
        "rank": spec.rank or 0,
        "init": spec.init or "B",
        "alpha_constant": spec.alpha.constant,
        "alpha_exponent": -spec.alpha.gamma,
        "log2_lr": trial.log2_lr,
        "seed": trial.seed,
    }
