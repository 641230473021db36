"""Every trained parameter is in exactly one named group, at the learning rate of its role."""

import pytest
import torch
from torch import nn

from mua_rl.adapter.adapters import Full, LoRA
from mua_rl.adapter.groups import learning_rates, param_groups, role_of, scale_learning_rates


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)


def names_by_group(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in groups}


def test_lora_parameters_are_grouped_by_matrix():
    model = LoRA(4, target_modules=["first", "last"]).attach(Net())
    groups = param_groups(model, {"lora_A": 1e-3, "lora_B": 2e-3})
    found = names_by_group(model, groups)
    prefix = "base_model.model."
    assert found["lora_A"] == [f"{prefix}{layer}.lora_A.default.weight" for layer in ("first", "last")]
    assert found["lora_B"] == [f"{prefix}{layer}.lora_B.default.weight" for layer in ("first", "last")]
    assert [(g["lr"], g["initial_lr"]) for g in groups] == [(1e-3, 1e-3), (2e-3, 2e-3)]


def test_full_finetuning_is_one_role_with_and_without_decay():
    model = Full().attach(Net())
    groups = param_groups(model, {"full": 1e-3}, 0.1, decayed=["first.weight", "last.weight"])
    found = names_by_group(model, groups)
    assert found["full"] == ["first.weight", "last.weight"]
    assert found["full/no_decay"] == ["first.bias", "last.bias", "norm.bias", "norm.weight"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_a_trained_parameter_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match="role full"):
        param_groups(Full().attach(Net()), {"lora_A": 1e-3})


def test_a_role_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="role lora_A"):
        param_groups(Full().attach(Net()), {"full": 1e-3, "lora_A": 1e-3})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("base_model.model.layers.0.up_proj.lora_A.default.weight", "lora_A"),
        ("layers.0.up_proj.lora_B.default.weight", "lora_B"),
        ("embed.lora_embedding_A.default", "lora_A"),
        ("embed.lora_embedding_B.default", "lora_B"),
        ("lora_A_like.weight", "full"),
        ("layers.0.up_proj.weight", "full"),
    ],
)
def test_roles_are_read_from_whole_path_segments(name, role):
    assert role_of(name) == role


def test_scaling_keeps_the_ratio_between_groups_and_starts_from_the_peak():
    model = LoRA(4, target_modules=["first"]).attach(Net())
    optimizer = torch.optim.AdamW(param_groups(model, {"lora_A": 1e-3, "lora_B": 4e-3}))
    for factor in (0.5, 0.25):  # twice: it must not compound
        scale_learning_rates(optimizer, factor)
        assert learning_rates(optimizer) == {"lora_A": factor * 1e-3, "lora_B": factor * 4e-3}
