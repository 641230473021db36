"""Rollouts of K trials at once, with the advantages (GAE) that belong to them, and their held-out returns.

Shapes: K trials with E environments each, T steps of a rollout, N = T E transitions, O and A numbers of an observation
and an action.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.distributions import Categorical, Independent

from mua_rl.envs.control.tensor import Step, TensorTask
from mua_rl.ppo.evaluation import HELD_OUT_SEED
from mua_rl.ppo.stacked.policy import StackedPolicy, Weights
from mua_rl.ppo.stacked.update import Options, Transitions


class Envs(Protocol):
    """K trials with E environments each, which start over by themselves: `TensorEnvs` or `GymnasiumEnvs`."""

    envs_per_trial: int

    def reset(self) -> Tensor:
        """Start every episode anew; observations `[K, E, O]`."""

    def step(self, action: Tensor) -> Step:
        """Act in every environment: integers `[K, E]`, or floats `[K, E, A]` within the bounds of the space."""


class GymnasiumEnvs:
    """Environments that are no tensors: each trial's own SB3 environments, stepped one trial after the other.

    Args:
        trials: Monitored environments of each trial, equally many.
        device: Where observations and rewards go.
    """

    def __init__(self, trials: Sequence[VecEnv], device: torch.device | str = "cpu"):
        self.trials, self.device = trials, device
        self.envs_per_trial = trials[0].num_envs

    def reset(self) -> Tensor:
        """See `Envs`."""
        return self._tensor([envs.reset() for envs in self.trials])

    def step(self, action: Tensor) -> Step:
        """See `Envs`."""
        steps = [envs.step(own) for envs, own in zip(self.trials, action.cpu().numpy(), strict=True)]
        observations, rewards, dones, infos = zip(*steps, strict=True)
        ended = np.stack(dones)
        truncated = np.array([[info.get("TimeLimit.truncated", False) for info in trial] for trial in infos]) & ended
        final, returns = np.stack(observations), np.zeros(ended.shape)
        for k, e in zip(*ended.nonzero(), strict=True):
            final[k, e] = infos[k][e]["terminal_observation"]
            returns[k, e] = infos[k][e]["episode"]["r"]
        return Step(
            self._tensor(observations),
            self._tensor(rewards),
            torch.as_tensor(ended & ~truncated, device=self.device),
            torch.as_tensor(truncated, device=self.device),
            self._tensor(final),
            self._tensor(returns),
        )

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.stack(values), dtype=torch.float32, device=self.device)


class Collector:
    """Lets K trials act and keeps what they met.

    Args:
        envs: Of K trials.
        generators: One for each trial, on the CPU: it alone decides the trial's actions.
        options: PPO's.
    """

    def __init__(self, envs: Envs, generators: Sequence[torch.Generator], options: Options):
        self.envs, self.generators, self.options = envs, generators, options
        self.observation = envs.reset()

    @torch.no_grad()
    def collect(self, policy: StackedPolicy) -> tuple[Transitions, Tensor]:
        """`n_steps` steps of every environment, and the mean return `[K]` of the episodes that ended (NaN: none)."""
        weights, space = policy.weights(), policy.policy.action_space
        noises = self._noise(space)
        bounds = action_bounds(space, noises.device)
        observations, actions, log_probs, steps = [], [], [], []
        for noise in noises:
            distribution = policy.distribution(weights, self.observation)
            action = sample(distribution, noise)
            allowed = action if bounds is None else action.clamp(*bounds)
            observations.append(self.observation)
            actions.append(action)
            log_probs.append(distribution.log_prob(action))
            steps.append(self.envs.step(allowed))
            self.observation = steps[-1].observation
        met = Step(*(torch.stack(field, 1) for field in zip(*steps, strict=True)))  # [K, T, E, …]
        seen = torch.stack([*observations, self.observation], 1)
        values = policy.values(weights, seen.flatten(1, 2)).unflatten(1, seen.shape[1:3])
        ended = met.terminated | met.truncated
        rewards = met.reward + self.options.gamma * self._values_at_time_limits(policy, weights, met)
        advantages = generalized_advantages(rewards, values, ended, self.options.gamma, self.options.gae_lambda)
        values = values[:, :-1]
        fields = (seen[:, :-1], torch.stack(actions, 1), torch.stack(log_probs, 1), values, advantages)
        rollout = Transitions(*(field.flatten(1, 2) for field in (*fields, advantages + values)))
        return rollout, met.episode_return.sum((1, 2)) / ended.sum((1, 2))

    def _noise(self, space: spaces.Space) -> Tensor:
        """Random numbers of all actions, `[T, K, E]` in [0, 1), or `[T, K, E, A]` normal, each trial's from its own."""
        size = (self.options.n_steps, self.envs.envs_per_trial)
        if isinstance(space, spaces.Discrete):
            drawn = [torch.rand(size, generator=generator) for generator in self.generators]
        else:
            drawn = [torch.randn(*size, *space.shape, generator=generator) for generator in self.generators]  # type: ignore[misc]
        return torch.stack(drawn, 1).to(self.observation.device)

    def _values_at_time_limits(self, policy: StackedPolicy, weights: Weights, met: Step) -> Tensor:
        """Value `[K, T, E]` of the last observation where the time limit ended an episode, else 0."""
        values = torch.zeros_like(met.reward)
        steps = met.truncated.any(2).any(0).nonzero().squeeze(1)
        if len(steps):
            last = met.final_observation[:, steps]
            values[:, steps] = policy.values(weights, last.flatten(1, 2)).unflatten(1, last.shape[1:3])
        return values * met.truncated


