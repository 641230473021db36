"""The figures of a sweep: metric against learning rate, one curve per rank, and the optimum against the rank."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from mua_rl.analysis.measured import Measured, Sweep, slope
from mua_rl.lr.spec import AdapterSpec

_DPI = 120
_Style = dict[str, object]


def learning_rate_curves(sweep: Sweep, path: Path, label: str) -> None:
    """The paper's figure: the metric against log2 η, a panel for each scheme, with FFT in all of them.

    Lines are the fits (smooth near the top), faint dots runs, crosses at the bottom runs that diverged or were stopped.
    Dots on the curves are the optima, with their intervals in lanes at the top; hollow where one lies at an edge of its
    grid.

    Args:
        path: Where the PNG goes.
        label: Of the metric.
    """
    schemes: dict[Any, list[Measured]] = dict(sweep.schemes()) or {None: []}
    figure = Figure(figsize=(1.5 + 3.7 * len(schemes), 4.2), layout="constrained")
    panels = figure.subplots(1, len(schemes), sharex=True, sharey=True, squeeze=False)[0]
    ranks = sorted({m.spec.rank for line in schemes.values() for m in line if m.spec.rank is not None})
    styles = _styles(ranks)
    drawn = list(sweep.curves.values())
    bottom, top = _range(drawn)
    lane, lanes = 0.03 * (top - bottom), len(ranks) + 1
    for axes, (scheme, line) in zip(panels, schemes.items(), strict=True):
        for number, measured in enumerate([*line, *([sweep.fft] if sweep.fft else [])], 2):
            style = styles[measured.spec.rank]
            _draw_curve(axes, measured, style, top + (lanes + 3 - number) * lane, bottom - number * lane)
        axes.set(title=AdapterSpec(1, *scheme).scheme_label if scheme else "", xlabel="log2 η")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(label)
    panels[0].set_ylim(bottom - (lanes + 2) * lane, top + (lanes + 2) * lane)
    panels[0].xaxis.set_major_locator(_octaves(drawn))
    handles = [Line2D([], [], **styles[rank], label=f"r = {rank}") for rank in ranks]  # type: ignore[arg-type]
    if sweep.fft:
        handles.append(Line2D([], [], **styles[None], label="FFT"))  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(str(sweep), fontsize="medium")
    figure.savefig(path, dpi=_DPI)


def optimum_against_rank(sweep: Sweep, path: Path) -> None:
    """log2 η* against log2 r: a colour for each scheme, the theory's slope dashed through its points, FFT as a band.

    Args:
        path: Where the PNG goes.
    """
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ranks = sorted({m.spec.rank for line in sweep.schemes().values() for m in line if m.spec.rank is not None})
    if sweep.fft:
        optimum = sweep.fft.optimum
        axes.axhspan(optimum.low, optimum.high, color="black", alpha=0.08, lw=0)
        axes.axhline(optimum.log2_lr, color="black", ls="--", label="FFT")
    for number, (scheme, line) in enumerate(sweep.schemes().items()):
        colour = f"C{number}"
        shift = 2 ** (0.06 * (number - (len(sweep.schemes()) - 1) / 2))  # side by side, not over one another
        for measured in line:
            axes.errorbar(
                (measured.spec.rank or 1) * shift, measured.optimum.log2_lr, yerr=_bar(measured), fmt="o", capsize=3,
                color=colour, mfc="white" if measured.optimum.edge else colour,
            )  # fmt: skip
        trend = slope([sweep], scheme)
        name = AdapterSpec(1, *scheme).scheme_label
        if trend.theory is not None:
            known = [m for m in line if not m.optimum.edge]
            middle = np.mean([m.optimum.log2_lr - trend.theory * math.log2(m.spec.rank or 1) for m in known])
            axes.plot(ranks, middle + trend.theory * np.log2(ranks), color=colour, ls=":")
            name += f": slope {trend.value:+.2f} [{trend.low:+.2f}, {trend.high:+.2f}], theory {trend.theory:+.2f}"
        axes.plot([], [], "o:", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_title(str(sweep), fontsize="medium")
    axes.set(xlabel="rank r", ylabel="log2 of the best η")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=_DPI)


def _draw_curve(axes: Axes, measured: Measured, style: _Style, upper: float, lower: float) -> None:
    """A curve, with its optimum's interval at the height `upper` and its lost runs at `lower`."""
    optimum, colour = measured.optimum, style["color"]
    lrs, values = (np.array([point[i] for point in measured.points]) for i in (0, 1))
    lost = ~np.isfinite(values)
    axes.plot(lrs[~lost], values[~lost], ".", ms=5, color=colour, alpha=0.35, mew=0)
    axes.plot(lrs[lost], np.full(lost.sum(), lower), "x", ms=4, color=colour)
    shown = optimum.log2_lrs <= optimum.largest
    axes.plot(optimum.log2_lrs[shown], optimum.values[shown], **style)  # type: ignore[arg-type]
    marker = {"fmt": "o", "color": colour, "mfc": "white" if optimum.edge else colour, "zorder": 3}
    axes.errorbar(optimum.log2_lr, optimum.value, ms=6, **marker)  # type: ignore[arg-type]
    axes.errorbar(optimum.log2_lr, upper, xerr=_bar(measured), ms=4, capsize=2, **marker)  # type: ignore[arg-type]


def _bar(measured: Measured) -> list[list[float]]:
    """The interval, as matplotlib takes it."""
    optimum = measured.optimum
    return [[max(0.0, optimum.log2_lr - optimum.low)], [max(0.0, optimum.high - optimum.log2_lr)]]


def _styles(ranks: Sequence[int]) -> dict[int | None, _Style]:
    """Colour by rank, light to dark; FFT dashed black."""
    colours = colormaps["viridis_r"](np.linspace(0.15, 0.9, max(len(ranks), 2)))
    styles: dict[int | None, _Style] = {rank: {"color": colours[i]} for i, rank in enumerate(ranks)}
    return {**styles, None: {"color": "black", "ls": "--"}}


def _range(curves: Sequence[Measured]) -> tuple[float, float]:
    values = np.array([value for m in curves for _, value, _ in m.points if math.isfinite(value)])
    low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1.0


def _octaves(curves: Sequence[Measured]) -> MultipleLocator:
    """Ticks at whole octaves, about ten at most."""
    span = max(m.optimum.log2_lrs[-1] for m in curves) - min(m.optimum.log2_lrs[0] for m in curves)
    return MultipleLocator(max(1, math.ceil(span / 10)))
