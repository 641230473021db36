"""A base policy: zips of SB3 in its variants are read, everything else is refused with a reason."""

import base64
import json
import pickle
import zipfile
from contextlib import nullcontext
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402

from mua_rl.adapter.adapters import LoRA  # noqa: E402
from mua_rl.adapter.fingerprint import fingerprint  # noqa: E402
from mua_rl.envs.control import FAMILIES  # noqa: E402
from mua_rl.errors import UserError  # noqa: E402
from mua_rl.lr.record import LRRecord  # noqa: E402
from mua_rl.ppo import evaluation as ppo_evaluation  # noqa: E402
from mua_rl.ppo.arguments import PPOArguments, parse  # noqa: E402
from mua_rl.ppo.base import SHIPPED, read_base_policy, shipped_policy  # noqa: E402
from mua_rl.ppo.envs import build_envs, evaluation_envs, with_statistics  # noqa: E402
from mua_rl.ppo.evaluation import Returns, evaluate  # noqa: E402
from mua_rl.ppo.setup import find_base, set_up, training_envs  # noqa: E402
from mua_rl.ppo.trainer import PPO  # noqa: E402
from mua_rl.run.folder import RunFolder  # noqa: E402


class Endless(gymnasium.Env):
    """No episode ends."""

    observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}


gymnasium.register("Endless-v0", entry_point=Endless)


class Images(gymnasium.Env):
    """Black images."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((36, 36, 1), np.uint8), {}

    def step(self, action):
        return np.zeros((36, 36, 1), np.uint8), 0.0, False, False, {}


def save(path, env="CartPole-v1", algorithm=stable_baselines3.PPO, **options):
    model = algorithm("MlpPolicy", env, device="cpu", **options)
    model.save(path)
    return model


def test_weights_options_and_clip_range_come_from_the_zip(tmp_path):
    options = dict(gamma=0.9, n_epochs=3, clip_range=0.1, policy_kwargs={"net_arch": [8], "ortho_init": False})
    theirs = save(tmp_path / "p.zip", **options)
    base = read_base_policy(tmp_path / "p.zip")
    assert base.options["gamma"] == 0.9 and base.options["n_epochs"] == 3
    assert base.options["clip_range"] == pytest.approx(0.1)
    ours = PPO.from_base(base, make_vec_env("CartPole-v1"), device="cpu", n_epochs=7)
    assert (ours.gamma, ours.n_epochs) == (0.9, 7)  # what is given wins
    for mine, reference in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_a_schedule_that_another_python_pickled_is_left_unread(tmp_path):
    save(tmp_path / "p.zip", learning_rate=lambda progress: progress * 1e-3, clip_range=lambda progress: 0.3 * progress)
    base = read_base_policy(tmp_path / "p.zip")
    assert "clip_range" not in base.options
    PPO.from_base(base, make_vec_env("CartPole-v1"), device="cpu")


@pytest.mark.parametrize("clip_range", [0.1, lambda progress: 0.1 * progress], ids=["constant", "scheduled"])
def test_a_clip_range_that_is_not_read_is_told_unless_one_is_given(clip_range, tmp_path, capsys):
    save(tmp_path / "p.zip", clip_range=clip_range)
    flags = ["--env_id", "CartPole-v1", "--base", str(tmp_path / "p.zip"), "--lr", "0.001"]
    set_up(*parse(flags)[:2])
    assert ("0.2, SB3's default, is taken" in capsys.readouterr().out) is callable(clip_range)
    model = set_up(*parse([*flags, "--clip_range", "0.05"])[:2]).model
    assert model.clip_range(0.5) == 0.05 and not capsys.readouterr().out


def test_the_old_form_of_net_arch_is_understood(tmp_path):
    model = save(tmp_path / "p.zip", policy_kwargs={"net_arch": {"pi": [8], "vf": [4]}})
    model.policy_kwargs = {"net_arch": [{"pi": [8], "vf": [4]}], "device": "cuda"}  # as SB3 1.x wrote it
    model.save(tmp_path / "old.zip")
    ours = PPO.from_base(read_base_policy(tmp_path / "old.zip"), make_vec_env("CartPole-v1"), device="cpu")
    assert torch.equal(ours.policy.value_net.weight, model.policy.value_net.weight)


def test_weights_from_before_sb3_1_7_lack_two_names_and_fit(tmp_path):
    images = lambda: Images()  # noqa: E731
    model = stable_baselines3.PPO("CnnPolicy", make_vec_env(images), device="cpu")
    model.save(tmp_path / "p.zip")
    base = read_base_policy(tmp_path / "p.zip")
    old = {name: value for name, value in base.state_dict.items() if not name.startswith(("pi_f", "vf_f"))}
    assert len(old) < len(base.state_dict)
    ours = PPO.from_base(replace(base, state_dict=old), make_vec_env(images), adapter=LoRA(4), device="cpu")
    assert torch.equal(ours.policy.features_extractor.cnn[0].weight, model.policy.features_extractor.cnn[0].weight)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save(tmp_path / "p.zip")
    base = read_base_policy(tmp_path / "p.zip")
    with pytest.raises(UserError, match="do not fit the policy"):
        PPO.from_base(replace(base, policy_kwargs={"net_arch": [8]}), make_vec_env("CartPole-v1"))
    with pytest.raises(UserError, match="do not fit the policy"):
        PPO.from_base(replace(base, state_dict={}), make_vec_env("CartPole-v1"))


@pytest.mark.slow
def test_environments_in_processes_of_their_own_find_our_tasks():
    envs = build_envs("mua_rl/CartPole-LongPole-v0", 2, 0, subprocesses=True)
    together = build_envs("mua_rl/CartPole-LongPole-v0", 2, 0)
    try:
        assert np.array_equal(envs.reset(), together.reset())
    finally:
        envs.close()


@pytest.mark.parametrize("place", ["vecnormalize.pkl", "vec_normalize.pkl", "p/vecnormalize.pkl"])
def test_observation_statistics_are_found_where_sb3_and_rl_zoo3_put_them(tmp_path, place):
    envs = VecNormalize(make_vec_env("Pendulum-v1"))
    save(tmp_path / "p.zip", envs)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    envs.save(str(tmp_path / place))
    assert read_base_policy(tmp_path / "p.zip").vec_normalize == tmp_path / place


@pytest.fixture
def zoo_run(tmp_path):
    """A run's folder as rl-zoo3 leaves it, with evaluations and checkpoints."""
    envs = VecNormalize(make_vec_env("Pendulum-v1"))
    (tmp_path / "Pendulum-v1").mkdir()
    (tmp_path / "Pendulum-v1" / "config.yml").write_text(ZOO_CONFIG)
    for name in ("Pendulum-v1.zip", "best_model.zip", "rl_model_500_steps.zip"):
        save(tmp_path / name, envs)
    envs.save(str(tmp_path / "Pendulum-v1" / "vecnormalize.pkl"))
    return tmp_path


