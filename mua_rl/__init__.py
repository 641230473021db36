"""Reinforcement-learning finetuning with one learning rate for every LoRA rank and for full finetuning.

What other scripts use is importable from here; importing the package itself imports neither it nor PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mua_rl.adapter.adapters import Full, LoRA
    from mua_rl.adapter.groups import param_groups
    from mua_rl.adapter.rates import transfer
    from mua_rl.analysis.optimum import estimate_optimum
    from mua_rl.lr.record import LRRecord

__version__ = "0.2.0"
__all__ = ["Full", "LRRecord", "LoRA", "estimate_optimum", "param_groups", "transfer"]

_MODULES = {
    "Full": "mua_rl.adapter.adapters",
    "LoRA": "mua_rl.adapter.adapters",
    "LRRecord": "mua_rl.lr.record",
    "estimate_optimum": "mua_rl.analysis.optimum",
    "param_groups": "mua_rl.adapter.groups",
    "transfer": "mua_rl.adapter.rates",
}


def __getattr__(name: str) -> Any:
    """A public name, from its module, when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
