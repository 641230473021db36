"""Which layers of a model carry LoRA, and how large they are, for any `nn.Module` that PEFT can target."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mua_rl.errors import UserError, one_line

if TYPE_CHECKING:  # it imports transformers, which takes seconds that full finetuning of a small policy has no use for
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

MLP_PROJECTIONS = (
    ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),  # Llama and its like, the first two fused in Phi-3's
    ("mlp.c_fc", "mlp.c_proj"),  # GPT-2, StarCoder2
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    ("fc1", "fc2"),  # OPT, Phi
)
"""The default of the paper, the MLP projections of every decoder layer, by families; a model has the first it shows.

The order matters for models of several parts: a vision-language model's text layers come before its vision tower's.
"""

TargetModules = str | list[str]
"""`"mlp"`, `"all-linear"` (every linear layer but the output head), a regular expression, or a list of names."""


def resolve_targets(model: nn.Module, targets: TargetModules) -> TargetModules:
    """The names that PEFT shall match for `targets`.

    Raises:
        UserError: The model has no MLP projections under their usual names.
    """
    if targets != "mlp":
        return targets
    paths = [path for path, _ in model.named_modules()]
    for family in MLP_PROJECTIONS:
        if present := [name for name in family if any(path.endswith(f".{name}") for path in paths)]:
            return present
    raise UserError(
        f"the model has no MLP layers under their usual names ({', '.join(map(', '.join, MLP_PROJECTIONS))}): name the "
        "layers to adapt with --target_modules, or take all-linear."
    )


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every layer that carries LoRA, with its name."""
    if (peft := sys.modules.get("peft.tuners.lora")) is None:
        return  # nothing can carry LoRA yet
    for name, module in model.named_modules():
        if isinstance(module, peft.LoraLayer):
            yield name, module


def lora_matrices(layer: LoraLayer, adapter_name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer: `(r, n)` and `(m, r)`, with the kernel's axes after them for convolutions."""
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return cast(torch.Tensor, a), cast(torch.Tensor, b)


def fan_in(weight: torch.Tensor) -> int:
    """Inputs that one output of a linear or convolutional weight sums over."""
    return math.prod(weight.shape[1:])


def is_packed(module: nn.Module) -> bool:
    """Whether a linear layer has quantised weights, packed into integers (bitsandbytes)."""
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def targeted_layers(
    model: nn.Module, targets: TargetModules
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Layers of a plain model that PEFT would adapt, found by PEFT itself on a copy without storage.

    Yields:
        Each layer's name, and the A and B that a LoRA would have, shapes without values; their rank means nothing.

    Raises:
        UserError: No layer matches, or PEFT cannot adapt one.
    """
    # `copy.deepcopy` takes what its memo has for copied already: with every weight in there, without storage, it copies
    # the structure of the model alone.
    memo: dict[int, Any] = {id(w): torch.empty_like(w, device="meta") for w in model.buffers()}
    for module in model.modules():
        if is_packed(module):  # such weights have a shape of their own
            plain = cast(nn.Linear, module)
            memo[id(module)] = nn.Linear(plain.in_features, plain.out_features, device="meta")
        else:
            for weight in module.parameters(recurse=False):
                memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    with torch.device("meta"):
        skeleton = copy.deepcopy(model, memo)
    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    rank = math.lcm(*(module.groups for module in convolutions))  # PEFT wants a rank that every grouping divides
    from peft import LoraConfig

    config: Any = LoraConfig(r=rank, target_modules=resolve_targets(model, targets))
    for name, layer in lora_layers(inject(skeleton, config)):
        yield name.removeprefix("base_model.model."), lora_matrices(layer)


def sizes(model: nn.Module, targets: TargetModules) -> tuple[list[int], int]:
    """The fan-ins n of the targeted layers, each once, ascending, and their smallest fan-out m.

    Args:
        model: A plain model, or one that carries LoRA, whose own layers count then.
        targets: The layers of a plain model.

    Raises:
        UserError: No layer matches the targets.
    """
    matrices = [lora_matrices(layer) for _, layer in lora_layers(model)]
    matrices = matrices or [pair for _, pair in targeted_layers(model, targets)]
    if not matrices:
        raise UserError(f"no layer of the model matches the target modules {targets!r}.")
    return sorted({fan_in(a) for a, _ in matrices}), min(len(b) for _, b in matrices)


def leave_fast_path(model: nn.Module) -> None:
    """Keep PyTorch's own encoder layers from their fast path, which reads the bare weights and passes LoRA by.

    It is taken in evaluation, by rollouts say, and of no other layer; the switch is this process's.
    """
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)


def inject(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Let PEFT put its layers into a model.

    Raises:
        UserError: PEFT cannot.
    """
    leave_fast_path(model)
    try:
        from peft import get_peft_model

        return get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise UserError(f"LoRA cannot be attached: {one_line(error)}") from None
