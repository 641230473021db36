"""Arguments that every trainer takes, and how they become an adapter and a learning rate."""

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from mua_rl.adapter.adapters import Adapter, TargetModules, adapter_for
from mua_rl.errors import UserError, one_line
from mua_rl.lr import transfer as policy
from mua_rl.lr.rank import parse_rank
from mua_rl.lr.record import LRRecord
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import AdapterSpec
from mua_rl.lr.transfer import LearningRate
from mua_rl.run.folder import CONFIG, RunFolder

DEFAULT_RANK = 32


@dataclass
class AdapterArguments:
    """What is trained, and at which learning rate."""

    rank: str | None = field(
        default=None,
        metadata={"help": "LoRA rank; 0 or full: full finetuning. Default: 32, with --start-from full."},
    )
    init: str = field(
        default="B",
        metadata={
            "help": "Init[B] (A zero, B random), whose LR is full finetuning's, or Init[A].",
            "choices": ["A", "B"],
        },
    )
    alpha: str = field(
        default="1",
        metadata={"help": "LoRA multiplier as a function of the rank r: 1, 0.5, 1/r, 16/sqrt(r), 2*r^-0.25."},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that carry LoRA: mlp, all-linear, a regular expression, or a list of names."},
    )
    lr: float | None = field(default=None, metadata={"help": "Peak learning rate, instead of one from a record."})
    lr_from: str | None = field(
        default=None,
        metadata={"help": "LR record, or folder of a finished run, that gives the learning rate (whatever its rank)."},
    )
    rank_exponent: float | None = field(
        default=None,
        metadata={
            "help": "The LR of a record is taken to another rank by the theory times (r/m)^-c. Default c: as measured, "
            "0 (the theory alone) for PPO, else 0.5."
        },
    )
    start_from: str | None = field(
        default=None,
        metadata={"help": "Folder of a finished run whose policy to start from: its LoRA is merged into the weights."},
    )
    resume: str | None = field(
        default=None, metadata={"help": "Folder of an interrupted run to go on with, from its last checkpoint."}
    )

    def __post_init__(self) -> None:
        if self.rank_exponent is not None:
            policy.check_exponent(self.rank_exponent)

    @property
    def chosen_rank(self) -> str:
        """`--rank`, or its default."""
        if self.rank is not None:
            return self.rank
        return "full" if self.start_from else str(DEFAULT_RANK)

    @property
    def spec(self) -> AdapterSpec:
        """Rank, scheme and multiplier that were asked for.

        Raises:
            UserError: One of them cannot be read.
        """
        return AdapterSpec.parse(parse_rank(self.chosen_rank), self.init, self.alpha)

    def adapter(self, default_targets: TargetModules) -> Adapter:
        """The adapter that was asked for.

        Raises:
            UserError: The rank, the multiplier or the initialisation is none.
        """
        targets: TargetModules = default_targets
        if self.target_modules:
            names = [name for item in self.target_modules for name in _names(item)]
            targets = names[0] if len(names) == 1 else names
            if isinstance(targets, str) and targets.isidentifier() and targets != "mlp":
                targets = [targets]  # PEFT reads a lone string as a regular expression of the full path
        return adapter_for(self.spec, targets)


def _names(item: str) -> list[str]:
    """One target module, or several with commas between; a regular expression may have commas of its own."""
    return item.split(",") if re.fullmatch(r"[\w.-]+(,[\w.-]+)+", item) else [item]


