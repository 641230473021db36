"""How much one optimizer step gains under each configuration, from a gradient: statistics of one backward pass.

A step of Adam moves every weight by the learning rate η, whatever its gradient's size, so that the loss falls at first
by η times a sum of absolute gradient entries, the *aligned movement*. With G the gradient of a layer's weight (m × n):

    FFT                                           ‖G‖₁
    Init[B], α = 1   (A = 0, B ~ N(0, 1/r))       ‖BᵀG‖₁    = √(2r/π) Σ_j ‖G_:j‖₂ in expectation
    Init[A]          (A ~ N(0, 1/n), B = 0)       α ‖G Aᵀ‖₁ = α r √(2/(π n)) Σ_i ‖G_i:‖₂ in expectation

With SGD the gain is the squared norm of the gradient in what is trained: ‖G‖² for FFT, and for Init[B] ‖BᵀG‖², which
is ‖G‖² in expectation at any rank. See docs/theory.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mua_rl.lr.spec import AdapterSpec
from mua_rl.probes.movement import ProbeBatch, add_gradient

_ROWS = 16
"""Completions in a pass, which bounds the memory of the logits."""


def gradients_of(model: Any, batch: ProbeBatch) -> dict[str, torch.Tensor]:
    """The gradient of GRPO's loss, at the policy that wrote the completions, by the names of the weights."""
    model.zero_grad()
    add_gradient(model, batch, _ROWS)
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@dataclass(frozen=True)
class LayerSums:
    """What a layer's gradient G contributes.

    Attributes:
        name: The layer's name.
        outputs: m.
        inputs: n.
        entries: ‖G‖₁.
        columns: Σ_j ‖G_:j‖₂, over the n inputs.
        rows: Σ_i ‖G_i:‖₂, over the m outputs.
    """

    name: str
    outputs: int
    inputs: int
    entries: float
    columns: float
    rows: float

    @classmethod
    def of(cls, name: str, gradient: torch.Tensor) -> "LayerSums":
        """The sums of a gradient `(m, n)`; a convolution's kernel counts among its inputs."""
        g = gradient.detach().flatten(1).float()
        m, n = g.shape
        return cls(name, m, n, float(g.abs().sum()), float(g.norm(dim=0).sum()), float(g.norm(dim=1).sum()))


@dataclass(frozen=True)
class Probe:
    """Statistics of one gradient of a model.

    Attributes:
        layers: The layers that carry LoRA.
        everything: ‖g‖₁ over all weights that FFT trains.
    """

    layers: tuple[LayerSums, ...]
    everything: float

    @classmethod
    def of(cls, gradients: Mapping[str, torch.Tensor], targets: Iterable[str]) -> "Probe":
        """The statistics of a model's gradients by the names of its weights.

        Args:
            gradients: The gradient of every weight that FFT trains.
            targets: The names of the weights of the layers with LoRA.

        Raises:
            ValueError: There is no gradient at all in the layers with LoRA.
        """
        layers = tuple(LayerSums.of(name, gradients[name]) for name in targets)
        if not sum(layer.entries for layer in layers) > 0:
            raise ValueError("the gradient of the layers with LoRA is zero or no number.")
        return cls(layers, sum(float(g.detach().abs().sum(dtype=torch.float64)) for g in gradients.values()))

    @property
    def entries(self) -> float:
        """‖G‖₁ over the layers with LoRA."""
        return sum(layer.entries for layer in self.layers)

    @property
    def m_eff(self) -> float:
        """Init[B]'s first step gains √(r/m_eff) of FFT's on the same layers; m for Gaussian entries of one size."""
        return math.pi / 2 * (self.entries / sum(layer.columns for layer in self.layers)) ** 2

    @property
    def n_eff(self) -> float:
        """Init[A]'s first step gains α r / n_eff of FFT's on the same layers."""
        rows = sum(layer.rows / math.sqrt(layer.inputs) for layer in self.layers)
        return math.sqrt(math.pi / 2) * self.entries / rows

    def gain(self, spec: AdapterSpec, peft_init: bool = False) -> float:
        """What a configuration's first step gains at a learning rate, in units of FFT's of the layers with LoRA alone.

        Args:
            spec: The configuration.
            peft_init: Whether Init[A] has PEFT's variance, 1/(3n) instead of 1/n.
        """
        if spec.rank is None:
            return self.full_share
        alpha = spec.alpha(spec.rank)
        if spec.init == "B":
            return alpha * math.sqrt(spec.rank / self.m_eff)
        return alpha * spec.rank / self.n_eff / (math.sqrt(3) if peft_init else 1.0)

    @property
    def full_share(self) -> float:
        """F: what FFT of all weights gains, over what FFT of the layers with LoRA gains."""
        return self.everything / self.entries


def coherence(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """ρ, the share of a sign step that is the same in every batch, from the gradients of two independent batches.

    If each batch's sign agrees with the mean gradient's up to independent noise, E[sign g₁ · sign g₂] = ρ². Entries
    that are zero in either batch do not count; no agreement is 0.

    Args:
        first, second: Gradients of the same weights, or their signs.
    """
    agreement, count = 0.0, 0
    for one, other in zip(first, second, strict=True):
        product = torch.sign(one) * torch.sign(other)
        agreement += float(product.sum(dtype=torch.float64))
        count += int((product != 0).sum())
    return math.sqrt(max(0.0, agreement / count)) if count else 0.0
