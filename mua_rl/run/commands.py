"""The commands that a run or a sweep names at its end: all that it was given, but for what the next run changes."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OF_ONE_RUN = ("rank", "init", "alpha", "lora_alpha", "lr", "learning_rate", "lr_from", "output_dir", "resume")
"""Settings that say which adapter a run trained, at which learning rate, and where."""
OF_THE_BASE = ("start_from", "model", "base", "vec_normalize", "policy", "policy_kwargs", "use_sde")
"""Settings whose place the policy of `--start_from` takes."""


def other_ranks(folder: Path) -> str:
    """The command that prints the learning rate of the record in a folder at other ranks."""
    return shlex.join(["python", "-m", "mua_rl.lr", str(folder)])


def full_finetuning(algorithm: str, settings: Mapping[str, Any], folder: Path) -> str:
    """The command that trains all weights of the same base, at the learning rate of the record in a folder."""
    others = {name: value for name, value in settings.items() if name not in OF_ONE_RUN}
    return command(algorithm, {**others, "rank": "full", "lr_from": str(folder)})


def from_policy(algorithm: str, settings: Mapping[str, Any], folder: Path) -> str:
    """The command that trains all weights of the policy that the run in a folder ended with."""
    others = {name: value for name, value in settings.items() if name not in (*OF_ONE_RUN, *OF_THE_BASE)}
    return command(algorithm, {**others, "start_from": str(folder)})


def command(module: str, settings: Mapping[str, Any]) -> str:
    """A line for a shell, from settings as a run folder keeps them; a null, which YAML alone can say, is left out."""
    words = ["python", "-m", f"mua_rl.{module}"]
    for name, value in settings.items():
        flag = f"--{name}"
        if isinstance(value, list):
            words += [flag, *map(_word, value)]
        elif value is not None:
            word = _word(value)
            words += [f"{flag}={word}"] if word.startswith("-") else [flag, word]
    return shlex.join(words)


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