class _Parser(TrlParser):
    """TRL's parser, which says what is wrong without printing some hundred flags before it.

    Attributes:
        configured: The keys of the `--config` file.
    """

    configured: Set[str] = frozenset()

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a flag that it cannot use."""
        raise UserError(f"{message} (--help lists the flags).")

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """What TRL calls with the `--config` file: its values are checked, and read, as if they were given as flags."""
        actions = {action.dest: action for action in reversed(self._actions)}  # `--no_KEY` comes after `--KEY`
        if unknown := sorted(config.keys() - actions.keys()):
            raise UserError(f"the --config file has unknown keys: {', '.join(unknown)} (--help lists the flags).")
        self.configured = config.keys()
        try:
            return super().set_defaults_with_config(**{k: self._read(actions[k], v) for k, v in config.items()})
        except argparse.ArgumentError as error:
            raise UserError(f"in the --config file: {error} (--help lists the flags).") from None

    def _read(self, action: argparse.Action, value: Any) -> Any:
        if value is None or isinstance(value, (bool, dict)):
            return value
        if action.nargs == "+":
            return [self._read_one(action, item) for item in (value if isinstance(value, list) else [value])]
        return value if isinstance(value, list) else self._read_one(action, value)

    def _read_one(self, action: argparse.Action, value: Any) -> Any:
        read = self._get_value(action, str(value))
        self._check_value(action, read)
        return read


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[tuple, dict[str, Any]]:
    """Parse flags and `--config file.yaml` into the dataclasses.

    Returns:
        The instances, and the settings that were given, by a flag or in the file, also where they are the defaults
        (they make a `--config` file that says the same). A null where the default is one says nothing.

    Raises:
        UserError: The YAML file is missing, is none or has unknown keys, or a value cannot be used.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):  # TRL's parser knows the two words only
            arguments[position : position + 1] = argument.split("=", 1)
    if arguments[-1:] == ["--config"]:
        raise UserError("--config takes a YAML file.")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    parser = _Parser(list(dataclass_types), prog=name)  # type: ignore[arg-type]  # its annotation wants instances
    defaults = vars(parser.parse_args([]))
    try:
        with _config_in_ascii(arguments) as readable:
            instances = parser.parse_args_and_config(readable)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the --config file cannot be read: {error}.") from None
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(one_line(error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"the --config file is no YAML: {one_line(error)}.") from None
    if "--config" in arguments:
        position = arguments.index("--config")
        del arguments[position : position + 2]
    unsaid = object()
    flags = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, unsaid))))
    said = {k for k, v in flags.items() if v is not unsaid} | parser.configured
    values = vars(parser.parse_args(arguments))
    return instances, {k: v for k, v in values.items() if k in said and (v, defaults[k]) != (None, None)}


@contextlib.contextmanager
def _config_in_ascii(arguments: list[str]) -> Iterator[list[str]]:
    """The arguments with a `--config` file that TRL, which reads it in the encoding of the locale, reads as UTF-8."""
    position = arguments.index("--config") + 1 if "--config" in arguments else 0
    path = Path(arguments[position]) if position else Path()
    if not path.is_file() or path.read_bytes().isascii():
        yield list(arguments)
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="ascii") as copy:
        yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")), copy, sort_keys=False)
        copy.flush()
        yield [*arguments[:position], copy.name, *arguments[position + 1 :]]


def parse_run(adapter_type: type, arguments_type: type, argv: Sequence[str] | None = None) -> tuple[Any, Any, dict]:
    """The command line of a trainer: `AdapterArguments` (or a kind of it), the trainer's own, and what was given.

    `--resume RUN` brings back the settings of that run; `--learning_rate` is `--lr`.

    Raises:
        UserError: As `parse_arguments`; or the run cannot be resumed, or the two learning rates differ.
    """
    types = (adapter_type, arguments_type)
    (adapter_arguments, arguments), given = parse_arguments(types, argv)
    if resume := adapter_arguments.resume:
        run = RunFolder.open(resume)
        if extra := sorted(given.keys() - {"resume"}):
            raise UserError(f"--resume takes the run's own settings: drop {', '.join(extra)}.")
        if result := run.result():
            cure = f"use --start-from {run.path}" if result.is_good else "start anew with a smaller --lr"
            ended = "" if result.is_good else f" ({result.status})"
            raise UserError(f"the run {run.path} has ended{ended}: {cure}.")
        (adapter_arguments, arguments), given = parse_arguments(types, ["--config", str(run.path / CONFIG)])
        adapter_arguments.resume = resume
    if arguments.learning_rate is not None:
        if adapter_arguments.lr not in (None, arguments.learning_rate):
            raise UserError("--lr and --learning_rate differ: they are the same thing, give one of them.")
        adapter_arguments.lr = arguments.learning_rate
    return adapter_arguments, arguments, given


