"""What full finetuning (FFT) loses at the learning rate that a rule takes from a tuned LoRA, and what the tuning cost.

`regrets` is of whole sweeps; `small_sweeps` is of what a smaller sweep would have handed on: a finished sweep's seeds
are dealt out into small sweeps, of all its learning rates or of those that are octaves apart, each of which finds an
optimum of its own.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mua_rl.analysis.measured import Measured, Sweep
from mua_rl.analysis.optimum import estimate_optimum
from mua_rl.analysis.transfer_rules import Rule, shipped
from mua_rl.errors import UserError
from mua_rl.lr.spec import FFT


@dataclass(frozen=True, eq=False)
class Regret:
    """What FFT loses at a transferred learning rate.

    Attributes:
        rule: Its name.
        sweep: Of what.
        source: The curve that was tuned; `None` for a rule that needs none.
        log2_lr: Where FFT is run.
        share: Of the gain (FFT's best less the value before training) that is lost there, by FFT's fitted curve; all
            of it where FFT diverged, and in between the share of the way from the last that survived.
        is_bound: Whether the learning rate is outside FFT's grid: then `share` is of the grid's end, and at least that.
        within_noise: Whether FFT's value there cannot be told from its best.
        steps, seconds: Cost of tuning the source, as a share of what FFT's own sweep cost.
    """

    rule: str
    sweep: Sweep
    source: Measured | None
    log2_lr: float
    share: float
    is_bound: bool
    within_noise: bool
    steps: float
    seconds: float


def regrets(sweeps: Sequence[Sweep], rule: Rule) -> list[Regret]:
    """FFT's loss at the learning rate that a rule takes from each LoRA curve, in sweeps that have FFT."""
    losses = []
    for sweep in sweeps:
        fft, loras = sweep.fft, [curve for curve in sweep.curves.values() if curve.spec != FFT]
        if fft is None:
            continue
        for curve in loras if rule.needs_source else [fft]:
            log2_lr = rule.predict(curve, FFT, sweep.context)
            if log2_lr is None:
                continue
            source = curve if rule.needs_source else None
            steps, seconds = source.cost_beside(fft) if source else (0.0, 0.0)
            is_bound = not fft.optimum.covers(log2_lr) and not log2_lr >= fft.cliff
            as_good, share = fft.optimum.is_as_good(log2_lr), fft.share_lost(log2_lr)
            losses.append(Regret(rule.name, sweep, source, log2_lr, share, is_bound, as_good, steps, seconds))
    return losses


@dataclass(frozen=True, eq=False)
class SmallSweep:
    """A curve swept with fewer runs.

    Attributes:
        source: The curve as that sweep would have it.
        share: Of FFT's gain that is lost where FFT takes its learning rate from there by the rule that ships, or, where
            `source` is FFT, at the optimum found; by FFT's curve over all seeds, as in `Regret`.
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
    fft, small = sweep.fft, []
    if fft is None:
        return []
    rule = shipped(sweep.algorithm)
    for measured in sweep.curves.values():
        for source in _parts(measured, seeds, step):
            own = source.optimum.log2_lr
            log2_lr = own if source.spec == FFT else rule.predict(source, FFT, sweep.context)
            if log2_lr is not None and not math.isnan(share := fft.share_lost(log2_lr)):
                small.append(SmallSweep(source, share, *source.cost_beside(fft)))
    return small


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
