"""What came of docs/predictions.md: reads the CSVs of its runs and prints the table of outcomes as Markdown.

    python scripts/law_outcomes.py docs/results/law

A verdict is that of the estimate: *held* inside of the predicted interval, *refuted* where the prediction says so,
*undecided* between the two or where an edge lies beyond the grid, and *failed* outside of an interval for which the
prediction names nothing that refutes it. Where the 90 % interval reaches over to the other side, that is said. E1's
interval is the range over batches. Optima are those of `mua_rl.analysis.optimum`, with its draws.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mua_rl.analysis.measured import interval
from mua_rl.analysis.optimum import DRAWS, Array, Optimum, estimate_optimum
from mua_rl.analysis.rows import SweepRow, read_all
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.run.trial import Status

BASE_REWARD = 0.113
"""The mean training reward of the first step, at which no run has moved yet: it stands in the runs' logs."""
SHARE = 0.8
"""The share of the best point's gain at which an edge lies."""
FULL_OPTIMUM = -14.6
"""log2 η* of SmolLM2's FFT as docs/predictions.md has it."""
EFFECTIVE_SHARE = 0.53
"""The mean of the schedule (5 % warm-up, cosine to a tenth), with which steps become effective steps."""
STEPS = 60


@dataclass(frozen=True)
class Estimate:
    """A number with draws of it, `[D]`; NaN where the grid does not hold it."""

    value: float
    draws: Array

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - np.random.default_rng(1).permutation(other.draws))

    def shifted(self, by: float) -> "Estimate":
        """The estimate plus a number."""
        return Estimate(self.value + by, self.draws + by)

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "beyond the grid"
        low, high = interval(self.draws[~np.isnan(self.draws)])
        digits = 0 if abs(self.value) >= 100 else 2
        return f"{self.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@dataclass(frozen=True)
class Claim:
    """A registered prediction and what came of it.

    Attributes:
        number: Of the experiment.
        what: The quantity.
        predicted: The interval.
        outcome: What was measured.
        is_refuting: Whether a value refutes the prediction.
    """

    number: str
    what: str
    predicted: tuple[float, float]
    outcome: Estimate
    is_refuting: Callable[[float], bool] | None = None

    @property
    def verdict(self) -> str:
        """See above."""
        value, (low, high) = self.outcome.value, self.predicted
        if math.isnan(value):
            return "undecided"
        least, largest = interval(self.outcome.draws[~np.isnan(self.outcome.draws)])
        if low <= value <= high:
            unsure = self.is_refuting is not None and (self.is_refuting(least) or self.is_refuting(largest))
            return "held, the interval reaches what refutes" if unsure else "held"
        verdict = "undecided"
        if self.is_refuting is None:
            verdict = "**failed**"
        elif self.is_refuting(value):
            verdict = "**refuted**"
        overlaps = verdict != "undecided" and least <= high and low <= largest
        return f"{verdict}, the interval reaches what was predicted" if overlaps else verdict

    def cells(self) -> list[str]:
        """The claim's line in the table."""
        return [self.number, self.what, _range(self.predicted), str(self.outcome), self.verdict]


