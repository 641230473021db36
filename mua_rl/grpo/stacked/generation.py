"""Completions of all trials in one batch, token by token; in several batches where memory asks for it.

A prompt is computed once and its keys and values are copied to its completions. On a CPU the cache grows, completions
leave it as they end, and those of a prompt that begin alike share a row until they differ. On a GPU it has a fixed size
and the forward pass of one token for all rows is a captured CUDA graph, since a small model's pass is bound by the
launching of its kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from mua_rl.grpo.stacked.cache import ATTENTION, FixedBatch, GrowingBatch
from mua_rl.grpo.stacked.prompts import pad_left

_LOOK_EVERY = 4  # steps between two looks, on a GPU, at whether all rows have ended: each look waits for the GPU
_READ_AT_ONCE = 256  # prompts in one forward pass, which bounds its memory


@dataclass(frozen=True)
class Sampling:
    """How completions are generated.

    Attributes:
        end_ids: The tokens that end a completion.
        pad_id: The padding token, which follows the end.
        new_tokens: The most tokens of a completion.
        temperature: The number that logits are divided by before a token is drawn.
    """

    end_ids: list[int]
    pad_id: int
    new_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Completions:
    """Completions of K trials, b of each trial.

    Attributes:
        tokens: `(K, b, t)`, filled up with the padding token after the end.
        lengths: `(K, b)`, the number of tokens up to the end token, which counts.
        finite: `(K,)`, whether the trial's logits after its prompts, or its weights, were finite numbers.
        logps: `(K, b, t)` log-probs of the tokens, where an engine beside the trainer generated them; NaN after the
            end.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    finite: torch.Tensor
    logps: torch.Tensor | None = None


