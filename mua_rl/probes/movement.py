"""How far a few optimizer steps move a policy: measured on a probe batch and thrown away afterwards.

Two configurations at one learning rate change the weights by entries of one size, and yet the policy by different
amounts: LoRA's change lies in r of a layer's m output directions, of which the reward's gradient has only a part. What
a step does to the policy is measured here in seconds, as the KL divergence from where it started, so that a rule may
take account of it (`mua_rl.analysis.predictions`).
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from trl.trainer.utils import pad, selective_log_softmax

from mua_rl.adapter.adapters import Adapter
from mua_rl.adapter.groups import param_groups
from mua_rl.envs.tasks import Task, as_completions, load_split
from mua_rl.errors import Diverged, UserError
from mua_rl.lm.generation import complete, end_ids
from mua_rl.lm.text import completion_texts, is_conversational, prompt_ids

_ROWS_AT_ONCE = 48


@dataclass(frozen=True)
class ProbeBatch:
    """Completions that a policy wrote itself, and what they are worth.

    Attributes:
        ids: `(R, T)` token ids: prompts padded on the left, completions padded on the right.
        mask: `(R, T)`, 1 for tokens that are there.
        written: `(R, T - 1)`, 1 where the next token is of the completion.
        advantages: `(R,)`, rewards normalised over each prompt's group.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    written: torch.Tensor
    advantages: torch.Tensor

    def pieces(self, rows: int = _ROWS_AT_ONCE) -> list["ProbeBatch"]:
        """The batch in pieces of at most so many rows."""
        parts = [part.split(rows) for part in (self.ids, self.mask, self.written, self.advantages)]
        return [ProbeBatch(*piece) for piece in zip(*parts, strict=True)]


@torch.no_grad()
def probe_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: int = 12,
    group: int = 8,
    new_tokens: int | None = None,
    seed: int = 0,
) -> ProbeBatch:
    """Let a policy answer training prompts at temperature 1 and score the answers with the task's first reward.

    Prompts whose answers all have one reward tell nothing; up to ten times as many are asked until there are enough.

    Raises:
        UserError: The task fails, or no prompt has answers of different rewards.
    """
    rows = load_split(task, False, is_conversational(tokenizer)).shuffle(seed=seed)
    device = next(model.parameters()).device
    ends = torch.tensor(end_ids(model, tokenizer), device=device)
    asked, answers, advantages = [], [], []
    set_seed(seed)
    for start in range(0, min(len(rows), 10 * prompts), prompts):
        piece = rows[start : start + prompts]
        repeated = [ids for ids in prompt_ids(tokenizer, piece["prompt"]) for _ in range(group)]
        out = complete(model, tokenizer, repeated, new_tokens or task.max_completion_length, temperature=1.0)
        columns = {name: [v for v in values for _ in range(group)] for name, values in piece.items()}
        columns["prompts"] = columns.pop("prompt")
        texts = completion_texts(tokenizer, out)
        rewards = task.rewards[0](completions=as_completions(columns["prompts"], texts), **columns)
        scores = torch.tensor([float(reward or 0.0) for reward in rewards]).view(-1, group)
        spread = scores.std(1, keepdim=True)
        worth = ((scores - scores.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
        for row in (spread > 0).expand_as(scores).flatten().nonzero().flatten().tolist():
            ended = torch.isin(out[row], ends).nonzero()
            length = int(ended[0]) + 1 if len(ended) else len(out[row])
            asked.append(torch.tensor(repeated[row]))
            answers.append(out[row, :length].cpu())
            advantages.append(worth[row])
        if len(asked) >= prompts * group:
            break
    if not asked:
        raise UserError(
            f"the policy's answers to {10 * prompts} prompts of {task.name} all have the reward of their group: there "
            "is no gradient to probe with."
        )
    sides = [(asked, "left"), (answers, "right")]
    fill = tokenizer.pad_token_id
    ids = torch.cat([pad(part, padding_value=fill, padding_side=side) for part, side in sides], 1)
    mask = torch.cat([pad([torch.ones_like(r) for r in part], padding_side=side) for part, side in sides], 1)
    written = mask.clone()
    written[:, : -max(map(len, answers))] = 0
    batch = ProbeBatch(ids, mask, written[:, 1:], torch.stack(advantages))
    return ProbeBatch(*(part[: prompts * group].to(device) for part in vars(batch).values()))


def movement(
    model: Any,
    adapter: Adapter,
    learning_rate: float,
    batch: ProbeBatch,
    steps: int = 1,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[float]:
    """KL(start ‖ moved) per written token after each of a few AdamW steps on one batch; `model` stays as it was.

    The steps are those of GRPO's first: constant learning rate, gradient clipped at 1, no decay. A copy of the model
    is trained.

    Returns:
        `steps` numbers, in nats.

    Raises:
        Diverged: The divergence is not finite.
    """
    policy = adapter.attach(copy.deepcopy(model), seed=seed)
    optimizer = torch.optim.AdamW(param_groups(policy, adapter.learning_rates(learning_rate)), weight_decay=0.0)
    trained = [p for p in policy.parameters() if p.requires_grad]
    divergences = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        add_gradient(policy, batch, autocast=autocast)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        kl = divergence(model, policy, batch, autocast)
        if not kl < float("inf"):
            raise Diverged(f"the policy's divergence after step {step} at learning rate {learning_rate:.3g} is {kl}")
        divergences.append(kl)
    return divergences


def add_gradient(
    model: Any,
    batch: ProbeBatch,
    rows: int = _ROWS_AT_ONCE,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Add the gradient of GRPO's loss, at the policy that wrote the completions, to the weights' `grad`.

    Args:
        model: The policy.
        batch: What it wrote.
        rows: Completions in a pass, which bounds the memory of the logits.
        autocast: The context of forward passes.
    """
    tokens = batch.written.sum()
    for piece in batch.pieces(rows):
        with autocast():
            logits = _logits(model, piece)
        logps = selective_log_softmax(logits, piece.ids[:, 1:])
        (-(piece.advantages[:, None] * logps * piece.written).sum() / tokens).backward()


@torch.no_grad()
def divergence(
    start: Any, moved: Any, batch: ProbeBatch, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> float:
    """Mean over written tokens of KL(start ‖ moved), over the whole vocabulary."""
    total = torch.zeros((), device=batch.ids.device)
    for piece in batch.pieces():
        with autocast():
            before, after = _logits(start, piece), _logits(moved, piece)
        kl = nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True)
        total += (kl.sum(-1) * piece.written).sum()
    return float(total / batch.written.sum())


def _logits(model: Any, piece: ProbeBatch) -> torch.Tensor:
    """`(R, T - 1, V)` in fp32."""
    positions = (piece.mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=piece.ids, attention_mask=piece.mask, position_ids=positions, use_cache=False)
    return out.logits[:, :-1].float()
