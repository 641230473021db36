"""A trial, one training run of a sweep or by itself, and what came of it: the two halves of a row of a sweep's CSV."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from mua_rl.lr.spec import AdapterSpec

PER_TRIAL = (
    "rank", "init", "alpha", "lora_alpha", "lr", "learning_rate", "lr_from", "rank_exponent", "seed", "output_dir",
)  # fmt: skip
"""Settings of a trainer that each trial brings along."""
WITHOUT_EFFECT = (
    "lr_from", "rank_exponent", "output_dir", "report_to", "tensorboard_log", "wandb", "progress_bar", "verbose",
    "save_strategy", "save_steps", "save_total_limit",
)  # fmt: skip
"""Settings of a trainer that what a trial reaches does not depend on."""


@dataclass(frozen=True)
class Trial:
    """One training run: what is trained, at which learning rate, with which seed.

    Attributes:
        spec: What is trained.
        log2_lr: log2 of the peak learning rate η.
        seed: The seed of the adapter, of the order of the data and of the sampling.
    """

    spec: AdapterSpec
    log2_lr: float
    seed: int

    @property
    def learning_rate(self) -> float:
        """The peak learning rate η."""
        return 2.0**self.log2_lr

    @property
    def name(self) -> str:
        """The trial's name, for its folder and its files."""
        return f"{self.spec.file_name}-lr{self.log2_lr:g}-s{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """The trial as JSON and a CSV have it: rank, init, alpha, log2_lr, seed."""
        return {**self.spec.as_dict(), "log2_lr": self.log2_lr, "seed": self.seed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trial":
        """The trial that `as_dict` wrote.

        Raises:
            UserError: The values make no trial.
        """
        spec = AdapterSpec.parse(values["rank"], values["init"], values["alpha"])
        return cls(spec, values["log2_lr"], values["seed"])


class Status(StrEnum):
    """How a trial ended."""

    OK = "ok"
    WORSE = "worse"
    """The policy ended worse than it began, by more than two standard errors."""
    DIVERGED = "diverged"
    """Training left the finite numbers."""
    STOPPED = "stopped"
    """The trial was ended early, since it was hopeless."""
    UNSCORED = "unscored"
    """No step could teach anything: no reward gave a score, for example."""


@dataclass(frozen=True)
class TrialResult:
    """What a trial reached.

    Attributes:
        score: Held-out accuracy or return after training; NaN where it was not measured.
        standard_error: The standard error of the score, over problems or episodes.
        before: The same measure before training.
        reward_mean: Mean training reward (or return) over all steps that had one: the area under the learning curve.
        reward_last: Mean training reward over the last tenth of those steps.
        status: How the trial ended.
        reason: Why it ended so, where it did not end well; "" otherwise.
        steps: Optimizer steps (GRPO) or environment steps (PPO) that it took.
        seconds: Wall time; of trials that train together, each one's share.
    """

    score: float
    standard_error: float
    before: float
    reward_mean: float
    reward_last: float
    status: Status
    reason: str
    steps: int
    seconds: float

    @classmethod
    def of_divergence(cls, before: float, steps: int, seconds: float, reason: str) -> "TrialResult":
        """The result of a trial that left the finite numbers."""
        return cls(math.nan, math.nan, before, math.nan, math.nan, Status.DIVERGED, reason, steps, seconds)

    @classmethod
    def of_training(
        cls,
        score: float,
        standard_error: float,
        before: float,
        rewards: Iterable[float],
        steps: int,
        seconds: float,
        stopped: str = "",
        clear_fall: float | None = None,
    ) -> "TrialResult":
        """The result of a trial that came to its end, or was stopped.

        Args:
            score: The score after training; NaN where the trial was stopped.
            standard_error: The standard error of the score.
            before: The score before training.
            rewards: Mean training reward of each step, as `reward_means` takes them.
            steps: The number of steps that were taken.
            seconds: The wall time.
            stopped: Why the trial was stopped; "" where it was not.
            clear_fall: The fall that is no chance (`clear_change`); `None`: two standard errors of the score.
        """
        worse = is_clear(before - score, standard_error) if clear_fall is None else before - score > clear_fall
        status = Status.STOPPED if stopped else Status.WORSE if worse else Status.OK
        return cls(score, standard_error, before, *reward_means(rewards), status, stopped, steps, seconds)

    def with_status(self, status: Status, reason: str) -> "TrialResult":
        """The same result with another status, and why."""
        return replace(self, status=status, reason=reason)

    @property
    def is_good(self) -> bool:
        """Whether the trial went to its end and the policy is no worse."""
        return self.status is Status.OK and math.isfinite(self.score)

    @property
    def is_lost(self) -> bool:
        """Whether the learning rate has ruined the policy."""
        return self.status in (Status.WORSE, Status.DIVERGED)

    def as_dict(self) -> dict[str, Any]:
        """The result as a study and a CSV have it."""
        return {**asdict(self), "status": self.status.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrialResult":
        """The result that `as_dict` wrote, or the `Outcome` of a version before 0.2 (metric, error, diverged, stopped).

        Raises:
            ValueError: The status is unknown.
        """
        values = dict(values)
        if "metric" in values:
            diverged, stopped = values.pop("diverged"), values.pop("stopped")
            values["score"], values["standard_error"] = values.pop("metric"), values.pop("error")
            ruined = Status.DIVERGED if math.isnan(values["score"]) else Status.WORSE
            values["status"] = ruined if diverged else Status.STOPPED if stopped else Status.OK
            values["reason"] = stopped
        return cls(**{**values, "status": Status(values["status"])})


def reward_means(rewards: Iterable[float]) -> tuple[float, float]:
    """`reward_mean` and `reward_last` of a `TrialResult`.

    Args:
        rewards: The mean reward of each step, in order; NaN where none of its completions had a score, or no episode
            has ended yet.
    """
    scored = [reward for reward in rewards if not math.isnan(reward)]
    if not scored:
        return math.nan, math.nan
    return statistics.fmean(scored), statistics.fmean(scored[-math.ceil(len(scored) / 10) :])


def clear_change(before: Sequence[float], after: Sequence[float]) -> float:
    """How far two means of paired scores must differ for it to be no chance.

    That is what Student's paired test asks for at the level of two standard errors of a normal distribution. Where no
    score differs from the others of its kind, as in an environment without chance, they are one score, whose error is
    not known: a tenth of it is asked for.

    Args:
        before, after: Scores of the same problems or episodes, in the same order.
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    if len(changes) < 2 or len(set(before)) == len(set(after)) == 1:
        return abs(statistics.fmean(before)) / 10
    from scipy import stats  # here, since most of what imports this module judges nothing

    quantile = float(stats.t.isf(stats.norm.sf(2), len(changes) - 1))
    return quantile * statistics.stdev(changes) / len(changes) ** 0.5


def has_gained(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether paired scores rose by more than one standard error of the change, and by a thousandth at least."""
    changes = [new - old for old, new in zip(before, after, strict=True)]
    gain = statistics.fmean(changes)
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    return gain > max(error, abs(statistics.fmean(before)) / 1000)


def is_clear(difference: float, standard_error: float) -> bool:
    """Whether a difference is above 0 by more than two standard errors; it never is where one of them is no number."""
    return difference > 2 * standard_error
