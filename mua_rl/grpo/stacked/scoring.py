"""What the completions of trials side by side are worth: text, rewards, advantages and their metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mua_rl.envs.tasks import Task, as_completions
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.generation import Answers
from mua_rl.grpo.stacked.objective import completion_weights, group_advantages
from mua_rl.lm.text import completion_texts

Metrics = dict[str, float]


@dataclass(frozen=True)
class Rollout:
    """One step's completions of K trials with p prompts each, and what they are worth, on the CPU.

    Attributes:
        prompts: Token ids of the prompts, p of each trial after those of the trial before.
        answers: G completions of each prompt, b = p G for each trial.
        weighted_advantages: `(K, b)`, by which a completion's tokens count in the loss.
        metrics: Of each trial.
    """

    prompts: list[list[int]]
    answers: Answers
    weighted_advantages: torch.Tensor
    metrics: list[Metrics]


class Scoring:
    """Scores completions as a single run does.

    Args:
        task: Whose rewards.
        rows: Its rows that are used, by number.
        arguments: As for a single run.
        tokenizer: Of the policy.
        end_ids: Tokens that end a completion.
        new_tokens: The most tokens of a completion.

    Raises:
        UserError: The number of reward weights is not that of the rewards.
    """

    def __init__(
        self,
        task: Task,
        rows: Mapping[int, dict[str, Any]],
        arguments: GRPOArguments,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: list[int],
        new_tokens: int,
    ) -> None:
        self.task, self.rows, self.arguments, self.tokenizer = task, rows, arguments, tokenizer
        self.end_ids, self.new_tokens, self.rewards = end_ids, new_tokens, task.checked_rewards
        self.weights = torch.tensor(arguments.reward_weights or task.reward_weights or [1.0] * len(task.rewards))
        if len(self.weights) != len(task.rewards):
            raise UserError(f"--reward_weights takes {len(task.rewards)} numbers for the task {task.name}.")

    @property
    def group(self) -> int:
        """Completions per prompt G."""
        assert self.arguments.num_generations
        return self.arguments.num_generations

    def rollout(self, numbers: list[list[int]], prompts: list[list[list[int]]], answers: Answers) -> Rollout:
        """The completions of each trial's prompts, which are given by their rows' numbers and as token ids."""
        scores = [self._rewards(trial, text) for trial, text in zip(numbers, self.texts(answers), strict=True)]
        rewards = torch.stack([self._total(s) for s in scores])
        last = answers.tokens.gather(-1, answers.lengths[..., None] - 1).squeeze(-1)
        truncated = ~torch.isin(last, torch.tensor([*self.end_ids, self.tokenizer.pad_token_id]))
        counted = ~truncated if self.arguments.mask_truncated_completions else torch.ones_like(truncated)
        advantages = group_advantages(rewards, self.group, str(self.arguments.scale_rewards))
        weights = completion_weights(answers.lengths, counted, self.arguments.loss_type, self.new_tokens)
        grouped = rewards.view(len(rewards), -1, self.group)
        metrics = [
            {
                "reward": rewards[k].nanmean().item(),
                "frac_reward_zero_std": (grouped[k].amax(-1) == grouped[k].amin(-1)).float().mean().item(),
                "completions/mean_length": answers.lengths[k].float().mean().item(),
                "completions/clipped_ratio": truncated[k].float().mean().item(),
                **{
                    f"rewards/{getattr(function, '__name__', i)}/mean": scores[k][:, i].nanmean().item()
                    for i, function in enumerate(self.rewards)
                },
            }
            for k in range(len(numbers))
        ]
        return Rollout([ids for trial in prompts for ids in trial], answers, advantages * weights, metrics)

    def texts(self, answers: Answers) -> list[list[str]]:
        """The text of each trial's completions."""
        tokens, lengths = answers.tokens.tolist(), answers.lengths.tolist()
        return [
            completion_texts(self.tokenizer, [row[:length] for row, length in zip(rows, ends, strict=True)])
            for rows, ends in zip(tokens, lengths, strict=True)
        ]

    def _rewards(self, numbers: list[int], texts: list[str]) -> torch.Tensor:
        """Scores of one trial's completions, `(b, rewards)`; NaN where a reward gives none."""
        rows = [self.rows[number] for number in numbers for _ in range(self.group)]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["prompts"] = columns.pop("prompt")
        completions = as_completions(columns["prompts"], texts)
        scores = [reward(completions=completions, **columns) for reward in self.rewards]
        return torch.tensor([[float("nan") if s is None else s for s in row] for row in scores]).T

    def _total(self, scores: torch.Tensor) -> torch.Tensor:
        """Weighted sums of scores, `(b, rewards)` → `(b,)`; NaN where no reward gave a score."""
        return torch.where(scores.isnan().all(-1), torch.nan, (scores * self.weights).nansum(-1))
