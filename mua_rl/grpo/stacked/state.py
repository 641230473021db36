"""What each trial has for itself, beside its row of the stack."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.scoring import Metrics
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.lm.heldout import HeldOutResult
from mua_rl.run.trial import Trial, TrialResult

ROLE = "lora"
"""The name of a trial's only group of parameters, as in a single run."""


@dataclass
class TrialState:
    """A trial that trains.

    Attributes:
        number: The trial's number in its group.
        trial: The trial.
        order: Row numbers of the prompts of each step.
        generator: The generator of its draws.
        optimizer, schedule: The trial's own.
        history: Metrics of each step so far.
        bad_steps: How many of the newest steps, in a row, had no finite gradient.
        seconds: The trial's share of the time so far.
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

    @classmethod
    def begin(
        cls, number: int, trial: Trial, order: list[list[int]], values: torch.Tensor, arguments: GRPOArguments
    ) -> "TrialState":
        """The state before the first step, with the optimizer and the schedule of a single run.

        Args:
            number, trial, order: See `TrialState`.
            values: The trial's row of the stack.
            arguments: The arguments of a single run.
        """
        optimizer = torch.optim.AdamW(
            [{"params": [nn.Parameter(values)], "name": ROLE}],
            lr=trial.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
            fused=True,
        )
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
            num_training_steps=arguments.max_steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
        )
        return cls(number, trial, order, torch.Generator().manual_seed(trial.seed), optimizer, schedule)

    @property
    def parameter(self) -> nn.Parameter:
        """All of the trial's A and B as one vector."""
        return self.optimizer.param_groups[0]["params"][0]

    def step(self, gradient: torch.Tensor, finite: bool) -> None:
        """Take an optimizer step; one whose gradient is not finite changes nothing but the schedule."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.parameter.grad = gradient if finite else None  # the optimizer leaves a parameter without gradient alone
        self.optimizer.step()
        self.schedule.step()

    def result(self, before: float, after: HeldOutResult | None, stopped: str = "") -> TrialResult:
        """The result of a trial that is at its end, or was stopped.

        Args:
            before: The held-out accuracy before training.
            after: What the trial has reached; `None` where it was stopped.
            stopped: Why the trial was stopped.
        """
        rewards = [metrics["reward"] for metrics in self.history]
        score, error = (after.accuracy, after.standard_error) if after else (math.nan, math.nan)
        return TrialResult.of_training(score, error, before, rewards, len(self.history), self.seconds, stopped)

    def state_dict(self, stack: LoRAStack) -> dict[str, Any]:
        """All that training has made of the trial, on the CPU, in a form that does not depend on the others' ranks."""
        return {
            "values": stack.pack(self.number, self.parameter.detach()),
            "optimizer": _with_moments(self.optimizer.state_dict(), lambda moment: stack.pack(self.number, moment)),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "history": self.history,
            "bad_steps": self.bad_steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, stack: LoRAStack, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` of the same trial gave, maybe in another group."""
        self.parameter.data.copy_(stack.unpack(self.number, state["values"]))
        optimizer = _with_moments(state["optimizer"], lambda moment: stack.unpack(self.number, moment))
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.history, self.bad_steps, self.seconds = list(state["history"]), state["bad_steps"], state["seconds"]


def _with_moments(optimizer: dict[str, Any], convert: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """An optimizer's state with its moments converted, and a copy of its number of steps."""
    state = {
        index: {key: convert(value) if value.dim() else value.clone() for key, value in of.items()}
        for index, of in optimizer["state"].items()
    }
    return {**optimizer, "state": state}
