"""`python -m mua_rl.ppo`: runs, resumption, refusals."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402

from mua_rl.errors import UserError  # noqa: E402
from mua_rl.lr.record import LRRecord  # noqa: E402
from mua_rl.ppo.arguments import (  # noqa: E402
    DEFAULT_ENV,
    PPOArguments,
    parse,
)
from mua_rl.ppo.envs import FiniteGuard, build_envs, evaluation_envs  # noqa: E402
from mua_rl.ppo.run import train  # noqa: E402
from mua_rl.ppo.setup import set_up  # noqa: E402
from mua_rl.ppo.trainer import PPO  # noqa: E402
from mua_rl.run.folder import RunFolder, start_wandb  # noqa: E402

QUICK = ["--total_timesteps", "2048", "--eval_episodes", "4", "--tensorboard_log", "none", "--progress_bar", "false"]


class Poisoned(gymnasium.Env):
    """Gives a non-finite observation or reward at its n-th step, or fails there, or at the start."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, at=310, what="observation", value=float("nan")):
        self.at, self.what, self.value, self.steps = at, what, value, 0
        if what == "start":
            raise RuntimeError("poisoned")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        observation, reward = np.zeros(3, np.float32), 0.0
        if self.steps == self.at and self.what == "observation":
            observation[1] = self.value
        if self.steps == self.at and self.what == "reward":
            reward = self.value
        if self.steps == self.at and self.what == "failure":
            raise RuntimeError("poisoned")
        return observation, reward, self.steps % 20 == 0, False, {}


class Mixed(gymnasium.Env):
    """A vector and a word to see; ten steps an episode."""

    observation_space = spaces.Dict({"vector": spaces.Box(-100, 100, (2,), np.float32), "word": spaces.Discrete(3)})
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        return {"vector": self.np_random.normal(50, 3, 2).astype(np.float32), "word": self.steps % 3}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(action), self.steps == 10, False, {}


gymnasium.register("Poisoned-v0", entry_point=Poisoned)
gymnasium.register("Mixed-v0", entry_point=Mixed)


def run(*flags):
    return train(*parse([*QUICK, *flags]))


def weights(folder):
    return stable_baselines3.PPO.load(folder / "policy.zip", device="cpu").policy.state_dict()


def same_weights(first, second):
    return all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


@pytest.fixture
def any_gain(monkeypatch):
    """A record is written also by a run that is too short to learn: what is in it is the question."""
    monkeypatch.setattr("mua_rl.run.life.has_gained", lambda *_: True)


def test_every_option_of_sb3s_ppo_is_a_flag():
    ours = {field.name for field in fields(PPOArguments)}
    assert set(inspect.signature(stable_baselines3.PPO).parameters) - {"env", "_init_setup_model"} <= ours


@pytest.mark.slow
def test_a_run_leaves_what_it_promises_and_its_record_gives_full_finetuning_the_same_rate(tmp_path, any_gain):
    folder = run("--rank", "4", "--lr", "0.004", "--output_dir", str(tmp_path / "lora")).path
    present = {path.name for path in folder.iterdir()}
    assert {"policy.zip", "adapter", "curve.png", "lr_record.json", "result.json", "metrics.jsonl"} <= present
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 1024, 2048}
    assert lines[2]["lr/lora_A"] == lines[2]["lr/head"] == pytest.approx(0.004 * (1 - 0.9 / 2))
    record = LRRecord.load(folder)
    assert (record.learning_rate, record.rank, record.algorithm, record.widths) == (0.004, 4, "ppo", [128])
    assert record.other_learning_rates == {"head": 0.004}
    full = run("--rank", "full", "--lr_from", str(folder), "--output_dir", str(tmp_path / "full"))
    assert LRRecord.load(full.path).learning_rate == 0.004
    after = run("--start_from", str(folder), "--output_dir", str(tmp_path / "after"))
    first, last = json.loads((folder / "result.json").read_text()), json.loads((after.path / "result.json").read_text())
    assert last["before"] == first["score"]  # the switch loses nothing
    assert LRRecord.load(after.path).scheme == "FFT"


