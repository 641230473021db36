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
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from mua_rl.errors import UserError
from mua_rl.rollouts.seams_trl import SeamedTrainer

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
        """The mismatch as a run's metrics have it."""
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
        smallest, largest: The bounds; `None` stands for no bound.

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


class CorrectedGRPOTrainer(SeamedTrainer):
    """TRL's trainer with the engine's mismatch watched, and corrected for without a forward pass of its own."""

    _warned = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.use_vllm:
            self.add_callback(_ParityCheck(self))

    def correction(self, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """See `SeamedTrainer.correction`."""
        bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        ratio = importance_ratio(trainer, engine, mask, self.vllm_importance_sampling_mode, *bounds)
        self.watch(trainer, engine, mask)
        self.note("rollout/dropped", (((ratio == 0) * mask).sum() / mask.sum().clamp(min=1)).item())
        return ratio

    def watch(self, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> None:
        """See `SeamedTrainer.watch`."""
        mismatch = Mismatch.of(trainer, engine, mask)
        for name, value in mismatch.metrics().items():
            self.note(name, value)
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
        prompts = self.prompt_ids(rows[:_PROBE_PROMPTS]["prompt"])
        self.vllm_generation.sync_weights()
        completions, engine = answers(self.vllm_generation, prompts)
        trainer = self.log_probs(prompts, completions)
        padded = torch.full_like(trainer, float("nan"))
        for row, values in zip(padded, engine, strict=True):
            row[: len(values)] = torch.tensor([float("nan") if value is None else value for value in values])
        mismatch = Mismatch.of(trainer, padded, torch.ones_like(trainer))
        if not mismatch.kl < REFUSE_KL:
            raise UserError(
                f"the vLLM engine holds another policy than the trainer: KL {mismatch.kl:.3g} per token on the "
                "training prompts. Is it another model, or one that vLLM computes differently? See --vllm_sync."
            )
        if mismatch.kl > WARN_KL:
            _warn(mismatch, "before the first step")
        return mismatch


class _ParityCheck(TrainerCallback):
    """Runs the check once the weights are in place: before step 1, and after a resume."""

    def __init__(self, trainer: CorrectedGRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Check the engine, and print the result."""
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


def _warn(mismatch: Mismatch, when: str) -> None:
    print(
        f"mua_rl: WARNING: rollouts come from another policy than the one trained: KL {mismatch.kl:.3g} per token, "
        f"mean |log-prob difference| {mismatch.logp_difference:.3g} {when} (a good engine stays below {WARN_KL}). The "
        "loss corrects for it in part; look at --vllm_sync, --bf16 and --dtype.",
        file=sys.stderr,
    )
