"""The end of a sweep: its CSV, the LR record, and what the user is shown and told to do next."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mua_rl.errors import UserError
from mua_rl.record import LRRecord, package_versions
from mua_rl.sweep import rows
from mua_rl.sweep.arm import Arm, Outcome
from mua_rl.sweep.base import Curve, Facts
from mua_rl.sweep.optimum import COVERAGE, Optimum, estimate_optimum
from mua_rl.sweep.search import Search, is_good, runs_of

CSV = "sweep.csv"


def write_csv(
    path: Path, task: str, facts: Facts, outcomes: Mapping[Arm, Outcome], machines: Mapping[Arm, str]
) -> None:
    """Write all runs of a study to a CSV (`mua_rl.sweep.rows`), whole or not at all."""
    template = facts.template
    lines = [
        rows.Row(template.algorithm, task, template.base_model, arm, outcome, machines.get(arm, ""))
        for arm, outcome in outcomes.items()
    ]
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    rows.append(scratch, lines)
    if lines:
        os.replace(scratch, path)


def optimum_of(curve: Curve, outcomes: Mapping[Arm, Outcome]) -> Optimum | None:
    """The fit of a curve; `None` where too few of its runs trained."""
    try:
        return estimate_optimum(runs_of(outcomes, curve))
    except UserError:
        return None


def make_record(facts: Facts, search: Search, outcomes: Mapping[Arm, Outcome]) -> LRRecord | None:
    """The LR record that a finished search gives: the fitted optimum, as it is; `None` where nothing has learnt.

    Its metric is the mean over the runs at the learning rate next to the optimum.
    """
    optimum = optimum_of(search.curve, outcomes)
    mine = {arm: outcome for arm, outcome in outcomes.items() if arm.curve == search.curve}
    warning = search.verdict(outcomes)
    if optimum is None or (warning and not optimum.edge):
        return None
    good = {arm: outcome for arm, outcome in mine.items() if is_good([outcome])}
    nearest = min((arm.log2_lr for arm in good), key=lambda lr: abs(lr - optimum.log2_lr))
    beside = [outcome for arm, outcome in good.items() if arm.log2_lr == nearest]
    seeds = sorted({arm.seed for arm in good})
    template = facts.record_of(search.curve)
    learning_rate = 2.0**optimum.log2_lr
    others = {
        role: learning_rate if rate == template.learning_rate else rate  # a head that had no rate of its own
        for role, rate in template.other_learning_rates.items()
    }
    tried, seed_count = {arm.log2_lr for arm in mine}, f"{len(seeds)} seed{'s'[: len(seeds) > 1]}"
    note = (
        f"mua_rl.sweep: optimum of a fit to {len(mine)} runs at {len(tried)} learning rates with up to {seed_count}; "
        f"log2 of it {optimum.log2_lr:.2f}, {COVERAGE:.0%} interval {optimum.low:.2f} to {optimum.high:.2f}"
    )
    return replace(
        template,
        learning_rate=learning_rate,
        other_learning_rates=others,
        metric={
            **template.metric,
            "before": _mean([outcome.before for outcome in beside]),
            "after": _mean([outcome.metric for outcome in beside]),
        },
        seeds=seeds,
        versions=package_versions(),
        note=note + (f"; {warning}" if warning else ""),
    )


def show(searches: list[Search], outcomes: Mapping[Arm, Outcome], facts: Facts, console: Console) -> None:
    """The closing table: each curve's optimum with its interval, and what is wrong with it."""
    metric = facts.template.metric["name"]
    table = Table(title=f"best learning rates ({COVERAGE:.0%} intervals)", title_justify="left")
    for heading in ("", "log2 of the LR", "LR", metric, "runs", "remarks"):
        table.add_column(heading, overflow="fold")
    for search in searches:
        mine = {arm: outcome for arm, outcome in outcomes.items() if arm.curve == search.curve}
        optimum = optimum_of(search.curve, outcomes)
        remarks = [search.verdict(outcomes)] if mine else ["not run yet"]
        if optimum is not None and optimum.edge and not remarks[0]:
            remarks.append(f"the fit still rises at the {optimum.edge} end")
        if lost := sorted({arm.log2_lr for arm, outcome in mine.items() if outcome.diverged}):
            remarks.append("diverged at " + ", ".join(f"2^{lr:g}" for lr in lost))
        if ended := sum(bool(outcome.stopped) and not outcome.diverged for outcome in mine.values()):
            remarks.append(f"{ended} stopped early")
        name = str(facts.record_of(search.curve).configuration())
        if optimum is None:
            table.add_row(name, "–", "–", "–", str(len(mine)), "; ".join(filter(None, remarks)))
            continue
        table.add_row(
            name,
            f"{optimum.log2_lr:.2f} ({optimum.low:.2f} to {optimum.high:.2f})",
            f"{2**optimum.log2_lr:.3g}",
            f"{optimum.value:.3f} ± {optimum.error:.3f}" if abs(optimum.value) < 10 else f"{optimum.value:.1f}",
            str(len(mine)),
            "; ".join(filter(None, remarks)),
        )
    console.print(table)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
