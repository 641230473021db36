"""The reproduction's script: which trials there are, how they are grouped, and that none is trained twice."""

import importlib

import pytest

from mua_rl.errors import UserError
from mua_rl.run.trial import Status

pytest.importorskip("stable_baselines3")


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("reproduce_ppo")


def outcome(metric):
    from mua_rl.run.trial import TrialResult

    return TrialResult(metric, 1.0, 16.0, 100.0, 200.0, Status.OK, "", 25600, 1.5)


def test_arms_are_the_issues(script):
    work = script.all_work(seeds=8)
    assert len({(one.task, one.base, one.trial) for one in work}) == len(work)
    assert {one.trial.spec.rank for one in work} == {None, 2, 8, 32} and max(script.RANKS) <= script.WIDTH / 8
    assert {(one.trial.spec.init, str(one.trial.spec.alpha)) for one in work if one.trial.spec.rank} == {
        ("B", "1"),
        ("A", "1"),
        ("A", "1/r"),
    }
    assert len({(one.task, one.base) for one in work}) == 4


def test_groups_share_task_base_and_kind_and_hold_no_more_than_asked(script):
    work = script.all_work(seeds=2)
    groups = list(script.groups(work, 50))
    assert [one for group in groups for one in group] == work
    assert max(map(len, groups)) <= 50
    for group in groups:
        assert len({(one.task, one.base, one.trial.spec.rank is None) for one in group}) == 1


def test_what_is_in_the_csv_is_not_trained_again(script, tmp_path):
    path, work = tmp_path / "out.csv", script.all_work(seeds=1)
    assert script.finished(path) == set()
    first, second = work[:3], work[-2:]  # FFT, whose rank is an empty cell, and LoRA
    script.append(path, first, [outcome(float("nan"))] * 3, "here")
    script.append(path, second, [outcome(500.0)] * 2, "here")
    done = script.finished(path)
    assert [one for one in work if tuple(one.columns().values()) in done] == first + second
    header = path.read_text().splitlines()[0].split(",")
    assert header[:4] == ["algorithm", "task", "base", "rank"] and header[-1] == "machine"


def test_filters_choose_arms_and_an_unknown_name_is_refused(script):
    work = script.all_work(seeds=1)
    chosen = [one for one in work if script.wanted(one, ["task=pendulum", "rank=full,8"])]
    assert {one.task for one in chosen} == {"pendulum"} and {one.trial.spec.rank for one in chosen} == {None, 8}
    with pytest.raises(UserError, match="not 'colour=red'"):
        script.wanted(work[0], ["colour=red"])
