"""What a finished sweep measured: the optimum of each curve, and how optima move with the rank."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from mua_rl.analysis.optimum import COVERAGE, RESOLUTION, Array, Optimum, estimate_optimum
from mua_rl.analysis.outcomes import NOT_LEARNT, best_of, has_learnt, points_of
from mua_rl.analysis.rows import SweepRow
from mua_rl.errors import UserError
from mua_rl.lr.rules import Configuration, TransferError, lr_ratio
from mua_rl.lr.spec import FFT, AdapterSpec, AlphaRule, Scheme
from mua_rl.run.trial import Status, is_clear

Key = tuple[str, str, str]
"""(algorithm, task, base): what learning rates can be compared in."""
SchemeAlpha = tuple[Scheme, AlphaRule]
"""What LoRA curves have in common that differ in rank alone."""
VALUES = ("score", "reward_mean", "reward_last")
"""Fields of `TrialResult` that a curve can show."""


@dataclass(frozen=True)
class Context:
    """What a rule may know of a sweep beside its optima.

    Attributes:
        width: n, the largest fan-in of the trained layers; `None`: unknown.
        outputs: m, the fan-out of the trained layers (the rank of a full update); `None`: unknown.
        movement: Of curves, √KL per step and unit of learning rate (`mua_rl.analysis.movements`), where it was
            measured.
    """

    width: int | None = None
    outputs: int | None = None
    movement: Mapping[AdapterSpec, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measured:
    """A curve's optimum and what it took to find it.

    Attributes:
        spec: What the curve is of.
        optimum: See there.
        points: (log2 η, value, seed) of each run; NaN for one that diverged or was stopped.
        before: The metric before training.
        steps, seconds: Of all runs together.
    """

    spec: AdapterSpec
    optimum: Optimum
    points: list[tuple[float, float, int]]
    before: float
    steps: int
    seconds: float

    @property
    def cliff(self) -> float:
        """log2 of the smallest learning rate beyond those that most runs survived; infinity where there is none."""
        return min((lr for lr, _, _ in self.points if lr > self.optimum.largest), default=math.inf)

    def value_at(self, log2_lr: float) -> float:
        """The fitted value; beyond the last learning rate that most runs survived, down to what was there before."""
        last, cliff = self.optimum.largest, self.cliff
        if log2_lr <= last or cliff == math.inf:
            return self.optimum.value_at(log2_lr)
        return float(np.interp(log2_lr, [last, cliff], [self.optimum.value_at(last), self.before]))

    def share_lost(self, log2_lr: float) -> float:
        """Of the best value's gain over the metric before training; NaN where nothing was gained but noise."""
        best = float(self.optimum.values.max())
        gain = best - self.before
        return (best - self.value_at(log2_lr)) / gain if is_clear(gain, self.optimum.error) else math.nan

    def cost_beside(self, other: "Measured") -> tuple[float, float]:
        """Steps and seconds as shares of another curve's; 0 where that one's are not known."""
        steps = self.steps / other.steps if other.steps else 0.0
        return steps, self.seconds / other.seconds if other.seconds else 0.0


@dataclass(frozen=True, eq=False)
class Sweep:
    """All curves of one algorithm, task and base policy, which is what learning rates can be compared in.

    Attributes:
        curves: By rank, FFT last.
        without: Curves without an optimum, and why.
        context: What rules may know beside.
    """

    algorithm: str
    task: str
    base: str
    curves: dict[AdapterSpec, Measured]
    without: dict[AdapterSpec, str]
    context: Context = Context()

    def __str__(self) -> str:
        return f"{self.algorithm} {self.task} {self.base}"

    @property
    def fft(self) -> Measured | None:
        """Full finetuning's curve, if there is one."""
        return self.curves.get(FFT)

    def schemes(self) -> dict[SchemeAlpha, list[Measured]]:
        """The LoRA curves of each scheme and multiplier, ascending in rank."""
        curves: dict[SchemeAlpha, list[Measured]] = {}
        for spec, measured in self.curves.items():
            if spec != FFT:
                curves.setdefault((spec.scheme, spec.alpha), []).append(measured)
        return dict(sorted(curves.items(), key=lambda item: (item[0][0] is not Scheme.INIT_B, item[0][1].gamma)))


