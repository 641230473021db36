"""A study shared by workers: every trial is run once, whoever dies."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import asdict

import optuna
import pytest
from helpers import make_trial, spec

from mua_rl.errors import UserError
from mua_rl.run.trial import Status, TrialResult
from mua_rl.sweep import worker
from mua_rl.sweep.search import Search
from mua_rl.sweep.study import WORKER, Study
from mua_rl.sweep.work import work, work_together

SEARCHES = [Search(spec(rank), (-13.0, -12.0, -11.0, -10.0, -9.0), 1.0, 1.0, (1, 2)) for rank in (4, None)]
SETTINGS = {"algo": "grpo", "task": "arithmetic"}


def respond(trial):
    return TrialResult(0.9 - 0.03 * (trial.log2_lr + 10.6) ** 2, 0.01, 0.4, 0.5, 0.6, Status.OK, "", 100, 1.0)


class FakeRunner:
    """Answers at once, and writes down what it was asked to run."""

    def __init__(self, log, at_once=1, seconds=0.0, group=lambda trial: trial.spec.rank):
        self.log, self.at_once, self.seconds, self.group = log, at_once, seconds, group

    def run(self, trials):
        with open(self.log, "a") as stream:
            stream.writelines(f"{os.getpid()} begins {trial.spec} {trial.log2_lr} {trial.seed}\n" for trial in trials)
        time.sleep(self.seconds)
        with open(self.log, "a") as stream:
            stream.writelines(f"{os.getpid()} ends {trial.spec} {trial.log2_lr} {trial.seed}\n" for trial in trials)
        return [respond(trial) for trial in trials]


class WithoutLock(Study):
    """As on a database server, where nothing keeps two workers from planning at once."""

    def __init__(self, study, lock):
        super().__init__(study, contextlib.nullcontext())


def open_study(path, **settings):
    return Study.open(str(path), "sweep", {**SETTINGS, **settings})


def run(study, runner, searches=SEARCHES, deadline=math.inf):
    return work(study, searches, runner, lambda *_: None, deadline, threading.Event())


def runs(log, word="ends"):
    """How often each trial was begun, or ended."""
    return Counter(line.partition(f" {word} ")[2] for line in log.read_text().splitlines() if f" {word} " in line)


@pytest.mark.parametrize("location", ["study.journal", "sqlite:///{}/study.db"])
@pytest.mark.slow
def test_a_study_goes_through_its_searches_and_a_second_start_repeats_nothing(tmp_path, location):
    location = location.format(tmp_path) if "://" in location else str(tmp_path / location)
    log = tmp_path / "log"
    assert run(open_study(location), FakeRunner(log))
    outcomes = open_study(location).outcomes()
    assert len(outcomes) == 2 * (5 + 3)
    assert set(runs(log).values()) == {1}
    assert all(outcome == respond(trial) for trial, outcome in outcomes.items())
    before = log.read_text()
    assert run(open_study(location), FakeRunner(log))
    assert log.read_text() == before


def test_a_study_that_was_left_in_the_middle_goes_on_with_the_same_plan(tmp_path):
    log, whole = tmp_path / "log", tmp_path / "whole"
    run(open_study(tmp_path / "a"), FakeRunner(whole))

    class Tired(FakeRunner):
        def run(self, trials):
            if self.log.exists() and len(runs(self.log)) == 3:
                raise KeyboardInterrupt
            return super().run(trials)

    with pytest.raises(KeyboardInterrupt):
        run(open_study(tmp_path / "b"), Tired(log))
    assert run(open_study(tmp_path / "b"), FakeRunner(log))
    assert runs(log) == runs(whole)


def test_trials_of_one_group_are_taken_together_up_to_the_limit(tmp_path):
    calls = []

    class Watching(FakeRunner):
        def run(self, trials):
            calls.append([(trial.spec.rank, trial.log2_lr) for trial in trials])
            return super().run(trials)

    run(open_study(tmp_path / "study"), Watching(tmp_path / "log", at_once=4))
    assert [len(call) for call in calls] == [4, 1, 4, 1, 3, 3]
    assert all(len({rank for rank, _ in call}) == 1 for call in calls)


def test_workers_in_one_process_share_the_work(tmp_path):
    log, study = tmp_path / "log", open_study(tmp_path / "study")
    runners = [FakeRunner(log, seconds=0.05) for _ in range(3)]
    assert work_together(study, SEARCHES, runners, lambda *_: None, math.inf, threading.Event())
    assert len(runs(log)) == 16
    assert set(runs(log, "begins").values()) == {1}


def test_the_first_failure_ends_all_workers_and_leaves_its_trial_to_be_tried_again(tmp_path):
    log, study, stop = tmp_path / "log", open_study(tmp_path / "study"), threading.Event()

    class Failing(FakeRunner):
        def run(self, trials):
            raise UserError("out of memory")

    with pytest.raises(UserError, match="out of memory"):
        work_together(study, SEARCHES, [FakeRunner(log, seconds=0.1), Failing(log)], lambda *_: None, math.inf, stop)
    assert stop.is_set()
    assert run(open_study(tmp_path / "study"), FakeRunner(log))
    assert len(runs(log)) == 16
    assert set(runs(log).values()) == {1}


def test_no_trial_is_started_after_the_deadline(tmp_path):
    log = tmp_path / "log"
    assert not run(open_study(tmp_path / "study"), FakeRunner(log), deadline=time.monotonic())
    assert not log.exists()


def test_two_workers_that_plan_at_the_same_moment_do_not_run_a_trial_twice(tmp_path):
    first, second = (WithoutLock.open(str(tmp_path / "study"), "sweep", SETTINGS) for _ in range(2))
    trials = first._trials
    first._trials = lambda *states: []  # what it saw before the second planned
    second.plan(SEARCHES)
    first.plan(SEARCHES)
    first._trials = trials
    assert len(first._trials()) == 20
    log = tmp_path / "log"
    assert run(first, FakeRunner(log))
    assert set(runs(log).values()) == {1}
    assert len(first.outcomes()) == 16


def test_a_study_with_other_settings_is_refused_by_name_of_the_setting(tmp_path):
    open_study(tmp_path / "study")
    with pytest.raises(UserError, match="task: arithmetic → gsm8k"):
        open_study(tmp_path / "study", task="gsm8k")
    with pytest.raises(UserError, match="max_steps: default → 5"):
        open_study(tmp_path / "study", max_steps=5)
    assert open_study(tmp_path / "study")


def test_a_study_that_cannot_be_opened_is_a_clear_error(tmp_path):
    (tmp_path / "other").write_text("no journal\n")
    (tmp_path / "file").write_text("")
    for location in (tmp_path / "other", tmp_path / "file" / "study", "nosuchdatabase://host/name"):
        with pytest.raises(UserError, match="cannot be opened"):
            open_study(location)


def test_a_journal_whose_last_line_was_torn_by_a_crash_is_mended(tmp_path):
    path, log = tmp_path / "study", tmp_path / "log"
    run(open_study(path), FakeRunner(log), SEARCHES[:1])
    with open(path, "a") as stream:
        stream.write('{"op_code": 6, "worker')
    assert run(open_study(path), FakeRunner(log))
    assert set(runs(log).values()) == {1}


def test_outcomes_that_are_not_numbers_survive_storage(tmp_path):
    class Diverging(FakeRunner):
        def run(self, trials):
            super().run(trials)
            return [
                TrialResult.of_divergence(0.4, 7, 1.0, "not finite") if a.log2_lr > -12 else respond(a) for a in trials
            ]

    run(open_study(tmp_path / "study"), Diverging(tmp_path / "log"), SEARCHES[:1])
    outcomes = open_study(tmp_path / "study").outcomes()
    lost = outcomes[make_trial(4, "B", "1", -9.0, 1)]
    assert lost.status is Status.DIVERGED
    assert math.isnan(lost.score)
    assert lost.reason == "not finite"


def test_optunas_own_tools_see_parameters_and_values(tmp_path):
    run(open_study(tmp_path / "study"), FakeRunner(tmp_path / "log"))
    best = open_study(tmp_path / "study").study.best_trial
    assert best.params["log2_lr"] == -11
    assert best.params["rank"] in (0, 4)
    assert best.value == pytest.approx(0.9 - 0.03 * 0.16)


def claim_and_die(path, sign):
    study = open_study(path)
    study.plan(SEARCHES)
    if sign:
        study.claim(1, lambda trial: trial)
    else:
        study.study.ask()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("sign", [True, False])
def test_a_trial_whose_process_is_dead_is_run_by_another_once(tmp_path, sign, monkeypatch):
    path, log = tmp_path / "study", tmp_path / "log"
    monkeypatch.setattr(worker, "SILENCE_SECONDS", 0.2)  # for the one that never signed
    process = multiprocessing.get_context("fork").Process(target=claim_and_die, args=(path, sign))
    process.start()
    process.join()
    assert run(open_study(path), FakeRunner(log))
    assert len(runs(log)) == 16
    assert set(runs(log, "begins").values()) == {1}


def test_a_dead_workers_trial_that_had_its_outcome_is_not_repeated(tmp_path):
    path, log = tmp_path / "study", tmp_path / "log"
    study = open_study(path)
    study.plan(SEARCHES)
    [claim] = study.claim(1, lambda trial: trial)
    # It is killed before it could end the trial.
    study.claims[claim].set_user_attr("outcome", respond(claim).as_dict())
    study.claims[claim].set_user_attr(WORKER, {**asdict(study.worker), "name": "dead", "pid": 2**22 + 1})
    run(open_study(path), FakeRunner(log))
    assert len(runs(log)) == 15
    assert len(open_study(path).outcomes()) == 16


def test_a_living_workers_trial_is_left_alone_and_a_silent_one_elsewhere_is_not(tmp_path, monkeypatch):
    path = tmp_path / "study"
    far, near = open_study(path), open_study(path)
    far.plan(SEARCHES)
    [claim] = far.claim(1, lambda trial: trial)
    near.reap()
    assert far.claims[claim].number in [t.number for t in near._trials(optuna.trial.TrialState.RUNNING)]
    far.claims[claim].set_user_attr(WORKER, {**asdict(far.worker), "place": "another machine"})
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(worker, "SILENCE_SECONDS", 0.4)
    with far.heartbeat():
        for _ in range(10):
            near.reap()
            time.sleep(0.1)
        assert near._trials(optuna.trial.TrialState.RUNNING)
    for _ in range(10):
        near.reap()
        time.sleep(0.1)
    assert not near._trials(optuna.trial.TrialState.RUNNING)
    assert not far.finish(claim, respond(claim))  # it comes back, too late: its outcome does not count


def work_on(path, log, seconds):
    run(open_study(path), FakeRunner(log, seconds=seconds))


@pytest.mark.parametrize("location", ["study.journal", "sqlite:///{}/study.db"])
@pytest.mark.slow
def test_of_four_workers_one_is_killed_and_every_trial_is_done_once_and_none_lost(tmp_path, location):
    location = location.format(tmp_path) if "://" in location else str(tmp_path / location)
    log = tmp_path / "log"
    open_study(location)
    processes = multiprocessing.get_context("fork")
    workers = [processes.Process(target=work_on, args=(location, log, 0.4)) for _ in range(4)]
    for process in workers:
        process.start()
    victim = workers[0]
    while not log.exists() or f"{victim.pid} begins" not in log.read_text():
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    for process in workers[1:]:
        process.join(60)
        assert process.exitcode == 0
    assert len(open_study(location).outcomes()) == 16
    assert len(runs(log)) == 16
    assert set(runs(log).values()) == {1}, "every trial ended once"
    begun = runs(log, "begins")
    assert sorted(begun.values()) == [1] * 15 + [2], "and only the killed worker's was begun twice"
    assert {line.split()[0] for line in log.read_text().splitlines()} == {str(p.pid) for p in workers}


def test_the_study_keeps_what_was_found_of_the_base(tmp_path):
    found = []

    def find():
        found.append(1)
        return {"width": 128}

    assert open_study(tmp_path / "study").facts(find) == {"width": 128}
    assert open_study(tmp_path / "study").facts(find) == {"width": 128}
    assert len(found) == 1
    assert json.dumps(open_study(tmp_path / "study").study.user_attrs)


@pytest.mark.parametrize("location", ["study.journal", "sqlite:///{}/study.db"])
def test_optunas_own_heartbeat_never_gives_up_a_dead_workers_trial(tmp_path, location):
    """Why `mua_rl.sweep.worker` is there: Optuna beats in `Study.optimize` alone, and in no journal."""
    if "://" in location:
        callback = optuna.storages.RetryHeartbeatStaleTrialCallback()
        options = {"heartbeat_interval": 1, "grace_period": 1, "heartbeat_stale_trial_callback": callback}
        storage = optuna.storages.RDBStorage(location.format(tmp_path), **options)
    else:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / location))
        storage = optuna.storages.JournalStorage(backend)
        assert not hasattr(storage, "record_heartbeat")
    study = optuna.create_study(storage=storage)
    study.ask()  # as a worker that is killed now
    time.sleep(2.1)  # past the grace period
    optuna.storages.fail_stale_trials(study)
    assert [trial.state for trial in study.get_trials()] == [optuna.trial.TrialState.RUNNING]
