"""Checkpoints of GRPO trials side by side: a group that was cut off ends where it would have."""

import contextlib
import dataclasses
import math

import pytest
import torch
from helpers import make_trial

from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.checkpoint import Checkpoint, Checkpoints, mark, path_of
from mua_rl.grpo.stacked.trainer import StackedTrainer, train_side_by_side

pytestmark = pytest.mark.slow  # what is tested starts training

ARMS = [
    make_trial(rank=4, init="B", alpha="1", log2_lr=-8, seed=1),
    make_trial(rank=2, init="A", alpha="1/r", log2_lr=-7, seed=2),
    make_trial(rank=8, init="B", alpha="0.7", log2_lr=-9, seed=1),
]
HOPELESS = make_trial(rank=4, init="B", alpha="1", log2_lr=-20, seed=3)
LAST = 5


class Killed(BaseException):
    """What a kill is for a process that is to go on with the tests."""


def arguments(**changes):
    small = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": LAST, "save_steps": 2}
    return GRPOArguments(**{**small, "report_to": "none", "held_out_problems": 24, **changes})


def train(trials, folder=None, kill_at=None, **changes):
    """A trainer that has trained, and its outcomes; killed after a step, in the middle of the next."""
    given = arguments(**changes)
    trainer = StackedTrainer(given, trials)
    kept = Checkpoints(folder, given, trials, "mlp", trainer.base.fingerprint) if folder else None
    steps = []

    def on_step(step, metrics):
        steps.append(step)
        if step == kill_at:
            raise Killed

    outcomes = None
    with contextlib.suppress(Killed):
        outcomes = trainer.train(on_step, lambda trial, _: "hopeless" if trial == HOPELESS else None, kept)
    trainer.steps = steps
    return trainer, outcomes and [dataclasses.replace(outcome, seconds=0) for outcome in outcomes]


def same(one, other):
    """Bitwise, also where both are NaN."""
    return repr(one) == repr(other)


@pytest.fixture(scope="module")
def whole():
    return train([ARMS[0], HOPELESS, *ARMS[1:]])


def test_a_group_that_was_killed_ends_bitwise_where_it_would_have(tmp_path, whole, capsys):
    trials = [ARMS[0], HOPELESS, *ARMS[1:]]
    _, nothing = train(trials, tmp_path, kill_at=3)
    assert nothing is None
    trainer, outcomes = train(trials, tmp_path)
    assert trainer.steps == [3, 4, 5]
    assert "4 trials go on from step 2" in capsys.readouterr().out
    expected, outcomes_expected = whole
    assert same(outcomes, outcomes_expected)
    assert outcomes[1].reason == "hopeless"
    for ours, theirs in zip(trainer.states, expected.states, strict=True):
        assert same(ours.history, theirs.history)
        assert len(ours.history) == LAST
        assert torch.equal(ours.parameter, theirs.parameter)
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())
        assert ours.schedule.get_last_lr() == theirs.schedule.get_last_lr()


def test_it_may_be_killed_again_and_again(tmp_path, whole):
    trials = [ARMS[0], HOPELESS, *ARMS[1:]]
    for kill_at, steps in ((3, [1, 2, 3]), (3, [3]), (5, [3, 4, 5])):
        assert train(trials, tmp_path, kill_at)[0].steps == steps
    trainer, outcomes = train(trials, tmp_path)
    assert trainer.steps == [5]
    assert same(outcomes, whole[1])


