"""Rules that say what one curve's optimum tells of another's, and how well they do on finished sweeps.

A rule is anything with `Rule`'s attributes. `prediction_tests` holds its predictions against the measured optima, which
other seeds would have put elsewhere: `Test.perfect_hit` says how often any rule could be right, `Unmoved` shows how
often none is needed. How far off a rule may be is learnt from other sweeps than it is judged on: `calibrated` gives it
the interval that `evidence` gives to users (`mua_rl.lr.transfer`).
"""

import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from mua_rl.analysis.measured import Context, Measured, Sweep, log2_ratio
from mua_rl.analysis.optimum import COVERAGE, RESOLUTION
from mua_rl.lr.evidence import UNMOVED, Evidence, default_exponent, pair_kind
from mua_rl.lr.spec import FFT, AdapterSpec, Scheme

HIT = 0.5
"""Octaves within which a prediction counts as right."""
ENOUGH = 20
"""Pairs of curves from which on their kind is judged by itself; fewer are judged by all pairs of the algorithm."""


@dataclass(frozen=True)
class Prediction:
    """Of a curve's best learning rate.

    Attributes:
        log2_lr: log2 η.
        log2_interval: Where the rule says that the optimum lies, nine times in ten; `None`: it says nothing.
    """

    log2_lr: float
    log2_interval: tuple[float, float] | None = None


class Rule(Protocol):
    """Predicts an optimum from another.

    Attributes:
        name: For tables.
        needs_source: Whether anything has to be tuned first.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_source(self) -> bool: ...

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """The optimum of `target`, or `None` where the rule does not cover the pair."""


@dataclass(frozen=True)
class BareRule:
    """The theory's exponents and nothing else (`mua_rl.lr.rules.lr_ratio`)."""

    name: str = "theory"
    needs_source: bool = True

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        shift = log2_ratio(source.spec, target, context.width)
        return None if shift is None else Prediction(source.optimum.log2_lr + shift)


@dataclass(frozen=True)
class Unmoved:
    """The source's learning rate as it is, where the theory has one: a rule that does no better is not needed."""

    name: str = "no rule, the LR unchanged"
    needs_source: bool = True

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        return None if log2_ratio(source.spec, target, context.width) is None else Prediction(source.optimum.log2_lr)


@dataclass(frozen=True)
class RankCorrected:
    """The theory times (r_source / r_target)^c; FFT counts as rank m, its layers' outputs.

    With c = 0 the features of a rank move as far as FFT's; with c = 1/2 the function along the gradient does, since
    Init[B] confines an update to r of m output directions.

    Attributes:
        exponent: c.
        schemes: The schemes whose curves it corrects; FFT counts as Init[B].
    """

    exponent: float
    schemes: tuple[Scheme, ...] = (Scheme.INIT_B,)
    needs_source: bool = True

    @property
    def name(self) -> str:
        """See `Rule`."""
        return f"theory × (r/m)^{self.exponent:.3g}"

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        shift = log2_ratio(source.spec, target, context.width)
        correction = log2_rank_ratio(source.spec, target, context, self.schemes)
        if shift is None or correction is None:
            return None
        return Prediction(source.optimum.log2_lr + shift - self.exponent * correction)


@dataclass(frozen=True)
class Shipped:
    """What `mua_rl.lr.transfer.transfer` does of itself; from `shipped`.

    Attributes:
        exponent: c of `RankCorrected`.
        unmoved: The schemes within which the learning rate stays as it is.
    """

    exponent: float
    unmoved: tuple[Scheme, ...] = ()
    name: str = "what mua_rl does by default"
    needs_source: bool = True

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        stays = source.spec.scheme is target.scheme and target.scheme in self.unmoved
        rule: Rule = Unmoved() if stays else RankCorrected(self.exponent)
        return rule.predict(source, target, context)


def shipped(algorithm: str) -> Shipped:
    """The rule of an algorithm."""
    return Shipped(default_exponent(algorithm), UNMOVED.get(algorithm, ()))


@dataclass(frozen=True)
class EqualMovement:
    """The learning rate at which a step moves the policy as far as at the source's optimum, or part of the way there.

    Needs no theory and covers any two curves whose movement was measured, Init[A] and FFT too.

    Attributes:
        exponent: 1 makes movements equal, 1/2 is the geometric mean of that and of equal learning rates.
    """

    exponent: float = 1.0
    needs_source: bool = True

    @property
    def name(self) -> str:
        """See `Rule`."""
        return f"equal movement^{self.exponent:g}"

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        found = context.movement
        if source.spec not in found or target not in found:
            return None
        shift = -self.exponent * math.log2(found[target] / found[source.spec])
        return Prediction(source.optimum.log2_lr + shift)


