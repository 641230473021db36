"""How well rules predict the optima of finished sweeps.

`compare` holds a rule's predictions against the measured optima, which other seeds would have put elsewhere:
`Comparison.perfect_hit` says how often any rule could be right, `NO_RULE` shows how often none is needed. How far off a
rule may be is learnt from other sweeps than it is judged on: `calibrated` gives it the interval that `evidence` gives
to users (`mua_rl.lr.transfer`).
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mua_rl.analysis.measured import Measured, Sweep
from mua_rl.analysis.optimum import COVERAGE, RESOLUTION
from mua_rl.analysis.transfer_rules import THEORY, Rule, log2_rank_ratio, rank_corrected
from mua_rl.lr.evidence import Evidence, pair_kind
from mua_rl.lr.spec import FFT

HIT = 0.5
"""Octaves within which a prediction counts as right."""
ENOUGH = 20
"""Pairs of curves from which on their kind is judged by itself; fewer are judged by all pairs of the algorithm."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A prediction held against the measured optimum.

    Attributes:
        rule: The name of the rule.
        sweep, source, target: Of which two curves.
        log2_lr: The prediction, log2 η.
        octaves: To either side of it, where the rule says that the optimum lies nine times in ten; `None`: it says
            nothing.
    """

    rule: str
    sweep: Sweep
    source: Measured
    target: Measured
    log2_lr: float
    octaves: float | None = None

    @property
    def error(self) -> float:
        """Predicted less measured, in octaves."""
        return self.log2_lr - self.target.optimum.log2_lr

    @property
    def is_hit(self) -> bool:
        """Whether the prediction is within half an octave."""
        return abs(self.error) <= HIT

    @property
    def is_as_good(self) -> bool:
        """Whether the target's value there cannot be told from its best; the noisier its runs, the easier that is."""
        return self.target.optimum.is_as_good(self.log2_lr)

    @property
    def is_covered(self) -> bool | None:
        """Whether the optimum is in the stated interval, but for its own error; `None`: none is stated.

        The interval is of the true optimum. What was measured is off that by an error of its own, whose interval joins
        the stated one, like any independent errors, by the root of the sum of squares.
        """
        if self.octaves is None:
            return None
        optimum = self.target.optimum
        own = optimum.high - optimum.log2_lr if self.error > 0 else optimum.log2_lr - optimum.low
        return abs(self.error) <= math.hypot(self.octaves, own) + 1e-6  # rounding

    @property
    def loss(self) -> float:
        """Share of the target's gain that is lost at the predicted learning rate."""
        return self.target.share_lost(self.log2_lr)

    @property
    def scatter(self) -> float:
        """Standard deviation of a perfect rule's error, in octaves.

        Such a rule knows how far apart sweeps find the two optima on average over seeds. It starts from one that was
        measured with a few seeds and is held against another, so it is off by what these two differ from the average.
        """
        return math.hypot(self.source.optimum.scatter, self.target.optimum.scatter)

    @property
    def perfect_hit(self) -> float:
        """The probability that a perfect rule hits; of many comparisons the mean is the ceiling of their hit rate."""
        return self._perfect(-HIT, HIT)

    @property
    def perfect_as_good(self) -> float:
        """The probability that a perfect rule's prediction is as good as the best."""
        low, high = (end - self.target.optimum.log2_lr for end in self.target.optimum.plateau)
        return self._perfect(low, high)

    def _perfect(self, low: float, high: float) -> float:
        """The probability that a perfect rule's error lies between these."""
        if not self.scatter:
            return float(low <= 0 <= high)
        error = statistics.NormalDist(0.0, self.scatter)
        return error.cdf(high) - error.cdf(low)

    @property
    def pair(self) -> str:
        """Between what the prediction is, as `mua_rl.lr.evidence.EVIDENCE` has it."""
        return pair_kind(self.source.spec.scheme, self.target.spec.scheme)

    @property
    def kind(self) -> str:
        """The same for tables: "within Init[B]", "FFT ↔ Init[B]"."""
        return self.pair.replace(", ", " ↔ ") if ", " in self.pair else f"within {self.pair}"


def compare(sweeps: Sequence[Sweep], rule: Rule) -> list[Comparison]:
    """Every ordered pair of curves that the rule covers; optima at an edge of their grid are bounds and left out."""
    comparisons = []
    for sweep in sweeps:
        known = [measured for measured in sweep.curves.values() if not measured.optimum.edge]
        for source, target in itertools.permutations(known, 2):
            log2_lr = rule.predict(source, target.spec, sweep.context)
            if log2_lr is not None:
                octaves = rule.interval(source.spec, target.spec)
                comparisons.append(Comparison(rule.name, sweep, source, target, log2_lr, octaves))
    return comparisons


