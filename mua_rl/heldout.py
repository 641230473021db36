"""Held-out accuracy: a policy's answers to problems it is not trained on, scored by the task's own verifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from mua_rl.envs.tasks import Task, checked
from mua_rl.processes import gathered


@dataclass(frozen=True)
class HeldOutResult:
    """Answers to the held-out problems, in order, with the score of each (1.0 right, 0.0 wrong).

    `strict_scores` are those of the task's stricter verifier, where it has one: what only the other accepts may be
    reward hacking.
    """

    completions: list[str]
    scores: list[float]
    strict_scores: list[float] | None = None

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.scores) / len(self.scores)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over problems."""
        return (self.accuracy * (1 - self.accuracy) / len(self.scores)) ** 0.5

    def metrics(self) -> dict[str, float]:
        """What goes into a run's metrics."""
        metrics = {"held_out/accuracy": self.accuracy}
        if self.strict_scores:
            metrics["held_out/strict_accuracy"] = sum(self.strict_scores) / len(self.strict_scores)
        return metrics


def is_conversational(tokenizer: Any) -> bool:
    """Whether the policy wants prompts as chat messages."""
    return tokenizer.chat_template is not None


def prompt_ids(tokenizer: Any, prompts: Sequence, **options: Any) -> list[list[int]]:
    """Token ids of prompts (strings, or lists of messages) as a policy is asked them.

    Args:
        options: Of the chat template.
    """
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True, **options)[
        "input_ids"
    ]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 128,
    seed: int = 0,
) -> list[str]:
    """One completion per prompt (a string or a list of messages); temperature 0 is greedy decoding.

    Sampling draws from torch's global generator, seeded with `seed`; its state is put back afterwards, so that an
    evaluation in mid-training changes nothing in the training.
    """
    generator_state = torch.get_rng_state()
    was_training = model.training
    model.eval()
    options = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    if temperature != 0:
        options |= {"top_k": 0, "top_p": 1.0}
        set_seed(seed)
    completions: list[str] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="held-out", leave=False, disable=None):
        batch = list(prompts[start : start + batch_size])
        if isinstance(batch[0], str):
            inputs = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                batch,
                add_generation_prompt=True,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                return_dict=True,
            )
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options)
        answers = output[:, inputs["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(answers, skip_special_tokens=True)
    model.train(was_training)
    torch.set_rng_state(generator_state)
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
) -> HeldOutResult:
    """Answer `problems` (rows of `task`) and score the answers with `task.correct`."""
    return score(generate(model, tokenizer, problems["prompt"], max_new_tokens, temperature), task, problems)


def score(completions: list[str], task: Task, problems: Dataset) -> HeldOutResult:
    """Score answers to `problems` with the verifiers of their task."""
    columns = {name: problems[name] for name in problems.column_names if name != "prompt"}
    columns |= {"prompts": problems["prompt"], "completions": completions}
    scores, strict = (
        [score or 0.0 for score in checked(verifier, task.name)(**columns)] if verifier else None
        for verifier in (task.correct, task.strict)
    )
    assert scores is not None
    return HeldOutResult(completions, scores, strict)