ZOO_CONFIG = "!!python/object/apply:collections.OrderedDict\n- - - n_envs\n    - 4\n  - - normalize\n    - true\n"


@pytest.mark.parametrize("name", ["Pendulum-v1.zip", "best_model.zip", "rl_model_500_steps.zip"])
def test_every_policy_of_an_rl_zoo3_run_has_the_statistics_of_the_run(zoo_run, name):
    """rl-zoo3#468, #1556: without them the same weights are a far worse policy."""
    assert read_base_policy(zoo_run / name).vec_normalize == zoo_run / "Pendulum-v1" / "vecnormalize.pkl"


def test_a_checkpoint_has_its_own_statistics_first(zoo_run):
    own = zoo_run / "rl_model_vecnormalize_500_steps.pkl"
    own.write_bytes((zoo_run / "Pendulum-v1" / "vecnormalize.pkl").read_bytes())
    assert read_base_policy(zoo_run / "rl_model_500_steps.zip").vec_normalize == own
    assert read_base_policy(zoo_run / "best_model.zip").vec_normalize != own


def test_statistics_of_another_policy_beside_are_not_taken_and_of_two_runs_not_guessed(zoo_run):
    save(zoo_run / "other.zip", make_vec_env("Pendulum-v1"))
    assert read_base_policy(zoo_run / "other.zip").vec_normalize is None
    (zoo_run / "Other-v1").mkdir()
    (zoo_run / "Other-v1" / "vecnormalize.pkl").touch()
    with pytest.raises(UserError, match="name one with --vec_normalize"):
        read_base_policy(zoo_run / "best_model.zip")
    assert read_base_policy(zoo_run / "best_model.zip", "none").vec_normalize is None


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (ZOO_CONFIG, True),
        (ZOO_CONFIG.replace("true", "'{''norm_obs'': True, ''norm_reward'': False}'"), True),
        (ZOO_CONFIG.replace("true", "false"), False),
        (ZOO_CONFIG.replace("true", "'{''norm_obs'': False, ''norm_reward'': True}'"), False),
        ("!!python/object/apply:collections.OrderedDict\n- - - n_envs\n    - 4\n", False),
    ],
)
def test_statistics_that_are_missing_are_asked_for(zoo_run, settings, refused):
    (zoo_run / "Pendulum-v1" / "vecnormalize.pkl").unlink()
    (zoo_run / "Pendulum-v1" / "config.yml").write_text(settings)
    base = read_base_policy(zoo_run / "best_model.zip")
    automatic = PPOArguments(env_id="Pendulum-v1", n_envs=1)
    with pytest.raises(UserError, match="statistics are not there") if refused else nullcontext():
        training_envs(automatic, base)
    training_envs(replace(automatic, vec_normalize="none"), base)
    training_envs(replace(automatic, vec_normalize="new"), base)


