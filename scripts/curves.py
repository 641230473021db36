"""Learning-rate curves over LoRA ranks and full finetuning (FFT), with any model and any library's training loop.

What the scripts of the fields (`finetune_*.py`, issue 10) have in common. Each gives a `Field`: a base model, one
training run, one measurement. From it comes either

    python scripts/finetune_text.py --lr 0.0005 --rank 8         # one run, at a learning rate that is given …
    python scripts/finetune_text.py --lr_from RUN --rank full    # … or from a record, at any rank
    python scripts/finetune_text.py                              # the curves: a search over learning rates at each rank

The curves' CSV, figures, report and LR record are those of `python -m mua_rl.sweep`, and so is the search. Runs that
the CSV has are not repeated: the same command goes on after a stop, and several processes share the work by `--only`.
"""

import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars as disable_dataset_bars
from selection import passes
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from mua_rl.adapter import groups as optim
from mua_rl.adapter.adapters import Adapter, Full, adapter_for
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.adapter.targets import TargetModules, lora_layers
from mua_rl.analysis.measured import Context, sweeps_of
from mua_rl.analysis.report import write_report
from mua_rl.analysis.rows import Row, append, read_all
from mua_rl.errors import Diverged, UserError
from mua_rl.lm import models
from mua_rl.lr.rank import parse_rank
from mua_rl.lr.record import LRRecord, check_learning_rate, package_versions
from mua_rl.lr.spec import AdapterSpec
from mua_rl.run.arguments import AdapterArguments, parse_arguments
from mua_rl.run.folder import MODEL_FOLDER, open_run
from mua_rl.run.learning_rate import Base, resolve_learning_rate
from mua_rl.run.machine import machine
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.closing import make_record, warnings_of
from mua_rl.sweep.facts import PLACEHOLDER, Facts
from mua_rl.sweep.search import HIGHEST, LOWEST, Search, scan_range

HEAD = "head"
IGNORED = -100
"""Label of a token that does not count."""
PRETRAINING_LR = 1e-3

Train = Callable[[nn.Module, Optimizer, LRScheduler, int], None]
"""Trains a model with an optimizer and its schedule, drawing its data by a seed."""


@dataclass(frozen=True)
class Field:
    """A finetuning problem.

    Attributes:
        algorithm: For records and tables, e.g. "sft": learning rates are compared within one.
        task: Of the data.
        base: Name of the base model.
        target_modules: The layers that carry LoRA.
        load: Gives a fresh copy of the base model, the same each time (a new head too), on the device that trains.
        train: Trains a model for `steps` optimizer steps with an optimizer and its schedule (one `step()` of each a
            step), drawing its data by a seed; clips gradients to norm 1.
        measure: The metric, larger being better, and its standard error.
        metric: Its name.
        steps: Optimizer steps of a run.
        batch: Sizes of a step, for the record.
        head: Dotted name of a module without pretrained weights, which LoRA runs train fully beside A and B.
    """

    algorithm: str
    task: str
    base: str
    target_modules: TargetModules
    load: Callable[[], nn.Module]
    train: Train
    measure: Callable[[nn.Module], tuple[float, float]]
    metric: str
    steps: int
    batch: dict[str, Any] = field(default_factory=dict)
    head: str | None = None


