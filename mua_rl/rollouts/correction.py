"""How far the engine's policy is from the trainer's: measured at each step, checked before the first, corrected.

Completions are sampled by the engine and scored by the trainer. The two compute the same policy in different kernels
and, where a sync is inexact, different policies. TRL multiplies the loss by the ratio of the two probabilities, cut or
masked (`vllm_importance_sampling_mode`), and runs a forward pass of its own to have the trainer's. Where a batch is
used for one optimizer step that pass gives what the loss computes again a moment later, so here the ratio is taken
inside the loss.
"""

import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import trl
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import pad

from mua_rl.errors import UserError
from mua_rl.rollouts.fsdp2 import output_layer_called

WARN_KL = 0.02
"""Nats per token above which rollouts are off-policy enough to say so."""

REFUSE_KL = 0.5
"""Nats per token above which the engine holds another policy."""

_PROBE_PROMPTS, _PROBE_TOKENS = 8, 16


@dataclass(frozen=True)
class Mismatch:
    """The engine's policy against the trainer's, on tokens that the engine sampled.

    Attributes:
        logp_difference: Mean of |log p(trainer) − log p(engine)|.
        largest: Its maximum.
        kl: Estimate of KL(engine ‖ trainer) in nats per token, the mean of e^d − 1 − d with d the difference: never
            negative, unbiased, and of small variance for small d (http://joschu.net/blog/kl-approx.html).
    """

    logp_difference: float
    largest: float
    kl: float

    @classmethod
    def of(cls, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> "Mismatch":
        """Compare log-probs.

        Args:
            trainer, engine: Log-probs `(sequences, tokens)`; NaN where the engine gave none.
            mask: `(sequences, tokens)`, true for the tokens that count.
        """
        difference = (trainer - engine).float()[mask.bool()]
        difference = difference[~difference.isnan()]
        if difference.numel() == 0:
            return cls(0.0, 0.0, 0.0)
        kl = difference.expm1() - difference
        mean, largest, mean_kl = torch.stack([difference.abs().mean(), difference.abs().max(), kl.mean()]).tolist()
        return cls(mean, largest, mean_kl)

    def metrics(self) -> dict[str, float]:
        """What goes into a run's metrics."""
        return {
            "rollout/logp_difference": self.logp_difference,
            "rollout/logp_difference_max": self.largest,
            "rollout/kl": self.kl,
        }


def importance_ratio(
    trainer: torch.Tensor,
    engine: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    smallest: float | None,
    largest: float | None,
) -> torch.Tensor:
    """The factor of the loss that corrects for sampling from the engine, as TRL defines it.

    Args:
        trainer, engine: Log-probs `(sequences, tokens)`; NaN where the engine gave none.
        mask: `(sequences, tokens)`, 1 for the tokens that count.
        mode: `token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask`: the ratio of a token or of a
            whole sequence, clamped to the bounds or set to 0 beyond them.
        smallest, largest: The bounds; `None` is none.

    Returns:
        `(sequences, tokens)` for the token modes and `(sequences, 1)` for the others.
    """
    difference = torch.nan_to_num((trainer - engine) * mask, nan=0.0)
    if mode.startswith("sequence_"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if mode.endswith("_truncate"):
        return ratio.clamp(min=smallest, max=largest)
    beyond = torch.zeros_like(ratio, dtype=torch.bool)
    if smallest is not None:
        beyond |= ratio < smallest
    if largest is not None:
        beyond |= ratio > largest
    return ratio.masked_fill(beyond, 0.0)


class CorrectedGRPOTrainer(trl.GRPOTrainer):
    """TRL's trainer with the engine's mismatch watched, and corrected for without a forward pass of its own."""

    _correcting: dict[str, Any] | None = None
    _warned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_vllm:
            self.add_callback(_ParityCheck(self))

    @property
    def _mode(self) -> str:
        """Which of TRL's two books of metrics is open."""
        assert self.model is not None
        return "train" if self.model.training else "eval"

    @property
    def corrects_in_loss(self) -> bool:
        """Whether the loss sees each batch with the weights that it was sampled with.

        With more optimizer steps per batch than one, TRL's own pass is needed for the ratio of PPO as well.
        """
        args: Any = self.args
        one_step = args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) == 0
        return self.use_vllm and self.vllm_importance_sampling_correction and one_step

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """As TRL's, but each prompt once: a group asks the same one many times."""
        assert self.num_generations and self.num_generations_eval
        group = self.num_generations if self._mode == "train" else self.num_generations_eval
        first = prompts[::group]
        repeated = prompts == [prompt for prompt in first for _ in range(group)]
        if repeated and self.environment_factories is None:  # which may give each repetition its own tools
            prompt_ids, images, fields = super()._tokenize_prompts(first)
            if images is None and not fields:
                return [list(ids) for ids in prompt_ids for _ in range(group)], images, fields
        return super()._tokenize_prompts(prompts)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.corrects_in_loss:
            with mock.patch.object(self, "vllm_importance_sampling_correction", False):
                return super()._generate_and_score_completions(inputs)
        output = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" in output and "sampling_per_token_logps" in output:
            self._watch(output["old_per_token_logps"], output["sampling_per_token_logps"], _scored(output))
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._correcting = inputs if self.corrects_in_loss and "sampling_per_token_logps" in inputs else None
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._correcting = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple:
        with output_layer_called(model):
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        inputs = self._correcting
        if inputs is not None:
            logps, engine, mask = result[0].detach(), inputs["sampling_per_token_logps"], _scored(inputs)
            ratio = importance_ratio(
                logps,
                engine,
                mask,
                self.vllm_importance_sampling_mode,
                self.vllm_importance_sampling_clip_min,
                self.vllm_importance_sampling_clip_max,
            )
            inputs["importance_sampling_ratio"] = ratio
            self._watch(logps, engine, mask)
            dropped = ((ratio == 0) * mask).sum() / mask.sum().clamp(min=1)
            self._metrics[self._mode]["rollout/dropped"].append(dropped.item())
        return result

    def _watch(self, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> None:
        mismatch = Mismatch.of(trainer, engine, mask)
        for name, value in mismatch.metrics().items():
            self._metrics[self._mode][name].append(value)
        if mismatch.kl > WARN_KL and not self._warned:
            self._warned = True
            _warn(mismatch, f"at step {self.state.global_step + 1}")

    @torch.no_grad()
    def check_rollouts(self) -> Mismatch:
        """Let the engine answer the first training prompts and compare its log-probs with the trainer's.

        Raises:
            UserError: The engine holds another policy.
        """
        rows: Any = self.train_dataset
        prompts = rows[:_PROBE_PROMPTS]["prompt"]
        prompt_ids = self._tokenize_prompts(prompts)[0]
        self.vllm_generation.sync_weights()
        completion_ids, engine = answers(self.vllm_generation, prompt_ids)
        trainer = self._logps(prompt_ids, completion_ids)
        scores = [torch.tensor([float("nan") if p is None else p for p in row]) for row in engine]
        padded = pad(scores, padding_value=float("nan")).to(trainer.device)  # type: ignore[arg-type]
        mismatch = Mismatch.of(trainer, padded, torch.ones_like(trainer))
        if not mismatch.kl < REFUSE_KL:
            raise UserError(
                f"the vLLM engine holds another policy than the trainer: KL {mismatch.kl:.3g} per token on the "
                "training prompts. Is it another model, or one that vLLM computes differently? See --vllm_sync."
            )
        if mismatch.kl > WARN_KL:
            _warn(mismatch, "before the first step")
        return mismatch

    def _logps(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> torch.Tensor:
        """The trainer's log-probs `(sequences, tokens)` of completions, padded on the right."""
        left, right = [torch.tensor(ids) for ids in prompt_ids], [torch.tensor(ids) for ids in completion_ids]
        sides = [(left, "left"), (right, "right")]
        fill = self._tokenizer.pad_token_id
        ids = torch.cat([pad(rows, padding_value=fill, padding_side=side) for rows, side in sides], 1)
        mask = torch.cat([pad([torch.ones_like(r) for r in rows], padding_side=side) for rows, side in sides], 1)
        device = self.accelerator.device
        length = max(len(row) for row in completion_ids)
        return self._get_per_token_logps_and_entropies(self.model, ids.to(device), mask.to(device), length)[0]


class _ParityCheck(TrainerCallback):
    """Runs the check once the weights are in place: before step 1, and after a resume."""

    def __init__(self, trainer: CorrectedGRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Check, and say what was found."""
        mismatch = self.trainer.check_rollouts()
        if state.is_world_process_zero:
            dtype = getattr(self.trainer.vllm_generation, "lora_dtype", None)
            lora = f", LoRA in {str(dtype).removeprefix('torch.')}" if dtype else ""
            print(
                f"mua_rl: the vLLM engine answers as the trainer does{lora}: mean |log-prob difference| "
                f"{mismatch.logp_difference:.2g}, KL {mismatch.kl:.2g} per token"
            )


def answers(generation: VLLMGeneration, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list]]:
    """A few tokens for each prompt, the same at each call with the same policy, and their log-probs."""
    seeded = {**generation.generation_kwargs, "seed": 0}
    few = min(generation.max_completion_length, _PROBE_TOKENS)
    with mock.patch.multiple(generation, generation_kwargs=seeded, max_completion_length=few):
        _, completion_ids, logps, _ = generation.generate(prompts=prompt_ids, images=None, num_generations=1)
    return completion_ids, [[token[0] for token in row] for row in logps]


def _scored(inputs: dict[str, Any]) -> torch.Tensor:
    """The mask of the tokens that the policy wrote and the loss counts."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _warn(mismatch: Mismatch, when: str) -> None:
    print(
        f"mua_rl: WARNING: rollouts come from another policy than the one trained: KL {mismatch.kl:.3g} per token, "
        f"mean |log-prob difference| {mismatch.logp_difference:.3g} {when} (a good engine stays below {WARN_KL}). The "
        "loss corrects for it in part; look at --vllm_sync, --bf16 and --dtype.",
        file=sys.stderr,
    )
