"""The process in which reasoning-gym scores answers with its own scorers.

Some of its scorers give the policy's text to Python's `eval` or to SymPy's `parse_expr`, which is `eval` too. Those
get only text that can do no harm there; other text scores 0, as it does when it does not parse. The two lists of them
were made by reading one version's source, and tests/test_tasks_reasoning.py holds them against it; another version,
whose scorers may evaluate more, is refused.
"""

import base64
import importlib.metadata
import math
import pickle
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mua_rl.errors import UserError
from mua_rl.rewards.worker_loop import serve

READ_VERSION = "0.1.25"
"""The version of reasoning-gym whose scorers have been read. pyproject.toml asks for the same."""

EVALUATE_PYTHON = frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"})
"""Generators whose scorer calls `eval` on the answer."""

EVALUATE_SYMPY = frozenset(
    {"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"}
)
"""Generators whose scorer calls `parse_expr` on the answer."""

_MAX_EVALUATED_CHARS = 1000
_FUNCTIONS = frozenset({"sin", "cos", "tan", "exp", "log", "ln", "sqrt", "pi", "asin", "acos", "atan", "sinh", "cosh"})
_HUGE_POWER = re.compile(r"(?:\*\*|\^)\s*\(*\s*[-+]?\s*(?:\d{3,}|[\d.]+\s*(?:\*\*|\^))|!")


def is_harmless(name: str, answer: str) -> bool:
    """Whether the scorer of generator `name` may see `answer`."""
    if name in EVALUATE_PYTHON:
        # Without parentheses nothing can be called, and without __ no attribute that matters can be reached.
        return len(answer) <= _MAX_EVALUATED_CHARS and not re.search(r"[()@;=]|__|\bfor\b|\*\*|<<", answer)
    if name in EVALUATE_SYMPY:
        words = re.findall(r"[^\W\d]\w*", answer)
        return (
            len(answer) <= _MAX_EVALUATED_CHARS
            and re.fullmatch(r"[\w\s.+*/^()-]*", answer, re.ASCII) is not None
            and not re.search(r"__|\.\s*[A-Za-z_]", answer)
            and not _HUGE_POWER.search(answer)
            and all(len(word) == 1 or word in _FUNCTIONS for word in words)
        )
    return True


def check_version() -> None:
    """Refuse a reasoning-gym whose scorers nobody has read.

    Raises:
        UserError: It is another version than `READ_VERSION`.
    """
    installed = importlib.metadata.version("reasoning-gym")
    if installed != READ_VERSION:
        raise UserError(
            f"reasoning-gym {installed} is installed, whose scorers may run a policy's text as code; those of "
            f"{READ_VERSION} have been checked: pip install reasoning-gym=={READ_VERSION}"
        )


def load() -> Callable[[list[Any]], float]:
    """Import reasoning-gym; the returned function scores `[generator, configuration, entry, answer]`."""
    try:
        check_version()
    except UserError as error:
        raise SystemExit(str(error)) from None  # the pool passes on what a worker that does not start has said
    import reasoning_gym

    @lru_cache(maxsize=16)
    def generator(name: str, config: str) -> Any:
        return reasoning_gym.create_dataset(name, size=1, seed=0, **pickle.loads(base64.b64decode(config)))

    def score(request: list[Any]) -> float:
        name, config, entry, answer = request
        if not is_harmless(name, answer):
            return 0.0
        # Entry and configuration are our own trainer's; they are pickled because JSON would turn tuples into lists.
        value = float(generator(name, config).score_answer(answer, pickle.loads(base64.b64decode(entry))))
        return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0

    return score


if __name__ == "__main__":
    serve(load)
