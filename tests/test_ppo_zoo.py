"""Agents as people have them: rl-zoo3's folders, zips and statistics of gym's days, wrappers, classes of one's own."""

import base64
import json
import pickle
import re
import shutil
import sys
import types
import zipfile
from pathlib import Path

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

from mua_rl.adapter.adapters import Full, LoRA  # noqa: E402
from mua_rl.errors import UserError  # noqa: E402
from mua_rl.ppo import zoo  # noqa: E402
from mua_rl.ppo.arguments import parse  # noqa: E402
from mua_rl.ppo.base import read_base_policy  # noqa: E402
from mua_rl.ppo.envs import build_envs, with_statistics  # noqa: E402
from mua_rl.ppo.pickles import read_statistics, unpickle  # noqa: E402
from mua_rl.ppo.run import train  # noqa: E402
from mua_rl.ppo.setup import set_up  # noqa: E402
from mua_rl.ppo.trainer import PPO  # noqa: E402

ZOO = Path("/work/shared/data/zoo/ppo")
AGENTS = sorted(ZOO.glob("*"))
QUICK = ["--total_timesteps", "256", "--eval_episodes", "2", "--tensorboard_log", "none", "--lr", "0.001"]
QUICK += ["--n_steps", "32", "--n_envs", "2", "--batch_size", "32", "--n_epochs", "1"]


class Seen(gymnasium.Env):
    """Random observations of any space, ten steps an episode."""

    def __init__(self, observation_space, action_space, scale=1.0):
        self.observation_space, self.action_space, self.scale = observation_space, action_space, scale

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        shape, dtype = self.observation_space.shape, self.observation_space.dtype
        return self.np_random.normal(0, self.scale, shape).astype(dtype)

    def step(self, action):
        self.steps += 1
        return self.observe(), 1.0, self.steps >= 10, False, {}


class Small(Seen):
    """A class of one's own, without an id."""

    def __init__(self, scale=1.0):
        super().__init__(spaces.Box(-9, 9, (3,), np.float32), spaces.Discrete(2), scale)


class Scaled(gymnasium.ObservationWrapper):
    """Observations times a factor, plus a number."""

    def __init__(self, env, factor=1.0, plus=0.0):
        super().__init__(env)
        self.factor, self.plus = factor, plus

    def observation(self, observation):
        return observation * np.float32(self.factor) + np.float32(self.plus)


# Files of gym's days, made here


@pytest.fixture
def gym(monkeypatch):
    """A module of gym's name for as long as something is pickled; it is gone when that is read."""

    def old(space):
        """The space as gym 0.21 pickled it."""
        kind = type(space).__name__
        module = "gym.spaces." + re.sub("(?<=.)([A-Z])", r"_\1", kind).lower()
        if not hasattr(sys.modules.get(module), kind):
            made = types.ModuleType(module)
            setattr(made, kind, type(kind, (), {"__module__": module}))
            monkeypatch.setitem(sys.modules, module, made)
        value = getattr(sys.modules[module], kind)()
        value._np_random = np.random.RandomState(0)
        value.dtype, value._shape = space.dtype, space.shape
        if kind == "Box":
            value.low, value.high = space.low, space.high
        elif kind == "Dict":
            value.spaces = {key: old(part) for key, part in space.spaces.items()}
        elif kind == "Tuple":
            value.spaces = [old(part) for part in space.spaces]
        else:
            name = "nvec" if kind == "MultiDiscrete" else "n"
            setattr(value, name, getattr(space, name))
        return value

    monkeypatch.setitem(sys.modules, "gym", types.ModuleType("gym"))
    sys.modules["gym"].__version__ = "0.21.0"
    monkeypatch.setitem(sys.modules, "gym.spaces", types.ModuleType("gym.spaces"))
    yield old


def forget_gym():
    for name in [name for name in sys.modules if name.partition(".")[0] == "gym"]:
        del sys.modules[name]


