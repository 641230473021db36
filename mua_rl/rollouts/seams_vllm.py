"""What we use of vLLM beyond its public API, imported only when it is called; CONTRIBUTING.md has the table."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_weights(llm: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give an engine in this process new weights, by name; vLLM's `LLM` has no call for it, and TRL does the same."""
    llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(weights)


class Handover:
    """Stands where an engine in this process keeps its class of adapters, and hands it matrices instead of a file's.

    vLLM reads an adapter from a folder and pins each matrix in the host's memory, which takes 2 ms a matrix. These are
    on the GPU already.

    Args:
        llm: A `vllm.LLM` with LoRA.

    Attributes:
        tensors: A and B of each adapter that is about to be loaded, under the name of its folder.
    """

    def __init__(self, llm: Any) -> None:
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        llm.llm_engine.model_executor.driver_worker.model_runner.lora_manager._lora_model_cls = self

    def from_local_checkpoint(self, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **options: Any):
        """See vLLM's `LoRAModel.from_local_checkpoint`, which this is called instead of."""
        from vllm.lora.lora_model import LoRAModel

        tensors = self.tensors[Path(lora_dir).name]
        taken = {key: options[key] for key in ("lora_model_id", "dtype", "weights_mapper", "skip_prefixes")}
        device = str(next(iter(tensors.values())).device)
        return LoRAModel.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, device=device, **taken)


def leave_uncompiled(model: nn.Module) -> None:
    """Call a model's layers as they are although a vLLM engine in this process has changed their classes.

    An architecture that vLLM has no code for (OLMo-2) runs on that of transformers, whose class vLLM makes into one
    that compiles: other models of the class then lack the attribute by which its own say whether to.
    """
    for kind in {type(module) for module in model.modules()}:
        if kind.__call__.__module__.startswith("vllm.") and not hasattr(kind, "do_not_compile"):
            kind.do_not_compile = True  # type: ignore[attr-defined]  # the engine's own have one of their own
