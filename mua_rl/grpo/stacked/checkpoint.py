"""Checkpoints of stacked trials: one file a trial, so that a trial goes on in whatever group it comes next.

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
from mua_rl.grpo.stacked.state import TrialState
from mua_rl.run.trial import PER_TRIAL, WITHOUT_EFFECT, Trial, TrialResult


@dataclass(frozen=True)
class Checkpoint:
    """What the file of a trial holds, which `torch.load` reads without running code.

    Attributes:
        trial: The trial, as a dictionary.
        settings: The settings that the trial's result depends on.
        step: The number of steps that its group had taken.
        before: The held-out accuracy before the first step.
        outcome: The result of a trial that had ended early by then, as a dictionary.
        state: The state of any other trial (`TrialState.state_dict`).
    """

    trial: dict[str, Any]
    settings: dict[str, Any]
    step: int
    before: float
    outcome: dict[str, Any] | None
    state: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path, trial: Trial) -> "Checkpoint":
        """Read the checkpoint of a trial; its tensors are read when they are used.

        Raises:
            UserError: There is no checkpoint, it cannot be read, or it is of another trial.
        """
        try:
            checkpoint = cls(**torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except FileNotFoundError:
            raise UserError(f"{path} is not there.") from None
        except Exception as error:  # of the file system, of zip, of pickle, or a file of something else
            raise UserError(f"{path} cannot be read ({type(error).__name__}).") from None
        if checkpoint.trial != trial.as_dict():
            raise UserError(f"{path} is of another trial.")
        return checkpoint


class Checkpoints:
    """The checkpoints of a group, written every `--save_steps` steps unless `--save_strategy` is no.

    Args:
        folder: Where the files lie; other groups' files may lie there too.
        arguments, trials, target_modules: See `mua_rl.grpo.stacked.trainer.StackedTrainer`.
        fingerprint: The base's `mua_rl.adapter.adapters.fingerprint`.
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
        settings = {k: v for k, v in arguments.to_dict().items() if k not in {*PER_TRIAL, *WITHOUT_EFFECT}}
        settings |= {"target_modules": target_modules, "base": fingerprint}
        self.settings = json.loads(json.dumps(settings))
        self.steps, every = arguments.max_steps, arguments.save_steps
        self.every = 0 if arguments.save_strategy == "no" else math.ceil(every if every >= 1 else every * self.steps)

    def load(self) -> list[Checkpoint] | None:
        """One checkpoint of each trial, all at one step, or `None`: the group begins anew, and says why where some of
        its trials have checkpoints."""
        if not any(path.exists() for path in self.paths):
            return None
        try:
            checkpoints = [Checkpoint.read(path, trial) for path, trial in zip(self.paths, self.trials, strict=True)]
            self._check(checkpoints)
        except UserError as error:
            print(f"mua_rl: the trials begin anew, for a checkpoint of theirs is of no use: {error}", flush=True)
            return None
        print(f"mua_rl: {len(checkpoints)} trials go on from step {checkpoints[0].step}", flush=True)
        return checkpoints

    def save(
        self, step: int, before: float, states: Iterable[TrialState], ended: Mapping[int, TrialResult], stack: LoRAStack
    ) -> None:
        """Write all files anew where it is time, each whole or not at all; where one cannot be written, say so.

        Args:
            step: The number of steps that the group has taken.
            before: The held-out accuracy before the first step.
            states: The trials that still train.
            ended: The results of the others, by their numbers.
            stack: The values of `states`.
        """
        if self.every < 1 or step % self.every or step >= self.steps:
            return
        try:
            for number, result in ended.items():
                self._write(number, step, before, result.as_dict(), None)
            for state in states:
                self._write(state.number, step, before, None, state.state_dict(stack))
            for path in self.paths:  # all of them at once, so that hardly ever a kill leaves some a step behind
                os.replace(_scratch(path), path)
        except (OSError, RuntimeError) as error:
            self._remove_scratch()
            print(f"mua_rl: no checkpoint at step {step}: {one_line(error)}", flush=True)

    def remove(self) -> None:
        """Delete the files of a group that has ended."""
        self._remove_scratch()
        for path in self.paths:
            path.unlink(missing_ok=True)

    def _check(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Refuse other settings, and trials that are at different steps."""
        first = checkpoints[0].step
        for path, checkpoint in zip(self.paths, checkpoints, strict=True):
            known = checkpoint.settings
            for key in sorted(known.keys() | self.settings):
                if known.get(key) != self.settings.get(key):
                    change = f"{key}: {known.get(key)} → {self.settings.get(key)}"
                    raise UserError(f"{path} is of other settings ({change}).")
            if checkpoint.step != first:
                raise UserError(f"{path} is of step {checkpoint.step}, {self.paths[0].name} of step {first}.")

    def _write(self, number: int, step: int, before: float, result: dict | None, state: dict | None) -> None:
        """Write a trial's file, under another name yet."""
        checkpoint = Checkpoint(self.trials[number].as_dict(), self.settings, step, before, result, state)
        path = self.paths[number]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(_scratch(path), "wb") as stream:
            torch.save(vars(checkpoint), stream)
            stream.flush()
            os.fsync(stream.fileno())

    def _remove_scratch(self) -> None:
        """Delete what was written halfway, by a process that was killed too."""
        for path in self.paths:
            for scratch in path.parent.glob(f".{path.name}.*"):
                scratch.unlink(missing_ok=True)


def path_of(folder: Path, trial: Trial) -> Path:
    """The file of a trial's checkpoint."""
    return folder / f"{trial.name}.pt"


def mark(folder: Path, trial: Trial) -> Hashable:
    """What trials that can go on together have in common; `None` of a trial that begins."""
    try:
        checkpoint = Checkpoint.read(path_of(folder, trial), trial)
    except UserError:
        return None
    return checkpoint.step, json.dumps(checkpoint.settings, sort_keys=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
