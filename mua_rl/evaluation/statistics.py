"""Statistics of an evaluation: unbiased pass@k, its confidence interval, and what tells two policies apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 10_000
_BATCH = 500
"""Resamples that are drawn at once, which bounds the memory."""


@dataclass(frozen=True)
class Estimate:
    """A share with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class PairedDifference:
    """How much better the second of two evaluations is on the same problems.

    Attributes:
        difference: Second minus first, with its 95% paired-bootstrap interval.
        p_value: The two-sided p-value of no difference.
        test: "McNemar exact", or "sign-flip permutation".
        better: The number of problems on which the second is better.
        worse: The number of problems on which it is worse.
    """

    difference: Estimate
    p_value: float
    test: str
    better: int
    worse: int


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of `k` answers is right, drawn without replacement from `samples`, of which `right` are.

    This is the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1), by exact integers.

    Raises:
        ValueError: `k` is below 1 or above `samples`, or `right` is not between 0 and `samples`.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} of {right} right among {samples} samples is not defined")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of per-problem shares (each in [0, 1]) with a 95% interval over problems.

    The interval is Wilson's where each value is 0 or 1, or all are the same (there the bootstrap's has no width); else
    it is that of the percentile bootstrap over problems.

    Raises:
        ValueError: There are no problems.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0:
        raise ValueError("no problems")
    if np.isin(array, (0.0, 1.0)).all() or (array == array[0]).all():
        return Estimate(float(array.mean()), *_wilson(float(array.mean()), array.size))
    return _bootstrap(array, seed)


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedDifference:
    """Compare two evaluations of the same problems, problem by problem.

    The test is McNemar's exact one where every value is 0 or 1; otherwise a permutation test that flips the signs of
    the differences (exact for up to 13 problems that differ, else 10,000 random flips).

    Args:
        first: Share of right answers to each problem.
        second: The same of the other evaluation, in the same order.
        seed: The seed of the resampling.

    Raises:
        ValueError: The lengths differ, or there are no problems.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"{a.size} and {b.size} problems cannot be paired")
    differences = b - a
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        test, p_value = "McNemar exact", mcnemar_exact(better, worse)
    else:
        test, p_value = "sign-flip permutation", _sign_flip(differences[differences != 0], seed)
    return PairedDifference(_bootstrap(differences, seed), p_value, test, better, worse)


def mcnemar_exact(better: int, worse: int) -> float:
    """Two-sided p-value of McNemar's exact test: the discordant pairs are a fair coin's tosses."""
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _sign_flip(differences: np.ndarray, seed: int) -> float:
    """Two-sided p-value of a mean difference, under which each difference could as well have the other sign."""
    if differences.size < 2:  # either sign of a lone difference is as large
        return 1.0
    result = stats.permutation_test(
        (differences,),
        lambda values, axis: np.abs(values.sum(axis=axis)),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _bootstrap(values: np.ndarray, seed: int) -> Estimate:
    """The mean with its 95% interval by the percentile bootstrap."""
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, mean, mean)
    rng = np.random.default_rng(seed)
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, batch=_BATCH, method="percentile", vectorized=True, rng=rng
    )
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def _wilson(share: float, problems: int) -> tuple[float, float]:
    """Wilson's score interval of a share, which need not be of whole problems."""
    z2 = stats.norm.ppf(0.975) ** 2
    centre = (share + z2 / (2 * problems)) / (1 + z2 / problems)
    half = math.sqrt(z2 * (share * (1 - share) / problems + z2 / (4 * problems**2))) / (1 + z2 / problems)
    return max(0.0, centre - half), min(1.0, centre + half)
