"""The gradient of stacked trials: their completions in packed forward passes, and the loss of each trial.

Each batch of completions is used for one optimizer step, so the probability ratio is 1 when its gradient is taken and
clips nothing: TRL's loss is a weighted sum of the tokens' ratios, and a completion without advantage, or masked, has no
part in it.
"""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.packing import (
    GPU_ALIGNED,
    UNLABELLED,
    PackedBatch,
    WeightedCompletion,
    attention_bias,
    batches,
    completion_sums,
    pack,
)
from mua_rl.grpo.stacked.scoring import Metrics, ScoredCompletions
from mua_rl.rollouts.correction import REFUSE_KL, Mismatch, importance_ratio


class Gradient:
    """Adds the gradient of scored completions to that of the trials' A and B.

    Args:
        model: The base with the trials' LoRAs and a fused output layer.
        arguments: The arguments of a single run; with `use_vllm` completions come from an engine, whose policy is not
            quite the trainer's.
        tokens: The most tokens of all trials together in one forward pass.
        pad_id: The padding token.
    """

    def __init__(self, model: PreTrainedModel, arguments: GRPOArguments, tokens: int, pad_id: int) -> None:
        self.model, self.arguments, self.tokens, self.pad_id = model, arguments, tokens, pad_id
        self._compared: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def passes(self, scored: ScoredCompletions) -> Iterator[PackedBatch]:
        """What has a part in the gradient, in batches for a forward pass.

        Completions without advantage have no part. Equal completions of one prompt are computed once, with the sum of
        their advantages.
        """
        rows = [self._rows(scored, k) for k in range(len(scored.prompts))]
        return batches(rows, self.tokens, self.pad_id, GPU_ALIGNED if self.model.device.type == "cuda" else 1)

    def _rows(self, scored: ScoredCompletions, k: int) -> list[np.ndarray]:
        """The packed rows of one trial."""
        completions, prompts = scored.completions, scored.prompts[k]
        lengths, weights = completions.lengths[k].tolist(), scored.weighted_advantages[k].tolist()
        logps = None if completions.logps is None else completions.logps[k].tolist()
        distinct: list[dict[tuple[int, ...], WeightedCompletion]] = [{} for _ in prompts]
        for i, tokens in enumerate(completions.tokens[k].tolist()):
            if weights[i] != 0:
                ids, of_prompt = tuple(tokens[: lengths[i]]), distinct[i * len(prompts) // len(lengths)]
                equal = of_prompt.get(ids, WeightedCompletion(ids, 0.0, logps and logps[i][: lengths[i]]))
                of_prompt[ids] = equal._replace(weight=equal.weight + weights[i])
        return [row for ids, of_prompt in zip(prompts, distinct, strict=True) for row in pack(ids, of_prompt.values())]

    def backward(self, batch: PackedBatch) -> torch.Tensor:
        """Add a pass's gradient to the trials' gradients, and return the losses `(K,)`."""
        batch = batch.to(self.model.device)
        logps = self.log_probs(batch.ids, batch.labels, batch.positions, batch.segments).view(batch.weights.shape)
        scored, weights = (batch.labels != UNLABELLED).view(logps.shape), batch.weights
        if self.arguments.use_vllm:
            self._compared.append((logps.detach(), batch.logps, scored))
            if self.arguments.vllm_importance_sampling_correction:
                weights = weights * self.importance(logps.detach(), batch)
        ratio = torch.where(scored, (logps - logps.detach()).exp(), 0.0)
        losses = -(ratio * weights).sum(-1)
        losses.sum().backward()
        return losses.detach()

    def importance(self, logps: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The factor of each token that corrects for sampling from the engine, `(K, b·t)`."""
        difference = (logps.view(batch.ids.shape) - batch.logps.view(batch.ids.shape)).nan_to_num(0.0)
        level, _, cut = str(self.arguments.vllm_importance_sampling_mode).partition("_")
        if level == "sequence":
            difference = completion_sums(difference, batch.segments)
        bounds = self.arguments.vllm_importance_sampling_clip_min, self.arguments.vllm_importance_sampling_clip_max
        zeros, ones = torch.zeros_like(difference), torch.ones_like(difference)
        return importance_ratio(difference, zeros, ones, f"token_{cut}", *bounds).view(batch.weights.shape)

    def mismatches(self, first: bool) -> list[Metrics]:
        """How far the engine's policy was from each trial's since the last call; empty without an engine.

        Args:
            first: Whether this is the first step.

        Raises:
            UserError: The engine holds another policy before the first step.
        """
        if not self._compared:
            return []
        trainer, engine, scored = (torch.cat(tensors, 1) for tensors in zip(*self._compared, strict=True))
        self._compared = []
        mismatches = [Mismatch.of(*trial) for trial in zip(trainer, engine, scored, strict=True)]
        if first and max(mismatch.kl for mismatch in mismatches) > REFUSE_KL:
            raise UserError("the vLLM engine holds another policy than the trainer: run the trials without --use_vllm.")
        return [mismatch.metrics() for mismatch in mismatches]

    def log_probs(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probs `(R, t)` of labels, each the token after its place; 0 where it is `UNLABELLED`.

        Sequences are padded on the right.

        Args:
            ids, labels: `(R, t)`.
            positions, segments: Those of packed rows, see `packing.PackedBatch`; `None`: each row is one sequence, for
                which causal attention needs no mask.
        """
        inputs = {"input_ids": ids, "shift_labels": labels}
        if positions is not None and segments is not None:
            dtype = torch.bfloat16 if self.arguments.bf16 else self.model.dtype
            inputs |= {"position_ids": positions, "attention_mask": attention_bias(segments, dtype)}
        return self.model(**inputs, fused_lm_head=True).log_probs
