"""Held-out return of a control policy: mean, standard deviation and interquartile mean over episodes."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from mua_rl.errors import UserError

HELD_OUT_SEED = 1_000_000
"""Evaluation environment i is seeded with this plus i."""
TRAINING_SEEDS = 900_000
"""Training environment i is seeded with a number below this plus i, so that the two never meet."""

LONG_EPISODE, LONGEST_EPISODE = 10_000, 120_000
"""Steps after which an episode is waited for aloud, and not waited for any more, where its environment has no limit of
its own. An Atari game ends after 108,000 frames, which are 27,000 steps or, without frame skipping, as many."""


@dataclass(frozen=True)
class Returns:
    """Undiscounted, unnormalised returns of held-out episodes: all of the first environment, of the second, and so on.

    Two measurements of the same length are of the same episodes in the same order.
    """

    values: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Standard deviation over episodes."""
        return float(np.std(self.values))

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over episodes; of one episode it is not known."""
        count = len(self.values)
        return float(np.std(self.values, ddof=1)) / count**0.5 if count > 1 else float("nan")

    @property
    def iqm(self) -> float:
        """Interquartile mean: the mean without the lowest and the highest quarter of the episodes."""
        cut = len(self.values) // 4
        return float(np.mean(sorted(self.values)[cut : len(self.values) - cut]))

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "std": self.std, "iqm": self.iqm, "episodes": len(self.values)}

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f} (IQM {self.iqm:.1f}, {len(self.values)} episodes)"


def evaluate(model: Any, envs: VecEnv, episodes: int) -> Returns:
    """Returns of `episodes` episodes under deterministic actions, from the seeds of `HELD_OUT_SEED`.

    Args:
        model: Anything with SB3's `predict`.
        envs: Monitored environments; with VecNormalize, `training` and `norm_reward` must be off.
        episodes: How many, shared out over the environments.

    Raises:
        UserError: An episode does not end.
    """
    numbers: list[int] = []  # of the environments whose episodes have ended, in that order

    def watch(variables: dict[str, Any], everything: dict[str, Any]) -> None:
        _watch_length(variables, everything)
        if variables["done"] and (not variables["is_monitor_wrapped"] or "episode" in variables["info"]):
            numbers.append(variables["i"])

    envs.seed(HELD_OUT_SEED)
    returns, _ = evaluate_policy(model, envs, n_eval_episodes=episodes, return_episode_rewards=True, callback=watch)
    in_order = sorted(zip(numbers, returns, strict=True), key=lambda pair: pair[0])  # type: ignore[arg-type]
    return Returns([float(value) for _, value in in_order])


def _watch_length(variables: dict[str, Any], _: dict[str, Any]) -> None:
    """What `evaluate_policy` calls after each step of an environment, with its own variables.

    Raises:
        UserError: An episode is longer than any is meant to be.
    """
    number, envs = variables["i"], variables["env"]
    steps = variables["current_lengths"][number]
    if steps not in (LONG_EPISODE, LONGEST_EPISODE) or variables["done"]:
        return
    spec = envs.get_attr("spec", number)[0]  # asked for so late, since not every spec gets out of a subprocess
    if spec is not None and spec.max_episode_steps is not None:
        return
    cure = "limit its episodes, as in --env_kwargs '{\"max_episode_steps\": 1000}' (gymnasium's TimeLimit)"
    if steps == LONGEST_EPISODE:
        raise UserError(f"environment {number} has not ended an episode in {steps:,} steps: {cure}.")
    if number == 0:
        print(
            f"mua_rl: an episode is {steps:,} steps long, and waited for up to {LONGEST_EPISODE:,}: if it has no end, "
            f"{cure}.",
            file=sys.stderr,
        )