@dataclass(frozen=True)
class Slope:
    """d log2 η* / d log2 r of a scheme.

    Attributes:
        value, low, high: With its interval (`COVERAGE`); NaN with fewer than two ranks.
        theory: What the rules give, or `None` where it depends on a width that is unknown.
        ranks: From which.
    """

    value: float
    low: float
    high: float
    theory: float | None
    ranks: list[int]


def sweeps_of(
    rows: Iterable[SweepRow],
    value: str = "score",
    contexts: Callable[[Key], Context] = lambda key: Context(),
    needs_optimum: bool = True,
) -> list[Sweep]:
    """Sort rows into sweeps and find the optimum of each curve.

    Args:
        rows: Each run once.
        value: Which of `VALUES` the curves show. The gain is counted from the metric before training with any of them.
        contexts: What is known of a sweep, by its key.
        needs_optimum: Whether at least one curve must have an optimum.

    Raises:
        UserError: No curve has an optimum, and one must.
    """
    sweeps: list[Sweep] = []
    for key, of_key in groupby(sorted(rows, key=_order), key=_key):
        curves: dict[AdapterSpec, Measured] = {}
        without: dict[AdapterSpec, str] = {}
        for curve, of_curve in groupby(of_key, key=lambda row: row.trial.spec):
            try:
                others = [measured for sweep in sweeps for measured in sweep.curves.values()] + [*curves.values()]
                curves[curve] = _with_own_draws(_measure(curve, list(of_curve), value), others)
            except UserError as error:
                without[curve] = str(error)
        sweeps.append(Sweep(*key, curves, without, contexts(key)))
    if needs_optimum and not any(sweep.curves for sweep in sweeps):
        reasons = [f"{spec.label}: {reason}" for sweep in sweeps for spec, reason in sweep.without.items()]
        raise UserError(
            f"no curve of the sweep has an optimum. {reasons[0]}"
            if reasons
            else "the CSVs hold no runs: run the sweep first."
        )
    return sweeps


def _key(row: SweepRow) -> Key:
    return row.algorithm, row.task, row.base


def _order(row: SweepRow) -> tuple:
    """LoRA by scheme and rank, then FFT."""
    spec = row.trial.spec
    scheme = (spec == FFT, spec.init, str(spec.alpha), spec.rank or 0)
    return (*_key(row), *scheme, row.trial.log2_lr, row.trial.seed)


def _measure(curve: AdapterSpec, rows: Sequence[SweepRow], value: str) -> Measured:
    """The optimum of a curve.

    Raises:
        UserError: The curve has none.
    """
    outcomes = points_of((row.trial, row.result) for row in rows)
    best = best_of(outcomes)
    if best is not None and not has_learnt(outcomes[best]):
        raise UserError(NOT_LEARNT)
    points = [
        (
            row.trial.log2_lr,
            float(getattr(row.result, value)) if row.result.status is Status.OK else math.nan,
            row.trial.seed,
        )
        for row in rows
    ]
    return Measured(
        spec=curve,
        optimum=estimate_optimum(points),
        points=points,
        before=statistics.fmean(row.result.before for row in rows),
        steps=sum(row.result.steps for row in rows),
        seconds=sum(row.result.seconds for row in rows),
    )


def _with_own_draws(measured: Measured, others: Iterable[Measured]) -> Measured:
    """Independent of other curves' also where one has the very same runs: all at the highest return, say.

    The fit draws the same for the same runs, and a difference of two such optima would pass for exactly 0.
    """
    draws = measured.optimum.draws
    twins = sum(np.array_equal(np.sort(draws), np.sort(other.optimum.draws)) for other in others)
    if not twins:
        return measured
    draws = np.random.default_rng(twins).permutation(draws)
    return replace(measured, optimum=replace(measured.optimum, draws=draws))


