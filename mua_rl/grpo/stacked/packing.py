"""Completions for the gradient, a prompt's in one row behind the prompt: `[prompt, completion 1, completion 2, …]`.

A completion attends to the prompt and to itself, and has the positions that it would have alone, so its log-probs are
those of a row of its own; the prompt is computed, and its activations are kept, once instead of once for each.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch

UNLABELLED = -100
_PROMPT, _PADDING = 0, -1  # the part of a row that a token belongs to; completions count from 1
_ROW = 512  # tokens: in longer rows attention to what is masked costs more than the prompt computed again
GPU_ALIGNED = 16
"""A GPU's attention kernels like lengths as a multiple of it, and are chosen anew for each length."""


class Completion(NamedTuple):
    """Token ids of a completion, not none; its weighted advantage; log-probs that the engine that wrote it gave."""

    tokens: Sequence[int]
    weight: float
    logps: Sequence[float] | None = None


@dataclass(frozen=True)
class Row:
    """A prompt and some of its completions; one entry for each token in every list.

    Attributes:
        ids: The prompt but for its last token, then for each completion that last token and all of its own but the
            last, so that each token that is scored has a place from which it is predicted.
        labels: The token to be scored at each place, or `UNLABELLED`.
        positions: Of the tokens, as if each completion followed the prompt alone.
        parts: Which completion a token belongs to, from 1; 0 for the prompt.
        weights: The weighted advantage of the completion, at its labels; 0 elsewhere.
        logps: The engine's log-probs of the labels; NaN elsewhere, and everywhere where there is no engine.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    parts: list[int]
    weights: list[float]
    logps: list[float]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Rows of K trials for one forward pass, b for each trial.

    Attributes:
        ids, labels: `(K·b, t)`.
        weights, logps: `(K, b·t)`.
        positions, parts: `(K·b, t)`; `None` where no row has two completions, so that causal attention does.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    logps: torch.Tensor
    positions: torch.Tensor | None
    parts: torch.Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in tensors))  # type: ignore[arg-type]


def pack(prompt: list[int], completions: Iterable[Completion], longest: int = _ROW) -> list[Row]:
    """Rows with a prompt's completions.

    Args:
        prompt: Token ids, at least one.
        completions: In any order.
        longest: Tokens of a row, at most, if it has more than one completion.
    """
    rows: list[Row] = []
    start = len(prompt) - 1
    for tokens, weight, logps in completions:
        size = len(tokens)
        if not rows or len(rows[-1]) + size > longest:
            nothing = [math.nan] * start
            rows.append(
                Row(prompt[:-1], [UNLABELLED] * start, [*range(start)], [_PROMPT] * start, [0.0] * start, nothing)
            )
        row = rows[-1]
        row.ids.extend([prompt[-1], *tokens[:-1]])
        row.labels.extend(tokens)
        row.positions.extend(range(start, start + size))
        row.parts.extend([max(row.parts, default=_PROMPT) + 1] * size)
        row.weights.extend([weight] * size)
        row.logps.extend([math.nan] * size if logps is None else logps)
    return rows


def batches(trials: Sequence[Sequence[Row]], tokens: int, pad_id: int, aligned: int = 1) -> Iterator[Batch]:
    """All rows of each trial, the longest first, so that a batch has little padding.

    Args:
        trials: Rows of each trial.
        tokens: Of one batch, with its padding, at most; more only where one row of each trial has more.
        pad_id: The padding token.
        aligned: The length of a batch is a multiple of it.
    """
    ordered = [sorted(rows, key=len, reverse=True) for rows in trials]
    start, most = 0, max(map(len, trials))
    while start < most:
        length = max(len(rows[start]) for rows in ordered if len(rows) > start)
        length = -(-length // aligned) * aligned
        count = min(most - start, max(1, tokens // (len(trials) * length)))
        yield _batch([rows[start : start + count] for rows in ordered], count, length, pad_id)
        start += count


def _batch(trials: Sequence[Sequence[Row]], count: int, length: int, pad_id: int) -> Batch:
    shape = (len(trials), count, length)
    ids, labels = np.full(shape, pad_id), np.full(shape, UNLABELLED)
    positions, parts = np.zeros_like(ids), np.full(shape, _PADDING)
    weights, logps = np.zeros(shape, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
    for k, rows in enumerate(trials):
        for i, row in enumerate(rows):
            ids[k, i, : len(row)], labels[k, i, : len(row)] = row.ids, row.labels
            positions[k, i, : len(row)], parts[k, i, : len(row)] = row.positions, row.parts
            weights[k, i, : len(row)], logps[k, i, : len(row)] = row.weights, row.logps
    inputs = [torch.from_numpy(array).flatten(0, 1) for array in (ids, labels)]
    values = [torch.from_numpy(array).flatten(1) for array in (weights, logps)]
    several = [torch.from_numpy(array).flatten(0, 1) if parts.max() > 1 else None for array in (positions, parts)]
    return Batch(*inputs, *values, *several)


def completion_sums(values: torch.Tensor, parts: torch.Tensor | None) -> torch.Tensor:
    """At each token the sum of its completion's values, `(R, t)` → `(R, t)`; values are 0 outside of completions.

    Args:
        parts: Of `Batch`.
    """
    if parts is None:
        return values.sum(-1, keepdim=True).expand_as(values)
    parts = parts.clamp(min=_PROMPT)
    sums = values.new_zeros(len(values), int(parts.max()) + 1)
    return sums.scatter_add(1, parts, values).gather(1, parts)


def attention_bias(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores, `(R, t)` → `(R, 1, t, t)`: 0 for the prompt and the token's own completion up
    to the token, −∞ for all else.

    Args:
        parts: Of `Batch`.
        dtype: That of the queries; in another one every layer would keep a copy for the backward pass.
    """
    seen = (parts[:, None, :] == parts[:, :, None]) | (parts[:, None, :] == _PROMPT)
    bias = torch.zeros(seen.shape, dtype=dtype, device=parts.device)
    return bias.masked_fill_(~seen.tril(), -torch.inf)[:, None]
