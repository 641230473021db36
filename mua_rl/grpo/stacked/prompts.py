"""What trials are asked: the rows of each step, in the order of a single run, and the token ids of their prompts."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from mua_rl.grpo.setup import check_number


def prompt_order(rows: Dataset, prompts: int, steps: int, seed: int, shuffle: bool = True) -> Iterator[list[int]]:
    """Row numbers of the prompts of each step, in the order of a single run with that seed.

    Raises:
        UserError: There are fewer rows than prompts in a step.
    """
    check_number(rows, prompts)
    sampler = RepeatSampler(rows, mini_repeat_count=1, batch_size=prompts, shuffle=shuffle, seed=seed)
    epochs: Iterable[list[int]] = iter(lambda: list(sampler), None)
    batches = (epoch[start : start + prompts] for epoch in epochs for start in range(0, len(epoch), prompts))
    return islice(batches, steps)


def pad_left(prompts: Sequence[Sequence[Sequence[int]]], pad_id: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of K trials, p of each, as `(K, p, P)` token ids padded on the left, and the mask of those that are none.

    Args:
        prompts: Token ids of the prompts.
        pad_id: The padding token.
        length: The least that P may be.
    """
    longest = max(length, max(len(ids) for trial in prompts for ids in trial))
    ids = [[[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in trial] for trial in prompts]
    mask = [[[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in trial] for trial in prompts]
    return torch.from_numpy(np.array(ids)), torch.from_numpy(np.array(mask))
