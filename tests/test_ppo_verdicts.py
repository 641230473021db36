"""What a PPO run says it came to: pairs of episodes decide, and what learnt nothing leaves no record."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

stable_baselines3 = pytest.importorskip("stable_baselines3")

from mua_rl.errors import UserError  # noqa: E402
from mua_rl.lr.record import LRRecord  # noqa: E402
from mua_rl.ppo import run as ppo_run  # noqa: E402
from mua_rl.ppo.arguments import parse  # noqa: E402
from mua_rl.ppo.envs import build_envs  # noqa: E402
from mua_rl.ppo.evaluation import Returns, evaluate  # noqa: E402
from mua_rl.ppo.setup import set_up  # noqa: E402
from mua_rl.run.trial import Status, TrialResult, clear_change, has_gained  # noqa: E402

QUICK = ["--total_timesteps", "1024", "--n_steps", "64", "--eval_episodes", "4", "--tensorboard_log", "none"]


def status(before, after):
    mean = np.mean
    fall = clear_change(before, after)
    return TrialResult.of_training(mean(after), 0.0, mean(before), [], 10, 1.0, clear_fall=fall).status


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0.0, 5.0], [0.0, 2.0], Status.OK),  # 2.5 ± 2.5 → 1.0 ± 1.0 over two episodes says nothing
        ([500.0] * 40, [495.0] * 40, Status.OK),  # an environment without chance shows one episode, 40 times
        ([500.0] * 40, [20.0] * 40, Status.WORSE),
        ([-100.0] * 4, [-200.0] * 4, Status.WORSE),
        ([3.0], [2.9], Status.OK),
        (list(range(20)), [k - 1.0 for k in range(20)], Status.WORSE),  # each episode fell alike: pairs tell
        (list(range(20)), [19.0 - k - 0.5 for k in range(20)], Status.OK),  # the same means, but no pair
    ],
)
def test_a_policy_is_worse_where_its_own_episodes_say_so(before, after, expected):
    assert status(before, after) is expected


def test_a_policy_that_stays_is_called_worse_in_about_two_cases_of_a_hundred():
    draw = np.random.default_rng(0)
    for count in (3, 10, 40):
        cases = [(draw.normal(size=count), draw.normal(size=count)) for _ in range(1000)]
        assert 0.01 < np.mean([status(list(a), list(b)) is Status.WORSE for a, b in cases]) < 0.04


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], False),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], True),
        ([-300.0, -200.0], [-299.99, -199.99], False),
        ([10.0, 20.0, 30.0, 40.0], [40.0, 30.0, 20.0, 12.0], False),
        ([500.0] * 3, [500.0] * 3, False),
    ],
)
def test_a_gain_is_more_than_the_noise_of_its_pairs(before, after, expected):
    assert has_gained(before, after) is expected


class Counted(gymnasium.Env):
    """The n-th episode of an environment returns n, after a number of steps that its seed decides."""

    observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = 0 if seed is not None else self.episode + 1
        self.length, self.steps = int(self.np_random.integers(1, 30)), 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(3, np.float32), float(self.episode) * (self.steps == 1), self.steps >= self.length, False, {}


gymnasium.register("Counted-v0", entry_point=Counted)


def test_held_out_returns_come_in_the_order_of_their_environments_whichever_ends_first():
    model = stable_baselines3.PPO("MlpPolicy", "Counted-v0", device="cpu")
    assert evaluate(model, build_envs("Counted-v0", 4, 0), 12).values == [0.0, 1.0, 2.0] * 4


def run(tmp_path, name, *flags):
    return ppo_run.train(*parse([*QUICK, *flags, "--output_dir", str(tmp_path / name)]))


def test_a_run_that_learnt_nothing_writes_no_record_and_says_so(tmp_path, capsys):
    folder = run(tmp_path, "still", "--lr", "1e-12")
    assert folder.result().status is Status.OK and not (folder.path / "lr_record.json").exists()
    assert "Nothing was learnt" in capsys.readouterr().out
    with pytest.raises(UserError, match="no lr_record"):
        LRRecord.load(folder.path)
    after = set_up(*parse(["--start_from", str(folder.path), "--lr", "0.001"])[:2])
    assert after.base.name == f"the policy of {folder.path}"


def test_the_scores_before_are_kept_for_a_resumed_run(tmp_path, monkeypatch):
    returns = iter([Returns([1.0, 2.0, 3.0]), Returns([2.0, 3.0, 4.5])])
    monkeypatch.setattr(ppo_run, "evaluate", lambda *_: next(returns))
    folder = run(tmp_path, "run", "--lr", "0.001")
    first = json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["scores_before"] == [1.0, 2.0, 3.0] and LRRecord.load(folder.path).metric["before"] == 2.0