class Decoder:
    """Generates completions with a model that carries the LoRAs of K trials (`LoRAStack`).

    Args:
        model: A causal language model of transformers that passed `mua_rl.grpo.stacked.settings.check_attention`.
        sampling: How completions are generated.
        at_once: The most completions of each trial that are generated at once, which bounds the memory; `None`: all.
        longest_prompt: Tokens of the longest prompt, to which a fixed cache is made.
        dtype: What attention computes in, where that is not the dtype of keys and values (autocast).
        fixed: Whether the cache has a fixed size; `None`: it has on a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        at_once: int | None = None,
        longest_prompt: int = 0,
        dtype: torch.dtype | None = None,
        fixed: bool | None = None,
    ) -> None:
        model.set_attn_implementation(ATTENTION)
        self.model, self.sampling, self.at_once, self.dtype = model, sampling, at_once, dtype
        self.longest_prompt, self.device = longest_prompt, next(model.parameters()).device
        self.end_ids = torch.tensor(sampling.end_ids, device=self.device)
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        self._batch: FixedBatch | None = None

    def forget(self) -> None:
        """Let the fixed cache and its graph go: the trials, or the places of their weights, have changed."""
        self._batch = None

    def complete(
        self, prompts: list[list[list[int]]], copies: int, generators: Sequence[torch.Generator] | None
    ) -> Completions:
        """Complete each trial's prompts, given as token ids.

        Args:
            prompts: p prompts of each trial.
            copies: Completions of each prompt; b = p · copies.
            generators: The generator of each trial, which its draws come from; `None` is greedy.

        Returns:
            The completions, on the CPU.
        """
        count, uniforms = len(prompts[0]), None
        if generators is not None:
            shape = count, copies, self.sampling.new_tokens
            uniforms = torch.stack([torch.rand(shape, generator=generator) for generator in generators])
        size = count if self.at_once is None else max(1, self.at_once // copies)
        batches = []
        for start in range(0, count, size):
            end = min(start + size, count)
            # A batch is filled up with its last prompt, so that one fixed cache does for all.
            numbers = [min(i, count - 1) for i in range(start, start + size if self.fixed else end)]
            asked = [[trial[i] for i in numbers] for trial in prompts]
            padded = pad_left(asked, self.sampling.pad_id, self.longest_prompt if self.fixed else 0)
            ids, mask = (tensor.to(self.device) for tensor in padded)
            draws = None if uniforms is None else uniforms[:, numbers].flatten(1, 2)
            batch, rows = self.answer(ids, mask, copies, draws), (end - start) * copies
            batches.append((batch.tokens[:, :rows], batch.lengths[:, :rows], batch.finite))
        tokens, lengths, finite = zip(*batches, strict=True)
        return Completions(torch.cat(tokens, 1).cpu(), torch.cat(lengths, 1).cpu(), torch.stack(finite).all(0).cpu())

    @torch.no_grad()
    def answer(
        self, prompts: torch.Tensor, mask: torch.Tensor, copies: int = 1, uniforms: torch.Tensor | None = None
    ) -> Completions:
        """Complete one batch of padded prompts.

        Args:
            prompts: `(K, p, P)` token ids, padded on the left.
            mask: `(K, p, P)`, 1 for tokens that are no padding.
            copies: Completions of each prompt; b = p · copies.
            uniforms: `(K, b, new_tokens)` draws from [0, 1), one for each token; `None` is greedy.
        """
        logits, batch = self._read(prompts, mask, copies)
        trials = len(prompts)
        draws = None if uniforms is None else uniforms.flatten(0, 1).to(self.device)
        tokens, lengths = self._write(logits.repeat_interleave(copies, 0), batch, trials, draws)
        finite = logits.isfinite().view(trials, -1).all(-1)
        return Completions(tokens.unflatten(0, (trials, -1)), lengths.unflatten(0, (trials, -1)), finite)

    def _read(
        self, prompts: torch.Tensor, mask: torch.Tensor, copies: int
    ) -> tuple[torch.Tensor, GrowingBatch | FixedBatch]:
        """Logits `(K·p, V)` after the prompts, and the batch of their completions."""
        if not self.fixed:
            logits, cache = self._prefill(prompts, mask)
            return logits, GrowingBatch(self.model, cache, mask, copies)
        trials, count, length = prompts.shape
        rows = torch.arange(trials * count, device=self.device).view(trials, count)
        pieces = []
        for piece in rows[0].split(max(1, _READ_AT_ONCE // trials)):
            logits, cache = self._prefill(prompts[:, piece], mask[:, piece])
            shape = (trials * count * copies, length)
            if self._batch is None or self._batch.shape != shape:
                self._batch = None  # frees its memory first
                self._batch = FixedBatch(self.model, shape, self.sampling.new_tokens, cache, self.dtype)
            self._batch.fill(rows[:, piece].flatten(), cache, mask[:, piece].flatten(0, 1), copies)
            pieces.append(logits.view(trials, len(piece), -1))
        assert self._batch is not None
        return torch.cat(pieces, 1).flatten(0, 1), self._batch

    def _prefill(self, prompts: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
        """Logits after prompts `(K, p, P)`, and their keys and values."""
        prompts, mask = prompts.flatten(0, 1), mask.flatten(0, 1)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": prompts, "attention_mask": mask, "position_ids": positions}
        return self.model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1], cache

    def _write(
        self, logits: torch.Tensor, batch: GrowingBatch | FixedBatch, trials: int, uniforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(R, t)` and lengths `(R,)` of completions, from the logits after their prompts on."""
        pad_id, new_tokens = self.sampling.pad_id, self.sampling.new_tokens
        rows = torch.arange(len(logits), device=self.device)
        tokens = torch.full((len(logits), new_tokens), pad_id, device=self.device)
        lengths = torch.zeros_like(rows)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        for step in range(new_tokens):
            draws = None if uniforms is None else uniforms[rows, step]
            token = choose(logits, draws, self.sampling.temperature, trials).masked_fill(ended, pad_id)
            tokens[rows, step] = token
            lengths[rows] += ~ended
            ended |= torch.isin(token, self.end_ids)
            looks = isinstance(batch, GrowingBatch) or step % _LOOK_EVERY == _LOOK_EVERY - 1
            if step + 1 == new_tokens or (looks and bool(ended.all())):
                break
            if isinstance(batch, GrowingBatch):
                going = ~ended
                rows, token, ended = rows[going], token[going], ended[going]
                batch.keep(going)
            logits = batch.next_logits(token)
        return tokens, lengths


def choose(logits: torch.Tensor, draws: torch.Tensor | None, temperature: float, pieces: int = 1) -> torch.Tensor:
    """Choose a token for each row of logits `(R, V)`: the likeliest, or the one at which the cumulated probability
    passes a draw from [0, 1), so that a row's token depends on its own logits and draw alone.

    Args:
        pieces: In how many pieces the rows are worked on, which bounds the memory.
    """
    if draws is None:
        return logits.argmax(-1)
    tokens = []
    for piece, drawn in zip(logits.chunk(pieces), draws.chunk(pieces), strict=True):
        below = torch.softmax(piece.float() / temperature, -1).cumsum(-1)
        token = torch.searchsorted(below, (drawn * below[:, -1]).unsqueeze(-1), right=True)
        tokens.append(token.squeeze(-1).clamp(max=logits.shape[-1] - 1))
    return torch.cat(tokens)
