"""The reward-hacking watch on held-out answers: what only the ordinary verifier accepts.

The other half of the watch is logged by the rewards themselves, at every training step, through TRL's `log_metric`:
`math/timeout`, `math/error`, `math/no_answer`, `math/unreadable`, `format_only` and the code reward's counts.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from mua_rl.envs.tasks import Task


def strict_metrics(task: Task, problems: Dataset, completions: Sequence[Any]) -> dict[str, float]:
    """Accuracy of held-out answers under the task's stricter verifier, and how much the ordinary one adds to it.

    Args:
        task: Its `strict` verifier is used; without one there is nothing to report.
        problems: The rows that were answered.
        completions: One answer per row.

    Returns:
        `strict_accuracy`, the share right under both, and `strict_gap`, the share right under `correct` only. A gap
        that grows while accuracy rises is a policy that games the extraction. Empty without a strict verifier.
    """
    if task.strict is None or not completions:
        return {}
    columns = {name: problems[name] for name in problems.column_names if name != "prompt"}
    arguments = {"prompts": problems["prompt"], "completions": list(completions), **columns}
    correct = [score == 1.0 for score in task.correct(**arguments)]
    strict = [score == 1.0 for score in task.strict(**arguments)]
    both = sum(a and b for a, b in zip(correct, strict, strict=True))
    return {
        "strict_accuracy": both / len(correct),
        "strict_gap": (sum(correct) - both) / len(correct),
    }
