"""Which learning rate a run has: the one that was asked for, or the one that an LR record gives."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord
from mua_rl.lr.rules import OWN, Configuration
from mua_rl.lr.transfer import LearningRate, transfer
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.folder import RunFolder


@dataclass(frozen=True)
class Base:
    """The policy that a run starts from, as far as a learning rate depends on it.

    Attributes:
        name: Its name for the reader.
        fingerprint: `mua_rl.adapter.fingerprint.fingerprint` of its weights.
        record: The record of the run that it comes from (`--start_from`), if any.
        task: What it is trained on; where no record fits, one of a task of the same family is nearest.
        conditions: What else a record may say of the run: entries of its batch, its schedule's name, its layers, its
            task, by the names that the reader sees. Nothing: they are not compared.
    """

    name: str
    fingerprint: str
    record: LRRecord | None = None
    task: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, record: LRRecord) -> str:
        """What differs between the runs of a record and this one, for the reader; "" for nothing that is known."""
        known = {**record.batch, "schedule": record.schedule.get("name"), "layers": record.target_modules}
        known["task"] = record.task
        pairs = [(name, known[name], value) for name, value in self.conditions.items() if name in known]
        return ", ".join(f"{name} {old} → {new}" for name, old, new in pairs if old != new)

    def is_base_of(self, record: LRRecord) -> bool:
        """Whether a record is of this base, or of the one that the run it comes from started with."""
        return record.base_fingerprint in (self.fingerprint, self.record and self.record.base_fingerprint)


def resolve_learning_rate(
    arguments: AdapterArguments, target: Configuration, base: Base, algorithm: str
) -> LearningRate:
    """The learning rate of a run: `--lr`, else `--lr_from`, else the record of `--start_from`, else a shipped record.

    A run that is resumed keeps its own: its optimizer has it, whatever a newer version or another record would give.

    Raises:
        UserError: Both flags are given, the record is of another base model or algorithm, or the theory does not
            give the learning rate of `target`.
    """
    if arguments.lr is not None:
        if arguments.lr_from:
            raise UserError("--lr and --lr_from exclude each other: give one of them.")
        return LearningRate(arguments.lr, "given by --lr")
    if arguments.resume and (kept := RunFolder(arguments.resume).learning_rate()):
        return LearningRate.from_dict(kept)
    record, source = find_record(arguments, base, algorithm)
    rate = transfer(record, target, source, arguments.rank_exponent)
    if base.is_base_of(record):
        if not (differences := base.differences(record)):
            return rate
        why = rate.why.replace(OWN, "the record's own rank and scheme")
        doubt = f"the record's runs differ from this one ({differences}), for which no rate was measured"
        cure = f"tune here (python -m mua_rl.sweep --algo {algorithm})"
        return replace(rate, why=why, evidence=None, warning=rate.warning or f"{doubt}: {cure}.")
    why = f"a guess, since no record fits {base.name} (tune it, or give --lr or --lr_from): {rate.why}"
    # The other learning rates are guesses, too, and fall with the width as the rest's.
    others = {role: other * record.configuration().width / target.width for role, other in rate.others.items()}
    return LearningRate(rate.value, why, others=others, is_guess=True)  # how far off it may be was measured on one base


def find_record(arguments: AdapterArguments, base: Base, algorithm: str) -> tuple[LRRecord, str]:
    """The record that a learning rate comes from, and its name for the reader.

    That is the record of `--lr_from`; else that of `--start_from` if it is of the same algorithm (a record of
    supervised finetuning, say, is not); else the shipped record of the very base model; else a shipped record of the
    algorithm, of the same family of tasks if there is one, which is of another base (`Base.is_base_of`) and gives a
    guess.

    Raises:
        UserError: The record of `--lr_from` is of another base model or algorithm, or there is no record at all.
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
    shipped = [(LRRecord.load(path), f"the shipped record {path.stem}{instead}") for path in shipped_records()]
    shipped = [(record, name) for record, name in shipped if record.algorithm == algorithm]
    if not shipped:
        raise UserError(f"there is no record for {base.name}: give a learning rate with --lr or --lr_from.")
    alike = [pair for pair in shipped if family(base.task) == family(pair[0].task)]
    return next(((record, name) for record, name in shipped if base.is_base_of(record)), (alike or shipped)[0])


def family(task: str) -> str:
    """The name that a task has in common with its shifts and versions: Pendulum, of mua_rl/Pendulum-HeavyBob-v0."""
    return re.split(r"[-:]", task.rpartition(":")[2].rpartition("/")[2])[0]


def shipped_records() -> list[Path]:
    """The files of the records that come with the package."""
    return sorted((Path(str(files("mua_rl"))) / "assets" / "records").glob("*.json"))