def test_other_algorithms_and_files_are_refused(tmp_path):
    for algorithm in (stable_baselines3.A2C, stable_baselines3.DQN):
        save(tmp_path / "other.zip", algorithm=algorithm)
        with pytest.raises(UserError, match="another algorithm"):
            read_base_policy(tmp_path / "other.zip")
    with pytest.raises(UserError, match="there is no base policy"):
        read_base_policy(tmp_path / "none.zip")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UserError, match="no zip written by"):
        read_base_policy(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(UserError, match="no zip written by"):
        read_base_policy(tmp_path / "empty.zip")


@pytest.mark.parametrize(
    ("env", "what"),
    [("Pendulum-v1", "observations"), ("Acrobot-v1", "observations")],
)
def test_another_environment_is_refused_with_both_spaces(tmp_path, env, what):
    save(tmp_path / "p.zip")
    with pytest.raises(UserError, match=f"trained with {what}"):
        PPO.from_base(read_base_policy(tmp_path / "p.zip"), make_vec_env(env))


def test_observation_bounds_may_differ_and_action_bounds_may_not(tmp_path):
    save(tmp_path / "p.zip", "Pendulum-v1")
    base = read_base_policy(tmp_path / "p.zip")
    base.check_spaces(spaces.Box(-9, 9, (3,), np.float32), spaces.Box(-2, 2, (1,), np.float32))
    with pytest.raises(UserError, match="trained with actions"):
        base.check_spaces(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-3, 3, (1,), np.float32))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_shipped_policy_serves_its_whole_family_and_takes_a_step(family):
    path = shipped_policy(family.env_id())
    assert path == SHIPPED / family.name / "policy.zip" and path.stat().st_size < 500_000
    ids = [family.nominal_id, *map(family.env_id, family.shifts), f"mua_rl.envs.control:{family.env_id()}"]
    assert {shipped_policy(env_id) for env_id in ids} == {path}
    base = read_base_policy(path)
    envs = build_envs(family.env_id(), 2, 0)
    envs = with_statistics(envs, base.vec_normalize) if base.vec_normalize else envs
    model = PPO.from_base(base, envs, adapter=LoRA(4, target_modules="hidden"), n_steps=8, batch_size=16, seed=0)
    model.learn(16)
    plain = stable_baselines3.PPO.load(path)
    assert type(plain) is stable_baselines3.PPO


@pytest.mark.parametrize("path", sorted((SHIPPED.parent / "records").glob("ppo-*.json")), ids=lambda path: path.stem)
def test_a_shipped_record_belongs_to_the_shipped_policy_of_its_name(path):
    record = LRRecord.load(path)
    base = read_base_policy(
        next(SHIPPED / f.name for f in FAMILIES if path.stem == f"ppo-{f.name.lower()}") / "policy.zip"
    )
    model = PPO.from_base(base, build_envs(record.task, 2, 0), device="cpu")
    assert fingerprint(model.policy) == record.base_fingerprint
    assert max(model.widths) == max(record.widths) and record.algorithm == "ppo"


