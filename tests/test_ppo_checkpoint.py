"""PPO runs that were cut off at awkward moments, and checkpoints that were damaged or put aside."""

import shutil

import pytest

pytest.importorskip("stable_baselines3")

from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord
from mua_rl.ppo.arguments import parse
from mua_rl.ppo.checkpoint import list_checkpoints, save_checkpoint
from mua_rl.ppo.run import train
from mua_rl.ppo.setup import set_up

FLAGS = ["--total_timesteps", "1024", "--n_steps", "32", "--checkpoint_steps", "256", "--eval_episodes", "2"]


class Killed(BaseException):
    """Stands for a SIGKILL."""


def kill(*_):
    raise Killed


@pytest.fixture(scope="module")
def killed_near_the_end(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "run"
    with pytest.MonkeyPatch.context() as context:
        context.setattr("mua_rl.run.life.plots.learning_curve", kill)
        with pytest.raises(Killed):
            train(*parse([*FLAGS, "--tensorboard_log", "none", "--output_dir", str(folder)]))
    return folder


@pytest.fixture
def any_gain(monkeypatch):
    """A record is written also by a run that is too short to learn: what is in it is the question."""
    monkeypatch.setattr("mua_rl.run.life.has_gained", lambda *_: True)


@pytest.fixture
def folder(killed_near_the_end, tmp_path):
    return shutil.copytree(killed_near_the_end, tmp_path / "run")


def test_a_run_that_was_killed_before_its_record_was_written_goes_on(folder, any_gain):
    assert train(*parse(["--resume", str(folder)])).result().steps == 1024
    assert LRRecord.load(folder).learning_rate > 0
    with pytest.raises(UserError, match="has ended"):
        parse(["--resume", str(folder)])


@pytest.mark.parametrize("content", [b"", b"\x0bno pickle", b"PK\x03\x04cut off"], ids=["empty", "garbage", "cut off"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on_from_the_one_before(folder, content):
    before, last = list_checkpoints(folder)
    (last / "training_state.pt").write_bytes(content)
    with pytest.raises(UserError, match=f"{last}.*delete it"):
        train(*parse(["--resume", str(folder)]))
    shutil.rmtree(last)
    assert before.is_dir()
    assert train(*parse(["--resume", str(folder)])).result().steps == 1024


def test_a_copy_that_was_put_aside_is_no_checkpoint_and_is_kept(folder):
    _, last = list_checkpoints(folder)
    aside = shutil.copytree(last, last.with_name(f"{last.name}-best"))
    shutil.rmtree(last)
    train(*parse(["--resume", str(folder)]))
    assert aside.is_dir()
    assert last in list_checkpoints(folder) and aside not in list_checkpoints(folder)


def test_what_a_kill_in_the_middle_of_a_checkpoint_leaves_goes_with_the_next(tmp_path, monkeypatch):
    model = set_up(*parse(FLAGS)[:2]).model
    model.learn(256)
    with monkeypatch.context() as context:
        context.setattr("mua_rl.ppo.checkpoint.torch.save", kill)
        with pytest.raises(Killed):
            save_checkpoint(model, tmp_path / "checkpoint-256")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(model, tmp_path / "checkpoint-512")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-512"]


def test_each_rollouts_own_return_is_the_same_in_a_resumed_run(folder, tmp_path):
    """Checkpoints restart the episodes, and only short ones have ended soon after."""

    def own_returns(run):
        return [(line["step"], line["rollout/return"]) for line in run.metrics() if "rollout/return" in line]

    resumed = train(*parse(["--resume", str(folder)]))
    flags = [*FLAGS, "--tensorboard_log", "none", "--output_dir", str(tmp_path / "unbroken")]
    unbroken = train(*parse(flags))
    assert own_returns(resumed) == own_returns(unbroken) != []
