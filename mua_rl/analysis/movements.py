"""Movements of a policy by curve, from CSVs of `scripts/measure_movement.py`, as transfer rules use them."""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mua_rl.errors import UserError
from mua_rl.lr.spec import AdapterSpec

Movements = dict[tuple[str, str], dict[AdapterSpec, float]]
"""By (task, base) and curve: √KL per step and unit of learning rate."""


def read_movements(paths: Sequence[Path | str]) -> Movements:
    """Movements per step and unit of learning rate, `√KL / (η · steps)`, each the geometric mean of its lines.

    A few small steps in one direction move a policy by a KL that grows with the square of steps and of η.

    Raises:
        UserError: A file cannot be read, or is of another kind.
    """
    logs: dict[tuple[str, str], dict[AdapterSpec, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8") as stream:
                for line in csv.DictReader(stream):
                    curve = AdapterSpec.parse(int(line["rank"]) if line["rank"] else None, line["init"], line["alpha"])
                    log2_kl, log2_steps = math.log2(float(line["kl"])), math.log2(int(line["steps"]))
                    logs[line["task"], line["base"]][curve].append(log2_kl / 2 - float(line["log2_lr"]) - log2_steps)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no CSV of measured movements ({type(error).__name__}: {error}): "
                "scripts/measure_movement.py makes one."
            ) from None
    return {
        key: {curve: 2.0 ** statistics.fmean(values) for curve, values in curves.items()}
        for key, curves in logs.items()
    }
