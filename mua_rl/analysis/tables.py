"""The tables of a report: optima, slopes, predictions, and what full finetuning (FFT) loses at a transferred rate."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rich.table import Table
from rich.text import Text

from mua_rl.analysis.measured import Slope, Sweep, distance, slope
from mua_rl.analysis.optimum import Optimum
from mua_rl.analysis.predictions import HIT, Comparison, calibrated, leave_one_out
from mua_rl.analysis.regret import Regret, SmallSweep, regrets, small_sweeps
from mua_rl.analysis.transfer_rules import HABITS, NO_RULE, Rule, shipped
from mua_rl.lr.spec import FFT, AdapterSpec

NOTE = "note"
FITTED = "theory × (r/m)^c, c fitted on the other tasks"
PERFECT = "a perfect rule, given the optima's noise"


@dataclass(frozen=True)
class ReportTable:
    """A table for the file and for the terminal; the first column and notes are text, the others are figures."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """With its title above."""
        rule = ["---:" if self._is_figure(column) else "---" for column in self.columns]
        cells = [self.columns, rule, *([cell.replace("|", r"\|") for cell in line] for line in self.lines)]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in cells)])

    def rich(self) -> Table:
        """For a console."""
        table = Table(title=Text(self.title), title_justify="left")
        for column in self.columns:
            table.add_column(column, justify="right" if self._is_figure(column) else "left")
        for line in self.lines:
            table.add_row(*(Text(cell) for cell in line))  # intervals in brackets are no markup
        return table

    def _is_figure(self, column: str) -> bool:
        return column not in (self.columns[0], NOTE)


def optimum_table(sweep: Sweep, shown: str) -> ReportTable:
    """Each curve's optimum, by what the curves show."""
    lines = []
    for curve, measured in sweep.curves.items():
        optimum = measured.optimum
        lines.append(
            [
                curve.label,
                str(len(measured.points)),
                _interval(optimum.log2_lr, optimum.low, optimum.high),
                f"{2**optimum.log2_lr:.2g}",
                f"{_number(optimum.value)} ± {_number(optimum.error)}",
                f"{optimum.plateau[0]:.1f} to {optimum.plateau[1]:.1f}",
                _interval(*distance(measured, sweep.fft), sign="+") if sweep.fft and curve != FFT else "–",
                _remark_on(optimum),
            ]
        )
    lines += [[curve.label, *["–"] * 6, reason] for curve, reason in sweep.without.items()]
    before = next((f"; {_number(m.before)} before training" for m in sweep.curves.values()), "")
    return ReportTable(
        f"{sweep}: optima by {shown}{before}",
        ["curve", "runs", "log2 η*", "η*", "value there", "as good", "octaves from FFT", NOTE],
        lines,
    )


def _remark_on(optimum: Optimum) -> str:
    if optimum.edge:
        return f"at the {optimum.edge} end: extend the grid"
    if optimum.low == optimum.log2_lrs[0] or optimum.high == optimum.log2_lrs[-1]:
        return "the interval reaches the grid's end"
    return ""


def slope_table(sweeps: Sequence[Sweep]) -> ReportTable | None:
    """d log2 η* / d log2 r, of each sweep and of all sweeps of an algorithm together."""
    groups = [([sweep], str(sweep)) for sweep in sweeps]
    for algorithm, of_algorithm in _by_algorithm(sweeps).items():
        if len(of_algorithm) > 1:
            groups.append((of_algorithm, f"all of {algorithm}"))
    lines = []
    for group, name in groups:
        for scheme in dict.fromkeys(scheme for sweep in group for scheme in sweep.schemes()):
            result = slope(group, scheme)
            if result.ranks:
                lines.append([f"{name}, {AdapterSpec(1, *scheme).scheme_label}", *_slope_cells(result)])
    columns = ["scheme", "ranks", "slope", "theory", "theory in the interval"]
    return ReportTable("Slope of log2 η* on log2 r", columns, lines) if lines else None


def _slope_cells(result: Slope) -> list[str]:
    ranks = ", ".join(str(rank) for rank in result.ranks)
    if result.theory is None:
        return [ranks, _interval(result.value, result.low, result.high, "+"), "–", "–"]
    inside = "yes" if result.low <= result.theory <= result.high else "no"
    return [ranks, _interval(result.value, result.low, result.high, "+"), f"{result.theory:+.2f}", inside]


