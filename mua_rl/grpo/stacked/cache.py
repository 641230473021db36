"""The keys and values of completions that are being generated: in a cache that grows, or in one of fixed size.

In the one that grows, completions of a prompt that begin alike share a row until they differ, and leave it as they end.
The one of fixed size has its forward pass captured in a CUDA graph.
"""

import sys
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mua_rl.grpo.stacked.memory import CACHE_ALIGNED

ATTENTION = "mua_rl_grouped"
"""The name of `grouped_attention` for transformers."""

_SHRINK = 0.75  # a batch lets its free places go when no more than this share is in use: that copies the cache


class GrowingBatch:
    """Completions in a cache that grows with each token, and shrinks as they end.

    Args:
        cache: Keys and values of the prompts.
        mask: The mask of the prompts, `(K, p, P)`.
        copies: Completions of each prompt.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: torch.Tensor, copies: int) -> None:
        self.model, self.cache = model, cache
        self.trials, self.mask = len(mask), mask.flatten(0, 1).bool()
        self.positions = self.mask.sum(-1, keepdim=True)
        self.places = torch.arange(len(self.mask), device=mask.device).repeat_interleave(copies)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `(R, V)` after a further token of each completion, `(R,)`."""
        origins, tokens, self.places = share(self.places, tokens, (self.trials, len(self.mask) // self.trials))
        if origins is not None:
            self.cache.batch_select_indices(origins)
            self.mask, self.positions = self.mask[origins], self.positions[origins]
        self.mask = nn.functional.pad(self.mask, (0, 1), value=True)
        inputs = {"input_ids": tokens[:, None], "attention_mask": self.mask[:, None, None]}
        logits = self.model(**inputs, position_ids=self.positions, past_key_values=self.cache).logits
        self.positions = self.positions + 1
        return logits[:, -1][self.places]

    def keep(self, completions: torch.Tensor) -> None:
        """Go on with some completions alone, given as `(R,)` booleans."""
        self.places = self.places[completions]


class FixedBatch:
    """Completions in a cache of fixed size, whose forward pass is, on a GPU, a captured graph.

    Args:
        shape: Completions, and tokens of their prompts with padding.
        new_tokens: The most tokens of a completion.
        like: A cache of the same model.
        dtype: See `Decoder`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: tuple[int, int],
        new_tokens: int,
        like: DynamicCache,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.shape = model, shape
        rows, prompt = shape
        device = next(model.parameters()).device
        length = -(-(prompt + new_tokens) // CACHE_ALIGNED) * CACHE_ALIGNED
        self.at = torch.full((1,), prompt, device=device)
        self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.mask = torch.ones((rows, 1, 1, length), dtype=torch.bool, device=device)

        def places(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros((rows, like.shape[1], length, like.shape[3]), dtype=dtype or like.dtype)

        layers = cast(list[Any], like.layers)
        self.layers = [_FixedLayer(places(layer.keys), places(layer.values), self.at) for layer in layers]
        self.cache = Cache(layers=list(self.layers))
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def fill(self, prompts: torch.Tensor, cache: DynamicCache, mask: torch.Tensor, copies: int) -> None:
        """Begin the completions of some prompts, given by their numbers, with what was computed for these."""
        rows = (prompts[:, None] * copies + torch.arange(copies, device=prompts.device)).flatten()
        length = self.shape[1]
        for layer, computed in zip(self.layers, cast(list[Any], cache.layers), strict=True):
            for places, values in ((layer.keys, computed.keys), (layer.values, computed.values)):
                places[rows, :, :length] = values.to(places.dtype).repeat_interleave(copies, 0)
        self.mask[rows] = False
        self.mask[rows, 0, 0, :length] = mask.bool().repeat_interleave(copies, 0)
        self.positions[rows] = mask.sum(-1, keepdim=True).repeat_interleave(copies, 0)
        self.at.fill_(length)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `(R, V)` after a further token of each completion, `(R,)`; the next call overwrites them."""
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
                f"without one, which is slower: {str(error).splitlines()[0]}",
                file=sys.stderr,
            )


class _FixedLayer(StaticLayer):
    """A layer's keys and values in fixed places; all layers share `at`, the place of the next token.

    The layer of transformers has no precision of its own: under autocast it keeps keys as the rotation leaves them, in
    fp32, though attention computes in bf16.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self.at, self.is_initialized = keys, values, at, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the new token's keys and values in their place, and return all of them, to be masked."""
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values


def share(
    places: torch.Tensor, tokens: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Give all completions that have the same place in a batch, and go on with the same token, one place in the next.

    Args:
        places: `(R,)` places of completions in a batch with as many places for each trial, in the trials' order.
        tokens: `(R,)`, the tokens with which they go on.
        shape: The shape of the batch: trials K and places of each.

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


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers, which for one token a row does not copy the keys for each head of a group: the heads
    that share keys take the place of the query's length."""
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    if length > 1 or heads == groups or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    folded = query.reshape(rows, groups, heads // groups, size)
    out = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, size), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