@dataclass(frozen=True)
class Calibrated:
    """A rule that says how far off it may be; from `calibrated`.

    Attributes:
        rule: Which.
        octaves: To either side of a prediction, where nine optima in ten lie, by kind of pair.
        otherwise: The same for other kinds; `None`: nothing is known, and no interval is stated.
    """

    rule: Rule
    octaves: Mapping[str, float] = field(default_factory=dict)
    otherwise: float | None = None

    @property
    def name(self) -> str:
        """See `Rule`."""
        return self.rule.name

    @property
    def needs_source(self) -> bool:
        """See `Rule`."""
        return self.rule.needs_source

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        prediction = self.rule.predict(source, target, context)
        octaves = self.octaves.get(_pair_kind(source.spec, target), self.otherwise)
        if prediction is None or octaves is None:
            return prediction
        return replace(prediction, log2_interval=(prediction.log2_lr - octaves, prediction.log2_lr + octaves))


TRANSFER_RULES: tuple[Rule, ...] = (BareRule(), RankCorrected(0.25), RankCorrected(0.5))
MOVEMENT_RULES: tuple[Rule, ...] = (EqualMovement(), EqualMovement(0.5))
"""Where movements were measured."""


def log2_rank_ratio(
    source: AdapterSpec, target: AdapterSpec, context: Context, schemes: Sequence[Scheme] = (Scheme.INIT_B,)
) -> float | None:
    """log2 of r_target / r_source, FFT being of rank m: 0 for schemes not in `schemes`, `None` for m unknown."""
    ranks = []
    for spec in (source, target):
        if spec != FFT and spec.scheme not in schemes:
            return 0.0
        ranks.append(context.outputs if spec.rank is None else spec.rank)
    if ranks[0] == ranks[1]:
        return 0.0
    return None if None in ranks else math.log2(ranks[1] / ranks[0])  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class Test:
    """A prediction held against the measured optimum.

    Attributes:
        rule: Its name.
        sweep, source, target: Of what.
        prediction: What the rule said.
        error: Predicted less measured, in octaves.
    """

    __test__ = False  # pytest

    rule: str
    sweep: Sweep
    source: Measured
    target: Measured
    prediction: Prediction
    error: float

    @property
    def is_hit(self) -> bool:
        """Within half an octave."""
        return abs(self.error) <= HIT

    @property
    def is_as_good(self) -> bool:
        """Whether the target's value there cannot be told from its best; the noisier its runs, the easier that is."""
        return self.target.optimum.is_as_good(self.prediction.log2_lr)

    @property
    def is_covered(self) -> bool | None:
        """Whether the optimum is in the stated interval, but for its own error; `None`: none is stated.

        The interval is of the true optimum. What was measured is off that by an error of its own, whose interval joins
        the stated one, like any independent errors, by the root of the sum of squares.
        """
        if self.prediction.log2_interval is None:
            return None
        low, high = self.prediction.log2_interval
        optimum = self.target.optimum
        if self.error > 0:
            allowed = math.hypot(self.prediction.log2_lr - low, optimum.high - optimum.log2_lr)
        else:
            allowed = math.hypot(high - self.prediction.log2_lr, optimum.log2_lr - optimum.low)
        return abs(self.error) <= allowed + 1e-6  # rounding

    @property
    def loss(self) -> float:
        """Share of the target's gain that is lost at the predicted learning rate."""
        return self.target.share_lost(self.prediction.log2_lr)

    @property
    def scatter(self) -> float:
        """Standard deviation of a perfect rule's error, in octaves.

        Such a rule knows how far apart sweeps find the two optima on average over seeds. It starts from one that was
        measured with a few seeds and is held against another, so it is off by what these two differ from the average.
        """
        return math.hypot(self.source.optimum.scatter, self.target.optimum.scatter)

    @property
    def perfect_hit(self) -> float:
        """The probability that a perfect rule hits; of many tests the mean is the ceiling of their hit rate."""
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
    def kind(self) -> str:
        """Between what, whatever the direction: "within Init[B]", "FFT ↔ Init[B]"."""
        schemes = sorted({self.source.spec.scheme, self.target.spec.scheme})
        return " ↔ ".join(schemes) if len(schemes) > 1 else f"within {schemes[0]}"


def prediction_tests(sweeps: Sequence[Sweep], rule: Rule) -> list[Test]:
    """Every ordered pair of curves that the rule covers; optima at an edge of their grid are bounds and left out."""
    tests = []
    for sweep in sweeps:
        known = [measured for measured in sweep.curves.values() if not measured.optimum.edge]
        for source, target in itertools.permutations(known, 2):
            prediction = rule.predict(source, target.spec, sweep.context)
            if prediction is not None:
                error = prediction.log2_lr - target.optimum.log2_lr
                tests.append(Test(rule.name, sweep, source, target, prediction, error))
    return tests


