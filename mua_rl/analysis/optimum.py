"""The best learning rate of one curve of a sweep: a smooth fit with its uncertainty, not the luckiest run.

A curve is the metric against log2 η: it rises slowly, has a top that may be flat, and falls, often off a cliff. The fit
is a Gaussian process over log2 η (Matérn 5/2) with a broad prior over its length scale, its amplitude and the noise of
a run. It is drawn from many times; where each drawn curve peaks is one draw of the optimum, so that noise, few seeds, a
coarse grid and a flat top all widen the interval. Unlike a bootstrap over seeds, that needs no second seed. On curves
that fall faster than they rise the estimate is up to a quarter octave low, alike for all curves of such a shape.

Three things keep what is far from the top from bending it:

- seed means in the lowest part of the curve count as "low", whatever their value;
- learning rates beyond which most runs diverge bound the fit instead of entering it: the cliff lies somewhere between
  the last rate that most runs survived and the next, and each draw puts it elsewhere;
- a single diverged run among others at a learning rate counts as the curve's worst.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mua_rl.errors import UserError

COVERAGE = 0.9
"""Of an optimum's interval."""
DRAWS = 1000
RESOLUTION = 1 / 8
"""Octaves between the learning rates at which the fit is evaluated."""
EDGE_SHARE = 0.25
"""Share of draws that peak at an end of the grid, from which on the optimum is said to lie there."""