def sample(distribution: Categorical | Independent, noise: Tensor) -> Tensor:
    """Actions of a distribution, from numbers in [0, 1) `[K, E]` or, for a Gaussian, normal ones `[K, E, A]`."""
    if isinstance(distribution, Categorical):
        return (noise.unsqueeze(-1) >= distribution.probs.cumsum(-1)[..., :-1]).sum(-1)
    return distribution.base_dist.loc + distribution.base_dist.scale * noise


def action_bounds(space: spaces.Space, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Lower and upper bounds of the actions of a Box, `[A]` each; None for other spaces."""
    if not isinstance(space, spaces.Box):
        return None
    return torch.as_tensor(space.low, device=device), torch.as_tensor(space.high, device=device)


def generalized_advantages(rewards: Tensor, values: Tensor, ended: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """GAE (Schulman et al. 2016).

    Args:
        rewards: Reward of each step, with γ V of the last observation where a time limit cut in, `[K, T, E]`.
        values: V of each observation and of the one after the last step, `[K, T + 1, E]`.
        ended: Whether the episode ended with this step, `[K, T, E]`.
        gamma: Discount.
        gae_lambda: λ.

    Returns:
        Advantages, `[K, T, E]`.
    """
    goes_on = 1.0 - ended.float()
    errors = rewards + gamma * goes_on * values[:, 1:] - values[:, :-1]
    decay = gamma * gae_lambda * goes_on
    advantages = torch.empty_like(errors)
    running = torch.zeros_like(errors[:, 0])
    for t in reversed(range(errors.shape[1])):
        running = torch.addcmul(errors[:, t], decay[:, t], running)
        advantages[:, t] = running
    return advantages


@torch.no_grad()
def held_out_returns(policy: StackedPolicy, task: TensorTask, episodes: int) -> Tensor:
    """Returns `[K, episodes]` under deterministic actions, from the same held-out starts for every trial."""
    weights = policy.weights()
    drawn = task.random_numbers(episodes, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    starts = task.starts(drawn.to(policy.trained.device))
    state = starts.expand(len(policy), *starts.shape)
    bounds = action_bounds(policy.policy.action_space, state.device)
    going = torch.ones(state.shape[:-1], dtype=torch.bool, device=state.device)
    returns = torch.zeros(state.shape[:-1], device=state.device)
    for step in range(task.max_episode_steps):
        action = policy.distribution(weights, task.dynamics.observe(state)).mode
        action = action if bounds is None else action.clamp(*bounds)
        state, reward, terminated = task.dynamics.step(state, action)
        returns += reward * going
        going &= ~terminated
        if step % 50 == 49 and not going.any():
            break
    return returns