def test_the_shipped_cartpole_policy_solves_the_nominal_task_and_fails_on_the_long_pole():
    model = stable_baselines3.PPO.load(shipped_policy("CartPole-v1"), device="cpu")
    assert evaluate(model, build_envs("mua_rl/CartPole-v0", 4, 0), 4).mean == 500
    assert evaluate(model, build_envs("mua_rl/CartPole-LongPole-v0", 4, 0), 4).mean < 30


def test_statistics_of_another_task_or_none_are_refused(tmp_path):
    VecNormalize(make_vec_env("Pendulum-v1")).save(str(tmp_path / "s.pkl"))
    with pytest.raises(UserError, match="do not fit"):
        with_statistics(make_vec_env("CartPole-v1"), tmp_path / "s.pkl")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"not": "statistics"})[:-3])
    with pytest.raises(UserError, match="cannot be read"):
        with_statistics(make_vec_env("Pendulum-v1"), tmp_path / "bad.pkl")


def test_evaluation_uses_the_training_statistics_and_leaves_them_alone():
    training = VecNormalize(make_vec_env("Pendulum-v1"))
    model = PPO("MlpPolicy", training, n_steps=16, batch_size=16, device="cpu").learn(16)
    held_out = evaluation_envs(build_envs("Pendulum-v1", 2, 0), training)
    count = training.obs_rms.count
    random_state = torch.get_rng_state()
    first, second = evaluate(model, held_out, 4), evaluate(model, held_out, 4)
    assert first == second and len(first.values) == 4  # the same held-out episodes each time
    assert first.mean < -100  # raw rewards, not normalised ones
    assert training.obs_rms.count == count
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_episode_without_end_is_refused_and_one_with_a_limit_of_its_own_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(ppo_evaluation, "LONG_EPISODE", 20)
    monkeypatch.setattr(ppo_evaluation, "LONGEST_EPISODE", 50)
    model = PPO("MlpPolicy", make_vec_env("Endless-v0"), device="cpu")
    limited = build_envs("Endless-v0", 2, 0, {"max_episode_steps": 60})
    assert evaluate(model, limited, 2).values == [60.0, 60.0]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r'not ended an episode in 50 steps: .*"max_episode_steps": 1000'):
        evaluate(model, build_envs("Endless-v0", 2, 0), 2)
    assert capsys.readouterr().err.count("an episode is 20 steps long") == 1


def test_interquartile_mean_by_hand():
    returns = Returns([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0])
    assert returns.iqm == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert Returns([7.0]).iqm == 7.0


def test_a_sweep_is_no_policy_to_start_from(tmp_path):
    sweep = RunFolder.create(str(tmp_path / "sweep"), "")
    sweep.start({"algo": "ppo"})
    with pytest.raises(UserError, match="is a sweep, which holds no policy: name a run"):
        find_base(PPOArguments(), str(sweep.path))


def test_a_zip_from_the_days_of_gym_is_read_with_its_spaces(tmp_path):
    """Gym is not installed here; its zips name its spaces, which Gymnasium has."""
    envs = VecNormalize(make_vec_env("Pendulum-v1"))
    save(tmp_path / "new.zip", envs)
    with zipfile.ZipFile(tmp_path / "new.zip") as new, zipfile.ZipFile(tmp_path / "p.zip", "w") as old:
        data = json.loads(new.read("data"))
        data["observation_space"][":serialized:"] = base64.b64encode(as_gym(envs.observation_space)).decode()
        data["action_space"][":serialized:"] = base64.b64encode(as_gym(envs.action_space)).decode()
        old.writestr("data", json.dumps(data))
        for name in set(new.namelist()) - {"data"}:
            old.writestr(name, new.read(name))
    del envs.norm_obs_keys  # newer than Gym
    (tmp_path / "vecnormalize.pkl").write_bytes(as_gym(envs))
    base = read_base_policy(tmp_path / "p.zip")
    assert base.observation_space == envs.observation_space and base.action_space == envs.action_space
    training = with_statistics(make_vec_env("Pendulum-v1"), base.vec_normalize)
    assert evaluation_envs(make_vec_env("Pendulum-v1"), training).obs_rms.count == envs.obs_rms.count


def as_gym(value):
    """Its pickle with Gym's names, which protocol 2 has between a `c` and the ends of lines."""
    pickled = pickle.dumps(value, protocol=2)
    assert b"cgymnasium." in pickled
    return pickled.replace(b"cgymnasium.", b"cgym.")
