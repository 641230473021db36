"""Answers of all trials in one batch, token by token; in several parts one after another where memory asks for it.

A prompt is computed once and its keys and values are copied to its completions. On a CPU the cache grows, completions
leave it as they end, and those of a prompt that begin alike share a row until they differ. On a GPU it has a fixed size
and the forward pass of one token for all rows is a captured CUDA graph, since a small model's pass is bound by the
launching of its kernels.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mua_rl.grpo.stacked.memory import CACHE_ALIGNED

ATTENTION = "mua_rl_grouped"
_LOOK_EVERY = 4  # steps between two looks, on a GPU, at whether all rows have ended: each look waits for the GPU
_READ_AT_ONCE = 256  # prompts in one forward pass, which bounds its memory
_SHRINK = 0.75  # share of a batch that is left when the rest is let go: that copies the cache


@dataclass(frozen=True)
class Answers:
    """Completions of K trials with b rows each.

    Attributes:
        tokens: `(K, b, t)`, filled up with the padding token after the end.
        lengths: `(K, b)`, tokens up to the end token, which counts.
        finite: `(K,)`, whether the trial's logits after its prompts, or its weights, were finite numbers.
        logps: `(K, b, t)` log-probs of the tokens, where another program than the trainer has written them; NaN after
            the end.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    finite: torch.Tensor
    logps: torch.Tensor | None = None


