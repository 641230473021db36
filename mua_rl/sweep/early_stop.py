"""Which runs of a sweep need not go to their end: those whose training reward falls, or lags far behind its peers'."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from scipy.stats import norm, t

from mua_rl.run.algorithms import RewardCurve

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
        return statistics.fmean(last) - statistics.fmean(first), float(t.isf(norm.sf(CERTAINTY), 2 * n - 2)) * error
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
