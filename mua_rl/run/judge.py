"""Whether a run can still learn, by the metrics of its steps alone: one that cannot need not go on to its end."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PATIENCE = 20
"""Steps in a row that must teach nothing before a run is stopped: hard problems have barren steps by chance."""
_COLLAPSED = 0.1
"""The share of the first steps' length below which completions have collapsed."""
_SHORT = 20
"""Tokens: completions that are shorter from the beginning can shorten no further by any fault."""

_CURE_OF_RATE = "the learning rate is too large: try a quarter of it with --lr"


def why_no_learning(history: Sequence[Mapping[str, Any]], patience: int = PATIENCE) -> str:
    """Say why a run cannot learn any more, and the cure; "" where it can, or where that is not known yet.

    A run is judged by its newest steps. Completions without a score, and a gradient of 0, teach nothing; a policy that
    has solved its problems has no gradient either, so one whose reward has risen since its first steps may go on.
    Completions that have collapsed to a fraction of their length, for less reward, come from a ruined policy.

    Args:
        history: The metrics of each step, or their means over several, in order and under TRL's names: `reward`,
            `grad_norm`, `frac_reward_zero_std`, `completions/clipped_ratio` and `completions/mean_length`.
        patience: How many of the newest entries must agree.
    """
    if len(history) < patience:
        return ""
    first, newest = history[:patience], history[-patience:]
    rewards = _mean(first, "reward"), _mean(newest, "reward")
    span = f"in {patience} steps in a row"
    if rewards[1] is None:
        return f"no completion had a score {span}: see what the rewards were given with --log_completions"
    gain = 0.0 if rewards[0] is None else rewards[1] - rewards[0]
    if all(map(_taught_nothing, newest)):
        had_learnt = not all(map(_taught_nothing, history))
        if had_learnt and gain > 0:
            return ""
        if _is_always(newest, "completions/clipped_ratio", 1.0):
            cure = "raise --max_completion_length, or ask in another way"
            return f"all completions were cut off and taught nothing {span}: {_CURE_OF_RATE if had_learnt else cure}"
        cure = "take problems of another difficulty, or see what the rewards were given with --log_completions"
        if _is_always(newest, "frac_reward_zero_std", 1.0):
            cause = f"the completions of no prompt differed in reward {span}"
        else:
            cause = f"the gradient was zero {span}"
        return f"{cause}: {_CURE_OF_RATE if had_learnt and gain < 0 else cure}"
    began = _mean(first, "completions/mean_length") or 0.0
    lengths = [step.get("completions/mean_length", math.inf) for step in newest]
    if began >= _SHORT and max(lengths) < _COLLAPSED * began and gain < 0:
        return (
            f"completions have collapsed from {began:.0f} to {lengths[-1]:.0f} tokens, and earn less: {_CURE_OF_RATE}"
        )
    return ""


def _taught_nothing(step: Mapping[str, Any]) -> bool:
    """Whether a step had no gradient, or none but that of a penalty that holds the policy where it is."""
    return step.get("grad_norm") == 0.0 or step.get("frac_reward_zero_std") == 1.0


def _is_always(steps: Sequence[Mapping[str, Any]], name: str, value: float) -> bool:
    return all(step.get(name) == value for step in steps)


def _mean(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a metric over the steps that have it as a number."""
    values = [step[name] for step in steps if step.get(name) is not None and not math.isnan(step[name])]
    return statistics.fmean(values) if values else None
