"""Reads what stable-baselines3 pickled under any gym or Gymnasium: the spaces and observation statistics of a policy.

gym need not be installed: a stand-in takes the state of each of its objects, and becomes Gymnasium's space of the same
kind. Random generators inside, which no two versions of numpy pickle alike, are left out: nothing here draws from them.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize


class _StandIn:
    """Holds the state of an object whose class is not here; a subclass has the name of that class."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            vars(self).update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Find what a pickle names, as `pickle` asks for it."""
        if module.partition(".")[0] == "gym" or module.startswith("numpy.random"):
            return type(name, (_StandIn,), {})
        return super().find_class(module, name)


def unpickle(content: bytes) -> Any:
    """What was pickled; a space of gym as Gymnasium's.

    Raises:
        Exception: A pickle can fail in any way.
    """
    return _modern(_Unpickler(io.BytesIO(content)).load())


def read_statistics(path: Path) -> VecNormalize:
    """The statistics that `VecNormalize.save` wrote under any version of SB3; `set_venv` gives them environments.

    Raises:
        Exception: A pickle can fail in any way.
    """
    statistics = unpickle(path.read_bytes())
    if not isinstance(statistics, VecNormalize):
        raise TypeError(f"it holds a {type(statistics).__name__}, not a VecNormalize")
    state = vars(statistics)
    state |= {name: _modern(value) for name, value in state.items()}
    if state.get("norm_obs_keys") is None:  # SB3 before 1.2 normalised everything
        moments = state.get("obs_rms")
        state["norm_obs_keys"] = list(moments) if isinstance(moments, dict) else None
    return statistics


def _modern(value: Any) -> Any:
    """The Gymnasium space that a stand-in is for; any other value as it is."""
    if isinstance(value, dict):
        return {key: _modern(part) for key, part in value.items()}
    if not isinstance(value, _StandIn):
        return value
    kind, state = type(value).__name__, vars(value)
    if kind == "Box":
        low, high = np.asarray(state["low"]), np.asarray(state["high"])
        return spaces.Box(low, high, dtype=np.dtype(state.get("dtype") or low.dtype).type)
    if kind == "Discrete":
        return spaces.Discrete(int(state["n"]), start=int(state.get("start", 0)))
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.asarray(state["nvec"]))
    if kind == "MultiBinary":
        return spaces.MultiBinary(state["n"])
    if kind == "Dict":
        return spaces.Dict({key: _modern(part) for key, part in state["spaces"].items()})
    if kind == "Tuple":
        return spaces.Tuple([_modern(part) for part in state["spaces"]])
    return value
