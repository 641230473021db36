"""Which layers of an SB3 policy a name means, which role each parameter has, and what rank each layer can carry."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import nn

from mua_rl.adapter.adapters import Adapter
from mua_rl.adapter.groups import FULL, role_of
from mua_rl.adapter.targets import TargetModules, fan_in
from mua_rl.errors import UserError

HEAD, CRITIC = "head", "critic"
HEADS = ("action_net", "value_net", "log_std")
CRITIC_PARTS = ("value_net.", "mlp_extractor.value_net.", "vf_features_extractor.")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def head_role_of(name: str) -> str:
    """`mua_rl.adapter.groups.role_of`, and "head" for what a policy's output heads have beside a LoRA of their own."""
    segments = name.split(".")
    if segments[0] in HEADS and "base_layer" not in segments and role_of(name) == FULL:
        return HEAD
    return role_of(name)


def exactly(names: Sequence[str]) -> str:
    """A regular expression for these full names and no others (PEFT takes a list of names as endings)."""
    return "|".join(map(re.escape, names))


def hidden_layers(policy: ActorCriticPolicy) -> list[str]:
    """Full names of the linear and convolutional layers that neither read the observation nor are heads."""
    names = [name for name, module in policy.named_modules() if isinstance(module, LAYERS)]
    branches = [f"mlp_extractor.{net}" for net in ("policy_net", "value_net", "shared_net")]
    extractors = {
        name: module
        for name, module in policy.named_children()
        if name in ("features_extractor", "pi_features_extractor", "vf_features_extractor")
    }
    if any(name.split(".")[0] in extractors for name in names):
        branches = [
            f"{name}.extractors.{key}" if isinstance(module, CombinedExtractor) else name
            for name, module in extractors.items()
            for key in (module.extractors if isinstance(module, CombinedExtractor) else [""])
        ]
    first = [next((name for name in names if name.startswith(f"{branch}.")), None) for branch in branches]
    return [name for name in names if name not in first and name.split(".")[0] not in HEADS]


def resolve_layers(policy: ActorCriticPolicy, targets: TargetModules) -> list[str]:
    """Full names of the layers that `targets` names.

    Args:
        policy: A plain SB3 policy.
        targets: "hidden" (or "mlp", the default of `LoRA`), "actor" (those of them that are not the critic's alone),
            "all-linear", a regular expression for full names, or a
            list of full names or unambiguous endings. A full name wins over an ending (`value_net` is the head, not
            the critic's body, where PEFT's own matching takes both).

    Raises:
        UserError: A name fits no layer, or several, or there is no hidden layer.
    """
    layers = [name for name, module in policy.named_modules() if isinstance(module, LAYERS)]
    if isinstance(targets, list) and len(targets) == 1 and targets[0] in ("hidden", "actor", "all-linear"):
        targets = targets[0]
    if targets in ("hidden", "mlp"):
        found = hidden_layers(policy)
    elif targets == "actor":
        found = [name for name in hidden_layers(policy) if not is_critics(name)]
    elif targets == "all-linear":
        found = layers
    elif isinstance(targets, str):
        found = [name for name in layers if re.fullmatch(targets, name)]
    else:
        found = [_one_layer(layers, target) for target in targets]
    if not found:
        raise UserError(
            f"no layer of the policy matches the target modules {targets!r}: name some of {', '.join(layers)} with "
            "--target_modules, or train it fully (--rank full)."
        )
    return found


def _one_layer(layers: Sequence[str], target: str) -> str:
    found = [name for name in layers if name == target] or [name for name in layers if name.endswith(f".{target}")]
    if len(found) != 1:
        kind = f"several layers ({', '.join(found)})" if found else "no linear or convolutional layer"
        raise UserError(f"the target module {target!r} names {kind} of the policy; its layers: {', '.join(layers)}.")
    return found[0]


def is_critics(name: str) -> bool:
    """Whether a layer or a parameter of a policy is the critic's alone."""
    return f"{name}.".startswith(CRITIC_PARTS)


def fit(adapter: Adapter, policy: ActorCriticPolicy, layers: Sequence[str]) -> Adapter:
    """The adapter on these very layers; those that are smaller than its rank carry as much as they can.

    A rank that exceeds all of them stays as it is, and is refused where it is attached.
    """
    adapter = replace(cast(Any, adapter), target_modules=exactly(layers))
    if adapter.rank is None:
        return adapter
    weights = {name: cast(torch.Tensor, policy.get_submodule(name).weight) for name in layers}
    most = {name: min(len(weight), fan_in(weight)) for name, weight in weights.items()}
    rank = adapter.rank
    if rank > max(most.values()):
        return adapter
    return replace(cast(Any, adapter), layer_ranks={name: size for name, size in most.items() if size < rank})
