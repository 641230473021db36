"""`python -m mua_rl.analysis.report CSV [CSV …] --out FOLDER`: what finished sweeps say, as tables and figures.

For every algorithm, task and base policy in the CSVs: each curve's optimum, its slope over ranks beside the theory's,
its distance from full finetuning (FFT), how well transfer rules predict it, and what FFT loses at a transferred
learning rate. The same CSVs give the same report.
"""

import argparse
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mua_rl.analysis.figure import learning_rate_curves, optimum_against_rank
from mua_rl.analysis.measured import (
    VALUES,
    Context,
    Key,
    Slope,
    Sweep,
    distance,
    slope,
    sweeps_of,
)
from mua_rl.analysis.movements import read_movements
from mua_rl.analysis.optimum import COVERAGE, Optimum
from mua_rl.analysis.predictions import HIT, Comparison, calibrated, leave_one_out
from mua_rl.analysis.regret import Regret, SmallSweep, regrets, small_sweeps
from mua_rl.analysis.rows import read_all
from mua_rl.analysis.transfer_rules import HABITS, MOVEMENT_RULES, NO_RULE, TRANSFER_RULES, Rule, shipped
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.lr.spec import FFT, AdapterSpec

FILE_NAME = "report.md"
METRICS = {"grpo": "held-out accuracy", "ppo": "held-out return"}
"""What an algorithm's metric is called."""
NOTE = "note"
EPILOG = """examples:
  python -m mua_rl.analysis.report runs/my-sweep/sweep.csv --out runs/my-sweep/report
  python -m mua_rl.analysis.report grpo.csv ppo.csv --out report --sizes 'SmolLM2*=1536,576' '*-w256-*=256,256'"""
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


