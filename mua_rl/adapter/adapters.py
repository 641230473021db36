"""LoRA and full finetuning behind one small interface, for any `nn.Module` that PEFT can target.

`LoRA(rank, …)` and `Full()` answer the same calls, so a trainer attaches whatever it is given and never asks which one
it has. What LoRA saves is plain PEFT: only the starting values of A and B are ours, since PEFT offers neither Init[A]
(its default is `var 1/(3n)`, its "gaussian" `std 1/r`) nor Init[B] (A zero, B random).
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from mua_rl.adapter.groups import FULL, LORA_A, LORA_B
from mua_rl.adapter.targets import (
    TargetModules,
    fan_in,
    inject,
    leave_fast_path,
    lora_layers,
    lora_matrices,
    resolve_targets,
    sizes,
)
from mua_rl.errors import UserError
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import ALPHA_ONE, FFT, AdapterSpec, AlphaRule, Scheme, multiplier_rule

if TYPE_CHECKING:  # as in `targets`
    from peft import LoraConfig, PeftModel


class Adapter(ABC):
    """What a trainer may ask of LoRA and of full finetuning alike.

    Attributes:
        target_modules: The layers that the rules speak of.
        saved_as: The name of the folder, within a run's, for what was trained.
    """

    target_modules: TargetModules
    saved_as: ClassVar[str]
    rank: int | None

    @property
    @abstractmethod
    def spec(self) -> AdapterSpec:
        """Rank, scheme and multiplier."""

    @abstractmethod
    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """The learning rate of each role of trained parameters (`mua_rl.adapter.groups`)."""

    @abstractmethod
    def attach(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """Make `model` trainable (trained weights in fp32) and return it, wrapped in a `PeftModel` for LoRA.

        Args:
            model: The model, which is changed in place.
            seed: The seed of the starting values, which alone decides them.

        Raises:
            UserError: The model cannot be trained so; the message says why.
        """

    @abstractmethod
    def merged(self, model: nn.Module) -> nn.Module:
        """The plain model with what was learnt inside its weights (in place, for good)."""

    def configuration(self, model: nn.Module, optimizer: str = "adamw") -> Configuration:
        """What the rules of the learning rate need to know, for a model before or after `attach`.

        Raises:
            UserError: No layer matches the target modules, or the rank exceeds the model's width.
        """
        fan_ins, outputs = sizes(model, self.target_modules)
        if self.rank is not None and self.rank > max(fan_ins):
            raise UserError(
                f"rank {self.rank} exceeds the width {max(fan_ins)} of the model's layers: choose a smaller --rank."
            )
        return Configuration(self.spec, max(fan_ins), optimizer, outputs=outputs)

    def widths(self, model: nn.Module) -> list[int]:
        """Fan-ins of the layers that the rules speak of, each once, ascending; before or after `attach`."""
        return sizes(model, self.target_modules)[0]


@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank adaptation, `W = W* + α B A`, with Init[A] or Init[B].

    Attributes:
        rank: The rank r.
        init: "A" for Init[A] (`A₀ ~ N(0, 1/n)`, `B₀ = 0`), "B" for Init[B] (`A₀ = 0`, `B₀ ~ N(0, 1/r)`).
        alpha: The multiplier's rule α(r), or what `mua_rl.lr.spec.multiplier_rule` reads as one, such as "16/r".
        target_modules: The layers that carry LoRA.
        layer_ranks: Ranks of layers that are smaller than r, by their full names; their multiplier is α(r) too.

    Args:
        lora_alpha: PEFT's own setting instead of `alpha`: the multiplier is `lora_alpha / r`.
        use_rslora: Whether it is `lora_alpha / √r`, as in PEFT.

    Raises:
        UserError: There is no such LoRA, or the multiplier looks like PEFT's `lora_alpha`.
    """

    rank: int
    init: str = "B"
    alpha: AlphaRule = ALPHA_ONE
    target_modules: TargetModules = "mlp"
    layer_ranks: Mapping[str, int] = field(default_factory=dict, compare=False)
    lora_alpha: InitVar[float | None] = None
    use_rslora: InitVar[bool] = False
    saved_as: ClassVar[str] = "adapter"

    def __post_init__(self, lora_alpha: float | None, use_rslora: bool) -> None:
        object.__setattr__(self, "alpha", multiplier_rule(self.alpha, lora_alpha, use_rslora))
        AdapterSpec.parse(self.rank, self.init, str(self.alpha))

    @property
    def spec(self) -> AdapterSpec:
        return AdapterSpec(self.rank, Scheme(f"Init[{self.init}]"), self.alpha)

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        return {LORA_A: learning_rate, LORA_B: learning_rate}  # the theory has one for both

    def peft_config(self, model: nn.Module) -> "LoraConfig":
        """The PEFT configuration: dropout and bias off, `lora_alpha = α r` so that PEFT's multiplier is α.

        It is for loading and saving. PEFT alone would draw its own starting values by it, to which no learning rate of
        Init[A] or Init[B] belongs: train what `attach` returns.
        """
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha(self.rank) * self.rank,  # type: ignore[arg-type]  # PEFT divides it, so a float does
            target_modules=resolve_targets(model, self.target_modules),
            rank_pattern={re.escape(name): rank for name, rank in self.layer_ranks.items()},
            alpha_pattern={re.escape(name): self.alpha(self.rank) * rank for name, rank in self.layer_ranks.items()},
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        )

    def attach(self, model: nn.Module, seed: int = 0) -> "PeftModel":
        """Put A and B into a model; see `Adapter.attach`.

        Raises:
            UserError: The rank exceeds a layer's size, no layer matches, one is tied to another or never called, or
                there is an adapter already.
        """
        from peft.tuners.lora import LoraLayer, ParamWrapper

        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UserError(
                "the model carries a LoRA already: merge it first (--start_from does), or go on with --resume."
            )
        shared = _shared_weights(model)
        wrapped = inject(model, self.peft_config(model))
        generator = torch.Generator().manual_seed(seed)
        for name, layer in lora_layers(wrapped):
            a, b = lora_matrices(layer)
            layer_name = name.removeprefix("base_model.model.")
            if id(getattr(layer.get_base_layer(), "weight", None)) in shared:
                raise UserError(
                    f"the layer {layer_name} has its weight in common with another (tied embeddings, say), so that "
                    "its LoRA could not be merged without changing that one too: leave it out of --target_modules."
                )
            if _is_read_past(wrapped, name):
                raise UserError(
                    f"PyTorch's MultiheadAttention reads the weight of {layer_name} past any LoRA, which would train "
                    "nothing: leave it out of --target_modules."
                )
            if self.layer_ranks.get(layer_name, self.rank) > min(fan_in(a), len(b)):
                raise UserError(
                    f"rank {self.rank} exceeds the size of the layer {layer_name} ({fan_in(a)} → {len(b)}): choose a "
                    "smaller --rank or other --target_modules, or full finetuning (--rank full)."
                )
            self.draw(a, b, generator, experts=layer.num_experts if isinstance(layer, ParamWrapper) else 1)
        return wrapped

    @torch.no_grad()
    def draw(self, a: torch.Tensor, b: torch.Tensor, generator: torch.Generator, experts: int = 1) -> None:
        """Fill the A and B of a layer with starting values, the random one from a generator on the CPU.

        Args:
            a: `(r, n)`, with the kernel's axes after them for a convolution.
            b: `(m, r)`.
            generator: The source of the random values.
            experts: How many experts a mixture-of-experts layer has, whose A and B PEFT lays side by side:
                `(experts r, n)` and `(m, r experts)`.
        """
        random, zero = (a, b) if self.init == "A" else (b, a)
        zero.zero_()
        # 1/n for A and 1/r for B; a grouped convolution's B sums over r/groups.
        inputs = fan_in(random) // (experts if random is b else 1)
        random.copy_(torch.randn(random.shape, generator=generator) / math.sqrt(inputs))

    def merged(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()  # type: ignore[operator]  # a PeftModel's


@dataclass(frozen=True)
class Full(Adapter):
    """Full finetuning (FFT): every weight of the model is trained.

    Attributes:
        target_modules: The layers whose width the rules speak of, those a LoRA would carry; every weight is trained.
    """

    target_modules: TargetModules = "mlp"
    rank: None = field(default=None, init=False)
    saved_as: ClassVar[str] = "model"

    @property
    def spec(self) -> AdapterSpec:
        return FFT

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        return {FULL: learning_rate}

    def attach(self, model: nn.Module, seed: int = 0) -> nn.Module:
        return model.float().requires_grad_(True)

    def merged(self, model: nn.Module) -> nn.Module:
        return model


def adapter_for(spec: AdapterSpec, target_modules: TargetModules) -> Adapter:
    """The adapter of a specification, on certain layers."""
    if spec.rank is None:
        return Full(target_modules)
    return LoRA(spec.rank, spec.init, spec.alpha, target_modules)


def load_adapter(model: nn.Module, folder: Path | str, trainable: bool = True) -> "PeftModel":
    """Attach a saved adapter, its trained values and nothing drawn anew.

    Raises:
        UserError: The folder holds no LoRA of this model.
    """
    leave_fast_path(model)
    try:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} holds no adapter of this model: {str(error).splitlines()[0]}") from None


def _shared_weights(model: nn.Module) -> set[int]:
    """The `id`s of the parameters that several modules hold."""
    held = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return {weight for weight, modules in held.items() if modules > 1}


def _is_read_past(model: nn.Module, name: str) -> bool:
    """Whether a layer is the `out_proj` of PyTorch's own attention, which is not called; PEFT's wrapper of that is."""
    parent, _, own = name.rpartition(".")
    attention = model.get_submodule(parent)
    return own == "out_proj" and isinstance(attention, nn.MultiheadAttention) and not parent.endswith("base_layer")