@pytest.mark.slow
def test_head_rate_stays_where_the_rest_scales(tmp_path, any_gain):
    scaled = ["--alpha", "1/r", "--output_dir"]
    folder = run("--rank", "4", "--lr", "0.004", "--head_lr", "0.002", *scaled, str(tmp_path / "a"))
    other = run("--rank", "8", "--lr_from", str(folder.path), *scaled, str(tmp_path / "b"))
    record = LRRecord.load(other.path)
    assert record.learning_rate == pytest.approx(0.008) and record.other_learning_rates == {"head": 0.002}


@pytest.mark.slow
def test_the_heads_rate_is_that_of_the_record_that_gives_the_rest():
    shipped = set_up(*parse(["--rank", "8", "--alpha", "1/r"])[:2])
    assert (shipped.rate.value, shipped.model.head_learning_rate) == (8 * 2**-8, 2**-8)
    wide = ["--env_id", "CartPole-v1", "--base", "none", "--policy_kwargs", '{"net_arch": [1024, 1024]}']
    guess = set_up(*parse([*wide, "--rank", "8", "--alpha", "1/r"])[:2])
    assert "a guess" in guess.rate.reason and guess.model.head_learning_rate == guess.rate.value / 8 == 2**-11
    assert set_up(*parse(["--lr", "0.001"])[:2]).model.head_learning_rate is None  # that of the rest


def test_the_rates_of_all_parts_come_from_one_look_at_where_they_come_from(tmp_path, monkeypatch):
    """Else a record, or a folder, that changes meanwhile would give the heads another's rate."""
    import mua_rl.run.learning_rate as resolving

    looks, find_record, learning_rate = [], resolving.find_record, RunFolder.learning_rate
    monkeypatch.setattr(resolving, "find_record", lambda *given: looks.append("record") or find_record(*given))
    monkeypatch.setattr(RunFolder, "learning_rate", lambda run: looks.append("folder") or learning_rate(run))
    began = set_up(*parse([])[:2])
    folder = RunFolder.create(str(tmp_path / "run"), "")
    folder.start({}, {**began.rate.as_dict(), "head": 0.003})
    resumed = set_up(*parse(["--resume", str(folder.path)])[:2])
    assert looks == ["record", "folder"]
    assert (resumed.rate.value, resumed.model.head_learning_rate) == (began.rate.value, 0.003)


def test_weights_and_biases_goes_on_under_the_id_in_the_run_folder(tmp_path, monkeypatch):
    asked = []
    fresh = iter(["first", "second"])

    def init(**options):
        asked.append((options["id"], options["resume"]))
        return SimpleNamespace(id=options["id"] or next(fresh))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        start_wandb(RunFolder(tmp_path / folder))
    assert asked == [(None, "allow"), ("first", "allow"), (None, "allow")]


def test_the_default_command_needs_no_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, adapter_arguments, given = parse([])
    assert arguments.env_id == DEFAULT_ENV and given == {}
    arguments.total_timesteps, arguments.eval_episodes = 1024, 4
    folder = train(arguments, adapter_arguments, given).path
    assert folder.parent.name == "runs" and "/" not in folder.name
    reason = json.loads((folder / "result.json").read_text())["learning_rate_reason"]
    assert "the shipped record ppo-cartpole" in reason and "guess" not in reason


