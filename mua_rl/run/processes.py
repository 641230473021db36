"""The processes of one run, as `accelerate launch` starts them: which one speaks and writes, and what all must share.

With one process everything here is trivial. `on_main`, `total` and `gathered` are collective: all processes call them
at the same point.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import distributed

from mua_rl.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

Value = TypeVar("Value")


def launched() -> int:
    """Processes that the launcher started, known before they have found one another."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def count() -> int:
    """Processes of the run."""
    return distributed.get_world_size() if _connected() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _connected() else 0


def is_main() -> bool:
    """Whether this process is the one that prints and writes the run folder."""
    return rank() == 0


def sharding() -> str | None:
    """By what the launcher has the processes share weights, gradients and optimizer: "fsdp2", "zero3" or nothing."""
    names = {"ACCELERATE_USE_FSDP": "fsdp2", "ACCELERATE_USE_DEEPSPEED": "zero3"}
    return next((way for name, way in names.items() if os.environ.get(name, "false").lower() == "true"), None)


def sharded() -> bool:
    """Whether the launcher has the processes share weights, gradients and optimizer (FSDP2, ZeRO-3)."""
    return sharding() is not None


@contextmanager
def whole_weights(arguments: "TrainingArguments") -> Iterator[None]:
    """Models are loaded whole in every process, where transformers would shard them at once for ZeRO-3.

    accelerate's `zero3_init_flag: false` asks for this; transformers does not heed it.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def on_main(make: Callable[[], Value]) -> Value:
    """What `make` returns on the main process, on all of them; its `UserError` likewise.

    Raises:
        UserError: `make` raised it on the main process.
    """
    shared: list[Any] = [None, None]
    if is_main():
        try:
            shared[0] = make()
        except UserError as error:
            shared[1] = str(error)
    broadcast_object_list(shared)
    if shared[1] is not None:
        raise UserError(shared[1])
    return shared[0]


def total(value: float, device: torch.device | str) -> float:
    """The sum of a number over the processes.

    Args:
        value: This process's.
        device: Where the processes exchange tensors.
    """
    return float(reduce(torch.tensor(value, device=device), "sum"))


def gathered(rows: Sequence[Value]) -> list[Value]:
    """The rows of all processes, those of the first process first."""
    return list(gather_object(list(rows)))


def share_of(number: int) -> list[int]:
    """The indices below `number` that are this process's: equally many for each, the last repeated to fill up.

    `gathered(…)[:number]` of what is made from them is in order.
    """
    each = -(-number // count())
    return [min(index, number - 1) for index in range(rank() * each, (rank() + 1) * each)]


def _connected() -> bool:
    return distributed.is_available() and distributed.is_initialized()
