"""Completions for the gradient, a prompt's in one row behind the prompt: `[prompt, completion 1, completion 2, …]`.

A completion attends to the prompt and to itself, and has the positions that it would have alone, so its log-probs are
those of a row of its own; the prompt is computed, and its activations are kept, once instead of once for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

UNLABELLED = -100
_PROMPT, _PADDING = 0, -1  # the part of a row that a token belongs to; completions count from 1
_ROW = 512  # tokens: in longer rows attention to what is masked costs more than the prompt computed again
_ALIGNED = 16  # attention kernels like lengths as a multiple of it, and are chosen anew for each length


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
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    parts: list[int]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Rows of K arms for one forward pass, b for each arm.

    Attributes:
        ids, labels: `(K·b, t)`.
        weights: `(K, b·t)`.
        positions, parts: `(K·b, t)`; `None` where no row has two completions, so that causal attention does.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor | None
    parts: torch.Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tensors = ((field.name, getattr(self, field.name)) for field in fields(self))
        return Batch(**{name: None if tensor is None else tensor.to(device) for name, tensor in tensors})


def pack(prompt: list[int], completions: Sequence[tuple[Sequence[int], float]], longest: int = _ROW) -> list[Row]:
    """Rows with a prompt's completions, each given by its tokens and its weighted advantage.

    Args:
        prompt: Token ids, at least one.
        completions: In any order; none is empty.
        longest: Tokens of a row, at most, if it has more than one completion.
    """
    rows: list[Row] = []
    for tokens, weight in completions:
        if not rows or len(rows[-1]) + len(tokens) > longest:
            before = len(prompt) - 1
            rows.append(
                Row(prompt[:-1], [UNLABELLED] * before, list(range(before)), [_PROMPT] * before, [0.0] * before)
            )
        row, start = rows[-1], len(prompt) - 1
        row.ids.extend([prompt[-1], *tokens[:-1]])
        row.labels.extend(tokens)
        row.positions.extend(range(start, start + len(tokens)))
        row.parts.extend([max(row.parts, default=_PROMPT) + 1] * len(tokens))
        row.weights.extend([weight] * len(tokens))
    return rows


def batches(arms: Sequence[Sequence[Row]], tokens: int, pad_id: int) -> Iterator[Batch]:
    """All rows of each arm, the longest first, so that a batch has little padding.

    Args:
        arms: Rows of each arm.
        tokens: Of one batch, with its padding, at most; more only where one row of each arm has more.
        pad_id: The padding token.
    """
    ordered = [sorted(rows, key=len, reverse=True) for rows in arms]
    start, most = 0, max(map(len, arms))
    while start < most:
        length = max(len(rows[start]) for rows in ordered if len(rows) > start)
        length = -(-length // _ALIGNED) * _ALIGNED
        count = min(most - start, max(1, tokens // (len(arms) * length)))
        yield _batch([rows[start : start + count] for rows in ordered], count, length, pad_id)
        start += count


def _batch(arms: Sequence[Sequence[Row]], count: int, length: int, pad_id: int) -> Batch:
    shape = (len(arms), count, length)
    ids, labels = np.full(shape, pad_id), np.full(shape, UNLABELLED)
    positions, parts, weights = np.zeros_like(ids), np.full(shape, _PADDING), np.zeros(shape, dtype=np.float32)
    for k, rows in enumerate(arms):
        for i, row in enumerate(rows):
            ids[k, i, : len(row)], labels[k, i, : len(row)] = row.ids, row.labels
            positions[k, i, : len(row)], parts[k, i, : len(row)] = row.positions, row.parts
            weights[k, i, : len(row)] = row.weights
    flat = [torch.from_numpy(array).flatten(0, 1) for array in (ids, labels, positions, parts)]
    several = flat[2:] if parts.max() > 1 else (None, None)
    return Batch(*flat[:2], torch.from_numpy(weights).flatten(1), *several)


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
