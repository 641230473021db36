"""Which trials a sweep runs next: a pure function of what its trials have reached so far.

So a sweep that was cut off goes on as planned, whoever goes on with it. For each curve (a rank and its scheme, or FFT):

1. scan powers of two with the first seed, and go on past the end that is best, until the best lies between others;
2. halve the distance to its neighbours, until that is the resolution;
3. give all learning rates within an octave of the best every seed; go back to 1 where that moves the best;
4. go on past an end of the grid where the fitted curve (`mua_rl.analysis.optimum`) may still rise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from mua_rl.analysis.optimum import estimate_optimum
from mua_rl.analysis.outcomes import NOT_LEARNT, Points, best_of, has_learnt, points_of, survived
from mua_rl.lr.spec import AdapterSpec
from mua_rl.run.trial import Trial, TrialResult

LOWEST, HIGHEST = -24.0, -1.0
"""log2 of the learning rates between which a search stays."""
KNOWN_SPAN, UNKNOWN_SPAN = 2.0, 4.0
"""Octaves to either side of where a scan begins: around a record's learning rate, and around a guess."""
NEAR = 1.0
"""Octaves from the best within which every seed is run."""


class Plan(Protocol):
    """Says which trials of a curve are to be run.

    Attributes:
        spec: What the curve is of.
    """

    @property
    def spec(self) -> AdapterSpec: ...

    def next_trials(self, outcomes: Mapping[Trial, TrialResult]) -> list[Trial]:
        """What to run next, given what all trials have reached so far; all of it can run at once."""


@dataclass(frozen=True)
class FixedTrials:
    """A curve whose trials were chosen beforehand."""

    spec: AdapterSpec
    trials: tuple[Trial, ...]

    def next_trials(self, outcomes: Mapping[Trial, TrialResult]) -> list[Trial]:
        """See `Plan`."""
        return [trial for trial in self.trials if trial not in outcomes]


