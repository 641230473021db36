"""How far one optimizer step moves the features of each adapted layer: δ₁, δ₂, δ₃ and ΔZ_B of LoRA, ΔZ of FFT.

In the paper's notation (arXiv 2602.06204; `mua_rl.lr.rules`) a LoRA layer adds `Z_B = α B A Z` to its output, and step
t, from `A, B` at t−1 to `A, B` at t, changes that by exactly

    ΔZ_B = δ₁ + δ₂ + δ₃,    δ₁ = α B_{t-1} ΔA Z,    δ₂ = α ΔB A_{t-1} Z,    δ₃ = α ΔB ΔA Z.

A fully finetuned layer moves by `ΔZ = ΔW Z`; its bias is left out. Held fixed is the layer's input `Z`: what it got in
the model as it was before the first step, on the first batch. So each figure is the layer's own doing; that earlier
layers move too, and change `Z`, is not in it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from mua_rl.adapter.adapters import Adapter
from mua_rl.adapter.groups import param_groups
from mua_rl.adapter.targets import lora_layers, lora_matrices, targeted_layers
from mua_rl.errors import UserError

DELTA_1, DELTA_2, DELTA_3, DELTA_Z_B, DELTA_Z = "δ₁", "δ₂", "δ₃", "ΔZ_B", "ΔZ"

Loss = Callable[[nn.Module, Any], torch.Tensor]
"""`loss(model, batch)`, a scalar to minimise."""


@dataclass(frozen=True)
class FeatureUpdate:
    """The size of one quantity in one layer at one step.

    Attributes:
        step: Counted from 1.
        layer: Its name in the model.
        kind: Its class, e.g. "Linear", "Conv2d", "Embedding".
        quantity: "δ₁", "δ₂", "δ₃", "ΔZ_B" or "ΔZ".
        size: Root mean square over all coordinates and all positions of the batch; NaN or infinite after divergence.
    """

    step: int
    layer: str
    kind: str
    quantity: str
    size: float


def feature_updates(
    model: nn.Module,
    adapter: Adapter,
    loss: Loss,
    batches: Sequence[Any],
    learning_rate: float,
    steps: int,
    seed: int = 0,
) -> list[FeatureUpdate]:
    """Attach `adapter` to `model`, take some steps, and measure each.

    The optimizer is AdamW with β = (0.9, 0.999), ε = 1e-8, no weight decay, no clipping and a constant learning rate.
    The model is in evaluation mode (no dropout), so that nothing but the seed of A or B is random. A layer that the
    loss does not depend on is left out (LLaVA's last vision layer, say); of one that is called more than once, the
    first call counts.

    Args:
        model: Any module that the adapter takes. It is trained: hand over one that is not needed any more.
        loss: Called once to see the layers' inputs and whether it depends on them, then once a step.
        batches: Step t uses `batches[(t - 1) % len(batches)]`; the first is also the one that is measured on.
        seed: Decides the random one of A and B.

    Raises:
        UserError: The adapter cannot be attached, or the loss depends on none of its layers.
    """
    targets = [name for name, _ in targeted_layers(model, adapter.target_modules)]
    model = adapter.attach(model, seed).eval()
    names = [name for name, _ in lora_layers(model)] or targets
    layers = {name.removeprefix("base_model.model."): model.get_submodule(name) for name in names}
    inputs = _inputs(model, layers, loss, batches[0])
    if not inputs:
        raise UserError("the loss depends on none of the adapted layers: choose other target modules.")
    optimizer = torch.optim.AdamW(param_groups(model, adapter.learning_rates(learning_rate)))
    updates = []
    for step in range(1, steps + 1):
        before = {name: _weights(layers[name]) for name in inputs}
        optimizer.zero_grad()
        loss(model, batches[(step - 1) % len(batches)]).backward()
        optimizer.step()
        for name, features in inputs.items():
            layer = layers[name]
            kind = type(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer).__name__
            for quantity, change in _changes(layer, before[name], _weights(layer), features):
                size = change.square().mean().sqrt().item()
                updates.append(FeatureUpdate(step, name, kind, quantity, size))
    return updates


def _inputs(model: nn.Module, layers: dict[str, nn.Module], loss: Loss, batch: Any) -> dict[str, torch.Tensor]:
    """Z (token ids for an embedding) of each layer that the loss depends on."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            features = next(iter((*args, *kwargs.values()))).detach()
            inputs.setdefault(name, features.float() if features.is_floating_point() else features)

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    value = loss(model, batch)
    for hook in hooks:
        hook.remove()
    if value.requires_grad:
        value.backward()
    return {name: z for name, z in inputs.items() if any(p.grad is not None for p in layers[name].parameters())}


def _weights(layer: nn.Module) -> list[torch.Tensor]:
    """What is trained of a layer, as it is now: A and B, or W."""
    weights: Iterable[Any] = lora_matrices(layer) if isinstance(layer, LoraLayer) else [layer.weight]
    return [weight.detach().clone() for weight in weights]


@torch.no_grad()
def _changes(
    layer: nn.Module, before: list[torch.Tensor], after: list[torch.Tensor], features: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each quantity's name and its value at every coordinate."""
    steps = [new - old for old, new in zip(before, after, strict=True)]
    if not isinstance(layer, LoraLayer):
        yield DELTA_Z, _apply(layer, steps[0], features)
        return
    (a, b), (delta_a, delta_b), alpha = before, steps, layer.scaling["default"]
    z_a, delta_z_a = _apply_a(layer, a, features), _apply_a(layer, delta_a, features)
    delta_1 = alpha * _apply_b(layer, b, delta_z_a)
    delta_2 = alpha * _apply_b(layer, delta_b, z_a)
    delta_3 = alpha * _apply_b(layer, delta_b, delta_z_a)
    yield from ((DELTA_1, delta_1), (DELTA_2, delta_2), (DELTA_3, delta_3))
    yield DELTA_Z_B, delta_1 + delta_2 + delta_3


def _apply_a(layer: LoraLayer, a: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """`A Z` as the layer itself does it, with `a` for its A."""
    if "default" in layer.lora_embedding_A:
        return functional.embedding(features, a.T)
    return _apply(layer.lora_A["default"], a, features)


def _apply_b(layer: LoraLayer, b: torch.Tensor, z_a: torch.Tensor) -> torch.Tensor:
    """`B Z_A` as the layer itself does it, with `b` for its B."""
    if "default" in layer.lora_embedding_B:
        return z_a @ b.T
    return _apply(layer.lora_B["default"], b, z_a)


def _apply(module: nn.Module, weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The module's linear map with another weight: a linear layer, a convolution, an embedding; without its bias."""
    zeros = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    return functional_call(module, zeros | {"weight": weight}, (features,))
