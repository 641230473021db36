"""The classic control tasks as tensors: many environments of many trials stepped at once, on any device.

Dynamics, rewards and constants are those of the Gymnasium environment that `gymnasium.make` builds for the same id and
keywords; its object is asked for every constant, so each shift of `mua_rl.envs.control` works and is defined once.
States are float64 and observations and rewards float32, as with Gymnasium under stable-baselines3.

Shapes: K trials, E environments of each, S numbers of state, O of observation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import gymnasium
import torch
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from torch import Tensor

from mua_rl.envs.control import classic

STARTS = 64
"""Steps for which each trial's random starts are drawn at once."""


class Dynamics(Protocol):
    """A task without memory: states in, states out.

    Attributes:
        start_low, start_high: Bounds of the uniform distribution of starts, one for each of the S numbers.
    """

    start_low: Sequence[float]
    start_high: Sequence[float]

    def observe(self, state: Tensor) -> Tensor:
        """Observations, float32 `[…, O]`, of states, float64 `[…, S]`."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next states `[…, S]`, rewards `[…]` float32 and whether the task ended `[…]`.

        Actions are integers `[…]`, or floats `[…, A]` within the bounds of the action space.
        """


class CartPole:
    """Gymnasium's CartPole (Barto, Sutton and Anderson 1983), integrated by Euler's method."""

    start_low, start_high = (-0.05,) * 4, (0.05,) * 4

    def __init__(self, env: CartPoleEnv):
        self.env = env

    def observe(self, state: Tensor) -> Tensor:
        """See `Dynamics`."""
        return state.float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Dynamics`."""
        env = self.env
        _, x_dot, theta, theta_dot = state.unbind(-1)
        cosine, sine = theta.cos(), theta.sin()
        force = (action * 2 - 1).double() * env.force_mag
        push = (force + env.polemass_length * theta_dot.square() * sine) / env.total_mass
        inertia = env.length * (4.0 / 3.0 - env.masspole * cosine.square() / env.total_mass)
        theta_acceleration = (env.gravity * sine - cosine * push) / inertia
        x_acceleration = push - env.polemass_length * theta_acceleration * cosine / env.total_mass
        change = torch.stack((x_dot, x_acceleration, theta_dot, theta_acceleration), -1)
        state = state + env.tau * change
        terminated = (state[..., 0].abs() > env.x_threshold) | (state[..., 2].abs() > env.theta_threshold_radians)
        return state, torch.ones_like(force, dtype=torch.float32), terminated


class Acrobot:
    """Gymnasium's Acrobot (Sutton 1996), integrated by Runge and Kutta's fourth-order method."""

    start_low, start_high = (-0.1,) * 4, (0.1,) * 4

    def __init__(self, env: AcrobotEnv):
        self.env = env

    def observe(self, state: Tensor) -> Tensor:
        """See `Dynamics`."""
        theta_1, theta_2, theta_1_dot, theta_2_dot = state.unbind(-1)
        parts = (theta_1.cos(), theta_1.sin(), theta_2.cos(), theta_2.sin(), theta_1_dot, theta_2_dot)
        return torch.stack(parts, -1).float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Dynamics`."""
        env = self.env
        torque = (action - 1).double() * float(env.AVAIL_TORQUE[2])
        k_1 = self._derivative(state, torque)
        k_2 = self._derivative(state + env.dt / 2 * k_1, torque)
        k_3 = self._derivative(state + env.dt / 2 * k_2, torque)
        k_4 = self._derivative(state + env.dt * k_3, torque)
        theta_1, theta_2, theta_1_dot, theta_2_dot = (state + env.dt / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)).unbind(-1)
        theta_1, theta_2 = _wrapped(theta_1), _wrapped(theta_2)
        theta_1_dot = theta_1_dot.clamp(-env.MAX_VEL_1, env.MAX_VEL_1)
        theta_2_dot = theta_2_dot.clamp(-env.MAX_VEL_2, env.MAX_VEL_2)
        terminated = -theta_1.cos() - (theta_2 + theta_1).cos() > 1.0
        return torch.stack((theta_1, theta_2, theta_1_dot, theta_2_dot), -1), terminated.float() - 1.0, terminated

    def _derivative(self, state: Tensor, torque: Tensor) -> Tensor:
        """Velocities and accelerations of both joints; the second joint's as in Sutton and Barto's book."""
        env, g = self.env, 9.8
        m_1, m_2, l_1, c_1, c_2 = (
            env.LINK_MASS_1, env.LINK_MASS_2, env.LINK_LENGTH_1, env.LINK_COM_POS_1, env.LINK_COM_POS_2,
        )  # fmt: skip
        theta_1, theta_2, theta_1_dot, theta_2_dot = state.unbind(-1)
        cosine, sine = theta_2.cos(), theta_2.sin()
        d_1 = m_1 * c_1**2 + m_2 * (l_1**2 + c_2**2 + 2 * l_1 * c_2 * cosine) + 2 * env.LINK_MOI
        d_2 = m_2 * (c_2**2 + l_1 * c_2 * cosine) + env.LINK_MOI
        phi_2 = m_2 * c_2 * g * (theta_1 + theta_2 - math.pi / 2).cos()
        phi_1 = (
            -m_2 * l_1 * c_2 * sine * (theta_2_dot.square() + 2 * theta_2_dot * theta_1_dot)
            + (m_1 * c_1 + m_2 * l_1) * g * (theta_1 - math.pi / 2).cos()
            + phi_2
        )
        acceleration_2 = (torque + d_2 / d_1 * phi_1 - m_2 * l_1 * c_2 * theta_1_dot.square() * sine - phi_2) / (
            m_2 * c_2**2 + env.LINK_MOI - d_2.square() / d_1
        )
        acceleration_1 = -(d_2 * acceleration_2 + phi_1) / d_1
        return torch.stack((theta_1_dot, theta_2_dot, acceleration_1, acceleration_2), -1)


class Pendulum:
    """Gymnasium's Pendulum: torque on a rod that is to stand up."""

    start_low, start_high = (-math.pi, -1.0), (math.pi, 1.0)

    def __init__(self, env: PendulumEnv):
        self.env = env

    def observe(self, state: Tensor) -> Tensor:
        """See `Dynamics`."""
        theta, theta_dot = state.unbind(-1)
        return torch.stack((theta.cos(), theta.sin(), theta_dot), -1).float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Dynamics`."""
        env = self.env
        theta, theta_dot = state.unbind(-1)
        torque = action[..., 0].clamp(-env.max_torque, env.max_torque)  # float32, and so its products, as in Gymnasium
        cost = _wrapped(theta).square() + 0.1 * theta_dot.square() + (0.001 * torque.square()).double()
        pull = 3 * env.g / (2 * env.l) * theta.sin() + (3.0 / (env.m * env.l**2) * torque).double()
        theta_dot = (theta_dot + pull * env.dt).clamp(-env.max_speed, env.max_speed)
        state = torch.stack((theta + theta_dot * env.dt, theta_dot), -1)
        return state, -cost.float(), torch.zeros_like(cost, dtype=torch.bool)


DYNAMICS: dict[type, Any] = {
    CartPoleEnv: CartPole,
    classic.CartPole: CartPole,
    AcrobotEnv: Acrobot,
    classic.Acrobot: Acrobot,
    PendulumEnv: Pendulum,
    classic.Pendulum: Pendulum,
}
"""Dynamics by the exact class of the Gymnasium environment: a subclass may differ in anything."""


@dataclass(frozen=True)
class TensorTask:
    """A task that can be stepped as tensors.

    Attributes:
        dynamics: States in, states out.
        max_episode_steps: Time limit in environment steps.
        observation_space, action_space: Gymnasium's.
    """

    dynamics: Dynamics
    max_episode_steps: int
    observation_space: gymnasium.spaces.Space
    action_space: gymnasium.spaces.Space

    def random_numbers(self, *size: int, generator: torch.Generator) -> Tensor:
        """What `starts` makes starts of, float64 `[*size, S]` in [0, 1)."""
        return torch.rand(*size, len(self.dynamics.start_low), generator=generator, dtype=torch.float64)

    def starts(self, random_numbers: Tensor) -> Tensor:
        """Starts of episodes, as many as there are rows of random numbers `[…, S]`."""
        low = random_numbers.new_tensor(self.dynamics.start_low)
        high = random_numbers.new_tensor(self.dynamics.start_high)
        return low + (high - low) * random_numbers


def tensor_task(env_id: str, env_kwargs: dict[str, Any] | None = None) -> TensorTask | None:
    """The task that `gymnasium.make(env_id, **env_kwargs)` builds, as tensors; None where it has no tensor version.

    Raises:
        UserError: A keyword has a value that the task cannot have.
        gymnasium.error.Error: There is no such environment.
        TypeError: It has no such keyword.
    """
    env = gymnasium.make(env_id, **(env_kwargs or {}))
    bare, spec = env.unwrapped, env.spec
    dynamics = DYNAMICS.get(type(bare))
    if dynamics is None or spec is None or spec.max_episode_steps is None or spec.additional_wrappers:
        return None
    if getattr(bare, "_sutton_barto_reward", False):
        return None
    return TensorTask(dynamics(bare), spec.max_episode_steps, env.observation_space, env.action_space)


class Step(NamedTuple):
    """What one step of all environments gave; K trials with E environments each.

    Attributes:
        observation: Of the state that the next action acts on: after an end the next episode's first, `[K, E, O]`.
        reward: `[K, E]`.
        terminated: The task ended, `[K, E]`.
        truncated: The time limit ended the episode and the task did not, `[K, E]`.
        final_observation: As `observation`, but of an episode that ended the last one.
        episode_return: Sum of the rewards of an episode that ended here, else 0, `[K, E]`.
    """

    observation: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_observation: Tensor
    episode_return: Tensor


class TensorEnvs:
    """K trials with E environments each, which start over by themselves.

    Args:
        task: What is stepped.
        generators: One for each trial, on the CPU; it alone decides the trial's starts, whatever the other trials do.
        envs_per_trial: E.
        device: Where states live.
    """

    def __init__(
        self,
        task: TensorTask,
        generators: Sequence[torch.Generator],
        envs_per_trial: int,
        device: torch.device | str = "cpu",
    ):
        self.task, self.generators, self.envs_per_trial, self.device = task, generators, envs_per_trial, device
        self.reset()

    def reset(self) -> Tensor:
        """Start every episode anew; observations `[K, E, O]`."""
        self.drawn = 0
        self.state = self._starts()
        self.age = torch.zeros(self.state.shape[:-1], dtype=torch.int64, device=self.device)
        self.running_return = torch.zeros(self.state.shape[:-1], device=self.device)
        return self.task.dynamics.observe(self.state)

    def step(self, action: Tensor) -> Step:
        """Act in every environment.

        Args:
            action: Integers `[K, E]`, or floats `[K, E, A]` within the bounds of the action space.
        """
        dynamics = self.task.dynamics
        state, reward, terminated = dynamics.step(self.state, action)
        self.age += 1
        self.running_return += reward
        truncated = (self.age >= self.task.max_episode_steps) & ~terminated
        ended = terminated | truncated
        episode_return = self.running_return * ended
        self.age.masked_fill_(ended, 0)
        self.running_return.masked_fill_(ended, 0)
        self.state = torch.where(ended.unsqueeze(-1), self._starts(), state)
        final_observation = dynamics.observe(state)
        return Step(dynamics.observe(self.state), reward, terminated, truncated, final_observation, episode_return)

    def _starts(self) -> Tensor:
        """A start for every environment, `[K, E, S]`; drawn for `STARTS` steps at a time, on the CPU."""
        if self.drawn % STARTS == 0:
            drawn = [self.task.random_numbers(STARTS, self.envs_per_trial, generator=one) for one in self.generators]
            self.starts = self.task.starts(torch.stack(drawn, 1).to(self.device))
        self.drawn += 1
        return self.starts[(self.drawn - 1) % STARTS]


def _wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-π, π)."""
    return (angle + math.pi).remainder(2 * math.pi) - math.pi
