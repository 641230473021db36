"""What a smaller sweep would have done: its cost, and what full finetuning (FFT) loses at the LR it hands on.

From the runs of a finished sweep: its seeds are dealt out into small sweeps, of all its learning rates or of those that
are octaves apart, each of which finds an optimum of its own.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mua_rl.analysis.measured import Measured, Sweep
from mua_rl.analysis.optimum import estimate_optimum
from mua_rl.analysis.predictions import Prediction, shipped
from mua_rl.errors import UserError
from mua_rl.lr.spec import FFT


@dataclass(frozen=True, eq=False)
class SmallSweep:
    """A curve swept with fewer runs.

    Attributes:
        source: The curve as that sweep would have it.
        share: Of FFT's gain that is lost where FFT takes its learning rate from there by the rule that ships, or, where
            `source` is FFT, at the optimum found; by FFT's curve over all seeds, as in `regret.Regret`.
        steps, seconds: Its cost as a share of that of FFT's sweep with all seeds.
    """

    source: Measured
    share: float
    steps: float
    seconds: float


def small_sweeps(sweep: Sweep, seeds: int, step: float = 0.0) -> list[SmallSweep]:
    """All that a sweep's seeds make, of FFT and of each LoRA curve from which the rule gives FFT's learning rate.

    Args:
        sweep: Without FFT it makes none.
        seeds: In each. Seeds that have not run at every learning rate of the small sweep make none.
        step: Octaves between its learning rates; 0: it has all of them.
    """
    fft, found = sweep.fft, []
    if fft is None:
        return []
    rule = shipped(sweep.algorithm)
    for measured in sweep.curves.values():
        for source in _parts(measured, seeds, step):
            own = Prediction(source.optimum.log2_lr)
            prediction = own if source.spec == FFT else rule.predict(source, FFT, sweep.context)
            if prediction is not None and not math.isnan(share := fft.share_lost(prediction.log2_lr)):
                found.append(SmallSweep(source, share, *source.cost_beside(fft)))
    return found


def _parts(measured: Measured, seeds: int, step: float) -> Iterator[Measured]:
    """A curve's seeds in groups of so many, each with the whole of its grid, as curves of their own."""
    grid = _grid(measured, step)
    by_seed = {seed: {lr for lr, _, s in measured.points if s == seed} for _, _, seed in measured.points}
    whole = sorted(seed for seed, lrs in by_seed.items() if grid <= lrs)
    for start in range(0, len(whole) - seeds + 1, seeds):
        points = [point for point in measured.points if point[0] in grid and point[2] in whole[start : start + seeds]]
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


def _grid(measured: Measured, step: float) -> set[float]:
    """A curve's learning rates, in log2, or those that are `step` apart as most of its first seed's are: the scan's."""
    lrs = {lr for lr, _, _ in measured.points}
    if not step:
        return lrs
    first = min(seed for _, _, seed in measured.points)
    offset = statistics.mode(lr % step for lr, _, seed in sorted(measured.points) if seed == first)
    return {lr for lr in lrs if lr % step == offset}
