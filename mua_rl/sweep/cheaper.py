"""What a sweep of fewer seeds would have done: its cost, and what full finetuning (FFT) loses at the LR it hands on.

From the runs of a finished sweep: its seeds are dealt out into small sweeps, each of which finds an optimum of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mua_rl.errors import UserError
from mua_rl.sweep.measured import FFT, Measured, Sweep
from mua_rl.sweep.optimum import estimate_optimum
from mua_rl.sweep.transfer import Prediction, shipped


@dataclass(frozen=True, eq=False)
class SmallSweep:
    """A curve swept with fewer seeds.

    Attributes:
        source: The curve as that sweep would have it.
        seeds: How many.
        share: Of FFT's gain that is lost where FFT takes its learning rate from there by the rule that ships, or, where
            `source` is FFT, at the optimum found; by FFT's curve over all seeds, as in `regret.Regret`.
        steps, seconds: Its cost as a share of that of FFT's sweep with all seeds.
    """

    source: Measured
    seeds: int
    share: float
    steps: float
    seconds: float


def small_sweeps(sweep: Sweep, seeds: int) -> list[SmallSweep]:
    """All that a sweep's seeds make, of FFT and of each LoRA curve from which the rule gives FFT's learning rate.

    Args:
        sweep: Without FFT it makes none.
        seeds: In each. Seeds that have not run at every learning rate of their curve make none.
    """
    fft, found = sweep.fft, []
    if fft is None:
        return []
    rule = shipped(sweep.algorithm)
    for measured in sweep.curves.values():
        for source in _parts(measured, seeds):
            own = Prediction(source.optimum.log2_lr)
            prediction = own if source.curve == FFT else rule.predict(source, FFT, sweep.context)
            if prediction is not None and not math.isnan(share := fft.share_lost(prediction.log2_lr)):
                cost = source.steps / fft.steps, source.seconds / fft.seconds
                found.append(SmallSweep(source, seeds, share, *cost))
    return found


def _parts(measured: Measured, seeds: int) -> Iterator[Measured]:
    """A curve's seeds in groups of so many, each with the whole grid, as curves of their own."""
    grid = {lr for lr, _, _ in measured.points}
    by_seed = {seed: {lr for lr, _, s in measured.points if s == seed} for _, _, seed in measured.points}
    whole = sorted(seed for seed, lrs in by_seed.items() if lrs == grid)
    for start in range(0, len(whole) - seeds + 1, seeds):
        points = [point for point in measured.points if point[2] in whole[start : start + seeds]]
        try:
            optimum = estimate_optimum(points)
        except UserError:  # every run diverged
            continue
        share = len(points) / len(measured.points)
        yield replace(
            measured,
            optimum=optimum,
            points=points,
            steps=round(measured.steps * share),
            seconds=measured.seconds * share,
        )
