"""PPO as a sweep sees it (`mua_rl.run.algorithms.Algorithm`); SB3 is imported when it is asked for."""

from collections.abc import Hashable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mua_rl.errors import UserError
from mua_rl.lr.recipe import Recipe
from mua_rl.run.algorithms import Algorithm, Stacking
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.learning_rate import Base
from mua_rl.run.life import Names
from mua_rl.run.trial import Trial, TrialResult

if TYPE_CHECKING:
    from mua_rl.ppo.arguments import PPOArguments


class PPO(Algorithm):
    """See `Algorithm`, as for every method."""

    name = "ppo"
    most_stacked = 32
    judged_key = "rollout/return"
    plans_memory = False

    @property
    def names(self) -> Names:
        from mua_rl.ppo.run import NAMES

        return NAMES

    def argument_types(self) -> tuple[type[AdapterArguments], type]:
        if find_spec("stable_baselines3") is None:
            raise UserError("PPO needs stable-baselines3 and gymnasium: pip install 'mua-rl[control]'.")
        from mua_rl.ppo.arguments import PPOAdapterArguments, PPOArguments

        return PPOAdapterArguments, PPOArguments

    def complete(self, arguments: "PPOArguments", adapter: AdapterArguments, settings: dict[str, Any]) -> None:
        from mua_rl.ppo.arguments import complete

        complete(arguments, adapter, settings)

    def task(self, arguments: "PPOArguments") -> str:
        return arguments.env_id

    def steps(self, arguments: "PPOArguments") -> int:
        return arguments.total_timesteps

    def examine(self, arguments: "PPOArguments", adapter: AdapterArguments) -> tuple[Recipe, Base, str]:
        from mua_rl.ppo.run import recipe_of
        from mua_rl.ppo.setup import set_up

        setup = set_up(arguments, adapter)
        if (envs := setup.model.get_env()) is not None:
            envs.close()
        return recipe_of(arguments, setup), setup.base, ""

    def check_stacked(self, arguments: "PPOArguments", adapter: AdapterArguments, trial: Trial) -> None:
        from mua_rl.ppo.stacked.trainer import StackedPPO

        for envs in StackedPPO(arguments, [trial], *_base(arguments, adapter)).vec_envs:
            envs.close()

    def progress(self, checkpoints: Path, trial: Trial) -> Hashable:
        return None  # such a group takes seconds, and begins anew

    def train_stacked(
        self, arguments: "PPOArguments", adapter: AdapterArguments, trials: Sequence[Trial], stacking: Stacking
    ) -> list[TrialResult]:
        from mua_rl.ppo.arguments import limit_threads
        from mua_rl.ppo.stacked import trainer

        limit_threads()
        base = _base(arguments, adapter)
        device = "cpu" if arguments.device == "auto" else arguments.device
        return trainer.train_side_by_side(arguments, trials, *base, device=device, workers=stacking.threads)


def _base(arguments: "PPOArguments", adapter: AdapterArguments) -> tuple[Any, Any]:
    """The base policy, and the layers that carry LoRA.

    Raises:
        UserError: There is no base policy.
    """
    from mua_rl.ppo.setup import find_base

    base, name, _ = find_base(arguments, adapter.start_from)
    if base is None:
        raise UserError(f"{name} has no stacked form: run it singly.")
    return base, adapter.adapter("hidden").target_modules


ALGORITHM = PPO()
