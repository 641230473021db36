"""What the outcomes of a curve say before anything is fitted to them: its best learning rate, and whether it learnt."""

import math
import statistics
from collections.abc import Iterable, Sequence

from mua_rl.run.trial import Trial, TrialResult, is_clear

Points = dict[float, list[TrialResult]]
"""The outcomes of one curve by log2 η."""
NOT_LEARNT = "no run got better than the base by more than its noise"


def points_of(runs: Iterable[tuple[Trial, TrialResult]]) -> Points:
    """Sort the runs of a curve by learning rate."""
    points = Points()
    for trial, outcome in runs:
        points.setdefault(trial.log2_lr, []).append(outcome)
    return points


def survived(outcomes: Sequence[TrialResult]) -> bool:
    """Whether most runs at a learning rate are good: one unlucky seed does not speak against it, as in the fit."""
    return sum(outcome.is_good for outcome in outcomes) > len(outcomes) / 2


def has_learnt(outcomes: Sequence[TrialResult]) -> bool:
    """Whether the good runs at a learning rate got better than the base by more than two standard errors."""
    good = [outcome for outcome in outcomes if outcome.is_good]
    errors = [outcome.standard_error if math.isfinite(outcome.standard_error) else 0.0 for outcome in good]
    gain = statistics.fmean(outcome.score - outcome.before for outcome in good)
    return is_clear(gain, statistics.fmean(errors) / len(good) ** 0.5)


def best_of(points: Points) -> float | None:
    """log2 of the best learning rate: the highest mean metric, of equals the smallest rate.

    Only rates that most runs survived count, and a run that did not as the worst of the curve; `None`: there is none.
    """
    worst = min((o.score for outcomes in points.values() for o in outcomes if o.is_good), default=math.nan)
    means = {
        lr: statistics.fmean(o.score if o.is_good else worst for o in outcomes)
        for lr, outcomes in points.items()
        if survived(outcomes)
    }
    return min(means, key=lambda lr: (-means[lr], lr)) if means else None
