"""What a coordinate check measured and what follows: a CSV, slopes with verdicts, a table, a figure."""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby, zip_longest
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mua_rl.lr.rules import Configuration, best_lr_order
from mua_rl.lr.spec import AdapterSpec, AlphaRule, Scheme
from mua_rl.probes.feature_updates import DELTA_1, DELTA_2, DELTA_3, DELTA_Z, DELTA_Z_B

TRANSFERRED, FIXED = "transferred", "fixed"
TOLERANCE = 0.25
"""Slopes nearer to zero are flat: half of 1/2, the smallest exponent of the theory that is not zero."""
COLOURS = {DELTA_1: "tab:blue", DELTA_2: "tab:orange", DELTA_3: "tab:green", DELTA_Z_B: "tab:red", DELTA_Z: "tab:red"}


@dataclass(frozen=True)
class Row:
    """One size of one layer at one step: a line of the CSV.

    Attributes:
        axis: What was varied: "rank" or "width".
        scheme: "Init[A]", "Init[B]" or "FFT".
        alpha: The multiplier's rule as text; "" for FFT.
        rank: r; `None` for FFT.
        width: n, the largest fan-in among the adapted layers.
        lr_rule: "transferred", scaled by the rules from the first point, or "fixed", the first point's for all.
        learning_rate: η.
        seed: The seed of the adapter's start, of the batch and, where it is random, of the model.
        step, layer, kind, quantity, size: As in `mua_rl.probes.feature_updates.FeatureUpdate`.
    """

    axis: str
    scheme: str
    alpha: str
    rank: int | None
    width: int
    lr_rule: str
    learning_rate: float
    seed: int
    step: int
    layer: str
    kind: str
    quantity: str
    size: float

    @property
    def x(self) -> int | None:
        """Where it stands on the axis; `None` for full finetuning among ranks."""
        return self.rank if self.axis == "rank" else self.width

    def configuration(self) -> Configuration:
        """What the rules need to know."""
        alpha = AlphaRule.parse(self.alpha) if self.alpha else AlphaRule()
        return Configuration(AdapterSpec(self.rank, Scheme(self.scheme), alpha), self.width)


@dataclass(frozen=True)
class Line:
    """One quantity of one scheme along the axis, at the last step: a line of the table and of the figure.

    Attributes:
        axis, scheme, alpha, lr_rule, quantity: As in `Row`.
        sizes: log2 of the size at each point, the mean over layers and seeds.
        slope: The slope of log2 size on log2 rank or log2 width; NaN with fewer than two points.
        layer_slopes: The smallest and the largest slope of a single layer.
        theory: The slope of the theory's leading order, for learning rates at the edge of stability.
        verdict: "flat", "grows", "vanishes", "zero", "diverged", or "" for a single point.
    """

    axis: str
    scheme: str
    alpha: str
    lr_rule: str
    quantity: str
    sizes: dict[int | None, float]
    slope: float
    layer_slopes: tuple[float, float]
    theory: float
    verdict: str

    @property
    def title(self) -> str:
        """Scheme and multiplier."""
        return f"{self.scheme}, α = {self.alpha}" if self.alpha else self.scheme

    @property
    def should_be_flat(self) -> bool:
        """Whether the theory promises that this very line is flat: the whole update, at the transferred LR."""
        return self.lr_rule == TRANSFERRED and self.quantity in (DELTA_Z, DELTA_Z_B)

    @property
    def failed(self) -> bool:
        """Whether it should be flat and is not."""
        return self.should_be_flat and self.verdict not in ("flat", "")


def theory_order(quantity: str, configuration: Configuration, learning_rate: float) -> float:
    """Size of a quantity once both A and B have moved, to leading order, without the constants (`mua_rl.lr.rules`)."""
    n, r, alpha, eta = configuration.width, configuration.rank, configuration.multiplier, learning_rate
    if r is None or alpha is None:
        return eta * n
    both_moved = alpha * eta**2 * n * r
    random_times_step = alpha * eta * (r if configuration.scheme is Scheme.INIT_A else n)
    with_random_factor = DELTA_2 if configuration.scheme is Scheme.INIT_A else DELTA_1
    return max(random_times_step, both_moved) if quantity in (with_random_factor, DELTA_Z_B) else both_moved