_LOW = 0.6
"""What lies further below the top than this share of the curve's range is just low."""
_LOW_NOISE = 0.15
"""How exactly "low" is known; like all that follow in units of that part of the range that counts."""
_LENGTHS = np.array([1.5, 2.2, 3.3, 5.0])
"""Length scales in octaves; learning-rate curves of finetuning are two to four octaves wide at nine tenths of their
top."""
_AMPLITUDES = np.array([0.5, 1.0])
_NOISES = np.geomspace(0.01, 1.0, 9)
"""Standard deviation of one run."""
_LEVEL = 2.0
"""Standard deviation of the curve's unknown level."""

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where a curve has its best learning rate; all learning rates are log2 η.

    Attributes:
        log2_lr: The estimate: the mean of `draws`, but none above `largest`.
        low, high: Its interval (`COVERAGE`).
        value: The fitted metric there.
        error: Its standard error.
        plateau: Lowest and highest learning rate around it whose metric cannot be told from `value` (at 95 %).
        edge: "left" or "right" where the grid ends before the curve falls: the true optimum may lie beyond; else "".
        largest: The largest learning rate that most runs survived.
        draws: Draws of the optimum, `[DRAWS]`.
        scatter: Standard deviation of `log2_lr` between sweeps that differ in their seeds only, in octaves. Less than
            that of the draws: on a flat top an estimate may be steady while the optimum could be anywhere.
        log2_lrs, values: The fitted curve, ascending: smooth near the top, seed means elsewhere.
    """

    log2_lr: float
    low: float
    high: float
    value: float
    error: float
    plateau: tuple[float, float]
    edge: str
    largest: float
    draws: Array
    scatter: float
    log2_lrs: Array
    values: Array

    def value_at(self, log2_lr: float) -> float:
        """The fitted metric at a learning rate; beyond the grid that of its end (see `covers`)."""
        return float(np.interp(log2_lr, self.log2_lrs, self.values))

    def is_as_good(self, log2_lr: float) -> bool:
        """Whether a learning rate lies on the plateau: it cannot be told from the best."""
        return self.plateau[0] <= log2_lr <= self.plateau[1]

    def covers(self, log2_lr: float) -> bool:
        """Whether a learning rate lies within the grid."""
        return bool(self.log2_lrs[0] <= log2_lr <= self.log2_lrs[-1])


@dataclass(frozen=True, eq=False)
class _Top:
    """The part of a curve that counts, scaled so that its highest mean is 1 and "low" is 0.

    Attributes:
        x: log2 η, ascending, `[L]`.
        y: Means over seeds, `[L]`.
        runs: How many, `[L]`.
        is_low: Whether a mean counts as low only, `[L]`.
        residuals: Sum of squares of the runs around their means, and its degrees of freedom.
        end: Where the curve ends: x's last, or the smallest learning rate that most runs do not survive.
    """

    x: Array
    y: Array
    runs: Array
    is_low: NDArray[np.bool_]
    residuals: tuple[float, float]
    end: float


def estimate_optimum(points: Iterable[tuple[float, float, int]], higher_is_better: bool = True) -> Optimum:
    """Fit a curve and find where it peaks.

    Args:
        points: (log2 η, metric, seed) of each run; a metric that is not finite is a run that diverged.
        higher_is_better: Whether the metric is to be maximised.

    Raises:
        UserError: There are fewer than two learning rates, or most runs diverged at each of them.
    """
    points = sorted(points, key=lambda point: (point[0], point[2]))
    lrs, values = (np.array([point[i] for point in points], dtype=float) for i in (0, 1))
    seeds = np.array([point[2] for point in points])
    sign = 1.0 if higher_is_better else -1.0
    grid, index = np.unique(lrs, return_inverse=True)
    if len(grid) < 2:
        raise UserError(
            f"an optimum needs runs at two learning rates or more, and there {'is one' if len(grid) else 'are none'}: "
            "sweep more of them."
        )
    survived = np.bincount(index, np.isfinite(values)) > 0.5 * np.bincount(index)
    if not survived.any():
        raise UserError(
            f"most runs diverged at every learning rate from 2^{grid[0]:g} to 2^{grid[-1]:g}: sweep smaller ones."
        )
    last = int(np.flatnonzero(survived)[-1])
    values = sign * values
    values = np.where(np.isfinite(values), values, values[np.isfinite(values)].min())
    means = np.bincount(index, values) / np.bincount(index)
    highest = float(means[survived].max())
    # A run that has not quite diverged may end anywhere: a few such learning rates must not set the scale.
    low = highest - _LOW * min(highest - float(means.min()), 3 * (highest - float(np.quantile(means, 0.25))))
    scale = (highest - low) or 1.0
    values, means = (values - low) / scale, (means - low) / scale
    top = _find_top(grid, index, values, seeds, means, last)

    # Seeded by the runs: the same at each call, and not the same for two curves, whose draws must be independent.
    x, curves, noises, cliffs = _draw(top, np.random.default_rng(zlib.crc32(lrs.tobytes() + values.tobytes())))
    draws = x[np.argmax(np.where(x[:, None] <= cliffs, curves, -np.inf), axis=0)]
    low_end, high_end = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    best = min(float(draws.mean()), float(grid[last]))
    survivors = x[x <= grid[last] + 1e-9]
    at = int(np.argmin(np.abs(survivors - best)))  # of all of x, the nearest may lie past the last rate, on the cliff
    lrs_of_fit, fit = _whole_curve(top, x, curves.mean(axis=1), grid, means)
    return Optimum(
        log2_lr=best,
        # The draws lie on a grid; their mean lies outside of their quantiles where nearly all of them are at one end.
        low=min(max(float(low_end) - RESOLUTION / 2, float(top.x[0])), best),
        high=max(min(float(high_end) + RESOLUTION / 2, top.end), best),
        value=sign * float(curves[at].mean() * scale + low),
        error=float(curves[at].std() * scale),
        plateau=_plateau(survivors, curves, at),
        edge=_edge(draws, x, grid),
        largest=float(grid[last]),
        draws=draws,
        scatter=_scatter(top, x, curves, noises, draws),
        log2_lrs=lrs_of_fit,
        values=sign * (fit * scale + low),
    )


def _find_top(
    grid: Array, index: NDArray[np.int_], values: Array, seeds: NDArray[np.int_], means: Array, last: int
) -> _Top:
    """The learning rates that are not low, those between them and one to either side, none beyond `last`."""
    is_low = means < 0
    inside = np.flatnonzero(~is_low[: last + 1])
    part = slice(max(inside[0] - 1, 0), min(inside[-1] + 1, last) + 1)
    y = np.maximum(means, 0.0)
    counts = ~is_low[index] & (index >= part.start) & (index < part.stop)
    without_seeds, residuals = _remove_seed_effects(index[counts], values[counts], seeds[counts])
    y[np.unique(index[counts])] = without_seeds
    has_cliff = part.stop == last + 1 < len(grid)
    return _Top(
        x=grid[part],
        y=y[part],
        runs=np.bincount(index)[part].astype(float),
        is_low=is_low[part],
        residuals=residuals,
        end=float(grid[last + 1] if has_cliff else grid[part][-1]),
    )


def _remove_seed_effects(
    index: NDArray[np.int_], values: Array, seeds: NDArray[np.int_]
) -> tuple[Array, tuple[float, float]]:
    """Means over seeds at each learning rate as if every seed had been run there, and the residuals around them.

    A seed that is good at one learning rate is likely good at the next: where seeds differ between learning rates, that
    would pass for an effect of the learning rate. A value is modelled as mean + seed's effect + noise, the
    two of one size.
    """
    _, lr = np.unique(index, return_inverse=True)
    _, seed = np.unique(seeds, return_inverse=True)
    design = np.concatenate([np.eye(lr.max() + 1)[lr], np.eye(seed.max() + 1)[seed]], axis=1)
    prior = np.concatenate([np.zeros(lr.max() + 1), np.ones(seed.max() + 1)])
    inverse = np.linalg.inv(design.T @ design + np.diag(prior))
    solution = inverse @ design.T @ values
    left = values - design @ solution
    freedom = len(values) - float(np.trace(inverse @ design.T @ design))
    return solution[: lr.max() + 1], (float(left @ left), max(freedom, 0.0))


def _draw(top: _Top, rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Learning rates `[X]`, curves drawn from the fit `[X, DRAWS]`, each one's noise and where it ends `[DRAWS]`."""
    lengths, amplitudes, noises = (v.ravel() for v in np.meshgrid(_LENGTHS, _AMPLITUDES, _NOISES, indexing="ij"))
    covariance = _kernel(top.x, top.x, lengths, amplitudes)
    variance = noises[:, None] ** 2 / top.runs + _LOW_NOISE**2 * top.is_low + 1e-8
    covariance = covariance + variance[:, :, None] * np.eye(len(top.x))
    deviation = top.y - 0.5
    solved = np.linalg.solve(covariance, np.broadcast_to(deviation[:, None], (*covariance.shape[:2], 1)))[..., 0]
    squares, freedom = top.residuals
    log_likelihood = -0.5 * (solved @ deviation + np.linalg.slogdet(covariance)[1])
    log_likelihood -= freedom * np.log(noises) + squares / (2 * noises**2)
    weights = np.exp(log_likelihood - log_likelihood.max())
    drawn = rng.multinomial(DRAWS, weights / weights.sum())

    x = np.arange(top.x[0], top.end + 1e-9, RESOLUTION)
    curves = []
    for i in np.flatnonzero(drawn):
        between = _kernel(x, top.x, lengths[i : i + 1], amplitudes[i : i + 1])[0]
        mean = 0.5 + between @ solved[i]
        left = _kernel(x, x, lengths[i : i + 1], amplitudes[i : i + 1])[0]
        left -= between @ np.linalg.solve(covariance[i], between.T)
        root = np.linalg.cholesky(left + 1e-6 * np.eye(len(x)))
        curves.append(mean[:, None] + root @ rng.standard_normal((len(x), drawn[i])))
    order = rng.permutation(DRAWS)
    cliffs = rng.uniform(top.x[-1], top.end, DRAWS)
    return x, np.concatenate(curves, axis=1)[:, order], np.repeat(noises, drawn)[order], cliffs