def prediction_table(sweeps: Sequence[Sweep], rules: Sequence[Rule]) -> ReportTable | None:
    """How often each rule predicts one measured optimum from another: within half an octave, and as good as the best.

    The latter where the target's value there cannot be told from its best (`Optimum.plateau`). Noise widens these
    intervals and makes that easy: their median width stands beside, and what no rule achieves (`NO_RULE`) in a row.
    Hits between two schemes are of both directions together: a ratio is off by the same octaves in either.

    A rule's stated interval is from the other tasks of algorithms with the same rule in `mua_rl.lr.transfer`; that of
    the fitted rule from all other tasks, as its exponent is. Below an algorithm's rules stands the ceiling of all its
    pairs: how often a perfect rule is expected to succeed (`Comparison.perfect_hit`, `Comparison.perfect_as_good`).
    """
    rules = [*rules, NO_RULE]
    by_rule: dict[str, list[Comparison]] = {rule.name: [] for rule in rules}
    for default in dict.fromkeys(shipped(sweep.algorithm) for sweep in sweeps):
        alike = [sweep for sweep in sweeps if shipped(sweep.algorithm) == default]
        for rule in [*rules, default]:
            by_rule.setdefault(rule.name, []).extend(leave_one_out(alike, partial(calibrated, rule)))
    by_rule[FITTED] = leave_one_out(sweeps)
    by_algorithm = {
        algorithm: {name: [t for t in tests if t.sweep.algorithm == algorithm] for name, tests in by_rule.items()}
        for algorithm in dict.fromkeys(sweep.algorithm for sweep in sweeps)
    }
    kinds = list(
        dict.fromkeys(test.kind for by_name in by_algorithm.values() for tests in by_name.values() for test in tests)
    )
    lines = []
    for algorithm, by_name in by_algorithm.items():
        lines += [[f"{algorithm}: {name}", *_hit_cells(tests, kinds)] for name, tests in by_name.items() if tests]
        if pairs := {(test.source, test.target): test for tests in by_name.values() for test in tests}:
            lines.append([f"{algorithm}: {PERFECT}", *_perfect_cells(list(pairs.values()), kinds)])
    columns = ["rule", *kinds, "all", "mean error", "as good as the best", "its median width", "in the stated interval"]
    title = f"Predictions within {HIT:g} octave of the measured optimum, and those as good as it"
    return ReportTable(title, columns, lines) if lines else None


def _hit_cells(tests: Sequence[Comparison], kinds: Sequence[str]) -> list[str]:
    covered = [test.is_covered for test in tests if test.is_covered is not None]
    return [
        *(_share([test.is_hit for test in some]) for some in _by_kind(tests, kinds)),
        _share([test.is_hit for test in tests]),
        f"{statistics.fmean(abs(test.error) for test in tests):.2f}",
        _share([test.is_as_good for test in tests]),
        _median_width(tests),
        _share(covered),
    ]


def _perfect_cells(tests: Sequence[Comparison], kinds: Sequence[str]) -> list[str]:
    chances = [[test.perfect_hit for test in some] for some in [*_by_kind(tests, kinds), tests]]
    error = statistics.fmean(test.scatter for test in tests) * math.sqrt(2 / math.pi)
    return [
        *(f"{statistics.fmean(some):.0%}" if some else "–" for some in chances),
        f"{error:.2f}",
        f"{statistics.fmean(test.perfect_as_good for test in tests):.0%}",
        _median_width(tests),
        "–",
    ]


def _median_width(tests: Sequence[Comparison]) -> str:
    plateaus = [test.target.optimum.plateau for test in tests]
    return f"{statistics.median(high - low for low, high in plateaus):.1f}"


def _by_kind(tests: Sequence[Comparison], kinds: Sequence[str]) -> list[list[Comparison]]:
    return [[test for test in tests if test.kind == kind] for kind in kinds]


def regret_table(sweep: Sweep, rules: Sequence[Rule]) -> ReportTable | None:
    """What FFT loses at each transferred learning rate."""
    lines = []
    for rule in rules:
        for regret in regrets([sweep], rule):
            source = regret.source.spec if regret.source else None
            lines.append(
                [
                    f"{rule.name}{f', from {source.label}' if source else ''}",
                    f"{regret.log2_lr:.2f}",
                    "–" if math.isnan(regret.share) else f"{'≥ ' * regret.is_bound}{regret.share:.1%}",
                    f"{regret.steps:.0%}",
                    f"{regret.seconds:.0%}",
                    _remark(regret),
                ]
            )
    columns = ["rule", "log2 η", "lost of FFT's gain", "cost in steps", "in seconds", NOTE]
    return ReportTable(f"{sweep}: FFT at a transferred LR; cost against FFT's sweep", columns, lines) if lines else None


