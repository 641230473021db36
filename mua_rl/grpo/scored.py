"""Whether the completions of a run could teach anything: its rewards gave scores, and its steps had a gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mua_rl.envs.tasks import Task
from mua_rl.errors import Unscored
from mua_rl.grpo.arguments import GRPOArguments


def unscored(task: Task, arguments: GRPOArguments, number: int, steps: Sequence[Mapping[str, Any]]) -> Unscored | None:
    """What to say of steps none of which could teach anything; `None` where one could, or there are none.

    Args:
        task, arguments: Of the run.
        number: How many steps there were.
        steps: The metrics of each, or their means over several.
    """
    if not steps:
        return None
    names = ", ".join(getattr(reward, "__name__", "a reward without a name") for reward in task.rewards)
    whose, ending = f"the rewards of the task {task.name} ({names})", "so nothing was learnt, and there is no LR record"
    rewards = [step["reward"] for step in steps if step["reward"] is not None and not math.isnan(step["reward"])]
    if not rewards:
        return Unscored(
            f"no completion had a score in any of {number} steps, {ending}: see why {whose} give None; "
            "--log_completions shows what they were given."
        )
    if any(step.get("grad_norm", 0.0) != 0.0 for step in steps):
        return None
    most = arguments.max_completion_length or task.max_completion_length
    masks = arguments.mask_truncated_completions
    masked = [masks and step.get("completions/clipped_ratio") == 1.0 for step in steps]
    even = [step.get("frac_reward_zero_std") == 1.0 for step in steps]
    if all(masked):
        return Unscored(
            f"all completions of all {number} steps were cut off at {most} tokens and left out of the loss, {ending}: "
            "raise --max_completion_length, or give --mask_truncated_completions false."
        )
    if all(map(max, masked, even)):
        return Unscored(
            f"the completions of no prompt differed in reward in any of {number} steps, {ending}: the mean reward was "
            f"{sum(rewards) / len(rewards):.3g}; see what {whose} were given with --log_completions, or take problems "
            "of another difficulty."
        )
    return None
