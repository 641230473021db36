"""What a sweep asks of an algorithm, and which there are: every folder of this package with an `algorithm.py`."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mua_rl.lr.recipe import Recipe
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.learning_rate import Base
from mua_rl.run.life import Names
from mua_rl.run.trial import Trial, TrialResult

RewardCurve = Sequence[tuple[int, float]]
"""(step, mean training reward) of a run, ascending."""


@dataclass(frozen=True)
class Stacking:
    """How a group of trials is trained in one process.

    Attributes:
        checkpoints: The folder of the group's checkpoints, from which it goes on after a crash.
        threads: The CPU threads that the group may take.
        memory: The GPU memory that the group may take, as a multiple of one run's; `None`: the algorithm's default.
        on_step: Told of each step that the trials have taken together, and of how many there will be.
        why_hopeless: Says why a trial with these rewards need not go on, or ""; `None`: all trials go to their end.
    """

    checkpoints: Path
    threads: int = 1
    memory: float | None = None
    on_step: Callable[[int, int], None] | None = None
    why_hopeless: Callable[[Trial, RewardCurve], str] | None = None


class Algorithm(Protocol):
    """A trainer, as a sweep needs it; its command is `python -m mua_rl.NAME`.

    Attributes:
        name: Its name, which is that of its folder.
        most_stacked: The most trials that one process trains together.
        judged_key: What its metrics call the mean training reward of one step alone, in which no other step has a part.
        plans_memory: Whether trials in one process take as much GPU memory as they are given.
    """

    name: str
    most_stacked: int
    judged_key: str
    plans_memory: bool

    @property
    def names(self) -> Names:
        """What it calls its measures."""

    def argument_types(self) -> tuple[type[AdapterArguments], type]:
        """The dataclasses of its flags.

        Raises:
            UserError: A package that it needs is not installed.
        """

    def complete(self, arguments: Any, adapter: AdapterArguments, settings: dict[str, Any]) -> None:
        """Fill in, and note among the settings that were given, what some of them imply.

        Raises:
            UserError: Settings contradict each other.
        """

    def task(self, arguments: Any) -> str:
        """The task or the environment."""

    def steps(self, arguments: Any) -> int:
        """The steps of one run as its metrics count them; -1 where they are not known before the run."""

    def examine(self, arguments: Any, adapter: AdapterArguments) -> tuple[Recipe, Base, str]:
        """Load the base and attach an adapter.

        Returns:
            The recipe, the base, and why LoRA of the base cannot be stacked; "" where it can.

        Raises:
            UserError: Something that was given cannot be used.
        """

    def check_stacked(self, arguments: Any, adapter: AdapterArguments, trial: Trial) -> None:
        """Refuse trials that cannot be trained together in one process.

        Raises:
            UserError: They cannot be.
        """

    def progress(self, checkpoints: Path, trial: Trial) -> Hashable:
        """What trials that were cut off must have in common to go on together; `None` for one that begins."""

    def train_stacked(
        self, arguments: Any, adapter: AdapterArguments, trials: Sequence[Trial], stacking: Stacking
    ) -> list[TrialResult]:
        """Train trials together in this process; what each reached, in order.

        Raises:
            UserError: Something that was given cannot be used.
        """


@cache
def algorithm_names() -> list[str]:
    """The names of all algorithms."""
    return sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/algorithm.py"))


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of a name out of `algorithm_names`."""
    return import_module(f"mua_rl.{name}.algorithm").ALGORITHM