def write_report(
    sweeps: Sequence[Sweep],
    out: Path,
    value: str = "score",
    rules: Sequence[Rule] = (),
    metrics: Mapping[str, str] = METRICS,
) -> list:
    """Write `report.md` and its figures into a folder.

    Args:
        sweeps: From `sweeps_of`.
        value: What the curves show, one of `VALUES`.
        rules: Transfer rules to hold against the others.
        metrics: What the metric is called, by algorithm.

    Returns:
        Its tables.

    Raises:
        UserError: The folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out takes a folder, and {out} cannot be one: {error}.") from None
    all_rules = [*TRANSFER_RULES, *rules]
    tables, parts = [], ["# What the sweep says", _introduction(sweeps, value)]
    for sweep, slug in zip(sweeps, _slugs(sweeps), strict=True):
        parts.append(f"## {sweep}")
        if sweep.curves:
            learning_rate_curves(sweep, out / f"{slug}-curves.png", label(sweep, value, metrics))
            parts.append(f"![metric against learning rate]({slug}-curves.png)")
        if sweep.schemes():
            optimum_against_rank(sweep, out / f"{slug}-optimum.png")
            parts.append(f"![optimum against rank]({slug}-optimum.png)")
        tables.append(optimum_table(sweep, label(sweep, value, metrics)))
        parts.append(tables[-1].markdown())
        if details := regret_table(sweep, [*all_rules, *HABITS]):
            tables.append(details)
            parts.append(details.markdown())
    parts.append("## All together")
    for table in (
        slope_table(sweeps),
        prediction_table(sweeps, all_rules),
        regret_summary(sweeps, all_rules),
        small_sweep_table(sweeps),
    ):
        if table:
            tables.append(table)
            parts.append(table.markdown())
    (out / FILE_NAME).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return tables


def label(sweep: Sweep, value: str, metrics: Mapping[str, str] = METRICS) -> str:
    """What a curve shows."""
    if value == "score":
        return metrics.get(sweep.algorithm, "held-out metric")
    kind = "return" if sweep.algorithm == "ppo" else "reward"
    return {"reward_mean": f"mean training {kind}", "reward_last": f"training {kind} at the end"}[value]


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
    for algorithm in dict.fromkeys(sweep.algorithm for sweep in sweeps):
        of_algorithm = [sweep for sweep in sweeps if sweep.algorithm == algorithm]
        if len(of_algorithm) > 1:
            groups.append((of_algorithm, f"all of {algorithm}"))
    lines = []
    for group, name in groups:
        for scheme in dict.fromkeys(scheme for sweep in group for scheme in sweep.schemes()):
            found = slope(group, scheme)
            if found.ranks:
                lines.append([f"{name}, {AdapterSpec(1, *scheme).scheme_label}", *_slope_cells(found)])
    columns = ["scheme", "ranks", "slope", "theory", "theory in the interval"]
    return ReportTable("Slope of log2 η* on log2 r", columns, lines) if lines else None


def _slope_cells(found: Slope) -> list[str]:
    ranks = ", ".join(str(rank) for rank in found.ranks)
    if found.theory is None:
        return [ranks, _interval(found.value, found.low, found.high, "+"), "–", "–"]
    inside = "yes" if found.low <= found.theory <= found.high else "no"
    return [ranks, _interval(found.value, found.low, found.high, "+"), f"{found.theory:+.2f}", inside]


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
    found = {
        algorithm: {name: [t for t in tests if t.sweep.algorithm == algorithm] for name, tests in by_rule.items()}
        for algorithm in dict.fromkeys(sweep.algorithm for sweep in sweeps)
    }
    kinds = list(dict.fromkeys(test.kind for by_name in found.values() for tests in by_name.values() for test in tests))
    lines = []
    for algorithm, by_name in found.items():
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
    for algorithm in dict.fromkeys(sweep.algorithm for sweep in sweeps):
        for rule in [*rules, *HABITS]:
            of_rule = regrets([sweep for sweep in sweeps if sweep.algorithm == algorithm], rule)
            if found := [regret for regret in of_rule if not math.isnan(regret.share)]:
                shares = [regret.share for regret in found]
                least = "≥ " * any(regret.is_bound for regret in found)
                lines.append(
                    [
                        f"{algorithm}: {rule.name}",
                        str(len(found)),
                        f"{least}{statistics.median(shares):.1%}",
                        f"{least}{max(shares):.1%}",
                        _share([regret.share <= 0.03 and not regret.is_bound for regret in found]),
                        _share([regret.share <= 0.1 and not regret.is_bound for regret in found]),
                        _share([regret.within_noise for regret in found]),
                        f"{statistics.fmean(regret.steps for regret in found):.0%}",
                        f"{statistics.fmean(regret.seconds for regret in found):.0%}",
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
    for algorithm in dict.fromkeys(sweep.algorithm for sweep in sweeps):
        of_algorithm = [sweep for sweep in sweeps if sweep.algorithm == algorithm]
        most = max((len({seed for _, _, seed in sweep.fft.points}) for sweep in of_algorithm if sweep.fft), default=0)
        for seeds, step in [(1, 1.0), *((2**k, 0.0) for k in range(most.bit_length()) if 2**k < most)]:
            found = [small for sweep in of_algorithm for small in small_sweeps(sweep, seeds, step)]
            loras = [small for small in found if small.source.spec != FFT]
            ffts = [small for small in found if small.source.spec == FFT]
            if loras:
                name = f"{algorithm}, {seeds} of {most} seeds{', whole octaves' if step else ''}"
                lines.append([name, *_loss_cells(loras), *_loss_cells(ffts)])
    columns = ["sweep", *(f"{of}: {what}" for of in ("LoRA", "FFT") for what in _LOSSES)]
    title = "FFT's loss at the LR that a smaller sweep gives, by mua_rl's rule; cost against FFT's whole sweep"
    return ReportTable(title, columns, lines) if lines else None


def _loss_cells(found: Sequence[SmallSweep]) -> list[str]:
    """`_LOSSES`."""
    if not found:
        return ["–"] * len(_LOSSES)
    return [
        str(len(found)),
        f"{statistics.fmean(small.steps for small in found):.0%}",
        f"{statistics.fmean(small.seconds for small in found):.0%}",
        f"{statistics.median(small.share for small in found):.1%}",
        *(_share([small.share <= most for small in found]) for most in (0.03, 0.1)),
    ]


def _introduction(sweeps: Sequence[Sweep], value: str) -> str:
    text = (
        "Optima are those of a fit over all seeds (`mua_rl.analysis.optimum`); intervals in brackets hold "
        f"{COVERAGE:.0%}. “As good” are the learning rates whose value cannot be told from the best. A gain is the "
        "value less the held-out metric before training. Optima at an edge of their grid are left out of slopes and "
        "predictions. A prediction's stated interval is what nine in ten of the rule's predictions kept to on other "
        "tasks of algorithms with the same rule, for the fitted rule on all other tasks (– where there is none); that "
        "of the optimum it is held against joins it. A perfect rule knows how far apart optima are found on average "
        "over seeds and misses by how far the measured ones are off that: its row says how often it is expected to "
        "hit. Where tops are flat a miss costs little: a prediction is as good as the best within the target's “as "
        "good” interval, whose median width in octaves stands beside. Noise widens it; the share to beat is that of no "
        "rule."
    )
    if unknown := sorted({sweep.base for sweep in sweeps if sweep.context.outputs is None and sweep.fft}):
        text += f" Without `--sizes` of {', '.join(unknown)}, rules that need m say nothing of FFT there."
    return text


_LONGEST_SLUG = 100
"""Letters: file systems take some 250, and a task or a base may be a path of many folders."""


def _slugs(sweeps: Sequence[Sweep]) -> list[str]:
    """A file name's beginning for each sweep."""
    slugs: list[str] = []
    for sweep in sweeps:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", str(sweep))[:_LONGEST_SLUG].strip("-.")
        slugs.append(slug if slug not in slugs else f"{slug}-{len(slugs)}")
    return slugs


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    value, low, high = (round(number, 2) + 0.0 for number in (value, low, high))  # + 0.0: no minus zero
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits)}/{len(hits)} ({sum(hits) / len(hits):.0%})" if hits else "–"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"


