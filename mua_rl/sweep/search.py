"""Which trials a sweep runs next: a pure function of what its trials have reached so far.

So a sweep that was cut off goes on as planned, whoever goes on with it. For each curve (a rank and its scheme, or FFT):

1. scan powers of two with the first seed, and go on past the end that is best, until the best lies between others;
2. halve the distance to its neighbours, until that is the resolution;
3. give all learning rates within an octave of the best every seed; go back to 1 where that moves the best;
4. go on past an end of the grid where the fitted curve (`mua_rl.analysis.optimum`) may still rise.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mua_rl.analysis.optimum import estimate_optimum
from mua_rl.lr.spec import AdapterSpec
from mua_rl.run.trial import Trial, TrialResult, is_clear

LOWEST, HIGHEST = -24.0, -1.0
"""log2 of the learning rates between which a search stays."""
KNOWN_SPAN, UNKNOWN_SPAN = 2.0, 4.0
"""Octaves to either side of where a scan begins: around a record's learning rate, and around a guess."""
NEAR = 1.0
"""Octaves from the best within which every seed is run."""

Points = dict[float, list[TrialResult]]
"""Outcomes of one curve by log2 η."""


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
        points = Points()
        for trial, outcome in outcomes.items():
            if trial.spec == self.spec:
                points.setdefault(trial.log2_lr, []).append(outcome)
        return points

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
            return "no run got better than the base by more than its noise"
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
        return {"left": below, "right": above, "": []}[estimate_optimum(runs_of(outcomes, self.spec)).edge]

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


def survived(outcomes: Sequence[TrialResult]) -> bool:
    """Whether most runs at a learning rate are good: one unlucky seed does not speak against it, as in the fit."""
    return sum(outcome.is_good for outcome in outcomes) > len(outcomes) / 2


def has_learnt(outcomes: Sequence[TrialResult]) -> bool:
    """Whether the good runs at a learning rate got better than the base by more than two standard errors."""
    good = [outcome for outcome in outcomes if outcome.is_good]
    error = (
        statistics.fmean(o.standard_error if math.isfinite(o.standard_error) else 0.0 for o in good) / len(good) ** 0.5
    )
    return is_clear(statistics.fmean(o.score - o.before for o in good), error)


def runs_of(outcomes: Mapping[Trial, TrialResult], curve: AdapterSpec) -> list[tuple[float, float, int]]:
    """The runs of a curve as `estimate_optimum` takes them; one that was stopped counts as one that diverged."""
    return sorted(
        (trial.log2_lr, outcome.score if outcome.is_good else math.nan, trial.seed)
        for trial, outcome in outcomes.items()
        if trial.spec == curve
    )


def best_of(points: Points) -> float | None:
    """log2 of the best learning rate: the highest mean metric, of equals the smallest rate.

    Only rates that most runs survived count, and a run that did not as the worst of the curve; `None`: there is none.
    """
    worst = min((o.score for found in points.values() for o in found if o.is_good), default=math.nan)
    means = {
        lr: statistics.fmean(o.score if o.is_good else worst for o in found)
        for lr, found in points.items()
        if survived(found)
    }
    return min(means, key=lambda lr: (-means[lr], lr)) if means else None


RewardCurve = Sequence[tuple[int, float]]
"""(step, mean training reward), ascending."""
PATIENCE = 0.4
"""Share of a run's steps before which it is not judged."""
ENOUGH_PEERS = 3
CERTAINTY = 3.2
"""Standard deviations of a normal distribution that a judgement needs: a run is judged six times, at each tenth."""


def why_hopeless(curve: RewardCurve, peers: Sequence[RewardCurve], steps: int, independent: bool | None = None) -> str:
    """Why a run need not go on; "" where it should.

    From `PATIENCE` of its steps on, at every tenth of them, a run is hopeless whose reward has fallen below its start
    by clearly more than its noise, or has risen less than half as much as the median of at least `ENOUGH_PEERS` others
    of its curve had by the same step. A run whose policy does not change is stopped in at most 1 % of cases, also
    where the rewards are running means, which tell much less than as many independent points.

    Args:
        curve: The run's rewards so far.
        peers: Those of other runs of its curve.
        steps: Of a whole run.
        independent: Whether the rewards are independent, and no running means; `None`: the curve tells.
    """
    if not curve or curve[-1][0] < PATIENCE * steps:
        return ""
    judged = math.floor(10 * curve[-1][0] / steps + 1e-9) * steps / 10
    curve = [point for point in curve if point[0] <= judged]
    if not curve or curve[-1][0] < (PATIENCE - 0.1) * steps:
        return ""
    step = curve[-1][0]
    gain, noise = _gain(curve, steps, independent)
    if -gain > noise:
        return f"the reward fell by {-gain:.3g} in {step:,} of {steps:,} steps"
    earlier = [[point for point in peer if point[0] <= step] for peer in peers if peer[-1][0] >= step]
    reached = [_gain(peer, steps, independent)[0] for peer in earlier]
    if len(reached) >= ENOUGH_PEERS and (median := statistics.median(reached)) / 2 - gain > noise:
        return f"the reward rose by {gain:.3g} in {step:,} steps, the median of its peers by {median:.3g}"
    return ""


def _gain(curve: RewardCurve, steps: int, independent: bool | None) -> tuple[float, float]:
    """Mean reward of the newest tenth of a run less that of its first, and how large it may be by chance.

    Of running means the second tenth counts where it is lower: only short episodes have ended at first.
    """
    rewards = [reward for _, reward in curve]
    n = max(3, round(len(curve) * steps / max(1, curve[-1][0]) / 10))
    first, last = rewards[:n], rewards[-n:]
    if len(rewards) < 2 * n:
        return statistics.fmean(last) - statistics.fmean(first), math.inf
    if _are_independent(rewards) if independent is None else independent:
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / n)
        return statistics.fmean(last) - statistics.fmean(first), _t_quantile(2 * n - 2) * error
    start = min(statistics.fmean(first), statistics.fmean(rewards[n : 2 * n]))
    # A random walk with the same steps would get so far: no stationary curve goes farther.
    error = math.sqrt(sum((new - old) ** 2 for old, new in pairwise(rewards)))
    return statistics.fmean(last) - start, CERTAINTY * error


def _are_independent(rewards: Sequence[float]) -> bool:
    """Whether the points of a curve vary about its trend independently of each other, as those of a walk do not.

    The steps between independent points correlate by -1/2, and so do those between means of two; of a walk or a running
    mean it is nearly 0, and 1/4.
    """
    pairs = [(one + two) / 2 for one, two in zip(rewards[::2], rewards[1::2], strict=False)]
    limit = -2.5 / math.sqrt(len(rewards) - 1)
    return _correlation_of_steps(rewards) < limit and _correlation_of_steps(pairs) < 0


def _correlation_of_steps(rewards: Sequence[float]) -> float:
    """Correlation of each step of a curve with the next; outliers, such as a collapse, are cut to size before."""
    steps = [new - old for old, new in pairwise(rewards)]
    middle = statistics.median(steps)
    limit = 3 * statistics.fmean(abs(step - middle) for step in steps)
    if limit == 0:
        return 0.0
    steps = [min(max(step - middle, -limit), limit) for step in steps]
    mean = statistics.fmean(steps)
    steps = [step - mean for step in steps]
    return sum(old * new for old, new in pairwise(steps)) / sum(step * step for step in steps)


def _t_quantile(freedom: int) -> float:
    """What `CERTAINTY` is of Student's distribution (Cornish and Fisher 1938, to the second order)."""
    z = CERTAINTY
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
