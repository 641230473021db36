"""The format reward: did the policy think first and answer last, in the tags that its prompt asks for?"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from mua_rl.rewards.completions import completion_text

THINK_ANSWER_INSTRUCTION = (
    "Think first, then answer. Write the reasoning between <think> and </think> and the final answer alone between "
    "<answer> and </answer>."
)
"""The instruction that `format_reward` checks; tasks put it into their prompts."""

_TAGS = re.compile(r"</?(?:think|answer)>")
_LAYOUT = re.compile(r"\s*<think>.*\S.*</think>\s*<answer>.*\S.*</answer>\s*", re.DOTALL)


def has_think_answer_format(text: str) -> bool:
    """Whether `text` is exactly `<think>…</think> <answer>…</answer>`, each tag once and neither part empty.

    The prompt's chat template may have written the opening `<think>` already, so it alone may be missing.
    """
    tags = _TAGS.findall(text)
    if tags == ["</think>", "<answer>", "</answer>"]:
        text, tags = "<think>" + text, ["<think>", *tags]
    if tags != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    return _LAYOUT.fullmatch(text) is not None


def format_reward(
    prompts: Sequence[Any] | None = None, completions: Sequence[Any] = (), **columns: Any
) -> list[float | None]:
    """Score 1.0 for each completion in the format of `has_think_answer_format`, else 0.0.

    A TRL reward function. The muA paper's recipe adds it to the correctness reward with weight 0.1.
    """
    return [float(has_think_answer_format(completion_text(completion))) for completion in completions]


class WatchedFormatReward:
    """`format_reward` that also logs how often the format was rewarded without a right answer.

    A format reward is the easiest part of a reward to earn. `format_only` rising while accuracy stands still is a
    policy that has settled for it.

    Args:
        correct: The task's correctness reward; called with the same columns.
    """

    __name__ = "format_reward"

    def __init__(self, correct: Callable[..., list[float | None]]) -> None:
        self.correct = correct

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] = (),
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores as `format_reward`; logs the metric `format_only`, a fraction of the batch."""
        scores = format_reward(prompts, completions)
        if log_metric is not None and scores:
            rights = self.correct(prompts=prompts, completions=completions, **columns)
            wins = sum(score == 1.0 and right != 1.0 for score, right in zip(scores, rights, strict=True))
            log_metric("format_only", wins / len(scores))
        return scores