@dataclass(frozen=True)
class Search:
    """The search for the best learning rate of one curve.

    Attributes:
        spec: What the curve is of.
        scan: log2 of the learning rates to begin with, ascending.
        step: Octaves between them, and by which the scan is extended.
        resolution: Octaves between the best and its neighbours at the end.
        seeds: The first finds the best; all of them are run near it.
    """

    spec: AdapterSpec
    scan: tuple[float, ...]
    step: float
    resolution: float
    seeds: tuple[int, ...]

    def trial(self, log2_lr: float, seed: int) -> Trial:
        """One run of the curve."""
        return Trial(self.spec, log2_lr, seed)

    def points(self, outcomes: Mapping[Trial, TrialResult]) -> Points:
        """The outcomes that are of this curve."""
        return points_of((trial, outcome) for trial, outcome in outcomes.items() if trial.spec == self.spec)

    def runs(self, outcomes: Mapping[Trial, TrialResult]) -> list[tuple[float, float, int]]:
        """The runs of the curve as `estimate_optimum` takes them; one that was stopped counts as one that diverged."""
        own = ((trial, outcome) for trial, outcome in outcomes.items() if trial.spec == self.spec)
        return sorted(
            (trial.log2_lr, result.score if result.is_good else math.nan, trial.seed) for trial, result in own
        )

    def next_trials(self, outcomes: Mapping[Trial, TrialResult]) -> list[Trial]:
        """What to run next; all of it can run at once. Nothing once the optimum is found (or cannot be: `verdict`)."""
        points = self.points(outcomes)
        new = [lr for lr in self.scan if lr not in points] or self._new_learning_rates(points)
        if new:
            return [self.trial(lr, self.seeds[0]) for lr in new]
        best = best_of(points)
        if best is None:
            return []
        near = [lr for lr in sorted(points) if abs(lr - best) <= max(NEAR, self.resolution) and survived(points[lr])]
        seeded = [trial for seed in self.seeds for lr in near if (trial := self.trial(lr, seed)) not in outcomes]
        return seeded or [self.trial(lr, self.seeds[0]) for lr in self._beyond_the_edge(outcomes)]

    def verdict(self, outcomes: Mapping[Trial, TrialResult]) -> str:
        """What is wrong with the best learning rate so far, in a few words; "" for nothing."""
        points = self.points(outcomes)
        best = best_of(points)
        if best is None:
            return "most runs diverged or were stopped at every learning rate"
        if not has_learnt(points[best]):
            return NOT_LEARNT
        if len(points) > 1 and best in (min(points), max(points)):
            side = "smallest" if best == min(points) else "largest"
            return f"the best learning rate is the {side} that was tried, 2^{best:g}"
        return ""

    def has_learnt(self, outcomes: Mapping[Trial, TrialResult]) -> bool:
        """Whether the best learning rate so far makes a better policy than the base."""
        points = self.points(outcomes)
        best = best_of(points)
        return best is not None and has_learnt(points[best])

    def _new_learning_rates(self, points: Points) -> list[float]:
        """log2 of learning rates to try after those of `points`."""
        lrs, best = sorted(points), best_of(points)
        below, above = self._beyond(lrs)
        if best is None:
            return below
        if not has_learnt(points[best]):
            # Too small a rate moves nothing: what may be lies above, up to where training breaks.
            if survived(points[lrs[-1]]):
                return above
            last = max(lr for lr in lrs if survived(points[lr]))
            return self._between(last, lrs[lrs.index(last) + 1])
        if best == lrs[0]:
            return below
        if best == lrs[-1]:
            return above
        position = lrs.index(best)
        return [lr for pair in pairwise(lrs[position - 1 : position + 2]) for lr in self._between(*pair)]

    def _beyond_the_edge(self, outcomes: Mapping[Trial, TrialResult]) -> list[float]:
        """log2 of the next learning rate past an end where the fit may have its optimum; nothing where none has."""
        points = self.points(outcomes)
        best = best_of(points)
        if best is None or len(points) < 2 or not has_learnt(points[best]):
            return []
        below, above = self._beyond(sorted(points))
        return {"left": below, "right": above, "": []}[estimate_optimum(self.runs(outcomes)).edge]

    def _beyond(self, lrs: list[float]) -> tuple[list[float], list[float]]:
        """log2 of the next learning rate below and above those there are, as far as the bounds leave any."""
        below = [max(LOWEST, lrs[0] - self.step)] if lrs[0] > LOWEST else []
        above = [min(HIGHEST, lrs[-1] + self.step)] if lrs[-1] < HIGHEST else []
        return below, above

    def _between(self, low: float, high: float) -> list[float]:
        """The middle of two learning rates that are further apart than the resolution."""
        return [(low + high) / 2] if high - low > 1.001 * self.resolution else []


def scan_around(centre: float, known: bool, resolution: float) -> tuple[tuple[float, ...], float]:
    """Where a search begins without a range: the scan's log2 learning rates, ascending, and the octaves between them.

    Args:
        centre: log2 of the learning rate that a record gives; a multiple of `resolution` near it is taken.
        known: Whether the record is of this base and scheme, or gives but a guess; then the scan is wide and coarse.
        resolution: In octaves.
    """
    step, span = _step(1.0 if known else 2.0, resolution), KNOWN_SPAN if known else UNKNOWN_SPAN
    middle = resolution * round(centre / resolution)
    trials = max(1, round(span / step))
    return _within_bounds([middle + k * step for k in range(-trials, trials + 1)]), step


def scan_range(low: float, high: float, resolution: float) -> tuple[tuple[float, ...], float]:
    """As `scan_around`, over a range that was asked for."""
    step = _step(1.0, resolution)
    return _within_bounds([low + k * step for k in range(int((high - low) / step + 1e-9) + 1)]), step


def _step(most: float, resolution: float) -> float:
    """The largest step up to `most` that ends at the resolution when it is halved."""
    return resolution * 2.0 ** max(0, math.floor(math.log2(most / resolution)))


def _within_bounds(lrs: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({min(max(lr, LOWEST), HIGHEST) for lr in lrs}))
