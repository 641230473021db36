"""Rewards for reasoning-gym's generators: each generator's own scorer, run in a process that can be killed."""

import base64
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from mua_rl.rewards.completions import completion_text, last_number, required_column, tagged_answer
from mua_rl.rewards.worker_pool import Failure, shared_pool

WORKER_MODULE = "mua_rl.rewards.reasoning_worker"
MAX_ANSWER_CHARS = 20_000
ANSWER_READERS: dict[str, Callable[[str], str | None]] = {
    "tags": tagged_answer,
    "number": last_number,
    "text": str.strip,
}
"""What counts as the answer: the inside of the last `<answer>` tags, the last number of the reply, or all of it."""


def packed(value: Any) -> str:
    """A generator's entry or configuration as text, for a column of the dataset."""
    return base64.b64encode(pickle.dumps(value)).decode("ascii")


def reasoning_scores(
    completions: Sequence[Any],
    generator: Sequence[str],
    config: Sequence[str],
    entry: Sequence[str],
    answer_in: Sequence[str] = (),
) -> list[float | Failure]:
    """The generator's score in [0, 1] of each completion's answer, or why there is none; no answer scores 0.

    Args:
        answer_in: Which of `ANSWER_READERS` finds each answer; none given: "tags".
    """
    answers = _answers(completions, answer_in)
    scores: list[float | Failure] = [0.0] * len(answers)
    scored = [i for i, answer in enumerate(answers) if answer and len(answer) <= MAX_ANSWER_CHARS]
    requests = list(dict.fromkeys((generator[i], config[i], entry[i], str(answers[i])) for i in scored))
    replies = dict(zip(requests, shared_pool(WORKER_MODULE).ask(requests), strict=True)) if requests else {}
    for i in scored:
        scores[i] = replies[generator[i], config[i], entry[i], str(answers[i])]
    return scores


def _answers(completions: Sequence[Any], answer_in: Sequence[str]) -> list[str | None]:
    readers = [ANSWER_READERS[name] for name in answer_in or ["tags"] * len(completions)]
    return [read(completion_text(completion)) for read, completion in zip(readers, completions, strict=True)]


def reasoning_reward(
    prompts: Sequence[Any] | None = None,
    completions: Sequence[Any] = (),
    generator: Sequence[str] = (),
    config: Sequence[str] = (),
    entry: Sequence[str] = (),
    answer_in: Sequence[str] = (),
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The score that reasoning-gym gives the answer in each completion, between 0 and 1 (see `reasoning_scores`).

    A TRL reward function. It logs `reasoning/timeout`, `reasoning/error` and `reasoning/no_answer`, each a fraction of
    the batch.

    Raises:
        UserError: There is no column of generators, configurations or entries.
        GraderFault: reasoning-gym cannot be started.
    """
    for name, values in (("generator", generator), ("config", config), ("entry", entry)):
        required_column("reasoning_reward", name, values, columns, completions)
    scores = reasoning_scores(completions, generator, config, entry, answer_in)
    if log_metric is not None and scores:
        without = sum(not answer for answer in _answers(completions, answer_in))
        log_metric("reasoning/timeout", sum(score is Failure.TIMEOUT for score in scores) / len(scores))
        log_metric("reasoning/no_answer", without / len(scores))
        errors = sum(isinstance(score, Failure) and score is not Failure.TIMEOUT for score in scores)
        log_metric("reasoning/error", errors / len(scores))
    return [0.0 if isinstance(score, Failure) else score for score in scores]


def reasoning_correct(
    prompts: Sequence[Any] | None = None, completions: Sequence[Any] = (), **columns: Any
) -> list[float | None]:
    """1.0 for a full score of `reasoning_reward`, else 0.0: partial credit is no right answer."""
    columns.pop("log_metric", None)
    scores = reasoning_reward(prompts, completions, **columns)
    return [float(score is not None and score >= 1.0 - 1e-9) for score in scores]
