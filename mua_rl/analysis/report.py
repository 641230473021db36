"""`python -m mua_rl.analysis.report CSV [CSV …] --out FOLDER`: what finished sweeps say, as tables and figures.

For every algorithm, task and base policy in the CSVs: each curve's optimum, its slope over ranks beside the theory's,
its distance from full finetuning (FFT), how well transfer rules predict it, and what FFT loses at a transferred
learning rate. The same CSVs give the same report.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from mua_rl.analysis.figure import learning_rate_curves, optimum_against_rank
from mua_rl.analysis.measured import VALUES, Context, Key, Sweep, sweeps_of
from mua_rl.analysis.movements import read_movements
from mua_rl.analysis.optimum import COVERAGE
from mua_rl.analysis.rows import read_all
from mua_rl.analysis.tables import (
    ReportTable,
    optimum_table,
    prediction_table,
    regret_summary,
    regret_table,
    slope_table,
    small_sweep_table,
)
from mua_rl.analysis.transfer_rules import HABITS, MOVEMENT_RULES, TRANSFER_RULES, Rule
from mua_rl.errors import UserError
from mua_rl.exits import run_command

FILE_NAME = "report.md"
METRICS = {"grpo": "held-out accuracy", "ppo": "held-out return"}
"""What an algorithm's metric is called."""
EPILOG = """examples:
  python -m mua_rl.analysis.report runs/my-sweep/sweep.csv --out runs/my-sweep/report
  python -m mua_rl.analysis.report grpo.csv ppo.csv --out report --sizes 'SmolLM2*=1536,576' '*-w256-*=256,256'"""


def write_report(
    sweeps: Sequence[Sweep],
    out: Path,
    value: str = "score",
    rules: Sequence[Rule] = (),
    metrics: Mapping[str, str] = METRICS,
) -> list[ReportTable]:
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