def test_trials_go_on_in_another_group_too(tmp_path, whole):
    train([ARMS[0], HOPELESS, *ARMS[1:]], tmp_path, kill_at=3)
    trainer, _ = train([ARMS[1], ARMS[0]], tmp_path)  # without the largest rank, in another order
    assert trainer.steps == [3, 4, 5]
    for ours, theirs in zip(trainer.states, (whole[0].states[1], whole[0].states[0]), strict=True):
        assert ours.trial == theirs.trial
        for metrics, expected in zip(ours.history, theirs.history, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
        packed = [t.stack.pack(s.number, s.parameter.detach()) for t, s in ((trainer, ours), (whole[0], theirs))]
        torch.testing.assert_close(*packed, rtol=1e-3, atol=1e-5)
    assert same(train([HOPELESS], tmp_path)[1], [whole[1][1]])  # nothing is left to train


def test_the_files_are_gone_when_the_group_has_ended_and_hold_no_code(tmp_path):
    train(ARMS[:2], tmp_path, kill_at=3)
    assert sorted(tmp_path.iterdir()) == sorted(path_of(tmp_path, trial) for trial in ARMS[:2])
    assert isinstance(Checkpoint.read(path_of(tmp_path, ARMS[0]), ARMS[0]).before, float)
    (tmp_path / f".{path_of(tmp_path, ARMS[0]).name}.1").touch()  # of a process that was killed as it wrote
    (tmp_path / "another").touch()
    outcomes = train_side_by_side(arguments(), ARMS[:2], checkpoints=tmp_path, adapters=tmp_path / "adapters")
    assert [outcome.steps for outcome in outcomes] == [LAST, LAST]
    assert {path.name for path in tmp_path.iterdir()} == {"another", "adapters"}


@pytest.mark.parametrize("fault", ["torn", "no checkpoint", "another trial", "settings", "missing", "another step"])
def test_a_checkpoint_of_no_use_is_named_in_a_line_and_the_trials_begin_anew(tmp_path, fault, capsys):
    trials, folder = ARMS[:2], tmp_path / "here"
    train(trials, folder, kill_at=3)
    first, second = (path_of(folder, trial) for trial in trials)
    changes, message = {}, ""
    if fault == "torn":
        second.write_bytes(second.read_bytes()[:-1000])
        message = f"{second} cannot be read"
    elif fault == "no checkpoint":
        torch.save({"weights": torch.zeros(3)}, second)
        message = f"{second} cannot be read (TypeError)"
    elif fault == "another trial":
        second.write_bytes(first.read_bytes())
        message = f"{second} is of another trial"
    elif fault == "settings":
        changes, message = {"temperature": 0.5}, "other settings (temperature: 1.0 → 0.5)"
    elif fault == "missing":
        second.unlink()
        message = f"{second} is not there"
    else:
        older = second.read_bytes()
        train(trials, folder, kill_at=5)
        second.write_bytes(older)
        message = "of step 2"
    capsys.readouterr()
    trainer, outcomes = train(trials, folder, **changes)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mua_rl")]
    assert "begin anew" in line
    assert message in line
    assert trainer.steps == [1, 2, 3, 4, 5]
    assert same(outcomes, train(trials, **changes)[1])


def test_settings_without_effect_may_change(tmp_path):
    train(ARMS[:1], tmp_path, kill_at=3)
    assert train(ARMS[:1], tmp_path, save_steps=1, output_dir="elsewhere", seed=7)[0].steps == [3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, [2, 4]),
        ({"save_steps": 0.5}, [3]),
        ({"save_steps": 5}, []),
        ({"save_steps": 0}, []),
        ({"save_strategy": "no"}, []),
    ],
)
def test_checkpoints_are_written_as_often_as_the_trainers_own_flags_say(tmp_path, changes, written):
    given = arguments(**changes)
    trainer, seen = StackedTrainer(given, ARMS[:1]), []
    kept = Checkpoints(tmp_path, given, ARMS[:1], "mlp", trainer.base.fingerprint)
    trainer.train(lambda step, _: seen.append(mark(tmp_path, ARMS[0])), None, kept)
    last = mark(tmp_path, ARMS[0])
    found = [found and found[0] for found in [*seen[1:], last]]
    assert [step for step in range(1, LAST + 1) if found[step - 1] == step] == written


def test_a_folder_that_cannot_be_written_is_said_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "file").touch()
    _, outcomes = train(ARMS[:1], tmp_path / "file")
    assert math.isfinite(outcomes[0].score)
    assert capsys.readouterr().out.count("no checkpoint at step") == 2


def test_trials_that_can_go_on_together_bear_one_mark(tmp_path):
    train(ARMS[:2], tmp_path, kill_at=3)
    train(ARMS[2:], tmp_path, kill_at=5)
    marks = [mark(tmp_path, trial) for trial in [*ARMS, HOPELESS]]
    assert marks[0] == marks[1]
    assert [found and found[0] for found in marks] == [2, 2, 4, None]
    path_of(tmp_path, ARMS[0]).write_bytes(b"PK")
    assert mark(tmp_path, ARMS[0]) is None
