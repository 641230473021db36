"""A sweep's loop over a CSV: threads share it, nothing is repeated, and other sweeps' rows are left alone."""

import math
import threading

import pytest
from helpers import make_trial, spec

from mua_rl.analysis.rows import SweepRow, append, read
from mua_rl.errors import UserError
from mua_rl.run.trial import Status, TrialResult
from mua_rl.sweep.csv_study import CSVStudy
from mua_rl.sweep.search import FixedTrials, Search
from mua_rl.sweep.work import work_together

KEY = ("sft", "differences", "embedded")
SEARCHES = [Search(spec(rank), (-13.0, -12.0, -11.0, -10.0, -9.0), 1.0, 1.0, (1, 2)) for rank in (4, None)]


def respond(trial):
    return TrialResult(0.9 - 0.03 * (trial.log2_lr + 10.6) ** 2, 0.01, 0.4, 0.5, 0.6, Status.OK, "", 100, 1.0)


class Backend:
    """Answers at once, and keeps what it was asked."""

    at_once = 4

    def __init__(self):
        self.calls = []

    def group(self, trial):
        return trial.spec.rank

    def run(self, trials):
        self.calls.append(trials)
        return [respond(trial) for trial in trials]


def run(path, *backends, plans=SEARCHES):
    stop = threading.Event()
    assert work_together(CSVStudy(path, KEY), plans, backends, lambda *_: None, math.inf, stop)
    return [trial for backend in backends for call in backend.calls for trial in call]


def test_threads_share_the_work_and_a_second_start_repeats_nothing(tmp_path):
    path = tmp_path / "sweep.csv"
    append(path, [SweepRow("sft", "other", "embedded", make_trial(4), respond(make_trial(4)), "")])
    backends = [Backend() for _ in range(3)]
    trials = run(path, *backends)
    assert len(trials) == len(set(trials)) == 2 * (5 + 3)
    assert all(len({trial.spec for trial in call}) == 1 for backend in backends for call in backend.calls)
    assert len(read(path)) == len(trials) + 1
    assert run(path, Backend()) == []


def test_trials_that_were_chosen_are_run_as_they_are(tmp_path):
    trials = tuple(make_trial(4, log2_lr=-10.5, seed=seed) for seed in range(6))
    backend = Backend()
    assert set(run(tmp_path / "sweep.csv", backend, plans=[FixedTrials(spec(4), trials)])) == set(trials)
    assert [len(call) for call in backend.calls] == [4, 2]


def test_a_run_that_fails_is_tried_again_by_the_next_start(tmp_path):
    class Failing(Backend):
        def run(self, trials):
            if len(self.calls) == 1:
                raise UserError("out of memory")
            return super().run(trials)

    with pytest.raises(UserError, match="out of memory"):
        run(tmp_path / "sweep.csv", Failing())
    assert len(read(tmp_path / "sweep.csv")) == 4
    assert len(run(tmp_path / "sweep.csv", Backend())) == 12
