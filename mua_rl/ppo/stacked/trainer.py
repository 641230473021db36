"""PPO with K trials side by side in one process: what `mua_rl.ppo.trainer.PPO` does K times, in K times fewer calls.

Trials share the base policy and the task, and differ in learning rate, seed, rank, initialisation and multiplier. Their
trained weights are stacked, their environments are rows of one tensor where the task has a tensor version
(`mua_rl.envs.control.tensor`), and each has its own learning rate, gradient norm, Adam moments, random numbers, order
of minibatches and early stop: a trial does what it would do alone, to rounding, whatever the others do.
"""

import copy
import inspect
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import gymnasium
import stable_baselines3
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from mua_rl.adapter.targets import TargetModules
from mua_rl.envs.control.tensor import TensorEnvs, TensorTask, tensor_task
from mua_rl.errors import UserError, one_line
from mua_rl.lr.record import check_learning_rate
from mua_rl.lr.spec import FFT
from mua_rl.ppo.arguments import PPOArguments
from mua_rl.ppo.base import BasePolicy
from mua_rl.ppo.envs import check_env_id, environment_class, evaluation_envs
from mua_rl.ppo.evaluation import Returns, evaluate
from mua_rl.ppo.setup import bare_envs, training_envs
from mua_rl.ppo.stacked.policy import SINGLY, StackedPolicy, build_policy
from mua_rl.ppo.stacked.rollouts import Collector, GymnasiumEnvs, held_out_returns
from mua_rl.ppo.stacked.update import Options, StackedAdam, update
from mua_rl.ppo.trainer import PPO
from mua_rl.run.trial import Trial, TrialResult, clear_change


