"""Named parameter groups: every trained parameter in exactly one, each at the learning rate of its role."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

LORA_A, LORA_B, FULL = "lora_A", "lora_B", "full"


def role_of(name: str) -> str:
    """The role of a parameter by its dotted name, wrapped in a `PeftModel` or not: lora_A, lora_B or full."""
    for segment in name.split("."):
        if segment in ("lora_A", "lora_embedding_A"):
            return LORA_A
        if segment in ("lora_B", "lora_embedding_B"):
            return LORA_B
    return FULL


def param_groups(
    model: nn.Module,
    learning_rates: float | Mapping[str, float],
    weight_decay: float = 0.0,
    decayed: Iterable[str] | None = None,
    role_of: Callable[[str], str] = role_of,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, one per role, with `name`, `lr`, `initial_lr` and `weight_decay`.

    Args:
        model: The model whose parameters that require gradients are grouped.
        learning_rates: Peak learning rate of each role, or one for all roles that the model has.
        weight_decay: Decay of the parameters named in `decayed`.
        decayed: Names of the parameters that decay; `None`: all. The others get a group `<role>/no_decay`.
        role_of: Maps a parameter's name to its role.

    Raises:
        ValueError: A trained parameter has a role without a learning rate, or a role has no parameter: either means
            that something would silently not be trained as intended.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not isinstance(learning_rates, Mapping):
        learning_rates = dict.fromkeys((role_of(name) for name, _ in trained), float(learning_rates))
    if leftover := sorted({role_of(name) for name, _ in trained} - learning_rates.keys()):
        examples = ", ".join([name for name, _ in trained if role_of(name) in leftover][:3])
        raise ValueError(f"no learning rate is given for the role {', '.join(leftover)} (of {examples}).")
    decays = set(decayed) if decayed is not None and weight_decay else {name for name, _ in trained}
    groups = []
    for role, rate in learning_rates.items():
        members = [(name, parameter) for name, parameter in trained if role_of(name) == role]
        if not members:
            raise ValueError(f"no trained parameter has the role {role}.")
        for group, decay, decaying in ((role, weight_decay, True), (f"{role}/no_decay", 0.0, False)):
            if parameters := [parameter for name, parameter in members if (name in decays) is decaying]:
                rates = {"lr": rate, "initial_lr": rate, "weight_decay": decay}
                groups.append({"params": parameters, "name": group, **rates})
    return groups


def scale_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak, which keeps the ratio between groups."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate that each group has now, read from the optimizer itself."""
    return {group.get("name", str(i)): float(group["lr"]) for i, group in enumerate(optimizer.param_groups)}
