"""The end of a sweep: its CSV, its report, the LR record, and what may be wrong with it."""

import os
import statistics
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from mua_rl.analysis.measured import Context, Measured, Sweep, sweeps_of
from mua_rl.analysis.optimum import COVERAGE
from mua_rl.analysis.report import write_report
from mua_rl.analysis.rows import SweepRow, append
from mua_rl.analysis.tables import ReportTable
from mua_rl.lr.recipe import Recipe
from mua_rl.lr.record import LRRecord
from mua_rl.run.trial import Status, Trial, TrialResult
from mua_rl.sweep.search import Search

CSV = "sweep.csv"


def rows_of(recipe: Recipe, outcomes: Mapping[Trial, TrialResult], machines: Mapping[Trial, str]) -> list[SweepRow]:
    """The runs of a study as rows of a CSV."""
    key = recipe.algorithm, recipe.task, recipe.base_model
    return [SweepRow(*key, trial, outcome, machines.get(trial, "")) for trial, outcome in outcomes.items()]


def write_csv(path: Path, rows: Sequence[SweepRow]) -> None:
    """Write all runs of a study to a CSV, whole or not at all: the study has them all, whoever ran them."""
    if rows:
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        append(scratch, rows)
        os.replace(scratch, path)


def write_tables(folder: Path, recipe: Recipe, rows: Sequence[SweepRow]) -> tuple[Sweep | None, list[ReportTable]]:
    """Write the report and its figures; what was measured (`None`: no run has ended), and the report's tables."""
    if not rows:
        return None, []
    context = Context(width=max(recipe.widths), outputs=recipe.outputs)
    sweeps = sweeps_of(rows, contexts=lambda _: context, needs_optimum=False)
    return sweeps[0], write_report(sweeps, folder, metrics={recipe.algorithm: recipe.score})


def warnings_of(search: Search, outcomes: Mapping[Trial, TrialResult]) -> list[str]:
    """What the user should know of a curve beside its optimum."""
    own = {trial: outcome for trial, outcome in outcomes.items() if trial.spec == search.spec}
    lost = {trial.log2_lr for trial, outcome in own.items() if outcome.is_lost}
    ended = {trial.log2_lr for trial, outcome in own.items() if outcome.status is Status.STOPPED}
    warnings = [search.verdict(outcomes) if own else "no run has ended yet"]
    for what, rates in (("diverged, or got worse, at", lost), ("stopped early at", ended)):
        if rates:
            warnings.append(f"{what} " + ", ".join(f"2^{rate:g}" for rate in sorted(rates)))
    return [f"{search.spec.label}: {warning}" for warning in warnings if warning]


def make_record(
    recipe: Recipe, search: Search, measured: Measured | None, outcomes: Mapping[Trial, TrialResult]
) -> LRRecord | None:
    """The LR record of a finished search: the fitted optimum as it is; `None` where no run got better than the base.

    Its metric is the mean over the runs at the learning rate next to the optimum.

    Args:
        recipe: How the runs were made.
        search: Which curve.
        measured: The curve with its optimum; `None`: it has none.
        outcomes: What all trials reached.
    """
    if measured is None or not search.has_learnt(outcomes):
        return None
    good = {trial: result for trial, result in outcomes.items() if trial.spec == search.spec and result.is_good}
    optimum = measured.optimum
    nearest = min((trial.log2_lr for trial in good), key=lambda rate: abs(rate - optimum.log2_lr))
    beside = [result for trial, result in good.items() if trial.log2_lr == nearest]
    seeds, rates = sorted({trial.seed for trial in good}), {log2_lr for log2_lr, _, _ in measured.points}
    note = (
        f"a sweep: optimum of a fit to {len(measured.points)} runs at {len(rates)} learning rates with "
        f"up to {len(seeds)} seed{'s'[: len(seeds) > 1]}; log2 of it {optimum.log2_lr:.2f}, {COVERAGE:.0%} interval "
        f"{optimum.low:.2f} to {optimum.high:.2f}"
    )
    warning = search.verdict(outcomes)
    return recipe.record(
        search.spec,
        2.0**optimum.log2_lr,
        (statistics.fmean(result.before for result in beside), statistics.fmean(result.score for result in beside)),
        seeds,
        "sweep",
        f"{note}; {warning}" if warning else note,
        beside[0].steps,
    )