def _scatter(top: _Top, x: Array, curves: Array, noises: Array, draws: Array) -> float:
    """See `Optimum.scatter`: the accuracy formula of Efron (2015), "Frequentist accuracy of Bayesian estimates".

    The mean of draws moves with a measured value by their covariance with the curve there over the value's variance.
    That is so at one noise; the draws of each are taken by themselves.
    """
    at = np.abs(x[:, None] - top.x[~top.is_low]).argmin(axis=0)
    squares = []
    for noise in np.unique(noises):
        alike = noises == noise
        covariances = curves[np.ix_(at, alike)] @ (draws[alike] - draws[alike].mean()) / alike.sum()
        squares.append(alike.mean() * np.sum(covariances**2 * top.runs[~top.is_low] / noise**2))
    return float(np.sqrt(np.sum(squares)))


def _kernel(a: Array, b: Array, lengths: Array, amplitudes: Array) -> Array:
    """Covariance of the curve between learning rates, `[H, A, B]`: Matérn 5/2 and an unknown level."""
    distance = np.sqrt(5) * np.abs(a[:, None] - b) / lengths[:, None, None]
    return (amplitudes**2)[:, None, None] * (1 + distance + distance**2 / 3) * np.exp(-distance) + _LEVEL**2


def _whole_curve(top: _Top, x: Array, fit: Array, grid: Array, means: Array) -> tuple[Array, Array]:
    """Learning rates and values: the fit between the outermost learning rates that are not low, means elsewhere."""
    first, end = top.x[~top.is_low][[0, -1]]
    near = (x >= first - RESOLUTION / 2) & (x <= end + RESOLUTION / 2)
    far = (grid < first) | (grid > end)
    lrs = np.concatenate([grid[far], x[near]])
    order = np.argsort(lrs)
    return lrs[order], np.concatenate([means[far], fit[near]])[order]


def _plateau(x: Array, curves: Array, at: int) -> tuple[float, float]:
    """The learning rates around `x[at]` at which at least one draw in twenty is no worse."""
    is_worse = np.quantile(curves[at] - curves[: len(x)], 0.05, axis=1) > 0
    different = np.flatnonzero(is_worse)
    first = different[different < at].max(initial=-1) + 1
    end = different[different > at].min(initial=len(x)) - 1
    return float(x[first]), float(x[end])


def _edge(draws: Array, x: Array, grid: Array) -> str:
    """See `Optimum.edge`; a cliff is no edge."""
    if x[0] == grid[0] and np.mean(draws == x[0]) >= EDGE_SHARE:
        return "left"
    if grid[-1] - RESOLUTION < x[-1] <= grid[-1] and np.mean(draws == x[-1]) >= EDGE_SHARE:
        return "right"
    return ""
