"""The reproduction's script: which trials there are, how they are grouped, and that none is trained twice."""

import importlib
import sys

import pytest

from mua_rl.analysis.rows import read
from mua_rl.errors import UserError
from mua_rl.run.trial import Status, TrialResult

pytest.importorskip("stable_baselines3")


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("reproduce_ppo")


def test_trials_are_the_issues(script):
    curves = script.all_curves()
    trials = [(curve.task, curve.base, trial) for curve in curves for trial in curve.trials(8)]
    assert len(set(trials)) == len(trials)
    assert {curve.spec.rank for curve in curves} == {None, 2, 8, 32} and max(script.RANKS) <= script.WIDTH / 8
    assert {(curve.spec.init, str(curve.spec.alpha)) for curve in curves if curve.spec.rank} == {
        ("B", "1"),
        ("A", "1"),
        ("A", "1/r"),
    }
    assert len({(curve.task, curve.base) for curve in curves}) == 4


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs the script with trainers that take no time; gives the groups: task, path of the base, and trials."""
    groups = []

    def train(arguments, trials, base, *_, **options):
        groups.append((arguments.env_id, base, trials))
        return [TrialResult(500.0, 1.0, 16.0, 100.0, 200.0, Status.OK, "", 25600, 1.5) for _ in trials]

    monkeypatch.setattr("mua_rl.ppo.stacked.trainer.train_side_by_side", train)
    monkeypatch.setattr("mua_rl.ppo.setup.read_base_policy", lambda path, statistics: path)
    monkeypatch.setattr(script, "prepare", lambda folder, base: script.base_path(folder, base).touch())

    def start(*flags):
        groups.clear()
        folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.csv")]
        monkeypatch.setattr(sys, "argv", ["reproduce_ppo.py", *folders, *flags])
        script.main()
        return list(groups)

    return start


def test_groups_share_task_base_and_kind_and_hold_no_more_than_asked(script, run, tmp_path):
    groups = run("--seeds", "2", "--per-group", "50")
    trained = [(task, base.stem, trial) for task, base, trials in groups for trial in trials]
    asked = [
        (script.TASKS[curve.task].env_id, curve.base, trial)
        for curve in script.all_curves()
        for trial in curve.trials(2)
    ]
    assert len(trained) == len(asked) and set(trained) == set(asked)
    assert max(len(trials) for *_, trials in groups) <= 50
    for *_, trials in groups:
        assert len({trial.spec.rank is None for trial in trials}) == 1
    assert {(row.task, row.base, row.trial) for row in read(tmp_path / "out.csv")} == set(asked)


def test_what_is_in_the_csv_is_not_trained_again(run):
    first = run("--seeds", "1", "--only", "task=pendulum", "rank=full,8")
    again = run("--seeds", "2", "--only", "task=pendulum", "rank=full,8", "init=B,")
    assert {trial.seed for *_, trials in first for trial in trials} == {0}
    assert {trial.seed for *_, trials in again for trial in trials} == {1}
    assert run("--seeds", "2", "--only", "task=pendulum", "rank=full") == []


def test_filters_choose_trials_and_an_unknown_name_is_refused(script):
    chosen = [curve for curve in script.all_curves() if script.wanted(curve, ["task=pendulum", "rank=full,8"])]
    assert {curve.task for curve in chosen} == {"pendulum"} and {curve.spec.rank for curve in chosen} == {None, 8}
    with pytest.raises(UserError, match="not 'colour=red'"):
        script.wanted(chosen[0], ["colour=red"])