@dataclass
class CurveArguments:
    """Which curves; without meaning for one run."""

    ranks: list[str] = field(
        default_factory=lambda: ["4", "16", "full"], metadata={"help": "LoRA ranks, and full for full finetuning."}
    )
    grid: list[float] = field(
        default_factory=lambda: [-13.0, -6.0],
        metadata={"help": "log2 of the first and the last learning rate of the scan; the search goes on past an end."},
    )
    resolution: float = field(default=0.5, metadata={"help": "Octaves between the best learning rate and the next."})
    seeds: int = field(default=3, metadata={"help": "Seeds near the best learning rate."})
    only: list[str] = field(
        default_factory=list, metadata={"help": "Curves to measure now, as in rank=4,16; the report has all."}
    )
    head_lr: float = field(default=1e-3, metadata={"help": "Learning rate of a new head."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run, or of the curves."})


def parse(arguments_type: type, argv: list[str] | None = None) -> tuple[Any, AdapterArguments, CurveArguments, dict]:
    """The command line of a field's script: its own arguments, the adapter's, the curves', and what was given.

    Raises:
        UserError: A flag cannot be used.
    """
    types = (arguments_type, AdapterArguments, CurveArguments)
    (own, adapter_arguments, curves), given = parse_arguments(types, argv)
    if adapter_arguments.start_from or adapter_arguments.resume:
        raise UserError("these scripts have no --start_from and no --resume: curves go on by the same command.")
    if len(curves.grid) != 2 or not LOWEST <= curves.grid[0] < curves.grid[1] <= HIGHEST:
        raise UserError(
            f"--grid takes two exponents between {LOWEST:g} and {HIGHEST:g}, the smaller first, as in -13 -6, not "
            f"{curves.grid}."
        )
    if not 0 < curves.resolution <= 1 or curves.seeds < 1:
        raise UserError("--resolution takes a number up to 1, and --seeds one from 1 on.")
    check_learning_rate(curves.head_lr, "--head_lr")
    return own, adapter_arguments, curves, given


def check_least(arguments: Any, **least: int) -> None:
    """Refuse numbers that are too small.

    Args:
        arguments: A field's own.
        least: The smallest that each of them takes.

    Raises:
        UserError: One is smaller.
    """
    for name, smallest in least.items():
        if getattr(arguments, name) < smallest:
            raise UserError(f"--{name} takes a number from {smallest} on, not {getattr(arguments, name)}.")


def run(problem: Field, adapter_arguments: AdapterArguments, curves: CurveArguments, given: dict) -> None:
    """One run where a learning rate is given, else the curves.

    Raises:
        UserError: Something that was given cannot be used.
        Diverged: The one run left the finite numbers.
    """
    targets = adapter_arguments.adapter(problem.target_modules).target_modules
    problem = replace(problem, target_modules=targets)
    if adapter_arguments.lr is None and adapter_arguments.lr_from is None:
        if adapter_arguments.rank is not None:
            raise UserError("--rank is of one run, which needs --lr or --lr_from; the curves take --ranks.")
        measure_curves(problem, adapter_arguments, curves)
    else:
        run_once(problem, adapter_arguments, curves, given)


def launch(arguments_type: type, problem: Callable[[Any], Field]) -> None:
    """The command line of a field's script.

    Args:
        arguments_type: A dataclass of the field's own arguments.
        problem: From these to the problem.
    """
    silence()
    own, adapter_arguments, curves, given = parse(arguments_type)
    run(problem(own), adapter_arguments, curves, given)


def finetune(
    problem: Field, adapter: Adapter, learning_rate: float, seed: int, head_lr: float
) -> tuple[nn.Module, float, float]:
    """Train a fresh copy of the base by the paper's recipe.

    AdamW, gradients clipped at 1, warm-up over the first 5 % of the steps, cosine decay to a tenth.

    Returns:
        The trained model, its metric and the metric's standard error; NaN where training diverged.
    """
    model = attach(problem, adapter, problem.load(), seed)
    roles = adapter.learning_rates(learning_rate)
    if problem.head is not None:
        roles[HEAD] = head_lr

    def role_of(name: str) -> str:
        return HEAD if problem.head and _is_in(name, problem.head) else optim.role_of(name)

    optimizer = AdamW(optim.param_groups(model, roles, weight_decay=0.01, role_of=role_of), betas=(0.9, 0.999))
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(0.05 * problem.steps), problem.steps, min_lr_rate=0.1
    )
    set_seed(seed)
    try:
        problem.train(model, optimizer, schedule, seed)
    except Diverged:
        return model, math.nan, math.nan
    return model, *problem.measure(model)


def attach(problem: Field, adapter: Adapter, model: nn.Module, seed: int = 0) -> nn.Module:
    """As `Adapter.attach`, with a new head trained in full.

    Raises:
        UserError: The adapter does not fit the model, or is on its new head too.
    """
    model = adapter.attach(model, seed=seed)
    if problem.head is not None:
        if any(_is_in(f"{name}.", problem.head) for name, _ in lora_layers(model)):
            raise UserError(
                f"the new head {problem.head} is trained in full: --target_modules takes the other layers, by name."
            )
        for name, weight in model.named_parameters():
            if _is_in(name, problem.head):
                weight.data = weight.data.float()
                weight.requires_grad_(True)
    return model


def _is_in(name: str, module: str) -> bool:
    return f".{module}." in f".{name}"


def run_once(problem: Field, adapter_arguments: AdapterArguments, curves: CurveArguments, given: dict) -> None:
    """One run with a run folder: settings, versions, what was trained, result and LR record.

    Raises:
        UserError: As `mua_rl.run.learning_rate.resolve_learning_rate`.
        Diverged: The run left the finite numbers.
    """
    adapter = adapter_arguments.adapter(problem.target_modules)
    base_model = problem.load()
    record = record_of(problem, adapter, base_model, curves.head_lr)
    target, base = record.configuration(), Base(problem.base, record.base_fingerprint)
    rate = resolve_learning_rate(adapter_arguments, target, base, problem.algorithm)
    print(f"{problem.base} on {problem.task}, {target}: learning rate {rate.value:.4g}, {rate.reason}")
    if rate.warning:
        print(f"warning: {rate.warning}")
    name = f"{problem.algorithm}-{problem.task}-r{adapter.rank or 'full'}"
    before, _ = problem.measure(base_model)
    attach(problem, adapter, base_model)  # refuses what fits no layer before there is a folder
    del base_model  # a run loads its own
    folder, _ = open_run(None, curves.output_dir, name, given)
    start = time.monotonic()
    model, metric, error = finetune(problem, adapter, rate.value, 0, curves.head_lr)
    seconds = time.monotonic() - start
    result = TrialResult.of_training(metric, error, before, [metric], problem.steps, seconds)
    if not math.isfinite(metric):
        result = TrialResult.of_divergence(before, problem.steps, seconds, f"{problem.metric} is {metric}")
    folder.finish(result, {"metric": problem.metric, "learning_rate": rate.value, "learning_rate_reason": rate.reason})
    if result.is_lost:
        raise Diverged(f"{problem.metric} went from {before:.4g} to {metric:.4g}")
    model.save_pretrained(folder.path / adapter.saved_as)  # type: ignore[operator]
    if problem.head and adapter.rank is not None:
        adapter.merged(model).save_pretrained(folder.path / MODEL_FOLDER)  # with the head
    measured = {"name": problem.metric, "before": before, "after": metric}
    replace(record, learning_rate=rate.value, metric=measured, seeds=[0], note=rate.reason).save(folder.path)
    print(f"{problem.metric}: {before:.4g} before, {metric:.4g} ± {error:.2g} after; in {folder.path}")


def record_of(problem: Field, adapter: Adapter, base_model: nn.Module, head_lr: float) -> LRRecord:
    """An LR record but for the learning rate, what it reached, and its seeds."""
    configuration = adapter.configuration(base_model)
    return LRRecord(
        learning_rate=PLACEHOLDER,
        scheme=configuration.scheme.value,
        rank=configuration.rank,
        alpha=str(configuration.spec.alpha),
        widths=adapter.widths(base_model),
        target_modules=adapter.target_modules,
        algorithm=problem.algorithm,
        task=problem.task,
        base_model=problem.base,
        base_fingerprint=fingerprint(base_model),
        optimizer={"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0},
        schedule={"name": "cosine", "warmup_fraction": 0.05, "final_fraction": 0.1, "steps": problem.steps},
        batch=problem.batch,
        metric={"name": problem.metric},
        seeds=[],
        versions=package_versions(),
        other_learning_rates={HEAD: head_lr} if problem.head else {},
        outputs=configuration.outputs,
    )


def measure_curves(problem: Field, adapter_arguments: AdapterArguments, curves: CurveArguments) -> None:
    """Search each curve's best learning rate, one run after another; then the report and the LR record.

    Raises:
        UserError: A rank does not fit the model, there is none to measure, or the folder cannot be used.
    """
    name = re.sub(r"[^\w.-]+", "-", f"{problem.algorithm}-{problem.task}-{problem.base}")
    out = Path(curves.output_dir or Path("runs") / name)
    csv = out / "sweep.csv"
    scan, step = scan_range(*curves.grid, curves.resolution)
    searches = []
    for rank in dict.fromkeys(map(parse_rank, curves.ranks)):
        spec = AdapterSpec.parse(rank, adapter_arguments.init, adapter_arguments.alpha)
        attach(problem, adapter_for(spec, problem.target_modules), problem.load())  # refuses a rank that does not fit
        searches.append(Search(spec, scan, step, curves.resolution, tuple(range(curves.seeds))))
    wanted = [one for one in searches if passes({"rank": str(one.spec.rank or "full")}, curves.only)]
    if not wanted:
        raise UserError(f"--only {' '.join(curves.only)} leaves none of --ranks {' '.join(curves.ranks)}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made ({error.strerror}): choose another --output_dir.") from None
    outcomes_of(csv, problem)  # refuses what is no CSV of these curves before there is work
    before, _ = problem.measure(problem.load())
    with tqdm(unit="run") as bar:
        while waiting := [trial for one in wanted for trial in one.next_trials(outcomes_of(csv, problem))]:
            bar.total = bar.n + len(waiting)
            outcome = run_trial(problem, waiting[0], before, curves.head_lr)
            append(csv, [Row(problem.algorithm, problem.task, problem.base, waiting[0], outcome, machine())])
            bar.set_postfix_str(f"{waiting[0].spec.label} 2^{waiting[0].log2_lr:g}: {outcome.score:.4g}")
            bar.update()
    close(problem, searches, out, curves.head_lr)


def outcomes_of(csv: Path, problem: Field) -> dict[Trial, TrialResult]:
    """The runs of this problem that a CSV has."""
    return {row.trial: row.result for row in rows_of(csv, problem)}


def rows_of(csv: Path, problem: Field) -> list[Row]:
    """The runs of this problem in a CSV, each once.

    Raises:
        UserError: It cannot be read, or its runs are of another length.
    """
    key = (problem.algorithm, problem.task, problem.base)
    rows = [row for row in (read_all([csv]) if csv.exists() else []) if (row.algorithm, row.task, row.base) == key]
    if other := {row.result.steps for row in rows} - {problem.steps}:
        raise UserError(f"{csv} has runs of {min(other)} steps, not {problem.steps}: choose another --output_dir.")
    return rows


def run_trial(problem: Field, trial: Trial, before: float, head_lr: float) -> TrialResult:
    """One run of a curve."""
    start = time.monotonic()
    _, metric, error = finetune(
        problem, adapter_for(trial.spec, problem.target_modules), trial.learning_rate, trial.seed, head_lr
    )
    seconds = time.monotonic() - start
    if not math.isfinite(metric):
        return TrialResult.of_divergence(before, problem.steps, seconds, "the metric left the finite numbers")
    return TrialResult.of_training(metric, error, before, [metric], problem.steps, seconds)


def close(problem: Field, searches: list[Search], out: Path, head_lr: float) -> None:
    """Report, figures and LR record of what there is, the record of the first curve whose search has ended."""
    template = record_of(problem, Full(problem.target_modules), problem.load(), head_lr)
    context = Context(max(template.widths), template.outputs)
    rows = rows_of(out / "sweep.csv", problem)
    outcomes = {row.trial: row.result for row in rows}
    [sweep] = sweeps_of(rows, contexts=lambda key: context)
    write_report([sweep], out, metrics={problem.algorithm: problem.metric})
    for warning in [warning for one in searches for warning in warnings_of(one, outcomes)]:
        print(f"note: {warning}")
    for search in searches:
        if search.spec in sweep.curves and not search.next_trials(outcomes):
            record = make_record(Facts(template, template, "", True), search, sweep.curves[search.spec], outcomes)
            if record is not None:
                print(f"record: {record.save(out)} ({record.learning_rate:.3g} for r={record.rank or 'full'})")
                break
    print(f"report: {out / 'report.md'}")


@torch.no_grad()
def completion_losses(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the losses of each example's labelled tokens, and their numbers, `(examples,)` both.

    Args:
        model: A language model of transformers.
        batches: Its inputs, and `labels`, -100 where a token does not count.
    """
    model.eval()
    sums, counts = [], []
    for batch in batches:
        inputs = {name: values.to(device()) for name, values in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
            logits = model(**inputs).logits[:, :-1]
        sums.append(cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none").sum(1))
        counts.append((labels != IGNORED).sum(1))
    return torch.cat(sums), torch.cat(counts)


def made_once(name: str, make: Callable[[], Sequence[Any]]) -> Path:
    """The folder of a base model that a script pretrains; the first time, it is made.

    Args:
        name: Of the folder, within `mua_rl.lm.models.cache_folder()`.
        make: Gives what is saved in it, a model and its tokenizer, say.
    """
    folder = models.cache_folder() / name

    def write(made: Path) -> None:
        print(f"pretraining a small model, kept in {folder}", flush=True)
        for part in make():
            part.save_pretrained(made)

    return models.made_once(folder, write)


def pretrain(model: nn.Module, train: Train, steps: int) -> nn.Module:
    """All weights of a small model, by AdamW with a cosine schedule."""
    model.to(device())
    optimizer = AdamW(model.parameters(), PRETRAINING_LR)
    train(model, optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 20, steps), 0)
    return model


def trainer_settings(steps: int, batch_size: int, seed: int) -> dict[str, Any]:
    """What the fields' `TrainingArguments` have in common: a run that is silent and saves nothing."""
    on_gpu = device().type == "cuda"
    return {
        "output_dir": tempfile.gettempdir(),  # there must be one
        "seed": seed,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "max_grad_norm": 1.0,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def silence() -> None:
    """Progress is shown here."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_dataset_bars()


def device() -> torch.device:
    """What trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