class Decoder:
    """Writes completions with a model that carries the LoRAs of K trials (`LoRAStack`).

    Args:
        model: A causal language model of transformers that passed `mua_rl.grpo.stacked.settings.check_attention`.
        end_ids: Tokens that end a completion.
        pad_id: The padding token.
        new_tokens: The most tokens of a completion.
        autocast: Makes the context of a forward pass.
        at_once: Completions of each trial that are written at once, which bounds the memory; `None`: all.
        fixed: Whether the cache has a fixed size; `None`: on a GPU it has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: list[int],
        pad_id: int,
        new_tokens: int,
        autocast: Callable[[], AbstractContextManager],
        at_once: int | None = None,
        fixed: bool | None = None,
    ) -> None:
        model.set_attn_implementation(ATTENTION)
        self.model, self.pad_id, self.new_tokens, self.autocast = model, pad_id, new_tokens, autocast
        self.at_once = at_once
        self.device = next(model.parameters()).device
        self.end_ids = torch.tensor(end_ids, device=self.device)
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        self._next: _FixedNext | None = None

    def forget(self) -> None:
        """Let the fixed cache and its graph go: the trials, or their weights' places, have changed."""
        self._next = None

    @torch.no_grad()
    def answer(
        self,
        prompts: torch.Tensor,
        mask: torch.Tensor,
        copies: int = 1,
        uniforms: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> Answers:
        """Complete prompts.

        Args:
            prompts: `(K, p, P)` token ids, padded on the left.
            mask: `(K, p, P)`, 1 for tokens that are there.
            copies: Completions of each prompt; b = p · copies.
            uniforms: `(K, b, new_tokens)` draws from [0, 1), one for each token to be sampled; `None` is greedy.
            temperature: What logits are divided by before sampling.
        """
        count = prompts.shape[1]
        size = count if self.at_once is None else max(1, self.at_once // copies)
        found = []
        for start in range(0, count, size):
            part = torch.arange(start, min(start + size, count), device=self.device)
            if self.fixed:  # parts are filled up, so that one cache does for all
                part = nn.functional.pad(part, (0, size - len(part)), value=count - 1)
            drawn = None if uniforms is None else uniforms[:, start * copies : (start + size) * copies]
            taken = min(size, count - start) * copies
            found.append(self._answer(prompts[:, part], mask[:, part], copies, drawn, temperature, taken))
        return Answers(
            torch.cat([answers.tokens for answers in found], 1),
            torch.cat([answers.lengths for answers in found], 1),
            torch.stack([answers.finite for answers in found]).all(0),
        )

    def _answer(
        self,
        prompts: torch.Tensor,
        mask: torch.Tensor,
        copies: int,
        uniforms: torch.Tensor | None,
        temperature: float,
        taken: int,
    ) -> Answers:
        """One part; the first `taken` completions of each trial are asked for, and the others end at once."""
        first, following = self._read(prompts, mask, copies)
        trials, rows = len(prompts), prompts.shape[1] * copies
        draws = None
        if uniforms is not None:
            draws = nn.functional.pad(uniforms, (0, 0, 0, rows - taken)).flatten(0, 1).to(self.device)
        finite = first.isfinite().view(trials, -1).all(-1)
        unasked = (torch.arange(rows, device=self.device) >= taken).repeat(trials)
        tokens, lengths = self._write(
            first.repeat_interleave(copies, 0), following, trials, draws, temperature, unasked
        )
        return Answers(tokens.view(trials, rows, -1)[:, :taken], lengths.view(trials, rows)[:, :taken], finite)

    def _read(
        self, prompts: torch.Tensor, mask: torch.Tensor, copies: int
    ) -> tuple[torch.Tensor, "_GrowingNext | _FixedNext"]:
        """Logits `(K·p, V)` after the prompts, and what goes on from there."""
        if not self.fixed:
            first, cache = self._prefill(prompts, mask)
            return first, _GrowingNext(self.model, self.autocast, cache, mask, copies)
        trials, count, length = prompts.shape
        rows = torch.arange(trials * count, device=self.device).view(trials, count)
        at_once = max(1, _READ_AT_ONCE // trials)
        found = []
        for piece in rows[0].split(at_once):
            first, cache = self._prefill(prompts[:, piece], mask[:, piece])
            shape = (trials * count * copies, length)
            if self._next is None or self._next.shape != shape:
                self._next = None  # its memory first
                self._next = _FixedNext(self.model, self.autocast, shape, self.new_tokens, cache)
            self._next.fill(rows[:, piece].flatten(), cache, mask[:, piece].flatten(0, 1), copies)
            found.append(first.view(trials, len(piece), -1))
        assert self._next is not None
        return torch.cat(found, 1).flatten(0, 1), self._next

    def _prefill(self, prompts: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
        """Logits after prompts `(K, p, P)`, and their keys and values."""
        prompts, mask = prompts.flatten(0, 1), mask.flatten(0, 1)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": prompts, "attention_mask": mask, "position_ids": positions}
        with self.autocast():
            return self.model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1], cache

    def _write(
        self,
        logits: torch.Tensor,
        following: "_GrowingNext | _FixedNext",
        trials: int,
        draws: torch.Tensor | None,
        temperature: float,
        ended: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(R, t)` and lengths `(R,)`; rows that have `ended` get none."""
        rows = torch.arange(len(logits), device=self.device)
        written = torch.full((len(logits), self.new_tokens), self.pad_id, device=self.device)
        lengths = torch.zeros(len(logits), dtype=torch.long, device=self.device)
        for step in range(self.new_tokens):
            drawn = None if draws is None else draws[rows, step]
            token = choose(logits, drawn, temperature, trials).masked_fill(ended, self.pad_id)
            written[rows, step] = token
            lengths[rows] += ~ended
            ended |= torch.isin(token, self.end_ids)
            if step + 1 == self.new_tokens:
                break
            if isinstance(following, _GrowingNext):
                if bool(ended.all()):
                    break
                going = ~ended
                rows, token, ended = rows[going], token[going], ended[going]
                following.keep(going)
            elif step % _LOOK_EVERY == _LOOK_EVERY - 1 and bool(ended.all()):
                break
            logits = following(token)
        return written, lengths


def share(
    places: torch.Tensor, tokens: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """One place in a batch for all completions that have the same place and go on with the same token.

    Args:
        places: `(R,)` of completions in a batch with as many places for each trial, in the trials' order.
        tokens: `(R,)`, with which they go on.
        shape: Of the batch: trials K and places of each.

    Returns:
        From which places those of the next batch come, again as many for each trial, `(K·n,)`, or `None` where they
        stay as they are; with which token they go on, `(K·n,)`; and the completions' places among them, `(R,)`. A
        place that no completion has goes on with token 0.
    """
    trials, size = shape
    base = int(tokens.max()) + 1
    pairs, numbers = (places * base + tokens).unique(return_inverse=True)
    parents = pairs // base
    trial = parents // size
    counts = trial.bincount(minlength=trials)
    most = int(counts.max())
    origins = None
    if most > _SHRINK * size and len(parents.unique_consecutive()) == len(parents):
        most, new = size, parents
    else:
        new = trial * most + torch.arange(len(pairs), device=trial.device) - (counts.cumsum(0) - counts)[trial]
        firsts = torch.arange(0, trials * size, size, device=trial.device)
        origins = firsts.repeat_interleave(most).index_copy(0, new, parents)
    return origins, tokens.new_zeros(trials * most).index_copy(0, new, pairs % base), new[numbers]


def choose(logits: torch.Tensor, draws: torch.Tensor | None, temperature: float, pieces: int = 1) -> torch.Tensor:
    """A token for each row of logits `(R, V)`: the likeliest, or the one at which the cumulated probability passes a
    draw from [0, 1), so that a row's token depends on its own logits and draw alone.

    Args:
        pieces: How many pieces to work in, which bounds the memory.
    """
    if draws is None:
        return logits.argmax(-1)
    chosen = []
    for piece, drawn in zip(logits.chunk(pieces), draws.chunk(pieces), strict=True):
        below = torch.softmax(piece.float() / temperature, -1).cumsum(-1)
        at = torch.searchsorted(below, (drawn * below[:, -1]).unsqueeze(-1), right=True)
        chosen.append(at.squeeze(-1).clamp(max=logits.shape[-1] - 1))
    return torch.cat(chosen)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers, which for one token a row does not copy the keys for each head of a group: the heads
    that share keys take the place of the query's length."""
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    if length > 1 or heads == groups or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    folded = query.reshape(rows, groups, heads // groups, size)
    out = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, size), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _GrowingNext:
    """From a token for each completion to the logits after it, `(R,)` → `(R, V)`, with a cache that grows.

    Args:
        cache: Keys and values of the prompts.
        mask: Of the prompts, `(K, p, P)`.
        copies: Completions of each prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        autocast: Callable[[], AbstractContextManager],
        cache: DynamicCache,
        mask: torch.Tensor,
        copies: int,
    ) -> None:
        self.model, self.autocast, self.cache = model, autocast, cache
        self.trials, self.mask = len(mask), mask.flatten(0, 1).bool()
        self.positions = self.mask.sum(-1, keepdim=True)
        self.places = torch.arange(len(self.mask), device=mask.device).repeat_interleave(copies)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        origins, tokens, self.places = share(self.places, tokens, (self.trials, len(self.mask) // self.trials))
        if origins is not None:
            self.cache.batch_select_indices(origins)
            self.mask, self.positions = self.mask[origins], self.positions[origins]
        self.mask = nn.functional.pad(self.mask, (0, 1), value=True)
        inputs = {"input_ids": tokens[:, None], "attention_mask": self.mask[:, None, None]}
        with self.autocast():
            out = self.model(**inputs, position_ids=self.positions, past_key_values=self.cache)
        self.positions = self.positions + 1
        return out.logits[:, -1][self.places]

    def keep(self, completions: torch.Tensor) -> None:
        """Go on with some completions alone, given as `(R,)` booleans."""
        self.places = self.places[completions]


class _FixedNext:
    """The same with a cache of fixed size and, on a GPU, a captured graph.

    Args:
        shape: Rows, and tokens of their prompts with padding.
        new_tokens: The most that are written.
        like: A cache whose heads the new one has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        autocast: Callable[[], AbstractContextManager],
        shape: tuple[int, int],
        new_tokens: int,
        like: DynamicCache,
    ) -> None:
        self.model, self.autocast, self.shape = model, autocast, shape
        rows, prompt = shape
        device = next(model.parameters()).device
        length = -(-(prompt + new_tokens) // CACHE_ALIGNED) * CACHE_ALIGNED
        self.at = torch.full((1,), prompt, device=device)
        self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.mask = torch.ones((rows, 1, 1, length), dtype=torch.bool, device=device)
        with autocast():
            low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        filled = cast(list[Any], like.layers)
        self.layers = [_FixedLayer(rows, length, layer.keys, layer.values, low, self.at) for layer in filled]
        self.cache = Cache(layers=list(self.layers))
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def fill(self, prompts: torch.Tensor, cache: DynamicCache, mask: torch.Tensor, copies: int) -> None:
        """Begin the rows of some prompts, given by their numbers, with what was computed for these."""
        rows = (prompts[:, None] * copies + torch.arange(copies, device=prompts.device)).flatten()
        length, filled = self.shape[1], cast(list[Any], cache.layers)
        for layer, found in zip(self.layers, filled, strict=True):
            for places, values in ((layer.all_keys, found.keys), (layer.all_values, found.values)):
                places[rows, :, :length] = values.to(places.dtype).repeat_interleave(copies, 0)
        self.mask[rows] = False
        self.mask[rows, 0, 0, :length] = mask.bool().repeat_interleave(copies, 0)
        self.positions[rows] = mask.sum(-1, keepdim=True).repeat_interleave(copies, 0)
        self.at.fill_(length)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.tokens.copy_(tokens[:, None])
        self.mask.index_fill_(-1, self.at, True)
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        self.positions += 1
        self.at += 1
        return self.logits

    def _forward(self) -> torch.Tensor:
        inputs = {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": self.positions}
        with self.autocast():
            return self.model(**inputs, past_key_values=self.cache).logits[:, -1]

    def _capture(self) -> None:
        """Record the forward pass; without a graph, and with a warning, where that cannot be done."""
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # kernels are chosen and workspaces made before the recording
                for _ in range(2):
                    self._forward()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._forward()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(
                f"mua_rl: WARNING: the decoding step of this model cannot be captured in a CUDA graph, so it runs "
                f"without, which is slower: {str(error).splitlines()[0]}",
                file=sys.stderr,
            )


class _FixedLayer(StaticLayer):
    """A layer's keys and values in fixed places, in the precision in which attention computes; all layers share `at`,
    the place of the next token."""

    def __init__(
        self,
        rows: int,
        length: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        dtype: torch.dtype | None,
        at: torch.Tensor,
    ) -> None:
        super().__init__(length)
        self.at = at
        self.all_keys, self.all_values = (
            torch.zeros((rows, like.shape[1], length, like.shape[3]), dtype=dtype or like.dtype, device=like.device)
            for like in (keys, values)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the new token's keys and values in their place; all there is comes back, to be masked."""
        self.all_keys.index_copy_(2, self.at, key_states.to(self.all_keys.dtype))
        self.all_values.index_copy_(2, self.at, value_states.to(self.all_values.dtype))
        return self.all_keys, self.all_values
