"""Completions for the gradient, a prompt's in one row behind the prompt: `[prompt, completion 1, completion 2, …]`.

A completion attends to the prompt and to itself, and has the positions that it would have alone, so its log-probs are
those of a row of its own; the prompt is computed, and its activations are kept, once instead of once for each.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

UNLABELLED = -100
_PROMPT, _PADDING = 0, -1  # the segment of a row that a token belongs to; completions count from 1
_ROW = 512  # tokens: in longer rows attention to what is masked costs more than the prompt computed again
GPU_ALIGNED = 16
"""A GPU's attention kernels prefer lengths that are a multiple of this, and are chosen anew for each length."""

COLUMNS = np.dtype(
    [
        ("ids", np.int64),  # the token at each place
        ("labels", np.int64),  # the token that is scored there, which comes next, or `UNLABELLED`
        ("weights", np.float32),  # the weighted advantage of the label's completion; 0 without a label
        ("logps", np.float32),  # the engine's log-prob of the label; NaN without a label or an engine
        ("positions", np.int64),  # as if each completion followed the prompt alone
        ("segments", np.int64),  # which completion the token belongs to, from 1; 0 for the prompt
    ]
)
"""What a packed row has for each place: the prompt but for its last token, then for each completion that last token and
all of its own but the last, so that each token that is scored has a place from which it is predicted."""


class WeightedCompletion(NamedTuple):
    """A completion's token ids, at least one; its weighted advantage; the log-probs of the engine that generated it."""

    tokens: Sequence[int]
    weight: float
    logps: Sequence[float] | None = None


@dataclass(frozen=True)
class PackedBatch:
    """Rows of K trials for one forward pass, b of each trial; see `COLUMNS`.

    Attributes:
        ids, labels: `(K·b, t)`.
        weights, logps: `(K, b·t)`.
        positions, segments: `(K·b, t)`; `None` where no row has two completions, so that causal attention does.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    logps: torch.Tensor
    positions: torch.Tensor | None
    segments: torch.Tensor | None

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on a device."""
        tensors = {name: None if tensor is None else tensor.to(device) for name, tensor in vars(self).items()}
        return PackedBatch(**tensors)  # type: ignore[arg-type]


def pack(prompt: list[int], completions: Iterable[WeightedCompletion], longest: int = _ROW) -> list[np.ndarray]:
    """Pack a prompt's completions into rows of `COLUMNS`.

    Args:
        prompt: Token ids, at least one.
        completions: The completions, in any order.
        longest: The most tokens of a row that has more than one completion.
    """
    start = len(prompt) - 1
    rows: list[list[np.ndarray]] = []
    length = longest
    for tokens, weight, logps in completions:
        if length + len(tokens) > longest:
            rows.append([_segment(prompt[:-1], UNLABELLED, 0.0, math.nan, 0, _PROMPT)])
            length = start
        ids = [prompt[-1], *tokens[:-1]]
        rows[-1].append(_segment(ids, tokens, weight, math.nan if logps is None else logps, start, len(rows[-1])))
        length += len(tokens)
    return [np.concatenate(row) for row in rows]


def _segment(
    ids: Sequence[int],
    labels: Sequence[int] | int,
    weight: float,
    logps: Sequence[float] | float,
    start: int,
    segment: int,
) -> np.ndarray:
    """The places of a prompt or a completion in a row, whose first has the position `start`."""
    places = np.empty(len(ids), COLUMNS)
    places["ids"], places["labels"], places["weights"], places["logps"] = ids, labels, weight, logps
    places["positions"], places["segments"] = np.arange(start, start + len(ids)), segment
    return places


def batches(
    trials: Sequence[Sequence[np.ndarray]], tokens: int, pad_id: int, aligned: int = 1
) -> Iterator[PackedBatch]:
    """Batches of all rows of each trial, the longest first, so that a batch has little padding.

    Args:
        trials: The rows of each trial.
        tokens: The most tokens of a batch, with its padding; more only where one row of each trial has more.
        pad_id: The padding token.
        aligned: The length of a batch is a multiple of this.
    """
    ordered = [sorted(rows, key=len, reverse=True) for rows in trials]
    start, most = 0, max(map(len, trials))
    while start < most:
        length = max(len(rows[start]) for rows in ordered if len(rows) > start)
        length = -(-length // aligned) * aligned
        count = min(most - start, max(1, tokens // (len(trials) * length)))
        yield _batch([rows[start : start + count] for rows in ordered], count, length, pad_id)
        start += count


def _batch(trials: Sequence[Sequence[np.ndarray]], count: int, length: int, pad_id: int) -> PackedBatch:
    padding = np.array((pad_id, UNLABELLED, 0.0, math.nan, 0, _PADDING), COLUMNS)
    batch = np.full((len(trials), count, length), padding)
    for trial, rows in zip(batch, trials, strict=True):
        for places, row in zip(trial, rows, strict=False):
            places[: len(row)] = row
    columns = {name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in COLUMNS.names or ()}
    weights, logps = (columns.pop(name).flatten(1) for name in ("weights", "logps"))
    ids, labels, positions, segments = (column.flatten(0, 1) for column in columns.values())
    several = (positions, segments) if segments.max() > 1 else (None, None)
    return PackedBatch(ids, labels, weights, logps, *several)


def completion_sums(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """At each token the sum of its completion's values, `(R, t)` → `(R, t)`; values are 0 outside of completions.

    Args:
        segments: See `PackedBatch`.
    """
    if segments is None:
        return values.sum(-1, keepdim=True).expand_as(values)
    segments = segments.clamp(min=_PROMPT)
    sums = values.new_zeros(len(values), int(segments.max()) + 1)
    return sums.scatter_add(1, segments, values).gather(1, segments)


def attention_bias(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores, `(R, t)` → `(R, 1, t, t)`: 0 for the prompt and the token's own completion up
    to the token, −∞ for all else.

    Args:
        segments: See `PackedBatch`.
        dtype: The dtype of the queries; in another one every layer would keep a copy for the backward pass.
    """
    seen = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == _PROMPT)
    bias = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return bias.masked_fill_(~seen.tril(), -torch.inf)[:, None]
