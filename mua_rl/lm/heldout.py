"""Held-out accuracy: a policy's answers to problems it is not trained on, scored by the task's own verifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mua_rl.envs.tasks import Task, as_completions, checked
from mua_rl.lm.generation import generate
from mua_rl.run.processes import gathered


@dataclass(frozen=True)
class HeldOutResult:
    """Answers to the held-out problems, in order, with the score of each.

    A score is 1.0 for right and 0.0 for wrong; a task of one's own may have others. `strict_scores` are those of the
    task's stricter verifier, where it has one: what only the other accepts may be reward hacking.
    """

    completions: list[str]
    scores: list[float]
    strict_scores: list[float] | None = None

    @property
    def accuracy(self) -> float:
        """Share of right answers, or the mean score."""
        return sum(self.scores) / len(self.scores)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over problems, as if two more had been right and two wrong (Agresti, Coull).

        Otherwise sixteen wrong answers to sixteen problems would be known without any error.
        """
        scores = [*self.scores, *2 * [min(0.0, *self.scores), max(1.0, *self.scores)]]
        mean = sum(scores) / len(scores)
        return sum((score - mean) ** 2 for score in scores) ** 0.5 / len(scores)

    def metrics(self) -> dict[str, float]:
        """The result as a run's metrics have it."""
        metrics = {"held_out/accuracy": self.accuracy}
        if self.strict_scores:
            metrics["held_out/strict_accuracy"] = sum(self.strict_scores) / len(self.strict_scores)
        return metrics


def gather(own: HeldOutResult, number: int) -> HeldOutResult:
    """The result on all `number` problems from each process's on its own (`processes.share_of`)."""
    strict = None if own.strict_scores is None else gathered(own.strict_scores)[:number]
    return HeldOutResult(gathered(own.completions)[:number], gathered(own.scores)[:number], strict)


def held_out(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Dataset,
    max_new_tokens: int,
    temperature: float = 0.0,
    template: Mapping[str, Any] | None = None,
) -> HeldOutResult:
    """Let a policy answer `problems` (rows of `task`) and score its answers; the arguments are those of `generate`.

    Raises:
        UserError: A verifier of the user's own failed.
    """
    answers = generate(model, tokenizer, problems["prompt"], max_new_tokens, temperature, template=template)
    return score(answers, task, problems)


def score(completions: list[str], task: Task, problems: Dataset) -> HeldOutResult:
    """Score answers to `problems` with the verifiers of their task.

    Raises:
        UserError: A verifier of the user's own failed.
    """
    columns = {name: problems[name] for name in problems.column_names if name != "prompt"}
    columns |= {"prompts": problems["prompt"], "completions": as_completions(problems["prompt"], completions)}
    scores, strict = (
        [score or 0.0 for score in checked(verifier, task.name)(**columns)] if verifier else None
        for verifier in (task.correct, task.strict)
    )
    assert scores is not None
    return HeldOutResult(completions, scores, strict)