def make_old(path, model, gym):
    """Rewrite an SB3 zip as one of gym's days: its spaces are gym's."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(contents["data"])
    for name in ("observation_space", "action_space"):
        pickled = cloudpickle.dumps(gym(getattr(model, name)))
        data[name][":serialized:"] = base64.b64encode(pickled).decode()
    data["clip_range"] = {":type:": "<class 'function'>", ":serialized:": "gAVubyBwaWNrbGU="}
    contents["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def make_old_statistics(path, statistics, gym):
    """Pickle statistics as SB3 1.0 did: gym's spaces, no `norm_obs_keys`."""
    state = statistics.__getstate__()
    spaces_of = {name: gym(state[name]) for name in ("observation_space", "action_space")}
    statistics.__dict__.update(spaces_of, obs_spaces=spaces_of["observation_space"])
    del statistics.__dict__["norm_obs_keys"]
    path.write_bytes(pickle.dumps(statistics))


def yaml_of_the_zoo(values):
    """A mapping as rl-zoo3 writes it."""
    rows = "".join(
        f"- - - {k}\n    - {json.dumps(v)}\n" if i == 0 else f"  - - {k}\n    - {json.dumps(v)}\n"
        for i, (k, v) in enumerate(values.items())
    )
    return "!!python/object/apply:collections.OrderedDict\n" + rows


