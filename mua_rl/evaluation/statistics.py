"""Statistics of an evaluation: unbiased pass@k, its confidence interval, and what tells two policies apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_CHUNK = 500
_Z95 = 1.959963984540054


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
        p_value: Two-sided, of no difference.
        test: "McNemar exact", or "sign-flip permutation".
        better, worse: Problems on which the second is better, and worse.
    """

    difference: Estimate
    p_value: float
    test: str
    better: int
    worse: int


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of `k` answers is right that are drawn without replacement from `samples`, `right` of them right.

    The unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1), in exact integer arithmetic.

    Raises:
        ValueError: `k` is below 1 or above `samples`, or `right` is not between 0 and `samples`.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} of {right} right among {samples} samples is not defined")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of per-problem shares (each in [0, 1]) with a 95% interval over problems.

    Wilson's score interval where each value is 0 or 1, or all are the same (there the bootstrap's has no width); else
    the percentile bootstrap over problems.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0:
        raise ValueError("no problems")
    mean = float(array.mean())
    if np.isin(array, (0.0, 1.0)).all() or (array == array[0]).all():
        return Estimate(mean, *_wilson(mean, array.size))
    means = _bootstrap_means(array, seed)
    return Estimate(mean, float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedDifference:
    """Compare two evaluations of the same problems, problem by problem.

    McNemar's exact test where every value is 0 or 1; otherwise a permutation test that flips the signs of the
    differences (exact for up to 12 problems that differ, else 10,000 random flips).

    Args:
        first, second: Share of right answers to each problem, in the same order.
        seed: Of the resampling.

    Raises:
        ValueError: The lengths differ, or there are no problems.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"{a.size} and {b.size} problems cannot be paired")
    differences = b - a
    means = _bootstrap_means(differences, seed)
    estimate = Estimate(float(differences.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        return PairedDifference(estimate, mcnemar_exact(better, worse), "McNemar exact", better, worse)
    return PairedDifference(estimate, _sign_flip(differences, seed), "sign-flip permutation", better, worse)


def mcnemar_exact(better: int, worse: int) -> float:
    """Two-sided p-value of McNemar's exact test: the discordant pairs are a fair coin's tosses."""
    n = better + worse
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def _sign_flip(differences: np.ndarray, seed: int) -> float:
    moved = differences[differences != 0]
    if moved.size == 0:
        return 1.0
    observed = abs(moved.sum()) - 1e-12
    if moved.size <= 12:
        signs = np.array(np.meshgrid(*[[-1, 1]] * moved.size)).reshape(moved.size, -1)
        return float((np.abs(moved @ signs) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme = 0
    for _ in range(_RESAMPLES // _CHUNK):
        signs = rng.integers(0, 2, (_CHUNK, moved.size)) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= observed).sum())
    return (extreme + 1) / (_RESAMPLES + 1)


def _bootstrap_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    chunks = [
        values[rng.integers(0, values.size, (_CHUNK, values.size))].mean(axis=1) for _ in range(_RESAMPLES // _CHUNK)
    ]
    return np.concatenate(chunks)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
