"""LoRA and full finetuning behind one small interface, for any `nn.Module` that PEFT can target.

`LoRA(rank, …)` and `Full()` answer the same calls, so a trainer attaches whatever it is given and never asks which one
it has. What LoRA saves is plain PEFT: only the starting values of A and B are ours, since PEFT offers neither Init[A]
(its default is `var 1/(3n)`, its "gaussian" `std 1/r`) nor Init[B] (A zero, B random).
"""

import copy
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from mua_rl.adapter.groups import FULL, LORA_A, LORA_B
from mua_rl.errors import UserError, one_line
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import ALPHA_ONE, FFT, AdapterSpec, AlphaRule, Scheme

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


class Adapter(Protocol):
    """What a trainer may ask of LoRA and of full finetuning alike."""

    @property
    def rank(self) -> int | None:
        """LoRA rank, or `None` for full finetuning."""

    @property
    def target_modules(self) -> TargetModules:
        """The layers that the rules speak of."""

    @property
    def saved_as(self) -> str:
        """Name of the folder, within a run's, for what was trained."""

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """The learning rate of each role of trained parameters (`mua_rl.adapter.groups`)."""

    def attach(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """Make `model` trainable (trained weights in fp32) and return it, wrapped in a `PeftModel` for LoRA.

        Raises:
            UserError: It cannot be done with this model.
        """

    def configuration(self, model: nn.Module, optimizer: str = "adamw") -> Configuration:
        """What the LR rules need to know, for a model before or after `attach`."""

    def widths(self, model: nn.Module) -> list[int]:
        """Fan-ins of the layers that the rules speak of, each once, ascending; before or after `attach`."""

    def merged(self, model: nn.Module) -> nn.Module:
        """The plain model with what was learnt inside its weights (in place, for good)."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation, `W = W* + α B A`, with Init[A] or Init[B].

    Attributes:
        rank: r.
        init: "A" for Init[A] (`A₀ ~ N(0, 1/n)`, `B₀ = 0`), "B" for Init[B] (`A₀ = 0`, `B₀ ~ N(0, 1/r)`).
        alpha: The multiplier's rule α(r).
        target_modules: Which layers carry LoRA.
        layer_ranks: Ranks of layers that are smaller than r, by their full names; their multiplier is α(r) too.
    """

    rank: int
    init: str = "B"
    alpha: AlphaRule = ALPHA_ONE
    target_modules: TargetModules = "mlp"
    layer_ranks: Mapping[str, int] = field(default_factory=dict, compare=False)
    saved_as: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"a LoRA needs a rank of at least 1, not {self.rank}; full finetuning is rank 0 or 'full'.")
        if self.init not in ("A", "B"):
            raise UserError(
                f"the initialisation {self.init!r} is not one of A and B: others, PiSSA and OLoRA among them, shift "
                "the base weights or have no learning-rate rule."
            )

    @property
    def spec(self) -> AdapterSpec:
        """Rank, scheme and multiplier."""
        return AdapterSpec(self.rank, Scheme.INIT_A if self.init == "A" else Scheme.INIT_B, self.alpha)

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """See `Adapter.learning_rates`. The theory has one learning rate for A and B."""
        return {LORA_A: learning_rate, LORA_B: learning_rate}

    def peft_config(self, model: nn.Module) -> LoraConfig:
        """The PEFT configuration: dropout and bias off, `lora_alpha = α r` so that PEFT's multiplier is α."""
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

    def attach(self, model: nn.Module, seed: int = 0) -> PeftModel:
        """See `Adapter.attach`. A and B are drawn from a generator of their own, so that `seed` alone decides them.

        Raises:
            UserError: The rank exceeds a layer's size, no layer matches, one is tied to another or never called, or
                there is an adapter already.
        """
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UserError(
                "the model carries a LoRA already: merge it first (--start-from does), or go on with --resume."
            )
        shared = _shared_weights(model)
        wrapped = _inject(model, self.peft_config(model))
        generator = torch.Generator().manual_seed(seed)
        for name, layer in lora_layers(wrapped):
            a, b = lora_matrices(layer)
            layer_name = name.removeprefix("base_model.model.")
            if id(getattr(layer.get_base_layer(), "weight", None)) in shared:
                raise UserError(
                    f"the layer {layer_name} has its weight in common with another (tied embeddings, say), so that "
                    "its LoRA could not be merged without changing that one too: leave it out of --target-modules."
                )
            if _is_read_past(wrapped, name):
                raise UserError(
                    f"PyTorch's MultiheadAttention reads the weight of {layer_name} past any LoRA, which would train "
                    "nothing: leave it out of --target-modules."
                )
            if self.layer_ranks.get(layer_name, self.rank) > min(fan_in(a), len(b)):
                raise UserError(
                    f"rank {self.rank} exceeds the size of the layer {layer_name} ({fan_in(a)} → {len(b)}): choose a "
                    "smaller --rank or other --target-modules, or full finetuning (--rank full)."
                )
            self.draw(a, b, generator, experts=layer.num_experts if isinstance(layer, ParamWrapper) else 1)
        return wrapped

    @torch.no_grad()
    def draw(self, a: torch.Tensor, b: torch.Tensor, generator: torch.Generator, experts: int = 1) -> None:
        """Fill the A and B of a layer with starting values, the random one from a generator on the CPU.

        Args:
            experts: Of a mixture-of-experts layer, whose A and B PEFT lays side by side: `(experts r, n)` and
                `(m, r experts)`.
        """
        random, zero = (a, b) if self.init == "A" else (b, a)
        zero.zero_()
        # 1/n for A and 1/r for B; a grouped convolution's B sums over r/groups.
        inputs = fan_in(random) // (experts if random is b else 1)
        random.copy_(torch.randn(random.shape, generator=generator) / math.sqrt(inputs))

    def configuration(self, model: nn.Module, optimizer: str = "adamw") -> Configuration:
        """See `Adapter.configuration`."""
        width, outputs = _sizes(model, self.target_modules)
        if self.rank > width:
            raise UserError(
                f"rank {self.rank} exceeds the width {width} of the model's layers: choose a smaller --rank."
            )
        return Configuration(self.spec, width, optimizer, outputs=outputs)

    def widths(self, model: nn.Module) -> list[int]:
        """See `Adapter.widths`."""
        return _widths(model, self.target_modules)

    def merged(self, model: nn.Module) -> nn.Module:
        """See `Adapter.merged`."""
        return model.merge_and_unload()  # type: ignore[operator]


