"""The command line of a trainer: dataclasses become flags, a YAML file gives what no flag does, and argv is read once.

Flags are spelt as TRL spells them, with underscores; dashes are taken as well.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from mua_rl.adapter.adapters import Adapter, adapter_for
from mua_rl.adapter.targets import TargetModules
from mua_rl.errors import UserError, one_line
from mua_rl.lr.rank import parse_rank
from mua_rl.lr.spec import AdapterSpec, multiplier_rule
from mua_rl.lr.transfer import check_exponent
from mua_rl.run.folder import CONFIG, RunFolder

DEFAULT_RANK = 32


@dataclass
class AdapterArguments:
    """What is trained, and at which learning rate."""

    rank: str | None = field(
        default=None,
        metadata={"help": "LoRA rank; 0 or full: full finetuning. Default: 32, with --start_from full."},
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
        metadata={
            "help": "Multiplier α of B A as a function of the rank r: 1, 0.5, 1/r, 16/sqrt(r), 2*r^-0.25. It is not "
            "PEFT's lora_alpha, which is α r."
        },
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "PEFT's lora_alpha, instead of --alpha: the multiplier is lora_alpha / r."}
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
            check_exponent(self.rank_exponent)
        rule = multiplier_rule(self.alpha, self.lora_alpha)
        if self.lora_alpha is not None:
            self.alpha, self.lora_alpha = str(rule), None

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
            UserError: The rank, the multiplier or the initialisation cannot be read.
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


class _Parser(HfArgumentParser):
    """transformers' parser, which says what is wrong without printing some hundred flags before it."""

    likes: Mapping[str, str] = MappingProxyType({})
    """What other programs call by these names, and what takes their place here."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a flag that it cannot use."""
        words = [word.partition("=")[0].lstrip("-").replace("-", "_") for word in message.split()]
        likes = [f"{word}: {self.likes[word]}" for word in words if word in self.likes]
        if likes and "unrecognized" in message:
            raise UserError(f"{message} ({'; '.join(likes)}).")
        raise UserError(f"{message} (--help lists the flags).")


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[tuple, dict[str, Any]]:
    """Parse flags and `--config file.yaml` into the dataclasses; a flag wins over the file.

    Returns:
        The instances, and the settings that were given, by a flag or in the file, also where they are the defaults
        (they make a `--config` file that says the same). A null where the default is one says nothing.

    Raises:
        UserError: The YAML file cannot be used, or a flag or a value cannot.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    parser = _Parser(list(dataclass_types), prog=name)  # type: ignore[arg-type]  # its annotation wants instances
    parser.likes = {name: like for type_ in dataclass_types for name, like in getattr(type_, "LIKES", {}).items()}
    parser.add_argument("--config", metavar="FILE", nargs="?", help="YAML file of settings; flags win over it.")
    defaults = {f.name: f.default for type_ in dataclass_types for f in dataclasses.fields(type_) if f.init}
    said = _read_flags(parser, defaults.keys(), sys.argv[1:] if argv is None else argv)
    if "config" in said:
        said = {**_read_config(parser, defaults.keys(), said.pop("config")), **said}
    try:
        instances = tuple(
            type_(**{f.name: said[f.name] for f in dataclasses.fields(type_) if f.name in said})
            for type_ in dataclass_types
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(one_line(error)) from None
    return instances, {k: v for k, v in said.items() if (v, defaults[k]) != (None, None)}


def _read_flags(parser: _Parser, names: Set[str], argv: Sequence[str]) -> dict[str, Any]:
    """The flags that were given, by their fields: what argparse has set of a namespace in which nothing was."""
    unsaid = object()
    flags = vars(parser.parse_args(list(argv), argparse.Namespace(**dict.fromkeys([*names, "config"], unsaid))))
    return {name: value for name, value in flags.items() if value is not unsaid}


def _read_config(parser: _Parser, names: Set[str], path: str | None) -> dict[str, Any]:
    """The settings of a `--config` file, read as if they were given as flags.

    A mapping `env` among them sets environment variables, as in TRL's own files.

    Raises:
        UserError: The file is missing, is not a YAML mapping, or has an unknown key or a value that no flag takes.
    """
    if path is None:
        raise UserError("--config takes a YAML file.")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the --config file cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"the --config file is no YAML: {one_line(error)}.") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("env", {}), dict):
        raise UserError(f"the --config file {path} must contain a YAML mapping.")
    os.environ.update({name: str(value) for name, value in settings.pop("env", {}).items()})
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if unknown := sorted(settings.keys() - names):
        named = [f"{name} ({parser.likes[name]})" if name in parser.likes else name for name in unknown]
        raise UserError(f"the --config file has unknown keys: {', '.join(named)} (--help lists the flags).")
    words, others = [], {}
    for name, value in settings.items():
        if value is None or value == [] or isinstance(value, (bool, dict)):  # which no word says
            others[name] = value
        else:
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    try:
        return {**_read_flags(parser, names, words), **others}
    except UserError as error:
        raise UserError(f"in the --config file: {error}") from None


def parse_run(
    adapter_type: type, arguments_type: type, argv: Sequence[str] | None = None, length: str | None = None
) -> tuple[Any, Any, dict]:
    """The command line of a trainer: `AdapterArguments` (or a subclass), the trainer's own, and what was given.

    `--resume RUN` brings back the settings of that run; `--learning_rate` is `--lr`. A run goes on beyond its end where
    its length is given anew.

    Args:
        adapter_type, arguments_type: The dataclasses of the flags.
        argv: The command line; `None`: this process's.
        length: The setting that says how long a run is; `None`: an ended run goes no further.

    Raises:
        UserError: As `parse_arguments`; or the run cannot be resumed, or the two learning rates differ.
    """
    types = (adapter_type, arguments_type)
    (adapter_arguments, arguments), given = parse_arguments(types, argv)
    if resume := adapter_arguments.resume:
        run = RunFolder.open(resume)
        longer = {name: value for name, value in given.items() if name == length}
        if extra := sorted(given.keys() - {"resume", *longer}):
            raise UserError(f"--resume takes the run's own settings: drop {', '.join(extra)}.")
        result = run.result()
        if result and not (longer and result.is_good):
            more = f"go on with a larger --{length}, or " * (length is not None)
            cure = f"{more}use --start_from {run.path}" if result.is_good else "start anew with a smaller --lr"
            ended = "" if result.is_good else f" ({result.status})"
            raise UserError(f"the run {run.path} has ended{ended}: {cure}.")
        taken = result.steps if result else 0
        if any(value <= taken for value in longer.values()):
            raise UserError(f"the run {run.path} has taken {taken} steps: give a larger --{length} to go on.")
        if result and run.last_checkpoint() is None:
            raise UserError(f"the run {run.path} left no checkpoint to go on from: use --start_from {run.path}.")
        flags = [word for name, value in longer.items() for word in (f"--{name}", str(value))]
        (adapter_arguments, arguments), given = parse_arguments(types, ["--config", str(run.path / CONFIG), *flags])
        adapter_arguments.resume = resume
    if arguments.learning_rate is not None:
        if adapter_arguments.lr not in (None, arguments.learning_rate):
            raise UserError("--lr and --learning_rate differ: they are the same thing, give one of them.")
        adapter_arguments.lr = arguments.learning_rate
    return adapter_arguments, arguments, given
