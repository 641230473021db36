"""The registry of verifiable text tasks: `--task NAME` looks a task up here.

A task is prompts plus the verifier that scores completions. Adding one takes a function and a decorator, in any module:

    from mua_rl.envs.tasks import Task, register_task

    @register_task("my-task")
    def my_task() -> Task: ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from mua_rl.errors import UserError

RewardFunc = Callable[..., list[float | None]]
"""TRL's reward signature: `f(prompts, completions, **columns) -> list of one score per completion`."""


@dataclass(frozen=True)
class Task:
    """A verifiable text task.

    Attributes:
        name: What `--task` takes.
        train, held_out: Build the two disjoint splits. Each row has a `prompt` (a string, or a list of chat messages)
            and the columns that the rewards read. They take `conversational`: whether the policy's tokenizer has a
            chat template, so that prompts should be messages.
        rewards: Rewards to train on, summed with `reward_weights`.
        correct: 1.0 for a right answer, else 0.0: the accuracy that is reported on both splits.
        max_completion_length: Tokens that a right answer fits in; the default of `--max_completion_length`.
    """

    name: str
    train: Callable[[bool], Dataset]
    held_out: Callable[[bool], Dataset]
    rewards: tuple[RewardFunc, ...]
    correct: RewardFunc
    reward_weights: tuple[float, ...] | None = None
    max_completion_length: int = 256


_TASKS: dict[str, Callable[..., Task]] = {}


def register_task(name: str) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Decorator: `build()` makes the task `name`. A later registration of the same name replaces the earlier one."""

    def register(build: Callable[..., Task]) -> Callable[..., Task]:
        _TASKS[name] = build
        return build

    return register


def task_names() -> list[str]:
    """Names of the registered tasks, sorted."""
    return sorted(_TASKS)


def get_task(name: str, **options: Any) -> Task:
    """Build the task called `name`.

    Raises:
        UserError: No task has that name.
    """
    if name not in _TASKS:
        raise UserError(f"there is no task {name!r}; the tasks are: {', '.join(task_names())}.")
    return _TASKS[name](**options)
