"""PPO's update for K trials at once: loss, gradient clipping and Adam, each trial by itself.

Shapes: K trials, N transitions of each in a rollout, M of them in a minibatch, O and A numbers of an observation and an
action, P trained numbers of a trial. Formulas and their order are those of stable-baselines3's `PPO.train`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mua_rl.ppo.stacked.policy import StackedPolicy


@dataclass(frozen=True)
class Options:
    """PPO's options, under stable-baselines3's names."""

    n_steps: int
    batch_size: int
    n_epochs: int
    gamma: float
    gae_lambda: float
    clip_range: float
    clip_range_vf: float | None
    normalize_advantage: bool
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    target_kl: float | None


class Transitions(NamedTuple):
    """Transitions of K trials, each field `[K, N]` or, for observations and actions of a Box, with a third axis."""

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, trials: Tensor, order: Tensor) -> "Transitions":
        """Transitions `order` (indices `[k, N]`) of the trials with these indices `[k]`."""
        return Transitions(*(field[trials[:, None], order] for field in self))

    def minibatches(self, size: int) -> Iterator["Transitions"]:
        """The transitions in their order, `size` at a time; the last ones may be fewer."""
        for parts in zip(*(field.split(size, 1) for field in self), strict=True):
            yield Transitions(*parts)


class StackedAdam:
    """Adam (Kingma and Ba 2015) on `policy.trained`, with a learning rate and a number of steps for each trial."""

    def __init__(self, policy: StackedPolicy, betas: tuple[float, float], eps: float):
        self.betas, self.eps = betas, eps
        self.first = torch.zeros_like(policy.trained)
        self.second = torch.zeros_like(policy.trained)
        self.steps = torch.zeros(len(policy), device=policy.trained.device)

    def take(self, trials: Tensor) -> Self:
        """A copy with the state of some of the trials."""
        some = type(self).__new__(type(self))
        some.betas, some.eps = self.betas, self.eps
        some.first, some.second, some.steps = self.first[trials], self.second[trials], self.steps[trials]
        return some

    def put(self, trials: Tensor, some: Self) -> None:
        """Take over the state of some of the trials."""
        self.first[trials], self.second[trials], self.steps[trials] = some.first, some.second, some.steps

    def step(self, trained: Tensor, gradient: Tensor, rates: Tensor, on: Tensor, body: int) -> None:
        """Update `trained`, in place.

        Args:
            trained: `[K, P]`.
            gradient: `[K, P]`; zero where `on` is False.
            rates: Learning rates of each trial's body and heads, `[K, 2]`.
            on: Which trials make the step, `[K]`; nothing of the others changes.
            body: How many of the P numbers are not the heads'.
        """
        going = on.float().unsqueeze(1)
        self.steps += on
        self.first.lerp_(gradient, going * (1 - self.betas[0]))
        self.second.lerp_(gradient.square(), going * (1 - self.betas[1]))
        steps = self.steps.clamp(min=1).unsqueeze(1)
        deviation = (self.second / (1 - self.betas[1] ** steps)).sqrt_().add_(self.eps)
        change = self.first / deviation
        rates = going * rates / (1 - self.betas[0] ** steps)
        trained[:, :body].addcmul_(change[:, :body], rates[:, :1], value=-1)
        trained[:, body:].addcmul_(change[:, body:], rates[:, 1:], value=-1)


def loss_and_kl(policy: StackedPolicy, trained: Tensor, batch: Transitions, options: Options) -> tuple[Tensor, Tensor]:
    """Each trial's PPO loss (Schulman et al. 2017) and its estimate of KL(old ‖ new), both `[K]`."""
    weights = policy.weights(trained)
    advantages = batch.advantages
    if options.normalize_advantage and advantages.shape[1] > 1:
        deviation, mean = torch.std_mean(advantages, 1, keepdim=True)
        advantages = (advantages - mean) / (deviation + 1e-8)
    distribution = policy.distribution(weights, batch.observations)
    log_ratio = distribution.log_prob(batch.actions) - batch.log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - options.clip_range, 1 + options.clip_range)
    loss = -torch.min(advantages * ratio, advantages * clipped).mean(1)
    values = policy.values(weights, batch.observations)
    if options.clip_range_vf is not None:
        change = (values - batch.values).clamp(-options.clip_range_vf, options.clip_range_vf)
        values = batch.values + change
    loss = loss + options.vf_coef * (batch.returns - values).square().mean(1)
    if options.ent_coef:
        loss = loss - options.ent_coef * distribution.entropy().mean(1)
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).mean(1)
    return loss, kl


def gradient_and_kl(policy: StackedPolicy, batch: Transitions, options: Options) -> tuple[Tensor, Tensor]:
    """Gradient of each trial's loss by its own numbers, `[K, P]`, not yet clipped, and the KL, `[K]`."""
    trained = policy.trained.detach().requires_grad_()
    loss, kl = loss_and_kl(policy, trained, batch, options)
    return torch.autograd.grad(loss.sum(), trained)[0], kl


def clipped(gradient: Tensor, max_norm: float, on: Tensor) -> Tensor:
    """Each trial's gradient scaled down to a norm of at most `max_norm`; zero where `on` is False."""
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(on.unsqueeze(1), gradient * factor, 0.0)


def update(
    policy: StackedPolicy,
    adam: StackedAdam,
    rollout: Transitions,
    order: Tensor,
    rates: Tensor,
    alive: Tensor,
    options: Options,
) -> None:
    """Some epochs over the rollout, in place of `policy.trained`.

    A trial whose KL exceeds 1.5 times the target makes no more steps, like an SB3 run that stops early; it leaves the
    batch with the end of the epoch.

    Args:
        policy, adam: Of K trials.
        rollout: Of K trials.
        order: Order of the transitions in each epoch, indices `[K, n_epochs, N]`.
        rates: Learning rates of each trial's body and heads, `[K, 2]`.
        alive: Trials that shall be updated, `[K]`.
        options: PPO's.
    """
    trials = alive.nonzero().squeeze(1)
    for epoch in range(options.n_epochs):
        if not len(trials):
            return
        some, moments, some_rates = policy.take(trials), adam.take(trials), rates[trials]
        on = torch.ones_like(trials, dtype=torch.bool)
        for batch in rollout.take(trials, order[trials, epoch]).minibatches(options.batch_size):
            gradient, kl = gradient_and_kl(some, batch, options)
            if options.target_kl is not None:
                on = on & ~(kl > 1.5 * options.target_kl)
            gradient = clipped(gradient, options.max_grad_norm, on)
            moments.step(some.trained, gradient, some_rates, on, policy.body)
        policy.trained[trials] = some.trained
        adam.put(trials, moments)
        trials = trials[on]
