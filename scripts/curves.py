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
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars as disable_dataset_bars
from rich.markup import escape
from selection import passes
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup, set_seed
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from mua_rl.adapter import groups as optim
from mua_rl.adapter.adapters import Adapter, Full, adapter_for
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.adapter.targets import TargetModules, lora_layers
from mua_rl.analysis.report import FILE_NAME as REPORT
from mua_rl.errors import Diverged, NoRate, UserError
from mua_rl.lm import models
from mua_rl.lr.rank import parse_rank
from mua_rl.lr.recipe import Recipe
from mua_rl.lr.record import check_learning_rate
from mua_rl.lr.spec import AdapterSpec
from mua_rl.run.arguments import AdapterArguments, parse_arguments
from mua_rl.run.folder import MODEL_FOLDER, RunFolder, open_run
from mua_rl.run.learning_rate import Base, resolve_learning_rate
from mua_rl.run.life import Measurement, Names, announce, live, raise_if_worse
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.closing import CSV, make_record, warnings_of, write_tables
from mua_rl.sweep.csv_study import CSVStudy
from mua_rl.sweep.search import HIGHEST, LOWEST, Search, scan_range
from mua_rl.sweep.work import work

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


def train(
    problem: Field, adapter: Adapter, model: nn.Module, learning_rate: float, seed: int, head_lr: float
) -> LRScheduler:
    """Train a model that has its adapter by the paper's recipe; gives the schedule, whose steps are those taken.

    AdamW, gradients clipped at 1, warm-up over the first 5 % of the steps, cosine decay to a tenth.

    Raises:
        Diverged: Training left the finite numbers.
    """
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
    problem.train(model, optimizer, schedule, seed)
    return schedule


def finetune(
    problem: Field, adapter: Adapter, learning_rate: float, seed: int, head_lr: float
) -> tuple[nn.Module, float, float]:
    """Train a fresh copy of the base.

    Returns:
        The trained model, its metric and the metric's standard error; NaN where training diverged.
    """
    model = attach(problem, adapter, problem.load(), seed)
    try:
        train(problem, adapter, model, learning_rate, seed, head_lr)
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


class FieldLearner:
    """One run of a field as `mua_rl.run.life` sees it.

    Args:
        problem: What is trained on what.
        adapter: The adapter, which a fresh copy of the base gets.
        adapter_arguments: Where the learning rate comes from.
        head_lr: The learning rate of a new head.

    Raises:
        UserError: The adapter does not fit, or nothing gives a learning rate.
    """

    seed = 0

    def __init__(self, problem: Field, adapter: Adapter, adapter_arguments: AdapterArguments, head_lr: float) -> None:
        self.problem, self.adapter, self.head_lr, self.steps = problem, adapter, head_lr, 0
        base_model = problem.load()
        self.recipe, configuration = recipe_of(problem, adapter, base_model, head_lr), adapter.configuration(base_model)
        base = Base(problem.base, self.recipe.base_fingerprint)
        self.rate = resolve_learning_rate(adapter_arguments, configuration, base, problem.algorithm)
        self.spec = configuration.spec
        self.title = f"{problem.task}, {configuration}, lr {self.rate.value:.3g}"
        self.names = Names(
            problem.algorithm, problem.metric, "held_out/metric", "training reward", "reward", "optimizer step", False
        )
        self.after: tuple[float, float] | None = None
        self.model = attach(problem, adapter, base_model, self.seed)

    def train(self, checkpoint: Path | None, on_begin: Callable[[], None]) -> None:
        """See `Learner.train`."""
        on_begin()
        schedule = train(self.problem, self.adapter, self.model, self.rate.value, self.seed, self.head_lr)
        self.steps = schedule.last_epoch
        self.after = self.problem.measure(self.model)
        if not math.isfinite(self.after[0]):
            raise Diverged(f"{self.problem.metric} is {self.after[0]}")

    def measure(self) -> Measurement:
        """See `Learner.measure`."""
        score, error = self.after or self.problem.measure(self.model)
        return Measurement(score, error, f"{score:.4g} ± {error:.2g}")

    def save(self, run: RunFolder) -> None:
        """See `Learner.save`; a model with a new head is written whole beside its adapter, with the head."""
        self.model.save_pretrained(run.path / self.adapter.saved_as)  # type: ignore[operator]
        if self.problem.head and self.adapter.rank is not None:
            self.adapter.merged(self.model).save_pretrained(run.path / MODEL_FOLDER)

    def unscored(self, metrics: list[dict[str, Any]]) -> None:
        """See `Learner.unscored`: supervised training has no reward."""

    def remarks(self) -> list[str]:
        """See `Learner.remarks`."""
        return []

    def doubt(self) -> str:
        """See `Learner.doubt`."""
        return ""


def run_once(problem: Field, adapter_arguments: AdapterArguments, curves: CurveArguments, given: dict) -> None:
    """One run with a run folder: settings, versions, what was trained, result and LR record.

    Raises:
        UserError: As `mua_rl.run.learning_rate.resolve_learning_rate`.
        Diverged: The run left the finite numbers.
        PolicyWorse: The model ended worse than it began.
    """
    adapter = adapter_arguments.adapter(problem.target_modules)
    learner = FieldLearner(problem, adapter, adapter_arguments, curves.head_lr)
    name = f"{problem.algorithm}-{problem.task}-r{adapter.rank or 'full'}"
    folder, _ = open_run(None, curves.output_dir, name, given)
    announce(
        folder,
        f"[bold]{escape(problem.task)}[/] with {escape(problem.base)}, {escape(str(learner.spec))}",
        learner.rate,
    )
    live(folder, learner)
    raise_if_worse(folder)


