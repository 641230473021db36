"""A sweep from request to record, with any number of processes that share its study."""

import math
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape

from mua_rl.analysis.report import FILE_NAME as REPORT
from mua_rl.errors import NoRate, UserError, without_password
from mua_rl.files import write_whole
from mua_rl.lr.recipe import Recipe
from mua_rl.lr.record import LRRecord
from mua_rl.lr.transfer import gives_full_finetuning
from mua_rl.run.commands import command, full_finetuning, other_ranks
from mua_rl.run.folder import CONFIG, RunFolder, open_run
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import Request, differences
from mua_rl.sweep.backend import choose_backends
from mua_rl.sweep.closing import CSV, make_record, rows_of, warnings_of, write_csv, write_tables
from mua_rl.sweep.display import Display
from mua_rl.sweep.facts import Facts, find_facts
from mua_rl.sweep.search import Search
from mua_rl.sweep.study import Study
from mua_rl.sweep.work import work_together

STUDY = "study.journal"


def open_folder(request: Request) -> tuple[Path, bool]:
    """The folder of the sweep, and whether it is new: not where `--output_dir` names a sweep's, which goes on.

    Raises:
        UserError: It is of something else, or of a sweep whose runs, which would be read as this one's, had other
            settings.
    """
    output_dir = request.settings.get("output_dir")
    if output_dir is not None and (Path(output_dir) / CONFIG).exists():
        known = RunFolder(output_dir).settings()
        if "algo" not in known:
            raise UserError(f"{output_dir} is the folder of something else than a sweep: choose another --output_dir.")
        if differing := differences(request.comparable(known), request.comparable()):
            raise UserError(
                f"the sweep in {output_dir} has runs with other settings ({differing}): choose another --output_dir, "
                "or give the settings it has."
            )
        return Path(output_dir), False
    name = f"sweep-{request.sweep.algo}-{request.task.rpartition(':')[2]}"
    return open_run(None, output_dir, name, request.settings)[0].path, True


def keep_settings(request: Request, folder: Path) -> None:
    """Make this command's settings those that `--resume` goes on with: it may have added ranks or seeds."""
    settings = {**request.settings, "output_dir": str(folder.resolve())}
    write_whole(folder / CONFIG, without_password(yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)))


def open_study(request: Request, folder: Path) -> tuple[Study, Facts]:
    """The study of the sweep, with what it knows of the base.

    Raises:
        UserError: It has other settings, or the trainer cannot use what was given.
    """
    name = (
        request.sweep.study_name
        or " ".join([request.sweep.algo, request.task, str(request.settings.get("model", ""))]).strip()
    )
    study = Study.open(request.sweep.study or str(folder / STUDY), name, request.comparable())
    return study, Facts.from_dict(study.facts(lambda: asdict(find_facts(request))))


def sweep(request: Request, console: Console) -> Path:
    """A sweep from request to record, or this process's part of one.

    Returns:
        The sweep's folder.

    Raises:
        UserError: Something that was given cannot be used, or a run failed.
        NoRate: The sweep has ended and found no learning rate.
    """
    deadline = time.monotonic() + (request.sweep.time_limit or math.inf)
    folder, is_new = open_folder(request)
    try:
        study, facts = open_study(request, folder)
    except UserError:
        if is_new:  # nothing is left of a sweep that cannot be run
            shutil.rmtree(folder)
        raise
    keep_settings(request, folder)
    searches = [facts.search(curve, request) for curve in request.specs]
    announce(request, facts, len(searches), folder, console)
    display, stop = Display(study, console), threading.Event()

    def say(text: str) -> None:
        console.print(text, highlight=False)

    def write_down(trial: Trial, outcome: TrialResult) -> None:
        write_csv(folder / CSV, rows_of(facts.recipe, study.outcomes(), study.machines()))
        display.on_outcome(trial, outcome)

    backends = choose_backends(request, facts.obstacle, folder, stop, display.on_step, say)
    with display.progress:
        complete = work_together(study, searches, backends, write_down, deadline, stop)
    record = conclude(facts.recipe, searches, study, folder, console, complete)
    if record is not None:
        announce_record(record, request, folder, console)
    elif complete:
        raise NoRate(f"the sweep found no learning rate for {first_lora(searches).spec.label}: see {folder / REPORT}.")
    else:
        again = escape(command("sweep", {"resume": str(folder)}))
        console.print(f"Time is up: {again} goes on.", soft_wrap=True)
    return folder


def announce(request: Request, facts: Facts, curves: int, folder: Path, console: Console) -> None:
    """Say what is about to be done."""
    source = f"{facts.source_name} ({facts.source.learning_rate:.4g} for {facts.source.configuration()})"
    console.print(
        f"[bold]{request.task}[/] with {facts.recipe.base_model}: {curves} "
        f"curve{'s'[: curves > 1]}, learning rates in steps of {request.sweep.resolution:g} "
        f"octave{'s'[: request.sweep.resolution != 1]}, {request.sweep.seeds} seed{'s'[: request.sweep.seeds > 1]} "
        f"near the optimum\nthe search begins around {source}{'' if facts.known else ', a guess'}\n"
        f"folder {folder}{f', study {without_password(request.sweep.study)}' if request.sweep.study else ''}",
        highlight=False,
        soft_wrap=True,
    )


def first_lora(searches: Sequence[Search]) -> Search:
    """The search whose optimum the LR record is of: the first LoRA's, else the first."""
    return next((search for search in searches if search.spec.rank is not None), searches[0])


def conclude(
    recipe: Recipe, searches: Sequence[Search], study: Study, folder: Path, console: Console, complete: bool
) -> LRRecord | None:
    """Write CSV and report, warn of what may be wrong, and write the LR record of a sweep that is complete.

    Returns:
        The record, if there is one.
    """
    outcomes = study.outcomes()
    rows = rows_of(recipe, outcomes, study.machines())
    write_csv(folder / CSV, rows)
    measured, tables = write_tables(folder, recipe, rows)
    if tables:
        console.print(tables[0].rich())
    for warning in [warning for search in searches for warning in warnings_of(search, outcomes)]:
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True, highlight=False)
    if measured is None or not complete:
        return None
    search = first_lora(searches)
    record = make_record(recipe, search, measured.curves.get(search.spec), outcomes)
    if record is not None:
        record.save(folder)
    return record


def announce_record(record: LRRecord, request: Request, folder: Path, console: Console) -> None:
    """Say what was found, and what to run with it."""
    settings = {name: value for name, value in request.settings.items() if name in {*request.trainer_settings, "seed"}}
    onward = f"\nfull finetuning at it: {full_finetuning(request.sweep.algo, settings, folder)}"
    console.print(
        f"LR record: {record.learning_rate:.4g} for {record.configuration()}\n"
        f"figures and tables: {folder / REPORT}; every run: {folder / CSV}\n"
        f"the learning rate at other ranks: {other_ranks(folder)}"
        f"{onward if gives_full_finetuning(record) else ''}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
