"""What `python -m mua_rl.sweep` can be asked: the sweep's own flags, and every flag of the trainer beside them."""

import argparse
import math
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mua_rl.errors import UserError, one_line
from mua_rl.lr.rank import parse_rank
from mua_rl.lr.spec import AdapterSpec, AlphaRule
from mua_rl.run.algorithms import Algorithm, algorithm_names, find_algorithm
from mua_rl.run.arguments import AdapterArguments, parse_arguments
from mua_rl.run.folder import CONFIG, RunFolder, with_whole_paths
from mua_rl.run.trial import PER_TRIAL, WITHOUT_EFFECT


@dataclass
class SweepArguments:
    """The sweep's own flags."""

    algo: str = field(default="grpo", metadata={"help": "Which trainer.", "choices": algorithm_names()})
    ranks: list[str] | None = field(
        default=None,
        metadata={"help": "LoRA ranks, and full for full finetuning; each gives a curve. Default: 32, for ppo 8."},
    )
    schemes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Init[A] or Init[B] with a multiplier: B (Init[B], α = 1; default), A, A/r (Init[A], α = 1/r), "
            "B/sqrt(r), A*0.5."
        },
    )
    seeds: int = field(default=2, metadata={"help": "Seeds near the optimum, counted from --seed; elsewhere one."})
    grid: list[float] | None = field(
        default=None,
        metadata={
            "help": "log2 of the smallest and largest LR to begin with, as in -14 -10. Default: around the record's."
        },
    )
    resolution: float = field(default=1.0, metadata={"help": "Octaves between LRs at the optimum: 1, or 0.5."})
    side_by_side: str = field(
        default="auto",
        metadata={"help": "Train trials in one process where they can be.", "choices": ["auto", "on", "off"]},
    )
    arms_memory: float | None = field(
        default=None,
        metadata={
            "help": "GPU memory that GRPO trials in one process may take, as a multiple of one run's (default: 1.4); "
            "more where their own weights, gradients and moments would leave less for work than one run has."
        },
    )
    workers: int = field(default=1, metadata={"help": "Runs (or groups of trials side by side) at once."})
    study: str | None = field(
        default=None,
        metadata={
            "help": "Optuna storage: a file, or a URL that several machines reach. Default: in the output folder."
        },
    )
    study_name: str | None = field(
        default=None, metadata={"help": "Of the study in its storage. Default: algorithm, model and task."}
    )
    early_stop: bool = field(default=True, metadata={"help": "End runs early that cannot be the best."})
    keep_weights: bool = field(default=False, metadata={"help": "Keep what each run trained, not its metrics alone."})
    time_limit: float | None = field(default=None, metadata={"help": "Seconds after which no further run is started."})

    def __post_init__(self) -> None:
        if not 0 < self.resolution <= 4:
            raise UserError(f"--resolution takes octaves above 0 and up to 4, as in 1 or 0.5, not {self.resolution}.")
        for name in ("seeds", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if self.arms_memory is not None:
            if not 0 < self.arms_memory < math.inf:
                raise UserError(f"--arms_memory takes a multiple of one run's memory, above 0, not {self.arms_memory}.")
            if not find_algorithm(self.algo).plans_memory:
                raise UserError(f"--arms_memory means nothing with --algo {self.algo}: drop it.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise UserError(f"--time_limit takes a number of seconds above 0, not {self.time_limit}.")
        if self.grid is not None and not (len(self.grid) == 2 and -24 <= self.grid[0] <= self.grid[1] <= -1):
            raise UserError(
                f"--grid takes log2 of the smallest and the largest learning rate, between -24 and -1, as in -14 -10; "
                f"{' '.join(f'{value:g}' for value in self.grid)} is empty or none."
            )


@dataclass(frozen=True)
class Request:
    """A command line, read.

    Attributes:
        sweep: The sweep's own flags.
        trainer, adapter: The trainer's arguments.
        trainer_settings: The settings of the trainer, as a `--config` file of it says them; without `PER_TRIAL`.
        settings: All settings that the command has, which the output folder keeps.
        specs: What each curve is of.
    """

    sweep: SweepArguments
    trainer: Any
    adapter: AdapterArguments
    trainer_settings: dict[str, Any]
    settings: dict[str, Any]
    specs: list[AdapterSpec]

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm that is swept."""
        return find_algorithm(self.sweep.algo)

    @property
    def task(self) -> str:
        """The task or the environment."""
        return self.algorithm.task(self.trainer)

    @property
    def steps(self) -> int:
        """The steps of one run as its metrics count them; -1 where they are not known before the run."""
        return self.algorithm.steps(self.trainer)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the trials."""
        return tuple(range(self.trainer.seed, self.trainer.seed + self.sweep.seeds))

    def comparable(self, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """What all runs of a study, or of a folder, must have in common; a setting that is its default is none.

        Args:
            settings: Those of another command; `None`: of this one.
        """
        settings = self.settings if settings is None else settings
        defaults = {f.name: f.default for arguments in (self.adapter, self.trainer) for f in fields(arguments)}
        own = {f.name for f in fields(SweepArguments)} - {"algo"} | {"rank", "init", "alpha", "lora_alpha"}
        ignored = {*own, *WITHOUT_EFFECT}
        return {k: v for k, v in settings.items() if k not in ignored and v != defaults.get(k, MISSING)}


def parse(argv: list[str] | None = None) -> Request:
    """Command line to request.

    Raises:
        UserError: As `mua_rl.run.arguments.parse_arguments`; or flags that contradict each other, or what is no rank or
            scheme.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    algorithm = find_algorithm(_algorithm(argv))
    types = (SweepArguments, *algorithm.argument_types())
    (sweep, adapter, trainer), settings = parse_arguments(types, argv)
    if adapter.resume:
        folder = RunFolder.open(adapter.resume)
        if extra := sorted(settings.keys() - {"resume", "algo"}):
            raise UserError(f"--resume takes the sweep's own settings: drop {', '.join(extra)}.")
        if "algo" not in folder.settings():
            raise UserError(f"{adapter.resume} is no sweep: go on with it by python -m mua_rl.grpo or mua_rl.ppo.")
        return parse(["--config", str(folder.path / CONFIG), "--output_dir", adapter.resume])
    if adapter.lr is not None or trainer.learning_rate is not None:
        raise UserError("a sweep finds the learning rate: drop --lr; --grid says where to look, and --lr_from too.")
    algorithm.complete(trainer, adapter, settings)
    settings = with_whole_paths(settings)
    return Request(
        sweep=sweep,
        trainer=trainer,
        adapter=adapter,
        trainer_settings=_of_trainer(settings),
        settings={**settings, "algo": algorithm.name},
        specs=_specs(sweep, adapter, settings),
    )


def differences(known: dict[str, Any], settings: dict[str, Any]) -> str:
    """How settings differ, for the reader; "" where they do not."""
    differing = sorted(k for k in known.keys() | settings.keys() if known.get(k) != settings.get(k))
    return ", ".join(f"{k}: {known.get(k, 'default')} → {settings.get(k, 'default')}" for k in differing)


def parse_scheme(text: str) -> tuple[str, str]:
    """(init, multiplier) of a scheme: `B` is ("B", "1"), `A/r` is ("A", "1/r"), `A*16/r` is ("A", "16/r").

    Raises:
        UserError: It is none.
    """
    init, rule = text.strip()[:1].upper(), text.strip()[1:]
    try:
        if init not in ("A", "B"):
            raise ValueError("it begins with neither A nor B")
        return init, str(AlphaRule.parse(f"1{rule}" if rule.startswith("/") else rule.lstrip("*") or "1"))
    except ValueError as error:
        raise UserError(f"--schemes takes B, A, A/r and the like, not {text!r}: {error}") from None


def _specs(sweep: SweepArguments, adapter: AdapterArguments, settings: dict[str, Any]) -> list[AdapterSpec]:
    """Each combination of ranks and schemes once; FFT has no scheme."""
    if sweep.ranks is not None and "rank" in settings:
        raise UserError("--rank and --ranks exclude each other: give --ranks.")
    if sweep.schemes is not None and settings.keys() & {"init", "alpha", "lora_alpha"}:
        raise UserError("--schemes stands for --init and --alpha: give one or the other.")
    ranks = [parse_rank(rank) for rank in sweep.ranks or [adapter.chosen_rank]]
    schemes = [parse_scheme(scheme) for scheme in sweep.schemes] if sweep.schemes else [(adapter.init, adapter.alpha)]
    return list(dict.fromkeys(AdapterSpec.parse(rank, *scheme) for rank in ranks for scheme in schemes))


def _of_trainer(settings: dict[str, Any]) -> dict[str, Any]:
    own = {f.name for f in fields(SweepArguments)}
    return {k: v for k, v in settings.items() if k not in own and k not in PER_TRIAL and k != "resume"}


def _algorithm(argv: list[str]) -> str:
    """The name in `--algo`, from the flags or the `--config` file: it decides which other flags there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--algo", "--config", "--resume"):
        parser.add_argument(flag)
    try:
        flags, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (--help lists the flags).") from None
    config = flags.config or (f"{flags.resume}/{CONFIG}" if flags.resume else None)
    name = flags.algo
    if name is None and config is not None and Path(config).is_file():
        try:
            settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"the --config file is no YAML: {one_line(error)}.") from None
        name = settings.get("algo") if isinstance(settings, dict) else None
    names = algorithm_names()
    if (name or "grpo") not in names:
        raise UserError(f"--algo takes {' or '.join(names)}, not {name!r}.")
    return name or "grpo"
