"""Checkpoints of trials side by side: one file a trial, so that a trial goes on in whatever group it comes next.

Trials of a group take each step together, so those go on together that are at one step with the same settings (`mark`).
"""

import json
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mua_rl.adapter.targets import TargetModules
from mua_rl.errors import UserError, one_line
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.grpo.stacked.state import StackedTrial
from mua_rl.run.trial import PER_TRIAL, WITHOUT_EFFECT, Trial, TrialResult


@dataclass(frozen=True)
class Checkpoint:
    """What the file of a trial holds, which `torch.load` reads without running code.

    Attributes:
        trial: Whose it is, as a dictionary.
        settings: What its result depends on beside the trial.
        step: Steps that its group had taken.
        before: Held-out accuracy before the first.
        outcome: Of a trial that had ended early by then, as a dictionary.
        state: Of any other (`StackedTrial.state_dict`).
    """

    trial: dict[str, Any]
    settings: dict[str, Any]
    step: int
    before: float
    outcome: dict[str, Any] | None
    state: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path, trial: Trial) -> "Checkpoint":
        """The checkpoint of a trial; its tensors are read when they are used.

        Raises:
            UserError: There is none, it cannot be read, or it is of another trial.
        """
        try:
            found = cls(**torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except FileNotFoundError:
            raise UserError(f"{path} is not there.") from None
        except Exception as error:  # of the file system, of zip, of pickle, or a file of something else
            raise UserError(f"{path} cannot be read ({type(error).__name__}).") from None
        if found.trial != trial.as_dict():
            raise UserError(f"{path} is of another trial.")
        return found


class Checkpoints:
    """The checkpoints of a group, written every `--save_steps` steps unless `--save_strategy` is no.

    Args:
        folder: Where the files lie; other groups' may lie there too.
        arguments, trials, target_modules: As `mua_rl.grpo.stacked.trainer.SideBySide` takes them.
        fingerprint: `mua_rl.adapter.fingerprint` of the base.
    """

    def __init__(
        self,
        folder: Path,
        arguments: GRPOArguments,
        trials: Sequence[Trial],
        target_modules: TargetModules,
        fingerprint: str,
    ) -> None:
        self.trials, self.paths = list(trials), [path_of(folder, trial) for trial in trials]
        ours = {k: v for k, v in arguments.to_dict().items() if k not in {*PER_TRIAL, *WITHOUT_EFFECT}}
        ours |= {"target_modules": target_modules, "base": fingerprint}
        self.settings = json.loads(json.dumps(ours))
        self.steps, every = arguments.max_steps, arguments.save_steps
        self.every = 0 if arguments.save_strategy == "no" else math.ceil(every if every >= 1 else every * self.steps)

    def load(self) -> list[Checkpoint] | None:
        """One of each trial, all at one step, or `None`: the group begins anew, and says why where there are some."""
        if not any(path.exists() for path in self.paths):
            return None
        try:
            found = [Checkpoint.read(path, trial) for path, trial in zip(self.paths, self.trials, strict=True)]
            self._check(found)
        except UserError as error:
            print(f"mua_rl: the trials begin anew, for a checkpoint of theirs is of no use: {error}", flush=True)
            return None
        print(f"mua_rl: {len(found)} trials go on from step {found[0].step}", flush=True)
        return found

    def save(
        self,
        step: int,
        before: float,
        states: Iterable[StackedTrial],
        ended: Mapping[int, TrialResult],
        stack: LoRAStack,
    ) -> None:
        """Write all files anew where it is time, each whole or not at all; where one cannot be written, say so.

        Args:
            step: That the group has taken.
            before: Held-out accuracy before the first.
            states: The trials that still train.
            ended: Outcomes of the others, by their numbers.
            stack: The values of `states`.
        """
        if self.every < 1 or step % self.every or step >= self.steps:
            return
        try:
            for number, outcome in ended.items():
                self._write(number, step, before, outcome.as_dict(), None)
            for state in states:
                self._write(state.number, step, before, None, state.state_dict(stack))
            for path in self.paths:  # all of them at once, so that hardly ever a kill leaves some a step behind
                os.replace(_scratch(path), path)
        except (OSError, RuntimeError) as error:
            self._clear()
            print(f"mua_rl: no checkpoint at step {step}: {one_line(error)}", flush=True)

    def remove(self) -> None:
        """Delete the files: the group has ended."""
        self._clear()
        for path in self.paths:
            path.unlink(missing_ok=True)

    def _check(self, found: Sequence[Checkpoint]) -> None:
        """Refuse other settings, and trials that are at different steps."""
        for path, checkpoint in zip(self.paths, found, strict=True):
            known = checkpoint.settings
            if differing := sorted(k for k in known.keys() | self.settings if known.get(k) != self.settings.get(k)):
                key = differing[0]
                raise UserError(f"{path} is of other settings ({key}: {known.get(key)} → {self.settings.get(key)}).")
            if checkpoint.step != found[0].step:
                raise UserError(f"{path} is of step {checkpoint.step}, {self.paths[0].name} of step {found[0].step}.")

    def _write(
        self, number: int, step: int, before: float, outcome: dict[str, Any] | None, state: dict[str, Any] | None
    ) -> None:
        """A trial's file, under another name yet."""
        checkpoint = Checkpoint(self.trials[number].as_dict(), self.settings, step, before, outcome, state)
        path = self.paths[number]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(_scratch(path), "wb") as stream:
            torch.save(vars(checkpoint), stream)
            stream.flush()
            os.fsync(stream.fileno())

    def _clear(self) -> None:
        """Delete what was written halfway, by a process that was killed too."""
        for path in self.paths:
            for scratch in path.parent.glob(f".{path.name}.*"):
                scratch.unlink(missing_ok=True)


def path_of(folder: Path, trial: Trial) -> Path:
    """The file of a trial."""
    return folder / f"{trial.name}.pt"


def mark(folder: Path, trial: Trial) -> Hashable:
    """What trials have in common that can go on together; `None` of a trial that begins."""
    try:
        found = Checkpoint.read(path_of(folder, trial), trial)
    except UserError:
        return None
    return found.step, json.dumps(found.settings, sort_keys=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