def fit_exponent(sweeps: Sequence[Sweep], schemes: tuple[Scheme, ...] = (Scheme.INIT_B,)) -> RankCorrected | None:
    """The exponent c with which `RankCorrected` predicts the optima of these sweeps best.

    Weighted least squares over all pairs that the theory covers; `None` where no pair tells.
    """
    x, y, variances = [], [], []
    for test in prediction_tests(sweeps, BareRule()):
        ratio = log2_rank_ratio(test.source.spec, test.target.spec, test.sweep.context, schemes)
        if ratio:
            x.append(ratio)
            y.append(test.error)
            variances.append(test.source.optimum.draws.var() + test.target.optimum.draws.var() + RESOLUTION**2)
    if not x:
        return None
    ratios, errors, weights = np.array(x), np.array(y), 1 / np.array(variances)
    return RankCorrected(float((weights * ratios) @ errors / ((weights * ratios) @ ratios)), schemes)


def calibrated(rule: Rule, sweeps: Sequence[Sweep]) -> Calibrated:
    """A rule with the interval that nine in ten of its predictions in these sweeps kept to, noise included.

    To be judged on other sweeps (`leave_one_out`). No interval is stated where these have no pair that the rule covers.
    Were the noise of these sweeps' optima taken off, a noisy task would hide how far off the rule is on a steady one.
    """
    tests = prediction_tests(sweeps, rule)
    by_kind = {kind: _off(alike) for kind, alike in _by_pair(tests).items()}
    return Calibrated(rule, by_kind, otherwise=_off(tests) if tests else None)


def _off(tests: Sequence[Test]) -> float:
    """Octaves from the measured optimum within which nine predictions in ten are."""
    return _nine_in_ten([abs(test.error) for test in tests])


def fitted(sweeps: Sequence[Sweep]) -> Calibrated | None:
    """The theory times a power of the ranks' ratio that is fitted to these sweeps, and calibrated on them."""
    rule = fit_exponent(sweeps)
    return None if rule is None else calibrated(rule, sweeps)


def evidence(sweeps: Sequence[Sweep], rule: Rule) -> dict[str, Evidence]:
    """How far off a rule was in these sweeps, by kind of pair: `mua_rl.lr.evidence.EVIDENCE`."""
    tests, found = prediction_tests(sweeps, rule), {}
    for kind, alike in _by_pair(tests).items():
        curves = [m for test in tests if _kind_of(test) == kind for m in (test.source, test.target)]
        ranks = [m.spec.rank for m in curves if m.spec.rank is not None]
        found[kind] = Evidence(
            ranks=(min(ranks), max(ranks)),
            alphas=tuple(sorted({str(m.spec.alpha) for m in curves if m.spec != FFT})),
            steps=max(round(m.steps / len(m.points)) for m in curves),
            octaves=_off(alike),
            loss=_nine_in_ten([test.loss for test in alike]),
        )
    return found


def _by_pair(tests: Sequence[Test]) -> dict[str, Sequence[Test]]:
    """The tests of each kind of pair (`mua_rl.lr.evidence.pair_kind`); all of them for a kind that has not `ENOUGH`."""
    kinds = {kind: [test for test in tests if _kind_of(test) == kind] for kind in sorted({_kind_of(t) for t in tests})}
    return {kind: alike if len(alike) >= ENOUGH else tests for kind, alike in kinds.items()}


def _nine_in_ten(values: Sequence[float]) -> float:
    """The smallest of them that at least `COVERAGE` of them do not exceed."""
    return float(np.quantile(values, COVERAGE, method="inverted_cdf"))


def _kind_of(test: Test) -> str:
    return _pair_kind(test.source.spec, test.target.spec)


def _pair_kind(source: AdapterSpec, target: AdapterSpec) -> str:
    return pair_kind(source.scheme, target.scheme)


def leave_one_out(
    sweeps: Sequence[Sweep],
    fit: Callable[[Sequence[Sweep]], Rule | None] = fitted,
    group: Callable[[Sweep], Hashable] = lambda sweep: (sweep.algorithm, sweep.task),
) -> list[Test]:
    """Predictions in each group of sweeps by a rule that was fitted on the other groups only.

    Args:
        fit: From sweeps to a rule; `None` where they do not determine one.
        group: What sweeps have in common that are left out together; by default sweeps of one task are, which are not
            independent of each other.
    """
    tests = []
    for left_out in dict.fromkeys(group(sweep) for sweep in sweeps):
        rule = fit([sweep for sweep in sweeps if group(sweep) != left_out])
        if rule is not None:
            tests += prediction_tests([sweep for sweep in sweeps if group(sweep) == left_out], rule)
    return tests
