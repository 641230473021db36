"""The GRPO objective of several trials at once: advantages within groups, and the weight of every token in the loss.

Each batch of completions is used for one optimizer step, so the probability ratio is 1 when its gradient is taken and
clips nothing: the loss is a weighted sum of the tokens' ratios, and a completion without advantage, or masked, has no
part in it. As TRL 1.16 defines it; `tests/test_arms_grpo_loss.py` holds it against TRL's own.
"""

import torch
from trl.trainer.utils import nanstd

LOSS_TYPES = ("dapo", "grpo", "dr_grpo")
_EPSILON = 1e-4


def group_advantages(rewards: torch.Tensor, group: int, scale: str = "group") -> torch.Tensor:
    """Rewards against the mean of their group, in units of a standard deviation.

    Args:
        rewards: `(K, b)`, completions of one prompt side by side; NaN where a completion could not be scored.
        group: Completions per prompt G.
        scale: The standard deviation is that of the "group", of the trial's whole "batch", or "none" at all.

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
        lengths: Tokens of the completions, `(K, b)`, the end token included.
        counted: Whether a completion counts, `(K, b)`; a truncated one may not.
        loss_type: "dapo" is a mean over all tokens of the batch, "grpo" one over completions of their tokens' mean,
            "dr_grpo" has the constant `longest` for the number of tokens of a completion.
        longest: `max_completion_length`.
    """
    if loss_type == "dapo":
        weights = 1 / (lengths * counted).sum(-1, keepdim=True).clamp(min=1)
    elif loss_type == "grpo":
        weights = 1 / lengths.clamp(min=1) / lengths.shape[1]
    else:
        weights = torch.full((1, 1), 1 / (lengths.shape[1] * longest), device=lengths.device)
    return weights * counted


def loss(logps: torch.Tensor, mask: torch.Tensor, weighted_advantages: torch.Tensor) -> torch.Tensor:
    """The loss of completions that are on policy.

    Args:
        logps: `(K, b, t)` of the completions' tokens.
        mask: `(K, b, t)`, true for tokens that are there.
        weighted_advantages: `(K, b)`, each advantage times its `completion_weights`.

    Returns:
        `(K,)`
    """
    ratio = torch.where(mask, (logps - logps.detach()).exp(), 0.0)
    return -(ratio.sum(-1) * weighted_advantages).sum(-1)
