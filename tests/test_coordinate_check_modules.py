"""LoRA attaches to modules of every kind, and their feature updates are flat in rank at the transferred learning rate.

Random weights throughout: a vision transformer, a diffusion UNet, an encoder, a vision-language model, an SB3-like MLP.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mua_rl.adapter.adapters import LoRA
from mua_rl.adapter.targets import lora_layers
from mua_rl.coordinate_check import Place, check
from mua_rl.probes.coordinate_report import FIXED, TRANSFERRED, lines
from mua_rl.probes.feature_updates import DELTA_Z_B, feature_updates

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


def vision_transformer():
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=8, **SIZES))
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(8, (4,))
    return model, lambda m: functional.cross_entropy(m(images).logits, labels)


class UNet(nn.Module):
    """One level of a diffusion UNet: down, residual convolutions on the timestep, attention, up with a skip."""

    def __init__(self, channels: int = 64):
        super().__init__()
        self.enter = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.time = nn.Linear(2 * channels, 2 * channels)
        self.norm1, self.norm2 = nn.GroupNorm(8, 2 * channels), nn.GroupNorm(8, 2 * channels)
        self.conv = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(2 * channels, 2 * channels) for _ in range(4))
        self.up = nn.Conv2d(3 * channels, channels, 3, padding=1)
        self.leave = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, image: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        skip = self.enter(image)
        x = self.down(functional.silu(skip))
        angles = time[:, None] * torch.logspace(0, 3, x.shape[1] // 2)
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        x = x + self.conv(functional.silu(self.norm1(x) + embedding[:, :, None, None]))
        pixels = self.norm2(x).flatten(2).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels))
        x = x + self.to_out(mixed).transpose(1, 2).reshape(x.shape)
        x = functional.interpolate(x, scale_factor=2)
        return self.leave(functional.silu(self.up(torch.cat([x, skip], 1))))


def diffusion_unet():
    image, noise, time = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.rand(2)
    level = time[:, None, None, None]
    noisy = (1 - level) * image + level * noise
    return UNet(), lambda m: functional.mse_loss(m(noisy, time), noise)


def encoder():
    model = BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=16, **SIZES))
    tokens, labels = torch.randint(100, (4, 8)), torch.randint(2, (4,))
    return model, lambda m: m(input_ids=tokens, labels=labels).loss


def vision_language():
    text = LlamaConfig(vocab_size=64, **{**SIZES, "num_hidden_layers": 1})
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **SIZES)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=63))
    images, patches = torch.randn(2, 3, 32, 32), torch.full((2, 4), 63)
    tokens = torch.cat([patches, torch.randint(63, (2, 8))], 1)
    return model, lambda m: m(input_ids=tokens, pixel_values=images, labels=tokens).loss


def control_policy():
    model = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 2))
    states, actions, advantages = torch.randn(16, 4), torch.randint(2, (16,)), torch.randn(16)
    return model, lambda m: (advantages * functional.cross_entropy(m(states), actions, reduction="none")).mean()


MODULES = {
    "vision transformer": (vision_transformer, r"vit\.(layers\..*(_proj|fc1|fc2)|embeddings\..*projection)"),
    "diffusion UNet": (diffusion_unet, ["down", "conv", "up", "time", "to_q", "to_k", "to_v", "to_out"]),
    "encoder": (encoder, ["query", "key", "value", "dense"]),
    "vision-language model": (vision_language, r".*(gate_proj|up_proj|down_proj|fc1|fc2|q_proj|k_proj|v_proj)"),
    "control policy": (control_policy, ["2"]),
}


def updates_by_lr_rule(build, targets, init):
    """The line of ΔZ_B against the rank for each LR rule."""

    def make(seed):
        torch.manual_seed(seed)
        model, loss = build()
        return model, [loss]

    places = [Place(LoRA(rank, init, target_modules=targets), make) for rank in (4, 64)]
    rows = check("rank", places, lambda model, loss: loss(model), seeds=range(2))
    return {line.lr_rule: line for line in lines(rows) if line.quantity == DELTA_Z_B}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.slow
def test_the_feature_update_is_flat_in_rank_for(name, init):
    build, targets = MODULES[name]
    line = updates_by_lr_rule(build, targets, init)
    assert line[TRANSFERRED].verdict == "flat"
    assert not line[TRANSFERRED].failed
    if init == "A":  # with Init[B] the fixed learning rate is the transferred one
        assert line[FIXED].slope > line[TRANSFERRED].slope + 0.25


@pytest.mark.parametrize("name", MODULES)
def test_every_layer_that_carries_lora_and_has_a_gradient_is_measured_in(name):
    build, targets = MODULES[name]
    torch.manual_seed(0)
    model, loss = build()
    updates = feature_updates(model, LoRA(4, target_modules=targets), lambda m, loss: loss(m), [loss], 1e-3, steps=1)
    attached = LoRA(4, target_modules=targets).attach(build()[0])
    carrying = {layer.removeprefix("base_model.model.") for layer, _ in lora_layers(attached)}
    unused = {layer for layer in carrying if "vision_tower.encoder.layers.1" in layer}  # LLaVA reads the one before
    assert {update.layer for update in updates} == carrying - unused