def make_agent(folder, gym, env_id="Pendulum-v1", normalize=True, **config):
    """A folder of rl-zoo3, of gym's days; the policy that it holds."""
    envs = VecNormalize(make_vec_env(env_id)) if normalize else make_vec_env(env_id)
    model = stable_baselines3.PPO("MlpPolicy", envs, n_steps=64, batch_size=32, n_epochs=1, device="cpu", seed=0)
    model.learn(64)
    folder.mkdir(parents=True)
    model.save(folder / f"{env_id}.zip")
    make_old(folder / f"{env_id}.zip", model, gym)
    inner = folder / env_id
    inner.mkdir()
    (inner / "args.yml").write_text(yaml_of_the_zoo({"algo": "ppo", "env": env_id, "env_kwargs": None}))
    (inner / "config.yml").write_text(yaml_of_the_zoo({"clip_range": "lin_0.1", "normalize": normalize, **config}))
    if normalize:
        make_old_statistics(inner / "vecnormalize.pkl", envs, gym)
    forget_gym()
    return model


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-2, 3, (4,), np.float32),
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Discrete(5),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
        spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(-1, 1, (2,), np.float64)}),
        spaces.Tuple([spaces.Discrete(2), spaces.MultiBinary(3)]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_every_space_of_gym_becomes_gymnasiums_without_gym(space, gym):
    pickled = cloudpickle.dumps(gym(space))
    forget_gym()
    assert unpickle(pickled) == space


def test_statistics_of_gyms_days_are_read_with_their_numbers(tmp_path, gym):
    envs = VecNormalize(make_vec_env("Pendulum-v1"))
    stable_baselines3.PPO("MlpPolicy", envs, n_steps=64, device="cpu").learn(64)
    mean, variance = envs.obs_rms.mean.copy(), envs.ret_rms.var
    make_old_statistics(tmp_path / "s.pkl", envs, gym)
    forget_gym()
    with pytest.raises(ModuleNotFoundError):
        pickle.loads((tmp_path / "s.pkl").read_bytes())
    read = with_statistics(make_vec_env("Pendulum-v1"), tmp_path / "s.pkl")
    np.testing.assert_array_equal(read.obs_rms.mean, mean)
    assert read.ret_rms.var == variance and read.training
    assert np.isfinite(read.reset()).all() and read.norm_obs_keys is None


def test_a_folder_of_gyms_days_trains_saves_and_loads_in_plain_sb3(tmp_path, gym):
    model = make_agent(tmp_path / "Pendulum-v1_1", gym)
    flags = ["--base", str(tmp_path / "Pendulum-v1_1"), "--rank", "4"]
    arguments, _, given = parse(flags)
    assert arguments.env_id == given["env_id"] == "Pendulum-v1"
    setup = set_up(*parse([*flags, "--lr", "0.001"])[:2])
    for mine, theirs in zip(setup.model.policy.parameters(), model.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert setup.model.clip_range(1.0) == setup.model.clip_range(0.0) == 0.1
    assert setup.pretrained.vec_normalize.parent.name == "Pendulum-v1"
    run = train(*parse([*QUICK, *flags, "--output_dir", str(tmp_path / "run")]))
    plain = stable_baselines3.PPO.load(run.path / "policy.zip", env=make_vec_env("Pendulum-v1"), device="cpu")
    plain.learn(64)
    assert VecNormalize.load(str(run.path / "vecnormalize.pkl"), make_vec_env("Pendulum-v1")).norm_obs


def test_an_environment_of_ones_own_comes_without_the_agents_wrappers(tmp_path, gym):
    make_agent(tmp_path / "a", gym, env_wrapper="nowhere.Wrapper")
    assert parse(["--base", str(tmp_path / "a")])[0].wrapper == "nowhere.Wrapper"
    arguments = parse(["--base", str(tmp_path / "a"), "--env_id", "mua_rl/Pendulum-HeavyBob-v0"])[0]
    assert (arguments.env_id, arguments.wrapper) == ("mua_rl/Pendulum-HeavyBob-v0", None)


def test_an_environment_whose_version_is_gone_is_replaced_aloud(capsys):
    assert zoo.newest_version("Hopper-v3") == "Hopper-v5"
    assert "no Hopper-v3 any more: Hopper-v5" in capsys.readouterr().out
    assert zoo.newest_version("LunarLander-v2") == "LunarLander-v3"
    capsys.readouterr()
    assert zoo.newest_version("CartPole-v1") == "CartPole-v1" and zoo.newest_version("Mine-v0") == "Mine-v0"
    assert not capsys.readouterr().out


def test_the_best_model_takes_the_statistics_of_its_agent_and_the_run_says_so(tmp_path, gym, capsys):
    folder = tmp_path / "Pendulum-v1_1"
    make_agent(folder, gym)
    shutil.copy(folder / "Pendulum-v1.zip", folder / "best_model.zip")
    statistics = folder / "Pendulum-v1" / "vecnormalize.pkl"
    for path in (folder, folder / "best_model.zip"):
        base = read_base_policy(path)
        assert (base.path.name, base.vec_normalize) == ("best_model.zip", statistics)
    train(*parse([*QUICK, "--base", str(folder), "--output_dir", str(tmp_path / "run")]))
    assert f"observation statistics {statistics}" in capsys.readouterr().out
    statistics.unlink()
    with pytest.raises(UserError, match="statistics are not there: give --vec_normalize"):
        set_up(*parse(["--base", str(folder), "--lr", "0.001"])[:2])


def test_a_checkpoint_takes_the_statistics_of_its_own_step(tmp_path, gym):
    folder = tmp_path / "a"
    make_agent(folder, gym)
    (folder / "Pendulum-v1.zip").rename(folder / "rl_model_900_steps.zip")
    shutil.copy(folder / "rl_model_900_steps.zip", folder / "rl_model_1000_steps.zip")
    own = folder / "rl_model_vecnormalize_1000_steps.pkl"
    shutil.copy(folder / "Pendulum-v1" / "vecnormalize.pkl", own)
    base = read_base_policy(folder)
    assert base.path.name == "rl_model_1000_steps.zip" and base.vec_normalize == own


def test_folders_that_hold_no_policy_or_several_are_refused(tmp_path, gym):
    with pytest.raises(UserError, match="holds no policy"):
        read_base_policy(tmp_path)
    make_agent(tmp_path / "a", gym, normalize=False)
    shutil.copy(tmp_path / "a" / "Pendulum-v1.zip", tmp_path / "a" / "other.zip")
    with pytest.raises(UserError, match=r"several policies .*name one"):
        read_base_policy(tmp_path / "a")


def test_settings_in_unrelated_folders_are_not_taken_for_a_policys_own(tmp_path, gym):
    make_agent(tmp_path / "other", gym)
    shutil.copy(tmp_path / "other" / "Pendulum-v1.zip", tmp_path / "mine.zip")
    assert (
        zoo.find_environment(tmp_path / "mine.zip") == {}
        and read_base_policy(tmp_path / "mine.zip").vec_normalize is None
    )


# Agents that people have


@pytest.mark.skipif(not AGENTS, reason="the agents of rl-trained-agents are not here")
@pytest.mark.parametrize("adapter", [LoRA(4, target_modules="hidden"), Full("hidden")], ids=["LoRA", "FFT"])
@pytest.mark.parametrize("folder", AGENTS, ids=lambda folder: folder.name)
def test_every_agent_loads_trains_saves_and_loads_in_plain_sb3(folder, adapter, tmp_path):
    base = read_base_policy(folder)
    space = base.observation_space
    envs = DummyVecEnv([lambda: Seen(space, base.action_space)] * 2)
    assert (base.vec_normalize is not None) == bool(zoo.read_config(base.path).get("normalize"))
    statistics = with_statistics(envs, base.vec_normalize) if base.vec_normalize else None
    model = PPO.from_base(base, statistics or envs, adapter=adapter, device="cpu", n_steps=16, batch_size=16, seed=0)
    before = model.policy.action_net.weight.clone()
    model.learn(32)
    assert not torch.equal(before, model.policy.action_net.weight)
    model.save(tmp_path / "policy.zip")
    plain = stable_baselines3.PPO.load(tmp_path / "policy.zip", env=envs, device="cpu")
    seen = np.zeros((3, *space.shape), space.dtype)
    np.testing.assert_array_equal(*(p.predict(seen, deterministic=True)[0] for p in (plain, model)))
    plain.learn(32)
    if statistics:
        statistics.save(str(tmp_path / "s.pkl"))
        assert (
            VecNormalize.load(str(tmp_path / "s.pkl"), envs).obs_rms.count
            == read_statistics(tmp_path / "s.pkl").obs_rms.count
        )


@pytest.mark.skipif(not AGENTS, reason="the agents of rl-trained-agents are not here")
def test_the_hopper_of_the_zoo_hops_in_todays_mujoco():
    pytest.importorskip("mujoco")
    arguments, adapter, _ = parse(["--base", str(ZOO / "Hopper-v3_1"), "--lr", "0.0001"])
    setup = set_up(arguments, adapter)
    from mua_rl.ppo.envs import evaluation_envs
    from mua_rl.ppo.evaluation import evaluate

    envs = evaluation_envs(build_envs(arguments.env_id, 1, 0), setup.model.get_env())
    assert arguments.env_id == "Hopper-v5" and evaluate(setup.model, envs, 1).mean > 1500


# Wrappers and classes of one's own


def test_wrappers_take_keywords_and_the_first_is_the_innermost(monkeypatch):
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    wrappers = ["own:Scaled", {"own:Scaled": {"factor": 2.0}}, {"own.Scaled": {"plus": 5}}]
    plain, wrapped = build_envs("CartPole-v1", 1, 0).reset(), build_envs("CartPole-v1", 1, 0, wrapper=wrappers).reset()
    np.testing.assert_allclose(wrapped, plain * 2 + 5, rtol=1e-6)
    flags = ["--wrapper", json.dumps(wrappers)]
    assert parse(flags)[0].wrapper == wrappers
    with pytest.raises(UserError, match="--wrapper is no JSON"):
        parse(["--wrapper", "[own:Scaled"])
    with pytest.raises(UserError, match="cannot import 'own:None'"):
        build_envs("CartPole-v1", 1, 0, wrapper="own:None")


def test_a_wrapper_of_gym_is_taken_from_gymnasium():
    envs = build_envs("CartPole-v1", 1, 0, wrapper="gym.wrappers.NormalizeObservation")
    assert envs.reset().shape == (1, 4)


@pytest.mark.parametrize("named", ["module", "file"])
def test_an_environment_may_be_a_class_in_a_module_or_a_file(named, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    (tmp_path / "theirs.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control.cartpole import CartPoleEnv\n"
        "class Theirs(CartPoleEnv):\n"
        "    def __init__(self, length=0.5):\n        super().__init__()\n        self.length = length\n"
    )
    env_id = "own:Small" if named == "module" else str(tmp_path / "theirs.py") + ":Theirs"
    kwargs = {"scale": 2.0} if named == "module" else {"length": 1.5, "max_episode_steps": 7}
    assert build_envs(env_id, 2, 0, kwargs).reset().shape[0] == 2
    flags = ["--env_id", env_id, "--env_kwargs", json.dumps(kwargs), "--base", "none", "--rank", "full"]
    train(*parse([*QUICK, *flags, "--output_dir", str(tmp_path / "run")]))
    with pytest.raises(UserError, match="no environment"):
        build_envs(f"{env_id}s", 1, 0)


def test_the_path_of_a_file_is_kept_whole_so_that_a_run_resumes_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert parse(["--env_id", "mine.py:Mine"])[2]["env_id"] == f"{tmp_path}/mine.py:Mine"