@dataclass(frozen=True)
class Full:
    """Full finetuning (FFT): every weight of the model is trained.

    Attributes:
        target_modules: The layers whose width the rules speak of, those a LoRA would carry; every weight is trained.
    """

    target_modules: TargetModules = "mlp"
    rank: int | None = field(default=None, init=False)
    saved_as: ClassVar[str] = "model"

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """See `Adapter.learning_rates`."""
        return {FULL: learning_rate}

    def attach(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """See `Adapter.attach`."""
        return model.float().requires_grad_(True)

    def configuration(self, model: nn.Module, optimizer: str = "adamw") -> Configuration:
        """See `Adapter.configuration`."""
        width, outputs = _sizes(model, self.target_modules)
        return Configuration(FFT, width, optimizer, outputs=outputs)

    def widths(self, model: nn.Module) -> list[int]:
        """See `Adapter.widths`."""
        return _widths(model, self.target_modules)

    def merged(self, model: nn.Module) -> nn.Module:
        """See `Adapter.merged`."""
        return model


def adapter_for(spec: AdapterSpec, target_modules: TargetModules) -> Adapter:
    """The adapter of a specification, on certain layers."""
    if spec.rank is None:
        return Full(target_modules)
    return LoRA(spec.rank, spec.init, spec.alpha, target_modules)


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
        "layers to adapt with --target-modules, or take all-linear."
    )