def parse_sizes(texts: Sequence[str]) -> Callable[[Key], Context]:
    """From `PATTERN=n,m` of `--sizes` to the contexts of `sweeps_of`; the first pattern that fits a base counts.

    Raises:
        UserError: It is none.
    """
    sizes = []
    for text in texts:
        match = re.fullmatch(r"(.+)=(\d+),(\d+)", text)
        if not match or not (int(match[2]) and int(match[3])):
            raise UserError(
                f"--sizes takes a base policy's name, its largest fan-in n and its fan-out m, as in "
                f"'SmolLM2*=1536,576', not {text!r}."
            )
        sizes.append((match[1], Context(int(match[2]), int(match[3]))))
    return lambda key: next((context for pattern, context in sizes if fnmatch(key[2], pattern)), Context())


def parse_metrics(texts: Sequence[str]) -> dict[str, str]:
    """`METRICS`, and those of `ALGORITHM=NAME` of `--metric`.

    Raises:
        UserError: It is none.
    """
    if wrong := [text for text in texts if not re.fullmatch(r"[^=]+=.+", text)]:
        raise UserError(f"--metric takes an algorithm and a name, as in sft='token accuracy', not {wrong[0]!r}.")
    return METRICS | dict(text.split("=", 1) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mua_rl.analysis.report",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("csv", type=Path, nargs="+", help="of finished sweeps")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--value", choices=VALUES, default="score", help="what is compared (default: the held-out score)"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=[], metavar="BASE=n,m",
        help="largest fan-in n and fan-out m of the trained layers, for base policies by name\n"
        "(* stands for anything); needed to predict FFT from a rank by more than the bare theory",
    )  # fmt: skip
    parser.add_argument(
        "--movement", type=Path, nargs="+", default=[], metavar="CSV",
        help="movements from scripts/measure_movement.py, for the rules that use them",
    )  # fmt: skip
    parser.add_argument(
        "--metric", nargs="+", default=[], metavar="ALGORITHM=NAME", help="what an algorithm's metric is called"
    )
    args = parser.parse_args()
    sizes, movements = parse_sizes(args.sizes), read_movements(args.movement)
    sweeps = sweeps_of(
        read_all(args.csv), args.value, lambda key: replace(sizes(key), movement=movements.get(key[1:], {}))
    )
    console = Console()
    for table in write_report(
        sweeps, args.out, args.value, MOVEMENT_RULES if movements else (), parse_metrics(args.metric)
    ):
        console.print(table.rich())
    print(f"written to {args.out / FILE_NAME}")


if __name__ == "__main__":
    run_command(main)