def train_side_by_side(
    arguments: PPOArguments,
    trials: Sequence[Trial],
    base: BasePolicy,
    target_modules: TargetModules = "hidden",
    device: torch.device | str = "cpu",
    workers: int = 1,
) -> list[TrialResult]:
    """Train all trials from `base` and evaluate them.

    Args:
        arguments: The task, PPO's options, the schedule and `eval_episodes`; its `seed` and `learning_rate` are the
            trials'.
        trials: All LoRA or all full finetuning.
        base: The policy that all start from.
        target_modules: What carries LoRA.
        device: Where everything but Gymnasium's own environments runs.
        workers: Threads that share out the trials, each with one core (a busy machine makes several cores of one thread
            wait for each other).

    Returns:
        What each trial reached, in order.

    Raises:
        UserError: See `StackedPPO`.
    """
    count = max(1, min(workers, len(trials)))
    groups = [StackedPPO(arguments, trials[first::count], base, target_modules, device) for first in range(count)]
    if count == 1:
        return groups[0].learn()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        outcomes = list(pool.map(StackedPPO.learn, groups))
    in_order = [outcomes[k % count][k // count] for k in range(len(trials))]
    return [replace(outcome, seconds=outcome.seconds / count) for outcome in in_order]


class StackedPPO:
    """K trials that are ready to train; arguments as `train_side_by_side`.

    Attributes:
        policy: The trials' policies, stacked.
        returns: Mean training return of each trial in each rollout, one tensor `[K]` a rollout; NaN before the first
            episode has ended.
        alive: Trials whose weights are finite, `[K]`.
        steps: Environment steps of each trial so far.

    Raises:
        UserError: There are no trials, the policy or an option has no stacked form (the message says to run singly), an
            adapter does not fit, or the environment cannot be built.
    """

    def __init__(
        self,
        arguments: PPOArguments,
        trials: Sequence[Trial],
        base: BasePolicy,
        target_modules: TargetModules = "hidden",
        device: torch.device | str = "cpu",
    ):
        if not trials:
            raise UserError("there are no trials to train.")
        self.arguments, self.trials, self.base, self.device = arguments, list(trials), base, torch.device(device)
        for trial in self.trials:
            if not trial.learning_rate > 0 or math.isinf(trial.learning_rate):
                raise UserError(f"a trial has the learning rate {trial.learning_rate}: it must be positive and finite.")
        if arguments.head_lr is not None:
            check_learning_rate(arguments.head_lr, "--head_lr")
        self.options = ppo_options(arguments, base)
        self.task = _tensor_task(arguments, base)
        self.generators = [torch.Generator().manual_seed(trial.seed) for trial in self.trials]
        self.vec_envs: list[VecEnv] = []
        envs: TensorEnvs | GymnasiumEnvs
        if self.task is not None:
            spaces = self.task.observation_space, self.task.action_space
            envs = TensorEnvs(self.task, self.generators, arguments.n_envs or base.n_envs, self.device)
        else:
            self.vec_envs = [training_envs(replace(arguments, seed=trial.seed), base) for trial in self.trials]
            spaces = self.vec_envs[0].observation_space, self.vec_envs[0].action_space
            envs = GymnasiumEnvs(self.vec_envs, self.device)
        self.sb3_policy = build_policy(base, *spaces)
        self.policy = StackedPolicy(self.sb3_policy, self.trials, target_modules, self.device)
        self.transitions = self.options.n_steps * envs.envs_per_trial
        self.collector = Collector(envs, self.generators, self.options)
        defaults = self.sb3_policy.optimizer.defaults
        self.adam = StackedAdam(self.policy, defaults["betas"], defaults["eps"])
        self.schedule = FloatSchedule(arguments.schedule(1.0))
        rates = [[trial.learning_rate, arguments.head_lr or trial.learning_rate] for trial in self.trials]
        self.rates = torch.tensor(rates, device=self.device)
        self.alive = torch.ones(len(self.trials), dtype=torch.bool, device=self.device)
        self.lost_at: dict[int, int] = {}
        self.steps = 0
        self.returns: list[Tensor] = []

    def learn(self) -> list[TrialResult]:
        """Train and evaluate; what each trial reached, in order."""
        start = time.perf_counter()
        before = Returns(self._base_returns())
        self.train()
        after = [Returns(values) for values in self._trial_returns()]
        seconds = (time.perf_counter() - start) / len(self.trials)
        curves = torch.stack(self.returns, 1).double().cpu()
        return [self._outcome(k, before, after[k], curves[k], seconds) for k in range(len(self.trials))]

    def train(self) -> None:
        """All environment steps and updates; a trial that leaves the finite numbers acts on and learns no more."""
        initial = self.policy.trained.clone()
        while self.steps < self.arguments.total_timesteps:
            self.steps += self.transitions
            self._iterate()
            lost = self.alive & ~self.policy.trained.isfinite().all(1)
            self.policy.trained = torch.where(lost.unsqueeze(1), initial, self.policy.trained)
            self.alive &= ~lost
            self.lost_at |= {k: self.steps for k in lost.nonzero().flatten().tolist()}

    def _iterate(self) -> None:
        """One rollout, which ends at `steps`, and the update on it."""
        rollout, returns = self.collector.collect(self.policy)
        self.returns.append(torch.where(returns.isnan(), self.returns[-1], returns) if self.returns else returns)
        factor = self.schedule(1.0 - self.steps / self.arguments.total_timesteps)
        size = (self.options.n_epochs, self.transitions)
        drawn = torch.stack([torch.rand(size, generator=generator) for generator in self.generators])
        order = drawn.to(self.device).argsort(dim=-1, stable=True)
        update(self.policy, self.adam, rollout, order, factor * self.rates, self.alive, self.options)

    def _base_returns(self) -> list[float]:
        """Held-out returns of the base policy."""
        if self.task is None:
            return self._evaluate_alone(self.sb3_policy, self.vec_envs[0])
        untrained = StackedPolicy(self.sb3_policy, [Trial(FFT, 0.0, 0)], device=self.device)
        return held_out_returns(untrained, self.task, self.arguments.eval_episodes)[0].tolist()

    def _trial_returns(self) -> list[list[float]]:
        """Held-out returns of every trial."""
        if self.task is not None:
            return held_out_returns(self.policy, self.task, self.arguments.eval_episodes).tolist()
        trained = copy.deepcopy(self.sb3_policy)
        returns = []
        for k, envs in enumerate(self.vec_envs):
            trained.load_state_dict(self.policy.state_dict(k))
            returns.append(self._evaluate_alone(trained, envs))
        return returns

    def _evaluate_alone(self, policy: ActorCriticPolicy, training: VecEnv) -> list[float]:
        episodes = self.arguments.eval_episodes
        held_out = evaluation_envs(bare_envs(self.arguments, min(8, episodes), 0), training)
        return evaluate(policy, held_out, episodes).values

    def _outcome(self, trial: int, before: Returns, after: Returns, curve: Tensor, seconds: float) -> TrialResult:
        if trial in self.lost_at:
            at = self.lost_at[trial]
            reason = f"a weight is no longer finite in the update after environment step {at}"
            return TrialResult.of_divergence(before.mean, at, seconds, reason)
        return TrialResult.of_training(
            after.mean,
            after.standard_error,
            before.mean,
            curve.tolist(),
            self.steps,
            seconds,
            clear_fall=clear_change(before.values, after.values),
        )

    def save(self, trial: int, path: Path | str) -> None:
        """Write a trial's policy, merged, as the SB3 zip that its single run would write."""
        arguments = replace(self.arguments, seed=self.trials[trial].seed)
        envs = bare_envs(arguments, self.collector.envs.envs_per_trial, arguments.seed)
        options = {**arguments.sb3_options(), "learning_rate": arguments.schedule(self.trials[trial].learning_rate)}
        model = PPO.from_base(self.base, envs, device="cpu", **options)
        model.policy.load_state_dict(self.policy.state_dict(trial))
        model.save(path)


def ppo_options(arguments: PPOArguments, base: BasePolicy) -> Options:
    """PPO's options as a single run has them: those given, else the base policy's, else SB3's.

    Raises:
        UserError: One of them has no stacked form.
    """
    defaults = {name: p.default for name, p in inspect.signature(stable_baselines3.PPO).parameters.items()}
    options = {**defaults, **base.options, **arguments.sb3_options()}
    if options["use_sde"] or arguments.rollout_buffer_class or arguments.rollout_buffer_kwargs:
        raise UserError(f"side by side there is neither gSDE nor a rollout buffer of your own: {SINGLY}.")
    if arguments.critic_lr is not None or any(arguments.own_options().values()):
        raise UserError(
            f"side by side there is no critic apart (rate, warm-up, clipping) and no KL to the base: {SINGLY}."
        )
    return Options(**{field.name: options[field.name] for field in fields(Options)})


def _tensor_task(arguments: PPOArguments, base: BasePolicy) -> TensorTask | None:
    """The task as tensors, if it has such a version and nothing is wrapped around it."""
    normalised = arguments.vec_normalize == "new" or (base.vec_normalize and arguments.vec_normalize != "none")
    if normalised or arguments.wrapper or arguments.frame_stack > 1:
        return None
    check_env_id(arguments.env_id)
    if environment_class(arguments.env_id) is not None:
        return None
    try:
        return tensor_task(arguments.env_id, arguments.env_kwargs)  # type: ignore[arg-type]  # a mapping since __post_init__
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise UserError(f"the environment {arguments.env_id!r} cannot be built: {one_line(error)}") from None
