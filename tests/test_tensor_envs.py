"""The tensor versions of the control tasks do, step by step, what Gymnasium's own environments do."""

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from mua_rl.envs.control import FAMILIES  # noqa: E402
from mua_rl.envs.control.tensor import TensorEnvs, tensor_task  # noqa: E402
from mua_rl.errors import UserError  # noqa: E402

CLASSIC = [family for family in FAMILIES if family.entry_point.startswith("mua_rl.envs.control.classic")]
IDS = [env_id for f in CLASSIC for env_id in (f.nominal_id, f.env_id(), *map(f.env_id, f.shifts))]
ARMS, ENVS = 2, 3


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def envs_of(env_id, seeds=(0, 1), **keywords):
    return TensorEnvs(tensor_task(env_id, keywords), generators(*seeds), ENVS)


def random_actions(space, generator, trials=ARMS):
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.randint(int(space.n), (trials, ENVS), generator=generator)
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    return low + (high - low) * torch.rand(trials, ENVS, *space.shape, generator=generator)


@pytest.mark.parametrize(
    ("env_id", "keywords"),
    [
        *((env_id, {}) for env_id in IDS),
        ("mua_rl/CartPole-v0", {"gravity": 20.0, "cart_mass": 2.0, "pole_mass": 0.3, "force": 5.0}),
        ("mua_rl/Acrobot-v0", {"link_1_mass": 2.0, "link_2_mass": 0.5, "link_1_length": 1.3}),
        ("mua_rl/Pendulum-v0", {"mass": 0.7, "length": 1.2, "max_torque": 3.0}),
    ],
)
def test_every_step_is_gymnasiums(env_id, keywords):
    envs, generator = envs_of(env_id, **keywords), torch.Generator().manual_seed(5)
    theirs = [gymnasium.make(env_id, **keywords) for _ in range(ARMS * ENVS)]

    def restart(i):
        theirs[i].reset()
        theirs[i].unwrapped.state = envs.state.flatten(0, 1)[i].numpy().copy()

    for i in range(ARMS * ENVS):
        restart(i)
    ends = 0
    for _ in range(210):
        action = random_actions(envs.task.action_space, generator)
        ours = envs.step(action)
        for i, (env, choice) in enumerate(zip(theirs, action.flatten(0, 1).numpy(), strict=True)):
            observation, reward, terminated, truncated, _ = env.step(choice)
            k, e = divmod(i, ENVS)
            np.testing.assert_allclose(ours.final_observation[k, e], observation, rtol=1e-6, atol=1e-6)
            assert ours.reward[k, e] == pytest.approx(reward, rel=1e-6)
            assert (ours.terminated[k, e], ours.truncated[k, e]) == (terminated, truncated and not terminated)
            if terminated or truncated:
                ends += 1
                restart(i)
                np.testing.assert_array_equal(ours.observation[k, e], envs.task.dynamics.observe(envs.state)[k, e])
            else:
                np.testing.assert_array_equal(ours.observation[k, e], ours.final_observation[k, e])
    assert ends > 0 or "Acrobot" in env_id


def test_a_task_that_ends_at_its_time_limit_has_terminated_and_is_not_truncated():
    task = tensor_task("mua_rl/CartPole-v0", {"max_episode_steps": 2})
    envs = TensorEnvs(task, generators(0), 2)
    envs.step(torch.zeros(1, 2, dtype=torch.int64))
    envs.state[0, 0, 0] = 3.0  # out of bounds with the next step
    step = envs.step(torch.zeros(1, 2, dtype=torch.int64))
    assert step.terminated.tolist() == [[True, False]]
    assert step.truncated.tolist() == [[False, True]]
    assert step.episode_return.tolist() == [[2.0, 2.0]]
    assert envs.age.tolist() == [[0, 0]]


def test_acrobot_ends_when_its_tip_is_up():
    envs = envs_of("mua_rl/Acrobot-v0")
    envs.state[0, 0] = torch.tensor([torch.pi, 0.0, 0.0, 0.0])
    step = envs.step(torch.ones(ARMS, ENVS, dtype=torch.int64))
    assert step.terminated[0].tolist() == [True, False, False]
    assert step.reward[0].tolist() == [0.0, -1.0, -1.0]


def test_an_trials_starts_depend_on_its_own_generator_alone():
    def starts(*seeds):
        envs = envs_of("mua_rl/CartPole-LongPole-v0", seeds)
        action = torch.ones(len(seeds), ENVS, dtype=torch.int64)  # falls within ten steps or so
        return torch.stack([envs.step(action).observation for _ in range(100)], 1)

    together, alone = starts(7, 8, 9), starts(8)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("env_id", [family.env_id() for family in CLASSIC])
def test_starts_are_spread_like_gymnasiums(env_id):
    task, env = tensor_task(env_id), gymnasium.make(env_id)
    ours = task.dynamics.observe(
        task.starts(task.random_numbers(4000, generator=torch.Generator().manual_seed(0)))
    ).numpy()
    theirs = np.stack([env.reset(seed=seed)[0] for seed in range(1000)])
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.15 * max(1e-9, theirs.std(0).max()))
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.1)


def test_tasks_without_a_tensor_version_are_told_apart():
    assert tensor_task("MountainCar-v0") is None
    assert tensor_task("CartPole-v1", {"sutton_barto_reward": True}) is None
    assert tensor_task("CartPole-v1").max_episode_steps == 500
    assert tensor_task("mua_rl/Pendulum-HighGravity-v0").dynamics.env.g == 15.0


def test_a_keyword_that_the_task_cannot_have_is_refused():
    with pytest.raises(UserError, match="pole_mass is -1"):
        tensor_task("mua_rl/CartPole-v0", {"pole_mass": -1.0})
