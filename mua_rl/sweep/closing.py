"""The end of a sweep: its CSV, its report, the LR record, and what may be wrong with it."""

import os
import statistics
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mua_rl.analysis import rows
from mua_rl.analysis.measured import Context, Measured, Sweep, sweeps_of
from mua_rl.analysis.optimum import COVERAGE
from mua_rl.analysis.report import ReportTable, write_report
from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord, package_versions
from mua_rl.run.trial import Status, Trial, TrialResult
from mua_rl.sweep.facts import Facts
from mua_rl.sweep.search import Search

CSV = "sweep.csv"


def rows_of(
    task: str, facts: Facts, outcomes: Mapping[Trial, TrialResult], machines: Mapping[Trial, str]
) -> list[rows.Row]:
    """The runs of a study as lines of a CSV."""
    template = facts.template
    return [
        rows.Row(template.algorithm, task, template.base_model, trial, outcome, machines.get(trial, ""))
        for trial, outcome in outcomes.items()
    ]


def write_csv(path: Path, lines: Sequence[rows.Row]) -> None:
    """Write all runs of a study to a CSV, whole or not at all: the study has them all, whoever ran them."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    rows.append(scratch, lines)
    if lines:
        os.replace(scratch, path)


def write_tables(folder: Path, facts: Facts, lines: Sequence[rows.Row]) -> tuple[Sweep | None, list[ReportTable]]:
    """Write the report and its figures; what was measured (`None` where no curve has an optimum), and the tables."""
    context = Context(width=max(facts.template.widths), outputs=facts.template.outputs)
    try:
        sweeps = sweeps_of(lines, contexts=lambda *_: context)
    except UserError:
        return None, []
    return sweeps[0], write_report(sweeps, folder)


def warnings_of(search: Search, outcomes: Mapping[Trial, TrialResult]) -> list[str]:
    """What the user should know of a curve beside its optimum."""
    mine = {trial: outcome for trial, outcome in outcomes.items() if trial.spec == search.spec}
    found = [search.verdict(outcomes)] if mine else ["no run has ended yet"]
    if lost := sorted({trial.log2_lr for trial, outcome in mine.items() if outcome.is_lost}):
        found.append("diverged, or got worse, at " + ", ".join(f"2^{lr:g}" for lr in lost))
    if ended := sorted({trial.log2_lr for trial, outcome in mine.items() if outcome.status is Status.STOPPED}):
        found.append("stopped early at " + ", ".join(f"2^{lr:g}" for lr in ended))
    return [f"{search.spec.label}: {warning}" for warning in found if warning]


def make_record(
    facts: Facts, search: Search, measured: Measured, outcomes: Mapping[Trial, TrialResult]
) -> LRRecord | None:
    """The LR record of a finished search: the fitted optimum as it is; `None` where no run got better than the base.

    Its metric is the mean over the runs at the learning rate next to the optimum.
    """
    if not search.has_learnt(outcomes):
        return None
    good = {trial: o for trial, o in outcomes.items() if trial.spec == search.spec and o.is_good}
    optimum = measured.optimum
    nearest = min((trial.log2_lr for trial in good), key=lambda lr: abs(lr - optimum.log2_lr))
    beside = [outcome for trial, outcome in good.items() if trial.log2_lr == nearest]
    template, learning_rate = facts.record_of(search.spec), 2.0**optimum.log2_lr
    seeds, tried = sorted({trial.seed for trial in good}), {log2_lr for log2_lr, _, _ in measured.points}
    schedule = template.schedule
    if schedule.get("steps") == -1:  # as many as the epochs made
        schedule = {**schedule, "steps": beside[0].steps}
    note = (
        f"a sweep: optimum of a fit to {len(measured.points)} runs at {len(tried)} learning rates with "
        f"up to {len(seeds)} seed{'s'[: len(seeds) > 1]}; log2 of it {optimum.log2_lr:.2f}, {COVERAGE:.0%} interval "
        f"{optimum.low:.2f} to {optimum.high:.2f}"
    )
    warning = search.verdict(outcomes)
    return replace(
        template,
        learning_rate=learning_rate,
        other_learning_rates={
            role: learning_rate if rate == template.learning_rate else rate  # a head without a rate of its own
            for role, rate in template.other_learning_rates.items()
        },
        metric={
            **template.metric,
            "before": statistics.fmean(outcome.before for outcome in beside),
            "after": statistics.fmean(outcome.score for outcome in beside),
        },
        schedule=schedule,
        seeds=seeds,
        versions=package_versions(),
        note=f"{note}; {warning}" if warning else note,
    )