@pytest.mark.slow
def test_yaml_and_flags_say_the_same(tmp_path):
    (tmp_path / "c.yaml").write_text("n_epochs: 2\nenv_kwargs: {pole_half_length: 1.2}\nrank: 4\nlr: 0.003\n")
    flags = ["--n_epochs", "2", "--env_kwargs", '{"pole_half_length": 1.2}', "--rank", "4", "--lr", "0.003"]
    first = run("--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "yaml"))
    second = run(*flags, "--output_dir", str(tmp_path / "flags"))
    assert same_weights(first.path, second.path)


@pytest.mark.slow
def test_a_killed_run_ends_where_the_unbroken_one_does(tmp_path):
    flags = ["--lr", "0.004", "--total_timesteps", "20480", "--checkpoint_steps", "2048", "--eval_episodes", "8"]
    command = [sys.executable, "-m", "mua_rl.ppo", *flags, "--output_dir"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("killed/checkpoint-*")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = tmp_path / "killed"
    assert list(killed.glob("checkpoint-*")) and not (killed / "result.json").exists()
    train(*parse(["--resume", str(killed)]))
    unbroken = train(*parse([*flags, "--output_dir", str(tmp_path / "unbroken")])).path
    assert same_weights(killed, unbroken)

    def measured(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]

    assert measured(killed) == measured(unbroken)


@pytest.mark.parametrize("kind", [["--vec_normalize", "new"], ["--use_sde", "true"]], ids=["normalised", "gSDE"])
@pytest.mark.slow
def test_a_resumed_run_equals_the_unbroken_one_and_so_does_what_it_measures(kind, tmp_path, monkeypatch):
    flags = ["--env_id", "Pendulum-v1", "--base", "none", *kind, "--lr", "0.001", "--n_steps", "64"]
    flags += ["--total_timesteps", "4096", "--checkpoint_steps", "1024", "--n_envs", "4", "--n_epochs", "2"]
    unbroken = run(*flags, "--output_dir", str(tmp_path / "unbroken")).path

    class Stopped(Exception):
        pass

    def stop_late(model, *args, **kwargs):
        if model.num_timesteps >= 3000:
            raise Stopped
        return original(model, *args, **kwargs)

    original = PPO.train
    monkeypatch.setattr(PPO, "train", stop_late)
    with pytest.raises(Stopped):
        run(*flags, "--output_dir", str(tmp_path / "broken"))
    monkeypatch.setattr(PPO, "train", original)
    torch.rand(7), np.random.rand(7)  # another process would have other random states
    resumed = train(*parse(["--resume", str(tmp_path / "broken")])).path
    assert same_weights(unbroken, resumed)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (unbroken, resumed))
    assert first["score"] == second["score"]
    with pytest.raises(UserError, match="has ended"):
        parse(["--resume", str(resumed)])


def test_a_resumed_run_trains_and_records_the_rates_that_it_began_with(tmp_path, monkeypatch):
    """Whatever the record that they came from says by then, and also where there is none any more."""
    import mua_rl.run.learning_rate as resolving

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PPO, "learn", interrupt)
        run(*QUICK, "--output_dir", str(tmp_path / "run"))
    began = RunFolder(tmp_path / "run").learning_rate()
    monkeypatch.delattr(resolving, "find_record")
    setup = set_up(*parse(["--resume", str(tmp_path / "run")])[:2])
    assert (setup.rate.value, setup.rate.reason) == (began["learning_rate"], began["reason"])
    assert setup.model.head_learning_rate == began["head"] is not None


@pytest.mark.slow
def test_of_a_dictionary_the_vectors_are_normalised_in_training_and_on_held_out_episodes(tmp_path):
    flags = ["--env_id", "Mixed-v0", "--policy", "MultiInputPolicy", "--base", "none", "--vec_normalize", "new"]
    folder = run(*flags, "--rank", "full", "--lr", "0.001", "--output_dir", str(tmp_path / "r")).path
    statistics = VecNormalize.load(str(folder / "vecnormalize.pkl"), build_envs("Mixed-v0", 1, 0))
    assert list(statistics.obs_rms) == ["vector"] and statistics.obs_rms["vector"].mean == pytest.approx(50, abs=1)
    seen = evaluation_envs(build_envs("Mixed-v0", 2, 0), statistics).reset()
    assert np.abs(seen["vector"]).max() < 9 and set(seen["word"]) == {0}


def test_statistics_of_rewards_alone_leave_observations_as_they_are():
    training = VecNormalize(build_envs("Pendulum-v1", 1, 0), norm_obs=False)
    held_out, plain = evaluation_envs(build_envs("Pendulum-v1", 1, 7), training), build_envs("Pendulum-v1", 1, 7)
    assert np.array_equal(held_out.reset(), plain.reset())


@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_names_environment_and_step(what, value):
    envs = FiniteGuard(build_envs("Poisoned-v0", 2, 0, {"at": 3, "what": what, "value": value}).venv)
    envs.reset()
    for _ in range(2):
        envs.step(np.zeros(2, int))
    with pytest.raises(UserError, match=rf"environment 0 gave a non-finite {what} at its step 3"):
        envs.step(np.zeros(2, int))


def test_a_non_finite_last_observation_of_an_episode_is_seen_too():
    envs = build_envs("Poisoned-v0", 2, 0, {"at": 20})
    envs.reset()
    with pytest.raises(
        UserError, match="environment 0 gave a non-finite last observation of an episode at its step 20"
    ):
        for _ in range(20):
            envs.step(np.zeros(2, int))