@dataclass(frozen=True)
class Curve:
    """The runs of one configuration: (log2 η, value, seed), and which of them are good.

    Attributes:
        points: The runs, a lost one with the value that it reached.
        optimum: Fitted; a lost run counts as diverged.
        noise: The standard deviation of a run.
        base: The value before training.
    """

    points: list[tuple[float, float, int]]
    optimum: Optimum
    noise: float
    base: float

    @property
    def best(self) -> Estimate:
        """log2 η*; NaN where it lies at an end of the grid."""
        return Estimate(math.nan if self.optimum.edge else self.optimum.log2_lr, self.optimum.draws)

    def edge(self, upper: bool) -> Estimate:
        """log2 of the rate at which the line through the means passes `SHARE` of the gain; draws by the runs' noise."""
        lrs = sorted({lr for lr, _, _ in self.points})
        groups = [[value for at, value, _ in self.points if at == lr] for lr in lrs]
        means = np.array([statistics.fmean(group) for group in groups])
        errors = self.noise / np.sqrt([len(group) for group in groups])
        drawn = means + errors * np.random.default_rng(0).standard_normal((DRAWS, len(lrs)))
        return Estimate(*self._crossing(lrs, means[None], upper), self._crossing(lrs, drawn, upper))

    def _crossing(self, lrs: Sequence[float], curves: Array, upper: bool) -> Array:
        crossings = []
        for values in curves:
            level = self.base + SHARE * (values.max() - self.base)
            order = range(int(values.argmax()), len(lrs) - 1) if upper else range(int(values.argmax()), 0, -1)
            step = 1 if upper else -1
            passed = [i for i in order if values[i] >= level > values[i + step]]
            crossings.append(math.nan)
            if passed:
                i = passed[0]
                share = (values[i] - level) / (values[i] - values[i + step])
                crossings[-1] = lrs[i] + share * (lrs[i + step] - lrs[i])
        return np.array(crossings)


Key = tuple[str, str, str, AdapterSpec]
"""Algorithm, task, base and configuration."""


def curves_of(rows: Sequence[SweepRow]) -> dict[Key, Curve]:
    """The curves of a sweep's rows."""
    groups: dict[Key, list[SweepRow]] = {}
    for row in rows:
        groups.setdefault((row.algorithm, row.task, row.base, row.trial.spec), []).append(row)
    noise = {name: run_noise([r for r in rows if r.algorithm == name]) for name in {r.algorithm for r in rows}}
    return {key: _curve(group, noise[group[0].algorithm]) for key, group in groups.items()}


def _value(row: SweepRow) -> float:
    return row.result.score if row.algorithm == "sft" else row.result.reward_mean


def _curve(rows: Sequence[SweepRow], noise: float) -> Curve:
    points = [(row.trial.log2_lr, _value(row), row.trial.seed) for row in rows]
    good = [
        (lr, value if row.result.status is Status.OK else math.nan, seed)
        for row, (lr, value, seed) in zip(rows, points, strict=True)
    ]
    base = rows[0].result.before if rows[0].algorithm == "sft" else BASE_REWARD
    return Curve(points, estimate_optimum(good), noise, base)