def lines(rows: Sequence[Row], tolerance: float = TOLERANCE) -> list[Line]:
    """Slopes and verdicts at the last step. Embeddings are left out: the rules do not speak of them."""
    last = max((row.step for row in rows), default=0)
    groups: dict[tuple[str, str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.step == last and row.kind != "Embedding":
            groups[row.axis, row.scheme, row.alpha, row.lr_rule, row.quantity].append(row)
    return [_line(key, group, tolerance) for key, group in groups.items()]


def _line(key: tuple[str, str, str, str, str], rows: list[Row], tolerance: float) -> Line:
    sizes = _mean_log2(rows)
    by_layer: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_layer[row.layer].append(row)
    of_layers = [_slope(_mean_log2(group)) for group in by_layer.values()]
    slope, theory = _slope(sizes), _slope(_theory(rows))
    return Line(*key, sizes, slope, (min(of_layers), max(of_layers)), theory, _verdict(sizes, slope, tolerance))


def _mean_log2(rows: Iterable[Row]) -> dict[int | None, float]:
    """log2 size at each point of the axis."""
    values: dict[int | None, list[float]] = defaultdict(list)
    for row in rows:
        values[row.x].append(math.log2(row.size) if row.size > 0 else math.nan if row.size != 0 else -math.inf)
    return {x: statistics.fmean(group) for x, group in values.items()}


def _theory(rows: list[Row]) -> dict[int | None, float]:
    """log2 of the theory's order at each point, as if the first point's LR were the largest stable one."""
    first = rows[0]
    edge = best_lr_order(first.configuration()) / first.learning_rate
    return {row.x: math.log2(theory_order(row.quantity, row.configuration(), edge * row.learning_rate)) for row in rows}


def _slope(sizes: dict[int | None, float]) -> float:
    points = [(math.log2(x), size) for x, size in sizes.items() if x is not None]
    if len(points) < 2 or not all(math.isfinite(size) for _, size in points):
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _verdict(sizes: dict[int | None, float], slope: float, tolerance: float) -> str:
    if any(math.isnan(size) or size == math.inf for size in sizes.values()):
        return "diverged"
    if any(size == -math.inf for size in sizes.values()):
        return "zero"
    if math.isnan(slope):
        return ""
    return "flat" if abs(slope) <= tolerance else "grows" if slope > 0 else "vanishes"


def table(measured: Sequence[Line], axis: str) -> Table:
    """All lines of one axis; those that the theory wants flat in bold, in red where they are not."""
    shown = [line for line in measured if line.axis == axis]
    xs = sorted({x for line in shown for x in line.sizes}, key=lambda x: (x is None, x))
    columns = Table(
        title=f"log2 of the size of a step's feature update, against the {axis}", title_justify="left", box=SIMPLE_HEAD
    )
    columns.add_column("scheme and LR", no_wrap=True)
    columns.add_column("")
    for heading in (*(_point(x, axis) for x in xs), "slope", "by layer", "theory", "verdict"):
        columns.add_column(heading, justify="right", no_wrap=True)
    for (title, rule), group in groupby(shown, lambda line: (line.title, line.lr_rule)):
        members = list(group)
        labels = [title, f"  LR {rule}"] if len(members) > 1 else [f"{title}, LR {rule}"]
        for line, label in zip_longest(members, labels, fillvalue=""):
            assert isinstance(line, Line)
            low, high = line.layer_slopes
            slopes = ("", "", "")
            if math.isfinite(line.slope):
                slopes = (_signed(line.slope), f"{_signed(low)} … {_signed(high)}", _signed(line.theory))
            columns.add_row(
                str(label),
                line.quantity,
                *(_size(line.sizes.get(x)) for x in xs),
                *slopes,
                line.verdict,
                style="bold red" if line.failed else "bold" if line.should_be_flat else None,
            )
        columns.add_section()
    return columns


def _size(log2_size: float | None) -> str:
    return "" if log2_size is None else "0" if log2_size == -math.inf else f"{log2_size:.2f}"


def _signed(slope: float) -> str:
    return f"{round(slope, 2) + 0.0:+.2f}"  # without a minus before zero


def _point(x: int | None, axis: str) -> str:
    return "full" if x is None else f"r={x}" if axis == "rank" else f"n={x}"


def figure(measured: Sequence[Line], axis: str) -> Figure:
    """Size against rank or width, both logarithmic: a column of panels per scheme, a row per LR rule.

    Among ranks, FFT is a dashed line in every panel.
    """
    shown = [line for line in measured if line.axis == axis and None not in line.sizes]
    of_full = [line.sizes[None] for line in measured if line.axis == axis and None in line.sizes]
    full = [2**size for size in of_full if math.isfinite(size)]
    titles = list(dict.fromkeys(line.title for line in shown)) or ["FFT"]
    rules = list(dict.fromkeys(line.lr_rule for line in shown)) or [TRANSFERRED]
    drawing = Figure(figsize=(1 + 3 * len(titles), 1 + 2.6 * len(rules)), layout="constrained")
    grid = drawing.subplots(len(rules), len(titles), sharey=True, squeeze=False)
    for row, rule in zip(grid, rules, strict=True):
        for axes, title in zip(row, titles, strict=True):
            members = [line for line in shown if (line.title, line.lr_rule) == (title, rule)]
            if shown and not members:  # its fixed LR is the transferred one
                axes.set_visible(False)
                continue
            axes.set_xscale("log", base=2)  # first, for of no data at all matplotlib makes no logarithmic axis later
            axes.set_yscale("log", base=2)
            for line in members:
                points = {x: 2**size for x, size in line.sizes.items() if x is not None and math.isfinite(size)}
                width = 2.5 if line.quantity in (DELTA_Z, DELTA_Z_B) else 1.2
                style = {"color": COLOURS[line.quantity], "linewidth": width, "marker": "o"}
                axes.plot(points.keys(), points.values(), label=line.quantity, **style)
            for size in full:
                axes.axhline(size, color="black", linestyle="--", linewidth=1, label="ΔZ of FFT")
            axes.set_title(f"{title}\nLR {rule}", fontsize=9)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    drawing.supxlabel("rank r" if axis == "rank" else "width n (largest fan-in)")
    drawing.supylabel("feature update of a step (root mean square)")
    return drawing


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """All rows, every step and every layer."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