def recipe_of(problem: Field, adapter: Adapter, base_model: nn.Module, head_lr: float) -> Recipe:
    """How the runs of a problem are made."""
    return Recipe(
        algorithm=problem.algorithm,
        task=problem.task,
        base_model=problem.base,
        base_fingerprint=fingerprint(base_model),
        widths=adapter.widths(base_model),
        outputs=adapter.configuration(base_model).outputs,
        target_modules=adapter.target_modules,
        optimizer={"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0},
        schedule={"name": "cosine", "warmup_fraction": 0.05, "final_fraction": 0.1, "steps": problem.steps},
        batch=problem.batch,
        score=problem.metric,
        other_learning_rates={HEAD: head_lr} if problem.head else {},
    )


class FieldBackend:
    """Runs the trials of a field one after another, as a sweep's backend; arguments as `run_trial`."""

    at_once = 1

    def __init__(self, problem: Field, before: float, head_lr: float) -> None:
        self.problem, self.before, self.head_lr = problem, before, head_lr

    def group(self, trial: Trial) -> Trial:
        """See `Backend.group`."""
        return trial

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `Backend.run`."""
        return [run_trial(self.problem, trial, self.before, self.head_lr) for trial in trials]


def measure_curves(problem: Field, adapter_arguments: AdapterArguments, curves: CurveArguments) -> None:
    """Search each curve's best learning rate by a sweep's loop; then the report and the LR record.

    Raises:
        UserError: A rank does not fit the model, there is none to measure, or the folder cannot be used.
        NoRate: All searches have ended, and found no learning rate.
    """
    name = re.sub(r"[^\w.-]+", "-", f"{problem.algorithm}-{problem.task}-{problem.base}")
    out = Path(curves.output_dir or Path("runs") / name)
    scan, step = scan_range(*curves.grid, curves.resolution)
    searches = []
    for rank in dict.fromkeys(map(parse_rank, curves.ranks)):
        spec = AdapterSpec.parse(rank, adapter_arguments.init, adapter_arguments.alpha)
        attach(problem, adapter_for(spec, problem.target_modules), problem.load())  # refuses a rank that does not fit
        searches.append(Search(spec, scan, step, curves.resolution, tuple(range(curves.seeds))))
    wanted = [search for search in searches if passes({"rank": str(search.spec.rank or "full")}, curves.only)]
    if not wanted:
        raise UserError(f"--only {' '.join(curves.only)} leaves none of --ranks {' '.join(curves.ranks)}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made ({error.strerror}): choose another --output_dir.") from None
    study = study_of(problem, out)
    base_model = problem.load()
    recipe = recipe_of(problem, Full(problem.target_modules), base_model, curves.head_lr)
    before, _ = problem.measure(base_model)
    del base_model

    def show(trial: Trial, result: TrialResult) -> None:
        print(f"{trial.spec.label} 2^{trial.log2_lr:g} seed {trial.seed}: {result.score:.4g}", flush=True)

    work(study, wanted, FieldBackend(problem, before, curves.head_lr), show, math.inf, threading.Event())
    close(recipe, searches, study, out)


def study_of(problem: Field, out: Path) -> CSVStudy:
    """The study in a folder's CSV.

    Raises:
        UserError: The CSV cannot be read, or its runs are of another length.
    """
    study = CSVStudy(out / CSV, (problem.algorithm, problem.task, problem.base))
    if others := {row.result.steps for row in study.rows()} - {problem.steps}:
        raise UserError(
            f"{study.path} has runs of {min(others)} steps, not {problem.steps}: choose another --output_dir."
        )
    return study


def run_trial(problem: Field, trial: Trial, before: float, head_lr: float) -> TrialResult:
    """One run of a curve.

    Args:
        problem: The field's problem.
        trial: What is run.
        before: The metric of the base.
        head_lr: The learning rate of a new head.
    """
    start = time.monotonic()
    _, metric, error = finetune(
        problem, adapter_for(trial.spec, problem.target_modules), trial.learning_rate, trial.seed, head_lr
    )
    seconds = time.monotonic() - start
    if not math.isfinite(metric):
        return TrialResult.of_divergence(before, problem.steps, seconds, "the metric left the finite numbers")
    return TrialResult.of_training(metric, error, before, [metric], problem.steps, seconds)


def close(recipe: Recipe, searches: Sequence[Search], study: CSVStudy, out: Path) -> None:
    """Write report and figures of what there is, and the LR record of the first curve whose search has an optimum.

    Raises:
        NoRate: All searches have ended, and found no learning rate.
    """
    outcomes = study.outcomes()
    sweep, _ = write_tables(out, recipe, study.rows())
    for warning in [warning for search in searches for warning in warnings_of(search, outcomes)]:
        print(f"note: {warning}")
    print(f"report: {out / REPORT}")
    ended = [search for search in searches if sweep and not search.next_trials(outcomes)]
    records = [make_record(recipe, search, sweep.curves.get(search.spec), outcomes) for search in ended if sweep]
    record = next((record for record in records if record is not None), None)
    if record is not None:
        print(f"record: {record.save(out)} ({record.learning_rate:.3g} for r={record.rank or 'full'})")
    elif len(ended) == len(searches):
        raise NoRate(f"no curve has a learning rate that made the base better: see {out / REPORT}.")


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