def load_adapter(model: nn.Module, folder: Path | str, trainable: bool = True) -> PeftModel:
    """Attach a saved adapter, its trained values and nothing drawn anew.

    Raises:
        UserError: The folder holds no LoRA of this model.
    """
    _leave_fast_path(model)
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} holds no adapter of this model: {str(error).splitlines()[0]}") from None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every layer that carries LoRA, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
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


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights, the same in whatever precision and wrapping they were loaded.

    It reads the name, the shape and up to 64 evenly spaced values of every parameter, rounded to bf16's precision.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            values = weight.detach().flatten()
            sample = values[:: max(1, len(values) // 64)][:64].to("cpu", torch.bfloat16)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _shared_weights(model: nn.Module) -> set[int]:
    """`id`s of the parameters that several modules hold."""
    held = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return {weight for weight, modules in held.items() if modules > 1}


def _is_read_past(model: nn.Module, name: str) -> bool:
    """Whether a layer is the `out_proj` of PyTorch's own attention, which is not called; PEFT's wrapper of that is."""
    parent, _, own = name.rpartition(".")
    attention = model.get_submodule(parent)
    return own == "out_proj" and isinstance(attention, nn.MultiheadAttention) and not parent.endswith("base_layer")


def _leave_fast_path(model: nn.Module) -> None:
    """Keep PyTorch's own encoder layers from their fast path, which reads the bare weights and passes LoRA by.

    It is taken in evaluation, by rollouts say, and of no other layer; the switch is this process's.
    """
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)


def _inject(model: nn.Module, config: LoraConfig) -> PeftModel:
    _leave_fast_path(model)
    try:
        return get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise UserError(f"LoRA cannot be attached: {one_line(error)}") from None


def _widths(model: nn.Module, targets: TargetModules) -> list[int]:
    """Fan-ins of the targeted layers of a plain or LoRA-carrying model."""
    return sorted({fan_in(a) for a, _ in _matrices(model, targets)})


def _sizes(model: nn.Module, targets: TargetModules) -> tuple[int, int]:
    """The largest fan-in n and the smallest fan-out m of the targeted layers."""
    matrices = _matrices(model, targets)
    return max(fan_in(a) for a, _ in matrices), min(len(b) for _, b in matrices)


def _matrices(model: nn.Module, targets: TargetModules) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A and B of the targeted layers of a plain or LoRA-carrying model; of a plain one, shapes without values."""
    found = [lora_matrices(layer) for _, layer in lora_layers(model)]
    found = found or [matrices for _, matrices in targeted_layers(model, targets)]
    if not found:
        raise UserError(f"no layer of the model matches the target modules {targets!r}.")
    return found


def targeted_layers(
    model: nn.Module, targets: TargetModules
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Layers of a plain model that PEFT would adapt, found by PEFT itself on a copy without storage.

    Yields:
        Each layer's name, and the A and B that a LoRA would have, shapes without values; their rank means nothing.

    Raises:
        UserError: There is none.
    """
    weights = [*model.parameters(), *model.buffers()]
    shapes = {id(weight): torch.empty_like(weight, device="meta") for weight in weights}
    shapes |= {id(p): nn.Parameter(shapes[id(p)], requires_grad=False) for p in model.parameters()}
    with torch.device("meta"):
        skeleton = copy.deepcopy(model, shapes)  # a weight that is found among the shapes is not copied
    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    rank = math.lcm(*(module.groups for module in convolutions))  # PEFT wants a rank that every grouping divides
    config: Any = LoraConfig(r=rank, target_modules=resolve_targets(model, targets))
    for name, layer in lora_layers(_inject(skeleton, config)):
        yield name.removeprefix("base_model.model."), lora_matrices(layer)
