"""Held-out accuracy: a policy's answers to problems it is not trained on, scored by the task's own verifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mua_rl.envs.tasks import Task, as_completions, checked
from mua_rl.lm.text import completion_texts, prompt_ids
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
        """What goes into a run's metrics."""
        metrics = {"held_out/accuracy": self.accuracy}
        if self.strict_scores:
            metrics["held_out/strict_accuracy"] = sum(self.strict_scores) / len(self.strict_scores)
        return metrics


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation settings, as for TRL."""
    given = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([] if given is None else [given] if isinstance(given, int) else given)})


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    min_new_tokens: int = 0,
) -> torch.Tensor:
    """What a policy itself writes, as it is trained: its softmax, not what a model's own generation settings make of it
    (those of Qwen2.5 have a repetition penalty and a top-k).

    Args:
        prompts: Token ids of each.
        temperature: 0 is greedy decoding.

    Returns:
        `(R, t)` token ids, filled up with the padding token after the end.
    """
    rows = [torch.tensor(ids, device=model.device) for ids in prompts]
    inputs = pad_sequence(rows, True, tokenizer.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
    # What is not said here, transformers takes from the model's settings.
    options: dict[str, Any] = {"do_sample": False}
    if temperature != 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        options |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    settings = GenerationConfig(
        **options,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids(model, tokenizer),
    )
    written = model.generate(input_ids=inputs, attention_mask=mask, generation_config=settings)
    return written[:, inputs.shape[1] :]


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 128,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
) -> list[str]:
    """One completion per prompt (a string or a list of messages); temperature 0 is greedy decoding.

    Sampling draws from torch's global generators, seeded with `seed`; their states are put back afterwards, so that an
    evaluation in mid-training changes nothing in the training.

    Args:
        template: Options of the chat template.
    """
    was_training = model.training
    model.eval()
    completions: list[str] = []
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), batch_size), desc="held-out", leave=False, disable=None):
            asked = prompt_ids(tokenizer, prompts[start : start + batch_size], **(template or {}))
            answers = complete(model, tokenizer, asked, max_new_tokens, temperature)
            completions += completion_texts(tokenizer, answers)
    model.train(was_training)
    return completions


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
    """Answer `problems` (rows of `task`) and score the answers with `task.correct`.

    Args:
        template: Options of the chat template.

    Raises:
        UserError: A verifier of one's own failed.
    """
    answers = generate(model, tokenizer, problems["prompt"], max_new_tokens, temperature, template=template)
    return score(answers, task, problems)


def score(completions: list[str], task: Task, problems: Dataset) -> HeldOutResult:
    """Score answers to `problems` with the verifiers of their task.

    Raises:
        UserError: A verifier of one's own failed.
    """
    columns = {name: problems[name] for name in problems.column_names if name != "prompt"}
    columns |= {"prompts": problems["prompt"], "completions": as_completions(problems["prompt"], completions)}
    scores, strict = (
        [score or 0.0 for score in checked(verifier, task.name)(**columns)] if verifier else None
        for verifier in (task.correct, task.strict)
    )
    assert scores is not None
    return HeldOutResult(completions, scores, strict)