def interval(draws: Array) -> tuple[float, float]:
    """Of `COVERAGE`."""
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def distance(measured: Measured, from_: Measured) -> tuple[float, float, float]:
    """Octaves from one optimum to another, with the interval."""
    low, high = interval(measured.optimum.draws - from_.optimum.draws)
    return measured.optimum.log2_lr - from_.optimum.log2_lr, low, high


def slope(sweeps: Sequence[Sweep], scheme: SchemeAlpha) -> Slope:
    """How a scheme's optimum moves with the rank: one slope for all sweeps, each with a level of its own.

    Optima at an edge of their grid are left out: they are bounds. The others count by their precision; the interval is
    that of the slope over draws of the optima.

    Args:
        scheme: The scheme and the multiplier.
    """
    lines = [[m for m in sweep.schemes().get(scheme, []) if not m.optimum.edge] for sweep in sweeps]
    known = [(sweep, line) for sweep, line in zip(sweeps, lines, strict=True) if len(line) > 1]
    ranks = sorted({rank for _, line in known for rank in _ranks(line)})
    if not known:
        return Slope(math.nan, math.nan, math.nan, None, ranks)
    theory = [_theory_slope(scheme, sweep.context.width, ranks) for sweep, _ in known]
    value = _slope([_centred(line, [[m.optimum.log2_lr] for m in line]) for _, line in known])
    draws = _slope([_centred(line, [m.optimum.draws for m in line]) for _, line in known])
    return Slope(float(value[0]), *interval(draws), theory[0] if len(set(theory)) == 1 else None, ranks)


def _ranks(line: Sequence[Measured]) -> list[int]:
    return [m.spec.rank for m in line if m.spec.rank is not None]


def _centred(line: Sequence[Measured], log2_lrs: Sequence[Sequence[float] | Array]) -> tuple[Array, Array, Array]:
    """log2 r `[R]` and log2 η `[R, D]` around their weighted means, and the weights `[R]`."""
    weights = np.array([1 / (m.optimum.draws.var() + RESOLUTION**2) for m in line])
    log2_ranks, y = np.log2(_ranks(line)), np.array(log2_lrs)
    share = weights / weights.sum()
    return log2_ranks - share @ log2_ranks, y - share @ y, weights


def _slope(lines: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Weighted least squares, `[D]`."""
    return np.sum([(w * x) @ y for x, y, w in lines], axis=0) / np.sum([(w * x) @ x for x, _, w in lines])


def _theory_slope(scheme: SchemeAlpha, width: int | None, ranks: Sequence[int]) -> float | None:
    """Of a line through the rules' ratios: a scheme may change its regime between two ranks."""
    ratios = [log2_ratio(AdapterSpec(ranks[0], *scheme), AdapterSpec(rank, *scheme), width) for rank in ranks]
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios):
        return None
    return round(float(np.polynomial.Polynomial.fit(np.log2(ranks), known, 1).convert().coef[-1]), 6)


_WIDEST = 2**20


def log2_ratio(source: AdapterSpec, target: AdapterSpec, width: int | None) -> float | None:
    """log2 of `mua_rl.lr.rules.lr_ratio`.

    `None` where the theory does not give it, or it depends on the width and that is unknown.
    """
    ranks = [rank for rank in (source.rank, target.rank) if rank is not None]
    widths = [width] if width is not None else [max(ranks, default=1), _WIDEST]
    try:
        ratios = {lr_ratio(Configuration(source, n), Configuration(target, n)) for n in widths}
    except (TransferError, ValueError):  # a ValueError: the rank is above the width
        return None
    return math.log2(ratios.pop()) if max(ratios) < 1.001 * min(ratios) else None
