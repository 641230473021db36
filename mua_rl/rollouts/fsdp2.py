"""Where TRL and accelerate leave FSDP2 alone: weights that nobody gives back, and a layer that nobody calls."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def reshard(model: nn.Module) -> None:
    """Give FSDP2's weights back to their processes.

    accelerate keeps embedding, last norm and output layer whole from a forward pass to its backward pass. Where none
    follows, as after a measurement, TRL finds plain weights among the sharded ones and fails.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def output_layer_called(model: nn.Module) -> Iterator[None]:
    """Within the block, each forward pass calls FSDP2's output layer, on no rows, when the layers before it are done.

    TRL reads the weight of that layer and never calls it, while FSDP2 gathers and gives back weights where layers are
    called. A layer on its own that never was, as under LoRA, breaks the first backward pass that leaves gradients
    where they are, as all passes of a step but the last do. One that was wrapped with the last norm would, before
    torch 2.13, keep both from being sharded again for an engine.
    """
    head: Any = model.get_output_embeddings() if isinstance(model, FSDPModule) else None  # type: ignore[operator]
    if not isinstance(head, FSDPModule):
        yield
        return
    backbone: Any = getattr(model, "get_base_model", lambda: model)().base_model

    def call(module: nn.Module, inputs: Any, output: Any) -> None:
        head(output.last_hidden_state[:, :0])  # type: ignore[operator]

    handle = backbone.register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()
