"""GRPO as a sweep sees it (`mua_rl.run.algorithms.Algorithm`); what needs a GPU's libraries is imported when called."""

import copy
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments, complete
from mua_rl.lr.recipe import Recipe
from mua_rl.run.algorithms import Algorithm, Stacking
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.learning_rate import Base
from mua_rl.run.life import Names
from mua_rl.run.trial import Trial, TrialResult


class GRPO(Algorithm):
    """See `Algorithm`, as for every method."""

    name = "grpo"
    most_stacked = 8  # more of them gain little, and take memory
    judged_key = "reward"
    plans_memory = True

    @property
    def names(self) -> Names:
        from mua_rl.grpo.run import NAMES

        return NAMES

    def argument_types(self) -> tuple[type[AdapterArguments], type]:
        return AdapterArguments, GRPOArguments

    def complete(self, arguments: GRPOArguments, adapter: AdapterArguments, settings: dict[str, Any]) -> None:
        complete(arguments, adapter, settings)

    def task(self, arguments: GRPOArguments) -> str:
        return arguments.task

    def steps(self, arguments: GRPOArguments) -> int:
        return arguments.max_steps

    def examine(self, arguments: GRPOArguments, adapter: AdapterArguments) -> tuple[Recipe, Base, str]:
        from mua_rl.grpo.run import recipe_of
        from mua_rl.grpo.setup import prepare_grpo
        from mua_rl.grpo.stacked.settings import check_policy

        setup = prepare_grpo(arguments, adapter)
        obstacle = ""
        if setup.adapter.rank is not None:
            try:
                check_policy(setup.policy, arguments)  # type: ignore[arg-type]  # a model of transformers, adapted
            except UserError as error:
                obstacle = str(error)
        return recipe_of(arguments, setup), setup.base, obstacle

    def check_stacked(self, arguments: GRPOArguments, adapter: AdapterArguments, trial: Trial) -> None:
        from mua_rl.grpo.stacked.settings import check

        check(arguments, [trial])

    def progress(self, checkpoints: Path, trial: Trial) -> Hashable:
        from mua_rl.grpo.stacked.checkpoint import mark

        return mark(checkpoints, trial)

    def train_stacked(
        self, arguments: GRPOArguments, adapter: AdapterArguments, trials: Sequence[Trial], stacking: Stacking
    ) -> list[TrialResult]:
        from mua_rl.grpo.stacked import memory, trainer

        on_step, why_hopeless, steps = stacking.on_step, stacking.why_hopeless, arguments.max_steps

        def keep_going(trial: Trial, history: list[dict[str, float]]) -> str | None:
            assert why_hopeless is not None
            rewards = [(step, metrics["reward"]) for step, metrics in enumerate(history, 1)]
            return why_hopeless(trial, [(step, reward) for step, reward in rewards if not math.isnan(reward)]) or None

        return trainer.train_side_by_side(
            copy.copy(arguments),
            trials,
            adapter.adapter("mlp").target_modules,
            on_step=(lambda step, _: on_step(step, steps)) if on_step else None,
            keep_going=keep_going if why_hopeless else None,
            start_from=adapter.start_from,
            memory=memory.TIMES_ONE_RUN if stacking.memory is None else stacking.memory,
            checkpoints=stacking.checkpoints,
        )


ALGORITHM = GRPO()