def _remark(regret: Regret) -> str:
    if regret.is_bound:
        return "outside FFT's grid"
    notes = ["as good as FFT's best within noise"] if regret.within_noise else []
    if regret.source and regret.source.optimum.edge:
        notes.append("the source's optimum is at an edge of its grid")
    return "; ".join(notes)


def regret_summary(sweeps: Sequence[Sweep], rules: Sequence[Rule]) -> ReportTable | None:
    """Regret and cost of each rule over all sweeps of an algorithm, and how often FFT is as good as its best."""
    lines = []
    for algorithm, of_algorithm in _by_algorithm(sweeps).items():
        for rule in [*rules, *HABITS]:
            of_rule = regrets(of_algorithm, rule)
            if cases := [regret for regret in of_rule if not math.isnan(regret.share)]:
                shares = [regret.share for regret in cases]
                least = "≥ " * any(regret.is_bound for regret in cases)
                lines.append(
                    [
                        f"{algorithm}: {rule.name}",
                        str(len(cases)),
                        f"{least}{statistics.median(shares):.1%}",
                        f"{least}{max(shares):.1%}",
                        _share([regret.share <= 0.03 and not regret.is_bound for regret in cases]),
                        _share([regret.share <= 0.1 and not regret.is_bound for regret in cases]),
                        _share([regret.within_noise for regret in cases]),
                        f"{statistics.fmean(regret.steps for regret in cases):.0%}",
                        f"{statistics.fmean(regret.seconds for regret in cases):.0%}",
                    ]
                )
    columns = [
        "rule", "cases", "median loss", "worst", "within 3 %", "within 10 %", "as good as the best",
        "mean cost in steps", "in seconds",
    ]  # fmt: skip
    return ReportTable("FFT's loss at a transferred LR, of its gain", columns, lines) if lines else None


_LOSSES = ("sweeps", "cost in steps", "in seconds", "median loss", "within 3 %", "within 10 %")


def small_sweep_table(sweeps: Sequence[Sweep]) -> ReportTable | None:
    """What smaller sweeps would have done for FFT, beside sweeps of FFT itself that are as small."""
    lines = []
    for algorithm, of_algorithm in _by_algorithm(sweeps).items():
        most = max((len({seed for _, _, seed in sweep.fft.points}) for sweep in of_algorithm if sweep.fft), default=0)
        for seeds, step in [(1, 1.0), *((2**k, 0.0) for k in range(most.bit_length()) if 2**k < most)]:
            small_ones = [small for sweep in of_algorithm for small in small_sweeps(sweep, seeds, step)]
            loras = [small for small in small_ones if small.source.spec != FFT]
            ffts = [small for small in small_ones if small.source.spec == FFT]
            if loras:
                name = f"{algorithm}, {seeds} of {most} seeds{', whole octaves' if step else ''}"
                lines.append([name, *_loss_cells(loras), *_loss_cells(ffts)])
    columns = ["sweep", *(f"{of}: {what}" for of in ("LoRA", "FFT") for what in _LOSSES)]
    title = "FFT's loss at the LR that a smaller sweep gives, by mua_rl's rule; cost against FFT's whole sweep"
    return ReportTable(title, columns, lines) if lines else None


def _loss_cells(small_ones: Sequence[SmallSweep]) -> list[str]:
    """`_LOSSES`."""
    if not small_ones:
        return ["–"] * len(_LOSSES)
    return [
        str(len(small_ones)),
        f"{statistics.fmean(small.steps for small in small_ones):.0%}",
        f"{statistics.fmean(small.seconds for small in small_ones):.0%}",
        f"{statistics.median(small.share for small in small_ones):.1%}",
        *(_share([small.share <= most for small in small_ones]) for most in (0.03, 0.1)),
    ]


def _by_algorithm(sweeps: Sequence[Sweep]) -> dict[str, list[Sweep]]:
    return {name: [s for s in sweeps if s.algorithm == name] for name in dict.fromkeys(s.algorithm for s in sweeps)}


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    value, low, high = (round(number, 2) + 0.0 for number in (value, low, high))  # + 0.0: no minus zero
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits)}/{len(hits)} ({sum(hits) / len(hits):.0%})" if hits else "–"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
