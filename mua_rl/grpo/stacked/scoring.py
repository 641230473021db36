"""What the completions of stacked trials are worth: rewards, advantages, and the weight of every token in the loss.

TRL computes the same within methods of its trainer, which cannot be called for several trials at once;
`tests/test_stacked_grpo_loss.py` holds these functions against them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import nanstd

from mua_rl.envs.tasks import Task, as_completions
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.generation import Completions, Sampling
from mua_rl.lm.text import completion_texts

_EPSILON = 1e-4  # as in TRL

Metrics = dict[str, float]
"""What is measured of one trial in one step, under TRL's names."""


@dataclass(frozen=True)
class ScoredCompletions:
    """One step's completions of K trials with p prompts each, and what they are worth, on the CPU.

    Attributes:
        prompts: Token ids of each trial's prompts.
        completions: G completions of each prompt, b = p · G of each trial.
        weighted_advantages: `(K, b)`, the weight of a completion's tokens in the loss.
        metrics: The metrics of each trial.
    """

    prompts: list[list[list[int]]]
    completions: Completions
    weighted_advantages: torch.Tensor
    metrics: list[Metrics]


class Scoring:
    """Scores completions as a single run does.

    Args:
        task: The task, whose rewards score them.
        rows: The task's rows that are used, by number.
        arguments: The arguments of a single run.
        tokenizer: The policy's tokenizer.
        sampling: How completions are generated.

    Raises:
        UserError: The number of reward weights is not that of the rewards.
    """

    def __init__(
        self,
        task: Task,
        rows: Mapping[int, dict[str, Any]],
        arguments: GRPOArguments,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
    ) -> None:
        assert arguments.num_generations
        self.task, self.rows, self.arguments, self.tokenizer = task, rows, arguments, tokenizer
        self.sampling, self.rewards, self.group = sampling, task.checked_rewards, arguments.num_generations
        self.weights = torch.tensor(arguments.reward_weights or task.reward_weights or [1.0] * len(task.rewards))
        if len(self.weights) != len(task.rewards):
            raise UserError(f"--reward_weights takes {len(task.rewards)} numbers for the task {task.name}.")

    def score(
        self, numbers: list[list[int]], prompts: list[list[list[int]]], completions: Completions
    ) -> ScoredCompletions:
        """Score the completions of each trial's prompts, which are given by their rows' numbers and as token ids."""
        scores = [self._scores(rows, texts) for rows, texts in zip(numbers, self.texts(completions), strict=True)]
        rewards = torch.stack([self._total(trial) for trial in scores])
        last = completions.tokens.gather(-1, completions.lengths[..., None] - 1).squeeze(-1)
        truncated = ~torch.isin(last, torch.tensor([*self.sampling.end_ids, self.sampling.pad_id]))
        counted = ~truncated if self.arguments.mask_truncated_completions else torch.ones_like(truncated)
        advantages = group_advantages(rewards, self.group, str(self.arguments.scale_rewards))
        weights = completion_weights(completions.lengths, counted, self.arguments.loss_type, self.sampling.new_tokens)
        deviations = nanstd(rewards.view(len(rewards), -1, self.group), dim=-1)
        columns = {
            "reward": rewards.nanmean(-1),
            "frac_reward_zero_std": torch.isclose(deviations, torch.zeros(())).float().mean(-1),
            "completions/mean_length": completions.lengths.float().mean(-1),
            "completions/clipped_ratio": truncated.float().mean(-1),
        }
        for i, reward in enumerate(self.rewards):
            name = getattr(reward, "__name__", i)
            columns[f"rewards/{name}/mean"] = torch.stack([trial[:, i].nanmean() for trial in scores])
        metrics = [{name: column[k].item() for name, column in columns.items()} for k in range(len(numbers))]
        return ScoredCompletions(prompts, completions, advantages * weights, metrics)

    def texts(self, completions: Completions) -> list[list[str]]:
        """The text of each trial's completions."""
        trials = zip(completions.tokens.tolist(), completions.lengths.tolist(), strict=True)
        return [
            completion_texts(self.tokenizer, [row[:length] for row, length in zip(rows, lengths, strict=True)])
            for rows, lengths in trials
        ]

    def _scores(self, numbers: list[int], texts: list[str]) -> torch.Tensor:
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


def group_advantages(rewards: torch.Tensor, group: int, scale: str = "group") -> torch.Tensor:
    """Rewards less the mean of their group, in units of a standard deviation.

    Args:
        rewards: `(K, b)`, a prompt's completions one after another; NaN where a completion could not be scored.
        group: Completions per prompt G.
        scale: Whose standard deviation is the unit: that of the "group", of the trial's "batch", or "none" at all.

    Returns:
        `(K, b)`; 0 where the reward is NaN.
    """
    grouped = rewards.view(len(rewards), -1, group)
    advantages = grouped - grouped.nanmean(-1, keepdim=True)
    if scale == "group":
        advantages = advantages / (nanstd(grouped, dim=-1, keepdim=True) + _EPSILON)
    elif scale == "batch":
        advantages = advantages / (nanstd(rewards, dim=-1, keepdim=True) + _EPSILON)[..., None]
    return advantages.view(rewards.shape).nan_to_num(0.0)


def completion_weights(lengths: torch.Tensor, counted: torch.Tensor, loss_type: str, longest: int) -> torch.Tensor:
    """The factor of `−advantage · ratio` of each token of a completion in the loss, `(K, b)`.

    Args:
        lengths: The completions' numbers of tokens, `(K, b)`, the end token included.
        counted: Whether a completion counts, `(K, b)`; a truncated one may not.
        loss_type: "dapo" is a mean over all tokens of the batch, "grpo" one over completions of their tokens' mean,
            "dr_grpo" divides by the constant `longest` instead of a completion's number of tokens.
        longest: `max_completion_length`.
    """
    if loss_type == "dapo":
        weights = 1 / (lengths * counted).sum(-1, keepdim=True).clamp(min=1)
    elif loss_type == "grpo":
        weights = 1 / lengths.clamp(min=1) / lengths.shape[1]
    else:
        weights = torch.full((1, 1), 1 / (lengths.shape[1] * longest), device=lengths.device)
    return weights * counted
