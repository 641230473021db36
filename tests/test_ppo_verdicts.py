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
from mua_rl.ppo.base import read_base_policy  # noqa: E402
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


# Where the learning rate comes from


def rate(*flags):
    return set_up(*parse(list(flags))[:2]).rate


def test_a_run_like_the_records_has_its_rate_without_a_doubt():
    own = rate("--total_timesteps", "25600")
    assert "the record's own configuration" in own.reason and not own.warning


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--batch_size", "1024"], "minibatch 128 → 1024"),
        (["--n_epochs", "10"], "epochs 5 → 10"),
        (["--target_kl", "0"], "target_kl 0.03 → None"),
        (["--lr_schedule", "constant"], "schedule linear → constant"),
        (
            ["--env_id", "mua_rl/CartPole-LongerPole-v0"],
            "task mua_rl/CartPole-LongPole-v0 → mua_rl/CartPole-LongerPole",
        ),
        (["--n_envs", "4", "--n_steps", "64"], "environments 8 → 4, steps_per_rollout 128 → 64"),
        (["--target_modules", "actor"], "layers ['mlp_extractor.policy_net.2', 'mlp_extractor.value_net.2'] →"),
    ],
)
def test_a_rate_from_a_record_names_what_differs_in_this_run(flags, difference):
    other = rate(*flags)
    assert difference in other.warning and "own configuration" not in other.reason
    assert "nine times in ten" not in other.reason and other.value == rate().value


def test_a_new_record_knows_its_discount(tmp_path, monkeypatch):
    monkeypatch.setattr("mua_rl.run.life.has_gained", lambda *_: True)
    folder = run(tmp_path, "run", "--lr", "0.001", "--gamma", "0.9")
    assert "gamma 0.9 → 0.99" in rate("--lr_from", str(folder.path), "--n_steps", "64", "--gamma", "0.99").warning


def test_a_guess_comes_from_the_record_of_the_same_family(tmp_path):
    stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", device="cpu").save(tmp_path / "mine.zip")
    guess = rate("--base", str(tmp_path / "mine.zip"), "--env_id", "mua_rl/Pendulum-HeavyBob-v0")
    assert "a guess" in guess.reason and "the shipped record ppo-pendulum" in guess.reason


def test_the_best_policy_on_the_way_is_kept_and_measured_where_it_was(tmp_path, monkeypatch, capsys):
    means = iter([1.0, 4.0, 9.0, 5.0, 60.0])  # before, three on the way, after
    monkeypatch.setattr(ppo_run, "evaluate", lambda *_: Returns([next(means)] * 3))
    folder = run(tmp_path, "run", "--lr", "0.01", "--total_timesteps", "2048", "--eval_steps", "512")
    measured = [(line["step"], line["held_out/return"]) for line in folder.metrics() if "held_out/return" in line]
    assert measured == [(0, 1.0), (512, 4.0), (1024, 9.0), (1536, 5.0), (2048, 60.0)]
    best = stable_baselines3.PPO.load(folder.path / "best_policy.zip", device="cpu")
    assert best.num_timesteps == 1024
    assert "the best on the way, 9 after 1,024 steps" in capsys.readouterr().out.replace("\n", " ")


def test_measuring_on_the_way_changes_nothing_in_training(tmp_path):
    flags = ["--env_id", "Pendulum-v1", "--base", "none", "--rank", "full", "--lr", "0.001", "--vec_normalize", "new"]
    plain = run(tmp_path, "plain", *flags).path
    measured = run(tmp_path, "measured", *flags, "--eval_steps", "512").path
    loaded = (stable_baselines3.PPO.load(folder / "policy.zip", device="cpu") for folder in (plain, measured))
    one, two = (model.policy.state_dict() for model in loaded)
    assert all((one[name] == two[name]).all() for name in one)
    best = read_base_policy(measured / "best_policy.zip")
    assert best.vec_normalize == measured / "best_vecnormalize.pkl"
