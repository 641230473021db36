"""The control tasks keep Gymnasium's contract, and a shifted one differs from the nominal one in its physics alone."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from mua_rl.envs.control import FAMILIES, NAMESPACE, register
from mua_rl.errors import UserError

pytest.importorskip("mujoco")
ALL_IDS = [family.env_id(shift) for family in FAMILIES for shift in (None, *family.shifts)]
SHIFTED = [(family, shift) for family in FAMILIES for shift in family.shifts]


def rollout(env: gymnasium.Env, steps: int = 60) -> list[tuple[np.ndarray, float, bool, bool]]:
    """Observations, rewards and ends under seeded random actions."""
    env.action_space.seed(3)
    env.reset(seed=7)
    trajectory = []
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        trajectory.append((observation, float(reward), terminated, truncated))
        if terminated or truncated:
            env.reset()
    return trajectory


@pytest.mark.parametrize("env_id", ALL_IDS)
@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is:UserWarning")
@pytest.mark.filterwarnings("ignore:.*recommend using a symmetric and normalized space:UserWarning")
@pytest.mark.filterwarnings("error")
def test_env_checker_finds_no_more_than_in_gymnasiums_own_task(env_id):
    check_env(gymnasium.make(env_id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_nominal_version_is_gymnasiums_task_step_by_step(family):
    ours, theirs = gymnasium.make(family.env_id()), gymnasium.make(family.nominal_id)
    assert ours.spec.max_episode_steps == theirs.spec.max_episode_steps
    assert ours.spec.reward_threshold == theirs.spec.reward_threshold
    for mine, reference in zip(rollout(ours), rollout(theirs), strict=True):
        np.testing.assert_array_equal(mine[0], reference[0])
        assert mine[1:] == reference[1:]


@pytest.mark.parametrize(("family", "shift"), SHIFTED, ids=lambda value: getattr(value, "name", value))
def test_a_shift_changes_the_dynamics_and_neither_spaces_nor_time_limit(family, shift):
    shifted, nominal = gymnasium.make(family.env_id(shift)), gymnasium.make(family.env_id())
    assert shifted.observation_space == nominal.observation_space
    assert shifted.action_space == nominal.action_space
    assert shifted.spec.max_episode_steps == nominal.spec.max_episode_steps
    pairs = zip(rollout(shifted, 20), rollout(nominal, 20), strict=True)
    assert any(not np.array_equal(mine[0], reference[0]) for mine, reference in pairs)


@pytest.mark.parametrize("env_id", [f"{NAMESPACE}/CartPole-LongPole-v0", f"{NAMESPACE}/Pendulum-HeavyBob-v0"])
def test_both_kinds_of_vectorisation_find_the_task_by_its_module(env_id):
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    name = f"mua_rl.envs.control:{env_id}"
    vector = gymnasium.make_vec(name, num_envs=3)
    assert vector.reset(seed=0)[0].shape[0] == 3
    assert stable_baselines3.common.env_util.make_vec_env(name, n_envs=3).reset().shape[0] == 3


def test_the_time_limit_truncates_and_does_not_terminate():
    env = gymnasium.make(f"{NAMESPACE}/Pendulum-HighGravity-v0")
    ends = [(terminated, truncated) for *_, terminated, truncated in rollout(env, 200)]
    assert ends[:-1] == [(False, False)] * 199 and ends[-1] == (False, True)


def test_registering_twice_changes_nothing():
    before = dict(gymnasium.registry)
    register()
    assert dict(gymnasium.registry) == before


@pytest.mark.parametrize(
    ("family", "keywords"),
    [
        ("CartPole", {"pole_half_length": 0.0}),
        ("CartPole", {"force": float("nan")}),
        ("Acrobot", {"link_2_mass": -1.0}),
        ("Pendulum", {"gravity": float("inf")}),
        ("HalfCheetah", {"mass_scale": 0.0}),
        ("Hopper", {"actuator_scale": [1.0, 1.0]}),
        ("Hopper", {"actuator_scale": -0.5}),
    ],
)
def test_impossible_physics_is_refused_by_name(family, keywords):
    with pytest.raises(UserError, match=next(iter(keywords))):
        gymnasium.make(f"{NAMESPACE}/{family}-v0", **keywords)


def test_body_changes_reach_the_compiled_model():
    nominal = gymnasium.make(f"{NAMESPACE}/Hopper-v0").unwrapped.model
    changed = gymnasium.make(
        f"{NAMESPACE}/Hopper-v0", gravity=5.0, mass_scale=2.0, friction_scale=0.5, actuator_scale=[1.0, 0.0, 0.5]
    ).unwrapped.model
    assert changed.opt.gravity[2] == -5.0
    np.testing.assert_allclose(changed.body_mass, 2 * nominal.body_mass)
    np.testing.assert_allclose(changed.body_inertia, 2 * nominal.body_inertia)
    np.testing.assert_allclose(changed.body_subtreemass, 2 * nominal.body_subtreemass)
    np.testing.assert_allclose(changed.geom_friction[:, 0], 0.5 * nominal.geom_friction[:, 0])
    np.testing.assert_allclose(changed.actuator_gear[:, 0], [200.0, 0.0, 100.0])