@dataclass(frozen=True)
class Base:
    """The policy that a run starts from, as far as a learning rate depends on it.

    Attributes:
        name: For the reader.
        fingerprint: `mua_rl.adapter.fingerprint` of its weights.
        record: The record of the run that it comes from (`--start-from`), if any.
    """

    name: str
    fingerprint: str
    record: LRRecord | None = None

    def is_base_of(self, record: LRRecord) -> bool:
        """Whether a record is of this base, or of the one that the run it comes from started with."""
        return record.base_fingerprint in (self.fingerprint, self.record and self.record.base_fingerprint)


def resolve_learning_rate(
    arguments: AdapterArguments, target: Configuration, base: Base, algorithm: str
) -> LearningRate:
    """The learning rate of a run: `--lr`, else `--lr-from`, else the record of `--start-from`, else a shipped record.

    A run that is resumed keeps its own: its optimizer has it, whatever a newer version or another record would give.

    Raises:
        UserError: Both flags are given, the record is of another base model or algorithm, or the theory does not
            give the learning rate of `target`.
    """
    if arguments.lr is not None:
        if arguments.lr_from:
            raise UserError("--lr and --lr-from exclude each other: give one of them.")
        return policy.given(arguments.lr)
    if arguments.resume and (written := RunFolder(arguments.resume).learning_rate()):
        return policy.kept(written)
    record, source = find_record(arguments, base, algorithm)
    rate = policy.transfer(record, target, source, arguments.rank_exponent)
    if base.is_base_of(record):
        return rate
    why = f"a guess, since no record fits {base.name} (tune it, or give --lr or --lr-from): {rate.why}"
    # Guesses, too, which fall with the width as the rest's.
    others = {role: other * record.configuration().width / target.width for role, other in rate.others.items()}
    return LearningRate(rate.value, why, others=others, is_guess=True)  # how far off it may be was measured on one base


def find_record(arguments: AdapterArguments, base: Base, algorithm: str) -> tuple[LRRecord, str]:
    """The record that a learning rate comes from, and its name for the reader.

    `--lr-from`, else the record of `--start-from` if it is of the algorithm (of supervised finetuning, say, it is not),
    else the shipped one of the very base model, else the first shipped one of the algorithm, which is of another base
    (`Base.is_base_of`) and gives a guess.

    Raises:
        UserError: The record of `--lr-from` is of another base model or algorithm, or there is no record at all.
    """
    if arguments.lr_from:
        record = LRRecord.load(arguments.lr_from)
        if not base.is_base_of(record):
            other = f"other weights than these by the name {base.name}" if record.base_model == base.name else ""
            raise UserError(
                f"{arguments.lr_from} is the record of another base model ({other or record.base_model}), and this one "
                f"is {base.name}: tune on it, or give a learning rate with --lr."
            )
        if record.algorithm != algorithm:
            raise UserError(f"{arguments.lr_from} is the record of a {record.algorithm} run, not of {algorithm}.")
        return record, arguments.lr_from
    instead = ""
    if base.record:
        if base.record.algorithm == algorithm:
            return base.record, f"the record of {arguments.start_from}"
        instead = f" (that of {arguments.start_from} is of {base.record.algorithm})"
    folder = Path(str(files("mua_rl"))) / "assets" / "records"
    shipped = [
        (LRRecord.load(path), f"the shipped record {path.stem}{instead}") for path in sorted(folder.glob("*.json"))
    ]
    shipped = [(record, name) for record, name in shipped if record.algorithm == algorithm]
    if not shipped:
        raise UserError(f"there is no record for {base.name}: give a learning rate with --lr or --lr-from.")
    return next(((record, name) for record, name in shipped if base.is_base_of(record)), shipped[0])
