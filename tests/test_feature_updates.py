"""The sizes of δ₁, δ₂, δ₃ and ΔZ are those of the changes that a layer's output really makes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mua_rl.adapter.adapters import Full, LoRA
from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import UserError
from mua_rl.lr.spec import AlphaRule
from mua_rl.probes.feature_updates import DELTA_1, DELTA_2, DELTA_3, DELTA_Z, DELTA_Z_B, feature_updates


class Alone(nn.Module):
    """One layer by itself: its input never changes, so its output changes by ΔZ_B alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "Linear": (lambda: nn.Linear(24, 16), lambda: torch.randn(5, 24)),
    "Conv1d": (lambda: nn.Conv1d(8, 16, 3, stride=2), lambda: torch.randn(5, 8, 9)),
    "Conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2), lambda: torch.randn(5, 8, 6, 6)),
    "Embedding": (lambda: nn.Embedding(20, 16), lambda: torch.randint(20, (5, 7))),
    "Conv1D": (lambda: Conv1D(16, 24), lambda: torch.randn(5, 7, 24)),
}


def rms(x):
    return x.square().mean().sqrt().item()


def measured_and_observed(kind, adapter, steps=3):
    """Measured sizes by step and quantity, and the output of the layer before each of the steps."""
    torch.manual_seed(0)
    build, draw = LAYERS[kind]
    x, outputs = draw(), []

    def loss(model, batch):
        output = model(batch)
        outputs.append(output.detach())
        return (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum()

    updates = feature_updates(Alone(build()), adapter, loss, [x], 1e-2, steps)
    assert {update.kind for update in updates} == {kind}
    assert {update.layer for update in updates} == {"layer"}
    return {(update.step, update.quantity): update.size for update in updates}, outputs[1:]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("adapter", [LoRA(4, "A", AlphaRule(3, 1), ["layer"]), LoRA(4, "B", target_modules=["layer"])])
def test_delta_z_b_is_what_the_layers_output_changes_by(kind, adapter):
    sizes, outputs = measured_and_observed(kind, adapter)
    for step in (1, 2):
        assert sizes[step, DELTA_Z_B] == pytest.approx(rms(outputs[step] - outputs[step - 1]), rel=1e-3)
        assert sizes[step, DELTA_Z_B] > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_delta_z_of_full_finetuning_is_what_the_output_changes_by_without_the_bias(kind):
    torch.manual_seed(0)
    build, draw = LAYERS[kind]
    layer = build()
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias.register_hook(torch.zeros_like)  # the bias does not move, so that the output shows ΔW Z alone
    x, outputs = draw(), []

    def loss(model, batch):
        outputs.append(model(batch).detach())
        return model(batch).square().sum()

    updates = feature_updates(Alone(layer), Full(["layer"]), loss, [x], 1e-3, steps=2)
    assert [update.quantity for update in updates] == [DELTA_Z, DELTA_Z]
    assert updates[0].size == pytest.approx(rms(outputs[2] - outputs[1]), rel=1e-3)


@pytest.mark.parametrize("init", ["A", "B"])
def test_the_parts_are_the_papers(init):
    torch.manual_seed(0)
    x, seen = torch.randn(5, 24), []

    def loss(model, batch):
        ((_, layer),) = lora_layers(model)
        seen.append([matrix.detach().clone() for matrix in lora_matrices(layer)])
        return model(batch).square().sum()

    adapter = LoRA(4, init, AlphaRule(0.5), ["layer"])
    updates = feature_updates(Alone(nn.Linear(24, 16)), adapter, loss, [x], 1e-2, steps=4)
    sizes = {(update.step, update.quantity): update.size for update in updates}
    for step in (1, 2, 3):
        (a, b), (new_a, new_b) = seen[step], seen[step + 1]
        expected = {
            DELTA_1: 0.5 * x @ (new_a - a).T @ b.T,
            DELTA_2: 0.5 * x @ a.T @ (new_b - b).T,
            DELTA_3: 0.5 * x @ (new_a - a).T @ (new_b - b).T,
        }
        for quantity, value in expected.items():
            assert sizes[step, quantity] == pytest.approx(rms(value), rel=1e-4)
    still = (DELTA_1, DELTA_3) if init == "A" else (DELTA_2, DELTA_3)
    assert [sizes[1, quantity] for quantity in still] == [0, 0]  # only the zero matrix has a gradient at first


def test_the_first_batch_is_measured_on_and_the_others_are_trained_on_in_turn():
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model(torch.ones(2, 24) * batch).square().sum()

    feature_updates(Alone(nn.Linear(24, 16)), LoRA(2, target_modules=["layer"]), loss, [1.0, 2.0, 3.0], 1e-2, steps=5)
    assert seen == [1.0, 1.0, 2.0, 3.0, 1.0, 2.0]


def test_a_layer_that_the_loss_does_not_depend_on_is_left_out():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.absent = (nn.Linear(24, 16) for _ in range(3))

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    def squares(model, x):
        return model(x).square().sum()

    for adapter in (LoRA(2, target_modules=["used", "idle", "absent"]), Full(["used", "idle", "absent"])):
        updates = feature_updates(Both(), adapter, squares, [torch.randn(3, 24)], 1e-2, steps=2)
        assert {update.layer for update in updates} == {"used"}
    with pytest.raises(UserError, match="depends on none"):
        idle = LoRA(2, target_modules=["idle", "absent"])
        feature_updates(Both(), idle, squares, [torch.randn(3, 24)], 1e-2, steps=1)