def run_noise(rows: Sequence[SweepRow]) -> float:
    """The standard deviation of a run between seeds, pooled over all learning rates with several good ones."""
    groups: dict[object, list[float]] = {}
    for row in rows:
        if row.result.status is Status.OK:
            groups.setdefault((row.task, row.base, row.trial.spec, row.trial.log2_lr), []).append(_value(row))
    several = [group for group in groups.values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    return math.sqrt(sum(statistics.variance(g) * (len(g) - 1) for g in several) / freedom) if freedom else 0.0


def slope(ranks: Sequence[int], optima: Sequence[Estimate]) -> Estimate:
    """The slope of optima on log2 r by least squares."""
    x = np.log2(ranks) - np.mean(np.log2(ranks))
    weights = x / (x @ x)
    return Estimate(float(weights @ [o.value for o in optima]), weights @ np.array([o.draws for o in optima]))


def probe_claims(name: str, path: Path, m_eff: tuple[float, float], f: tuple[float, float], rho: tuple[float, float]):
    """E1 of a model: means over batches, with the least and the largest as interval."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))

    def over_batches(values: Iterable[float]) -> Estimate:
        known = np.array([value for value in values if not math.isnan(value)])
        return Estimate(float(known.mean()) if len(known) else math.nan, known)

    def column(key: str) -> Estimate:
        return over_batches(float(row[key]) for row in rows)

    implied = [[float(row[f"m_eff_{rank}"]) for rank in (4, 16, 64)] for row in rows]
    sizes = column("m_eff").draws
    between = Estimate(float(sizes.max() / sizes.min() - 1), np.array([sizes.max() / sizes.min() - 1]))
    spread = over_batches(max(sizes) / min(sizes) - 1 for sizes in implied)
    for what, bounds in (("m_eff", m_eff), ("F", f), ("rho", rho)):
        yield Claim("E1", f"{what}, {name}", bounds, column(what), _outside(bounds))
    yield Claim("E1", f"spread of m_eff by drawn B, r = 4, 16, 64, {name}", (0, 0.05), spread, lambda v: v > 0.2)
    yield Claim("E1", f"spread of m_eff between batches, {name}", (0, 0.1), between, lambda v: v > 0.25)


def sweep_claims(rows: Sequence[SweepRow], probe: dict[str, float]) -> Iterable[Claim]:
    """E2 to E9.

    Args:
        rows: Of the runs.
        probe: E1's means for SmolLM2: n_eff, F and rho.
    """
    curves = curves_of(rows)
    grpo, task, base = "grpo", "arithmetic", "smollm2"
    b = {rank: curves[grpo, task, base, AdapterSpec.parse(rank)] for rank in (1, 2, 4)}
    yield Claim("E2", "η*(1) − η*(4)", (0.7, 1.3), b[1].best - b[4].best, lambda v: v <= 0.4)
    for upper in (False, True):
        moved = b[1].edge(upper) - b[4].edge(upper)
        yield Claim("E2", f"{'upper' if upper else 'lower'} edge, r = 1 − r = 4", (0.6, 1.4), moved)
    peft = [curves[grpo, task, f"{base}-peft", AdapterSpec.parse(rank, "A", "32/r")].best for rank in (8, 32, 128)]
    draws = np.array([optimum.draws for optimum in peft])
    values = [optimum.value for optimum in peft]
    spread = Estimate(max(values) - min(values), np.ptp(draws, axis=0))
    mean = Estimate(statistics.fmean(values), draws.mean(axis=0))
    yield Claim("E3", "largest − smallest of the three optima", (0, 0.8), spread, lambda v: v > 0.8)
    yield Claim("E3", "mean of the three optima", (-11, -10), mean, _outside((-11.5, -9.5)))
    yield Claim("E3b", "÷ 15, above FFT's η*", (-0.5, 0.5), mean.shifted(-math.log2(15) - FULL_OPTIMUM))
    yield Claim("E3b", "÷ 10, above FFT's η*", (-1, 1), mean.shifted(-math.log2(10) - FULL_OPTIMUM))
    for name, tau in (
        ("first step alone", 0.0),
        ("with τ = ρ × effective steps", probe["rho"] * EFFECTIVE_SHARE * STEPS),
    ):
        moved = Estimate(
            float(full_rate(mean.value, tau, probe["n_eff"], probe["F"])),
            full_rate(mean.draws, tau, probe["n_eff"], probe["F"]),
        )
        law = moved.shifted(-FULL_OPTIMUM)
        yield Claim("E3b", f"the law ({name}), above FFT's η*", (-0.5, 0.5), law, _outside((-1, 1)))
    warm = {
        spec: curves[grpo, f"{task}-warmup-20", base, spec].edge(True)
        - curves[grpo, f"{task}-warmup-3", base, spec].edge(True)
        for spec in (AdapterSpec.parse(16, "A", "1/r"), AdapterSpec.parse(16))
    }
    of_a, of_b = warm.values()
    yield Claim("E4", "upper edge of α = 1/r, warm-up 20 − 3", (-1, -0.4), of_a)
    yield Claim("E4", "upper edge of Init[B], warm-up 20 − 3", (-0.3, 0.3), of_b)
    yield Claim("E4", "the first move − the second", (-1.3, -0.1), of_a - of_b, lambda v: abs(v) <= 0.3)
    for name, where, bounds in (("Adam", base, (-0.55, -0.35)), ("SGD", f"{base}-sgd", (-0.15, 0.15))):
        optima = [curves["sft", task, where, AdapterSpec.parse(rank)] for rank in (4, 64)]
        is_refuting = (lambda v: v < -0.3) if name == "SGD" else None
        yield Claim(
            "E6", f"slope of η* on log2 r, {name}", bounds, slope((4, 64), [c.best for c in optima]), is_refuting
        )
    long = {rank: curves[grpo, f"{task}-240-steps", base, AdapterSpec.parse(rank)].best for rank in (4, 64, 256)}
    yield Claim(
        "E7", "slope of η* on log2 r, 240 steps", (-math.inf, -0.4), slope(list(long), list(long.values())),
        lambda v: v >= -0.25,
    )  # fmt: skip
    whole = curves[grpo, task, base, FFT].best
    bf16, mlp = (curves[grpo, task, f"{base}-{kind}", FFT].best for kind in ("bf16", "mlp"))
    yield Claim("E9a", "FFT in bf16 − FFT in fp32", (1, math.inf), bf16 - whole, lambda v: v < 0.3)
    yield Claim("E9b", "FFT of the MLP − FFT", (0.15, 0.75), mlp - whole, lambda v: v < 0 or v > 1)


def full_rate(log2_peft: float | Array, tau: float, n_eff: float, full_share: float) -> Array:
    """log2 of FFT's η whose aligned movement is that of PEFT's init at α = 32/r."""
    eta = np.exp2(log2_peft)
    return np.log2(32 * (eta / (math.sqrt(3) * n_eff) + tau * eta**2) / full_share)


def _outside(bounds: tuple[float, float]) -> Callable[[float], bool]:
    return lambda value: not bounds[0] <= value <= bounds[1]


def _range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    if math.isinf(low):
        return f"≤ {high:g}"
    return f"≥ {low:g}" if math.isinf(high) else f"[{low:g}, {high:g}]"


def claims(folder: Path) -> list[Claim]:
    """All claims of which there are runs.

    Raises:
        UserError: The folder has no such runs.
    """
    files = sorted(folder.glob("e[2-9]-*.csv"))
    if not files or not (folder / "e1-smollm2.csv").exists():
        raise UserError(f"{folder} holds no runs of docs/predictions.md: name docs/results/law.")
    smollm2 = list(probe_claims("SmolLM2", folder / "e1-smollm2.csv", (380, 660), (1.25, 1.5), (0.2, 0.36)))
    qwen = list(probe_claims("Qwen-0.5B", folder / "e1-qwen05.csv", (850, 1500), (1.15, 1.6), (0.12, 0.36)))
    with open(folder / "e1-smollm2.csv", encoding="utf-8", newline="") as stream:
        n_eff = statistics.fmean(float(row["n_eff"]) for row in csv.DictReader(stream))
    probe = {"n_eff": n_eff, "F": smollm2[1].outcome.value, "rho": smollm2[2].outcome.value}
    return [*smollm2, *qwen, *sweep_claims(read_all(files), probe)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--curves", action="store_true", help="the optimum and the edges of each curve, too")
    options = parser.parse_args()
    lines = [["", "quantity", "predicted", "measured [90 %]", "verdict"], ["---"] * 5]
    lines += [claim.cells() for claim in claims(options.folder)]
    if options.curves:
        lines += [[], ["curve", "η*", "lower edge", "upper edge", "grid's end"], ["---"] * 5]
        every = read_all(sorted(options.folder.glob("e[2-9]-*.csv")))
        for (*where, spec), curve in curves_of(every).items():
            best = Estimate(curve.optimum.log2_lr, curve.optimum.draws)
            edges = [str(curve.edge(upper)) for upper in (False, True)]
            lines.append([" ".join([*where, spec.label]), str(best), *edges, curve.optimum.edge])
    print("\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines))


if __name__ == "__main__":
    run_command(main)