def test_an_environment_that_fails_is_named_with_its_step():
    envs = build_envs("Poisoned-v0", 2, 0, {"at": 3, "what": "failure"})
    envs.reset()
    envs.step(np.zeros(2, int)), envs.step(np.zeros(2, int))
    with pytest.raises(UserError, match=r"failed at its step 3 of this run \(RuntimeError: poisoned\)"):
        envs.step(np.zeros(2, int))


def test_a_module_that_registers_an_environment_may_be_named_with_it():
    envs = build_envs("mua_rl.envs.control:mua_rl/CartPole-LongPole-v0", 1, 0)
    assert envs.observation_space.shape == (4,)


@pytest.mark.slow
def test_a_non_finite_value_in_training_keeps_the_last_checkpoint(tmp_path):
    flags = [
        "--env_id",
        "Poisoned-v0",
        "--total_timesteps",
        "4096",
        "--base",
        "none",
        "--lr",
        "0.001",
        "--n_envs",
        "4",
        "--n_steps",
        "64",
    ]
    with pytest.raises(UserError, match="step 310 of this run"):
        run(*flags, "--checkpoint_steps", "512", "--output_dir", str(tmp_path / "r"))
    assert (tmp_path / "r" / "checkpoint-1024" / "policy.zip").exists()
    assert not (tmp_path / "r" / "lr_record.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env_id", "Nowhere-v0"], "no environment 'Nowhere-v0'"),
        (["--base", "/nowhere.zip"], "no base policy at /nowhere.zip"),
        (["--rank", "200"], "rank 200 exceeds"),
        (["--rank", "200", "--target_modules", "all-linear"], "rank 200 exceeds the size of the layer"),
        (["--critic_lr", "2"], "--critic_lr must be"),
        (["--critic_warmup", "-1"], "--critic_warmup must not be negative"),
        (["--target_modules", "nothing"], "names no linear or convolutional layer"),
        (["--lr", "0"], "between 0 and 1"),
        (["--lr", "nan"], "between 0 and 1"),
        (["--lr", "10"], "between 0 and 1"),
        (["--head_lr", "0"], "--head_lr must be"),
        (["--batch_size", "1"], "PPO cannot be built"),
        (["--env_kwargs", "{"], "mapping in JSON"),
        (["--env_kwargs", '{"no_such": 1}'], "cannot be built"),
        (["--wrapper", "nowhere:Nothing"], "cannot import"),
        (["--policy_kwargs", '{"net_arch": [8]}'], "--base none"),
        (["--seed", "-1"], "--seed must lie"),
        (["--n_envs", "0"], "--n_envs must be at least 1"),
        (["--n_epochs", "0"], "--n_epochs must be at least 1"),
        (["--gamma", "2"], "--gamma must lie between 0 and 1"),
        (["--clip_range", "nan"], "--clip_range must not be negative, as nan is"),
        (["--env_id", "nowhere:Nothing-v0"], "no environment 'nowhere:Nothing-v0': No module named 'nowhere'"),
        (["--env_id", "Poisoned-v0", "--env_kwargs", '{"at": 1, "what": "start"}'], "cannot be built: poisoned"),
        (["--env_id", "FrozenLake-v1", "--vec_normalize", "new"], "there are none in Discrete.16.: drop it"),
        (["--lr_from", "/nowhere"], "no LR record"),
        (["--start_from", "/nowhere"], "no run folder"),
        (["--resume", "/nowhere"], "no run folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [] if "--resume" in flags else ["--output_dir", str(tmp_path / "out")]
    rate = [] if {"--lr", "--lr_from", "--start_from", "--resume"} & set(flags) else ["--lr", "0.001"]
    with pytest.raises(UserError, match=message):
        train(*parse([*flags, *rate, *given]))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_line_exits_with_2_and_one_line():
    outcome = subprocess.run(
        [sys.executable, "-m", "mua_rl.ppo", "--env_id", "Nowhere-v0"], capture_output=True, text=True
    )
    assert outcome.returncode == 2 and outcome.stderr.strip().splitlines()[-1].startswith(
        "mua_rl: error: no environment"
    )
