"""K LoRAs on one frozen base: A and B of all trials stacked, one batched product beside the shared base product.

A batch is laid out trial by trial: rows `k·b … (k+1)·b − 1` belong to trial k. Rows of different trials meet in no
product, so a NaN of one trial reaches no other. Trials may differ in rank: A and B are padded with zeros to the
largest, and zeros get no gradient, so they stay zero.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from mua_rl.adapter.adapters import LoRA
from mua_rl.adapter.targets import lora_layers
from mua_rl.errors import UserError

# Gradients are views into one vector a trial: what autograd warns of is that no other layout is as fast for it.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


def check_linear(name: str, layer: nn.Module) -> nn.Linear:
    """Return a layer that is to carry LoRA.

    Raises:
        UserError: The layer has no stacked form.
    """
    if not isinstance(layer, nn.Linear):
        raise UserError(f"trials side by side take linear layers, and {name} is not linear: run the trials singly.")
    if layer.weight.shape != (layer.out_features, layer.in_features):
        raise UserError(f"trials side by side know no 4-bit base, and {name} is quantised: run the trials singly.")
    return layer


class StackedLinear(nn.Module):
    """A frozen linear layer that adds `α_k B_k A_k x` to the rows of trial k.

    Attributes:
        a: The trials' A, `(K, r, n)`, fp32.
        b: The trials' B, `(K, m, r)`, fp32.
        multiplier: The trials' α, `(K, 1, 1)`; `None` where all are 1.
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.multiplier: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(K·b, t, n)` → `(K·b, t, m)`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for both products
        out = self.base(x)
        trials = len(self.a)
        low = torch.bmm(x.reshape(trials, -1, x.shape[-1]), self.a.to(x.dtype).mT)
        if self.multiplier is not None:
            low = (low * self.multiplier).to(x.dtype)
        return torch.baddbmm(out.view(trials, -1, out.shape[-1]), low, self.b.to(x.dtype).mT).view(out.shape)


class LoRAStack:
    """The LoRAs of several trials on one model.

    All of a trial's A and B lie in one row of `values`, their gradients in the same row of `gradients`, and the layers
    hold views into these: clipping, checking and stepping a trial are operations on one vector.

    Args:
        model: A causal language model; its targeted linear layers are replaced by `StackedLinear`.
        adapters: What each trial trains.
        seeds: The seed of each trial's starting values, which are those that `adapter.attach(model, seed)` draws.

    Attributes:
        values: `(K, P)`, fp32.
        gradients: `(K, P)`.
        active: Which of `adapters` the rows are; all at first.

    Raises:
        UserError: See `LoRA.attach`; or a targeted layer is not linear.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[LoRA], seeds: Sequence[int]) -> None:
        self.model, self.adapters = model, list(adapters)
        largest = max(adapters, key=lambda adapter: adapter.rank)
        self.rank = largest.rank
        wrapped = largest.attach(model)
        self.config = cast(LoraConfig, wrapped.peft_config["default"])
        self.layers: dict[str, StackedLinear] = {}
        for name, layer in list(lora_layers(wrapped)):
            base, name = layer.get_base_layer(), name.removeprefix("base_model.model.")
            self.layers[name] = StackedLinear(check_linear(name, base))
            model.set_submodule(name, self.layers[name])
        model.requires_grad_(False)
        self.active = list(range(len(self.adapters)))
        size = sum(self.rank * sum(layer.base.weight.shape) for layer in self.layers.values())
        self._lay_out(torch.zeros(len(self.active), size, device=next(model.parameters()).device))
        for trial, (adapter, seed) in enumerate(zip(adapters, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            for _, a, b in self.matrices(trial):
                adapter.draw(a, b, generator)

    def matrices(self, trial: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, A `(r, n)` and B `(m, r)` of every layer of an active trial, at its own rank; views, no gradient."""
        return self._views(self.values[self.active.index(trial)], self.adapters[trial].rank)

    def pack(self, trial: int, vector: torch.Tensor) -> torch.Tensor:
        """What of a vector that is laid out as a row of `values` belongs to a trial's own rank, `(P,)` → `(p,)`, on the
        CPU: it does not depend on the ranks of the others."""
        matrices = self._views(vector, self.adapters[trial].rank)
        return torch.cat([matrix.flatten() for _, a, b in matrices for matrix in (a, b)]).cpu()

    def unpack(self, trial: int, packed: torch.Tensor) -> torch.Tensor:
        """A row of `values` from what `pack` gave, maybe of another stack with that trial: `(p,)` → `(P,)`."""
        vector = torch.zeros_like(self.values[0])
        matrices = [m for _, a, b in self._views(vector, self.adapters[trial].rank) for m in (a, b)]
        for matrix, part in zip(matrices, packed.split([m.numel() for m in matrices]), strict=True):
            matrix.copy_(part.view(matrix.shape))
        return vector

    def keep(self, trials: Sequence[int]) -> None:
        """Let the other trials go: a batch has rows for these alone from now on."""
        rows = [self.active.index(trial) for trial in trials]
        self.active = list(trials)
        self._lay_out(self.values[rows])

    def alpha(self, trial: int) -> float:
        """The multiplier α of a trial."""
        return self.adapters[trial].alpha(self.adapters[trial].rank)

    @torch.no_grad()
    def peft_tensors(
        self, trial: int, dtype: torch.dtype = torch.float32, multiplier: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Copies of an active trial's A, and of B times a number, under PEFT's names; B is rounded to `dtype` once."""
        tensors = {}
        for name, a, b in self.matrices(trial):
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype, copy=True)
            tensors[f"base_model.model.{name}.lora_B.weight"] = (b * multiplier).to(dtype).contiguous()
        return tensors

    def save_adapter(self, trial: int, folder: Path | str) -> None:
        """Write an active trial as a PEFT adapter, which `mua_rl.adapter.adapters.load_adapter` reads.

        Raises:
            UserError: The trial has ended early, and its weights are gone.
        """
        if trial not in self.active:
            raise UserError(f"trial {trial} has ended early, and its adapter is gone.")
        folder, adapter, config = Path(folder), self.adapters[trial], copy.copy(self.config)
        config.r, config.lora_alpha = adapter.rank, adapter.peft_config(self.model).lora_alpha
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(self.peft_tensors(trial), folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _views(self, rows: torch.Tensor, rank: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """A `(…, r, n)` and B `(…, m, r)` of every layer, up to a rank, within rows `(…, P)` laid out as `values`."""
        start = 0
        for name, layer in self.layers.items():
            m, n = layer.base.weight.shape
            a, b = rows[..., start : start + self.rank * (n + m)].split([self.rank * n, self.rank * m], -1)
            yield name, a.unflatten(-1, (self.rank, n))[..., :rank, :], b.unflatten(-1, (m, self.rank))[..., :rank]
            start += self.rank * (n + m)

    def _lay_out(self, values: torch.Tensor) -> None:
        """Make `values` the trials' values and point the layers at them."""
        self.values, self.gradients = values, torch.zeros_like(values)
        alphas = [self.alpha(trial) for trial in self.active]
        multiplier = None if set(alphas) <= {1.0} else torch.tensor(alphas, device=values.device).view(-1, 1, 1)
        gradients = self._views(self.gradients, self.rank)
        for (name, a, b), (_, a_gradient, b_gradient) in zip(self._views(values, self.rank), gradients, strict=True):
            layer = self.layers[name]
            layer.multiplier, layer.a, layer.b = multiplier, nn.Parameter(a), nn.Parameter(b)
            layer.a.grad, layer.b.grad = a_gradient, b_gradient
