"""Which runs of a sweep need not go to their end: those whose training reward falls, or lags far behind its peers'."""

import math
import statistics
from collections.abc import Sequence

from mua_rl.run.algorithms import RewardCurve
from mua_rl.run.trial import is_clear

PATIENCE = 0.4
"""Share of a run's steps before which it is not judged."""
ENOUGH_PEERS = 3


def why_hopeless(curve: RewardCurve, peers: Sequence[RewardCurve], steps: int) -> str:
    """Why a run need not go on; "" where it should.

    After `PATIENCE` of its steps a run is hopeless whose reward has fallen below its start by more than twice its
    noise, or has risen less than half as much as the median of at least `ENOUGH_PEERS` others of its curve had by the
    same step.

    Args:
        curve: The run's rewards so far.
        peers: Those of other runs of its curve.
        steps: Of a whole run.
    """
    if not curve or curve[-1][0] < PATIENCE * steps:
        return ""
    step = curve[-1][0]
    gain, noise = _gain(curve, steps)
    if is_clear(-gain, noise):
        return f"the reward fell by {-gain:.3g} in {step:,} of {steps:,} steps"
    reached = [_gain([point for point in peer if point[0] <= step], steps)[0] for peer in peers if peer[-1][0] >= step]
    if len(reached) >= ENOUGH_PEERS and is_clear((median := statistics.median(reached)) / 2 - gain, noise):
        return f"the reward rose by {gain:.3g} in {step:,} steps, the median of its peers by {median:.3g}"
    return ""


def _gain(curve: RewardCurve, steps: int) -> tuple[float, float]:
    """Mean reward of the newest tenth of a run less that of its first tenth, and its standard error."""
    rewards = [reward for _, reward in curve]
    n = max(3, round(len(curve) * steps / max(1, curve[-1][0]) / 10))
    first, last = rewards[:n], rewards[-n:]
    variance = sum(statistics.variance(window) / len(window) for window in (first, last) if len(window) > 1)
    return statistics.fmean(last) - statistics.fmean(first), math.sqrt(variance)