def fit_exponent(sweeps: Sequence[Sweep]) -> float | None:
    """The exponent c with which `rank_corrected` predicts the optima of these sweeps best.

    Weighted least squares over all pairs that the theory covers; `None` where no pair tells.
    """
    pairs = []
    for one in compare(sweeps, THEORY):
        if ratio := log2_rank_ratio(one.source.spec, one.target.spec, one.sweep.context):
            variance = one.source.optimum.draws.var() + one.target.optimum.draws.var() + RESOLUTION**2
            pairs.append((ratio, one.error, 1 / variance))
    if not pairs:
        return None
    ratios, errors, weights = np.array(pairs).T
    return float((weights * ratios) @ errors / ((weights * ratios) @ ratios))


def calibrated(rule: Rule, sweeps: Sequence[Sweep]) -> Rule:
    """A rule with the interval that nine in ten of its predictions in these sweeps kept to, noise included.

    It is to be judged on other sweeps (`leave_one_out`). No interval is stated where these have no pair that the rule
    covers. Were the noise of these sweeps' optima taken off, a noisy task would hide how far off the rule is on a
    steady one.
    """
    comparisons = compare(sweeps, rule)
    octaves = {pair: _off(alike) for pair, alike in _by_pair(comparisons).items()}
    return replace(rule, octaves=octaves, otherwise=_off(comparisons) if comparisons else None)


def fitted(sweeps: Sequence[Sweep]) -> Rule | None:
    """The theory times a power of the ranks' ratio that is fitted to these sweeps, and calibrated on them."""
    exponent = fit_exponent(sweeps)
    return None if exponent is None else calibrated(rank_corrected(exponent), sweeps)


def evidence(sweeps: Sequence[Sweep], rule: Rule) -> dict[str, Evidence]:
    """How far off a rule was in these sweeps, by kind of pair: `mua_rl.lr.evidence.EVIDENCE`."""
    comparisons, by_pair = compare(sweeps, rule), {}
    for pair, alike in _by_pair(comparisons).items():
        curves = [curve for one in comparisons if one.pair == pair for curve in (one.source, one.target)]
        ranks = [curve.spec.rank for curve in curves if curve.spec.rank is not None]
        by_pair[pair] = Evidence(
            ranks=(min(ranks), max(ranks)),
            alphas=tuple(sorted({str(curve.spec.alpha) for curve in curves if curve.spec != FFT})),
            steps=max(round(curve.steps / len(curve.points)) for curve in curves),
            octaves=_off(alike),
            loss=_nine_in_ten([one.loss for one in alike]),
        )
    return by_pair


def _by_pair(comparisons: Sequence[Comparison]) -> dict[str, Sequence[Comparison]]:
    """The comparisons of each kind of pair; all of them for a kind that has not `ENOUGH`."""
    kinds = {pair: [one for one in comparisons if one.pair == pair] for pair in sorted({c.pair for c in comparisons})}
    return {pair: alike if len(alike) >= ENOUGH else comparisons for pair, alike in kinds.items()}


def _off(comparisons: Sequence[Comparison]) -> float:
    """Octaves from the measured optimum within which nine predictions in ten are."""
    return _nine_in_ten([abs(one.error) for one in comparisons])


def _nine_in_ten(values: Sequence[float]) -> float:
    """The smallest of the values that at least `COVERAGE` of them do not exceed."""
    return float(np.quantile(values, COVERAGE, method="inverted_cdf"))


def leave_one_out(sweeps: Sequence[Sweep], fit: Callable[[Sequence[Sweep]], Rule | None] = fitted) -> list[Comparison]:
    """Predictions in the sweeps of each task by a rule that was fitted on those of the other tasks only.

    Args:
        sweeps: Finished sweeps; those of one algorithm and task are not independent, and are left out together.
        fit: From sweeps to a rule; `None` where they do not determine one.
    """
    comparisons = []
    for left_out in dict.fromkeys((sweep.algorithm, sweep.task) for sweep in sweeps):
        own = [sweep for sweep in sweeps if (sweep.algorithm, sweep.task) == left_out]
        rule = fit([sweep for sweep in sweeps if sweep not in own])
        if rule is not None:
            comparisons += compare(own, rule)
    return comparisons
