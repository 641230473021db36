"""What belongs to one trial alone, beside its row of the stack."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mua_rl.grpo.stacked.scoring import Metrics
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.lm.heldout import HeldOutResult
from mua_rl.run.trial import Trial, TrialResult


@dataclass
class StackedTrial:
    """A trial that trains.

    Attributes:
        number: Among the trials of its group.
        trial: What it is.
        order: Rows of the prompts of each step.
        generator: Of its draws.
        optimizer, schedule: Its own.
        history: Metrics of each step so far.
        bad_steps: How many of the newest steps, in a row, had no finite gradient.
        seconds: Its share of the time so far.
    """

    number: int
    trial: Trial
    order: list[list[int]]
    generator: torch.Generator
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: list[Metrics] = field(default_factory=list)
    bad_steps: int = 0
    seconds: float = 0.0

    @property
    def parameter(self) -> nn.Parameter:
        """All of the trial's A and B as one vector."""
        return self.optimizer.param_groups[0]["params"][0]

    def outcome(self, before: float, after: HeldOutResult | None, stopped: str = "") -> TrialResult:
        """Of a trial that is at its end, or was stopped.

        Args:
            before: Held-out accuracy before training.
            after: What it has reached; `None` where it was stopped.
            stopped: Why.
        """
        rewards = [metrics["reward"] for metrics in self.history]
        score, error = (after.accuracy, after.standard_error) if after else (math.nan, math.nan)
        return TrialResult.of_training(score, error, before, rewards, len(self.history), self.seconds, stopped)

    def state_dict(self, stack: LoRAStack) -> dict[str, Any]:
        """All that training has made of the trial, on the CPU, in a form that does not depend on the others' ranks."""
        optimizer = self.optimizer.state_dict()
        moments = {
            index: {key: stack.pack(self.number, value) if value.dim() else value for key, value in of.items()}
            for index, of in optimizer["state"].items()
        }
        return {
            "values": stack.pack(self.number, self.parameter.detach()),
            "optimizer": {**optimizer, "state": moments},
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "history": self.history,
            "bad_steps": self.bad_steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, stack: LoRAStack, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` of the same trial gave, maybe in another group."""
        optimizer = state["optimizer"]
        moments = {
            index: {
                key: stack.unpack(self.number, value) if value.dim() else value.clone() for key, value in of.items()
            }
            for index, of in optimizer["state"].items()
        }
        self.parameter.data.copy_(stack.unpack(self.number, state["values"]))
        self.optimizer.load_state_dict({**optimizer, "state": moments})
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.history, self.bad_steps, self.seconds = list(state["history"]), state["bad_steps"], state["seconds"]
