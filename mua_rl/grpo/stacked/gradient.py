"""The gradient of trials side by side: a rollout's completions in packed forward passes, and the loss of each trial."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.objective import loss
from mua_rl.grpo.stacked.packing import (
    GPU_ALIGNED,
    UNLABELLED,
    Batch,
    Completion,
    Row,
    attention_bias,
    batches,
    completion_sums,
    pack,
)
from mua_rl.grpo.stacked.scoring import Metrics, Rollout
from mua_rl.rollouts.correction import REFUSE_KL, Mismatch, importance_ratio


class Gradient:
    """Adds a rollout's gradient to that of the trials' A and B.

    Args:
        model: The base with the trials' LoRAs and a fused output layer.
        arguments: As for a single run; `use_vllm`: completions come from an engine, whose policy is not quite the same.
        tokens: The most tokens of all trials together in one forward pass.
        pad_token_id: Fills rows up.
        autocast: The context of forward passes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: GRPOArguments,
        tokens: int,
        pad_token_id: int,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.model, self.arguments, self.tokens, self.pad_token_id = model, arguments, tokens, pad_token_id
        self.autocast = autocast
        self._compared: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def passes(self, rollout: Rollout) -> Iterator[Batch]:
        """What has a part in the gradient, in batches for a forward pass.

        Completions without advantage have none. Equal completions of one prompt are computed once, with the sum of
        their advantages.
        """
        rows = [self._rows(rollout, k) for k in range(len(rollout.answers.tokens))]
        aligned = GPU_ALIGNED if self.model.device.type == "cuda" else 1
        return batches(rows, self.tokens, self.pad_token_id, aligned)

    def _rows(self, rollout: Rollout, k: int) -> list[Row]:
        """Of one trial."""
        lengths, weights = rollout.answers.lengths[k].tolist(), rollout.weighted_advantages[k].tolist()
        logps = None if rollout.answers.logps is None else rollout.answers.logps[k].tolist()
        trials = len(rollout.answers.tokens)
        prompts = rollout.prompts[k * len(rollout.prompts) // trials : (k + 1) * len(rollout.prompts) // trials]
        group = len(lengths) // len(prompts)
        summed: dict[int, dict[tuple[int, ...], Completion]] = {}
        for i, tokens in enumerate(rollout.answers.tokens[k].tolist()):
            if weights[i] != 0:
                completions = summed.setdefault(i // group, {})
                ids = tuple(tokens[: lengths[i]])
                known = completions.get(ids, Completion(ids, 0.0, logps and logps[i][: lengths[i]]))
                completions[ids] = known._replace(weight=known.weight + weights[i])
        return [row for prompt, found in summed.items() for row in pack(prompts[prompt], found.values())]

    def backward(self, batch: Batch) -> torch.Tensor:
        """Add a pass's gradient to the trials'; the losses `(K,)`."""
        batch = batch.to(self.model.device)
        logps = self.log_probs(batch.ids, batch.labels, batch.positions, batch.parts).view(*batch.weights.shape, 1)
        scored = (batch.labels != UNLABELLED).view(logps.shape)
        weights = batch.weights
        if self.arguments.use_vllm:
            self._compared.append((logps.detach().squeeze(-1), batch.logps, scored.squeeze(-1)))
            if self.arguments.vllm_importance_sampling_correction:
                weights = weights * self.importance(logps.detach(), batch)
        losses = loss(logps, scored, weights)  # as if each token were a completion, for each has its weight
        losses.sum().backward()
        return losses.detach()

    def importance(self, logps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The factor of each token that corrects for sampling from the engine, `(K, b·t)`."""
        difference = (logps.view(batch.ids.shape) - batch.logps.view(batch.ids.shape)).nan_to_num(0.0)
        level, _, cut = str(self.arguments.vllm_importance_sampling_mode).partition("_")
        if level == "sequence":
            difference = completion_sums(difference, batch.parts)
        nothing, everything = torch.zeros_like(difference), torch.ones_like(difference)
        bounds = self.arguments.vllm_importance_sampling_clip_min, self.arguments.vllm_importance_sampling_clip_max
        return importance_ratio(difference, nothing, everything, f"token_{cut}", *bounds).view(batch.weights.shape)

    def mismatches(self, first: bool) -> list[Metrics]:
        """How far the engine's policy was from each trial's in the passes since the last call; none without an engine.

        Args:
            first: Whether this is the first step.

        Raises:
            UserError: The engine holds another policy before the first step.
        """
        if not self._compared:
            return []
        ours, theirs, scored = (torch.cat(tensors, 1) for tensors in zip(*self._compared, strict=True))
        self._compared = []
        found = [Mismatch.of(*trial) for trial in zip(ours, theirs, scored, strict=True)]
        if first and max(mismatch.kl for mismatch in found) > REFUSE_KL:
            raise UserError("the vLLM engine holds another policy than the trainer: run the trials without --use_vllm.")
        return [mismatch.metrics() for mismatch in found]

    def log_probs(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
        parts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probs `(R, t)` of labels, each the token after its place; 0 where it is `UNLABELLED`.

        Sequences are padded on the right.

        Args:
            ids, labels: `(R, t)`.
            positions, parts: Of rows that are packed, see `packing.Batch`; `None`: each row is one sequence, for which
                causal attention needs no mask.
        """
        inputs = {"input_ids": ids, "shift_labels": labels}
        if positions is not None and parts is not None:
            dtype = torch.bfloat16 if self.arguments.bf16 else self.model.dtype
            inputs |= {"position_ids": positions, "attention_mask": attention_bias(parts, dtype)}
        with self.autocast():
            return self.model(**inputs, fused_lm_head=True).log_probs
