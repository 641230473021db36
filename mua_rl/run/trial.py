"""One run of a sweep and what came out of it: the two halves of a row of the sweep's CSV."""

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from mua_rl.adapter.adapters import Adapter, TargetModules, adapter_for

Curve = tuple[int | None, str, str]
"""(rank, init, alpha): what arms have in common that differ in learning rate and seed alone."""
FFT: Curve = (None, "", "")
"""The curve of full finetuning, which has neither rank nor initialisation nor multiplier."""

PER_ARM = ("rank", "init", "alpha", "lr", "learning_rate", "lr_from", "rank_exponent", "seed", "output_dir")
"""Settings of a trainer that each arm brings along."""
WITHOUT_EFFECT = (
    "lr_from", "rank_exponent", "output_dir", "report_to", "tensorboard_log", "wandb", "progress_bar", "verbose",
    "save_strategy", "save_steps", "save_total_limit",
)  # fmt: skip
"""Settings of a trainer that what an arm reaches does not depend on."""


@dataclass(frozen=True)
class Arm:
    """A run of a sweep: what is trained, at which learning rate, with which seed.

    Attributes:
        rank: LoRA rank; `None` for full finetuning (FFT).
        init: "A" or "B", Init[A] or Init[B]; without meaning for FFT.
        alpha: The multiplier's rule as text, e.g. "1" or "1/r"; without meaning for FFT.
        log2_lr: log2 of the peak learning rate η.
        seed: Of the adapter, the order of the data and the sampling.
    """

    rank: int | None
    init: str
    alpha: str
    log2_lr: float
    seed: int

    @property
    def learning_rate(self) -> float:
        """η."""
        return 2.0**self.log2_lr

    @property
    def curve(self) -> Curve:
        """Which curve of the sweep's figure it is on."""
        return FFT if self.rank is None else (self.rank, self.init, self.alpha)

    @property
    def name(self) -> str:
        """For its folder and its files."""
        curve = f"r{self.rank}-{self.init}-{self.alpha}" if self.rank else "full"
        return re.sub(r"[^\w.-]+", "-", f"{curve}-lr{self.log2_lr:g}-s{self.seed}")

    def adapter(self, target_modules: TargetModules) -> Adapter:
        """The adapter that the arm trains."""
        return adapter_for(self.rank, self.init, self.alpha, target_modules)


@dataclass(frozen=True)
class Outcome:
    """What an arm reached.

    Attributes:
        metric: Held-out accuracy or return after training; NaN for an arm that diverged.
        error: Its standard error over problems or episodes.
        before: The same metric before training.
        reward_mean: Mean training reward (or return) over all steps that had one, the area under the learning curve.
        reward_last: Mean training reward over the last tenth of those steps.
        diverged: Whether it left the finite numbers, or got worse than it began.
        stopped: Why it was ended early ("" where it was not): a hopeless arm is not a diverged one.
        steps: Optimizer steps (GRPO) or environment steps (PPO) that it took.
        seconds: Wall time; of arms that train side by side, each one's share.
    """

    metric: float
    error: float
    before: float
    reward_mean: float
    reward_last: float
    diverged: bool
    stopped: str
    steps: int
    seconds: float

    @classmethod
    def of_divergence(cls, before: float, steps: int, seconds: float, reason: str) -> "Outcome":
        """Of an arm that left the finite numbers."""
        return cls(math.nan, math.nan, before, math.nan, math.nan, True, reason, steps, seconds)


def reward_means(rewards: Iterable[float]) -> tuple[float, float]:
    """`reward_mean` and `reward_last` of an `Outcome`.

    Args:
        rewards: Of each step, in order; NaN where none of its completions had a score, or no episode has ended yet.
    """
    scored = [reward for reward in rewards if not math.isnan(reward)]
    if not scored:
        return math.nan, math.nan
    return statistics.fmean(scored), statistics.fmean(scored[-math.ceil(len(scored) / 10) :])


def is_clear(difference: float, error: float) -> bool:
    """Whether a difference is above 0 by more than two standard errors; never of what is no number."""
    return difference > 2 * error
