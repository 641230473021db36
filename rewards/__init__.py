"""Verifiable rewards for math and code.

Names are loaded at first use: importing this package imports neither Math-Verify nor torch, and starts no process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mua_rl.rewards.code import CodeReward as CodeReward
    from mua_rl.rewards.code import code_fraction_reward as code_fraction_reward
    from mua_rl.rewards.code import code_reward as code_reward
    from mua_rl.rewards.code import faulty_rows as faulty_rows
    from mua_rl.rewards.code import grade_code as grade_code
    from mua_rl.rewards.completions import completion_text as completion_text
    from mua_rl.rewards.extract_code import extract_code as extract_code
    from mua_rl.rewards.faults import BadRow as BadRow
    from mua_rl.rewards.faults import GraderFault as GraderFault
    from mua_rl.rewards.format import WatchedFormatReward as WatchedFormatReward
    from mua_rl.rewards.format import format_reward as format_reward
    from mua_rl.rewards.math import MathVerdict as MathVerdict
    from mua_rl.rewards.math import gold_faults as gold_faults
    from mua_rl.rewards.math import judge_completions as judge_completions
    from mua_rl.rewards.math import math_reward as math_reward
    from mua_rl.rewards.math import strict_math_reward as strict_math_reward

_MODULE_OF = {
    "completion_text": "completions",
    "WatchedFormatReward": "format",
    "format_reward": "format",
    "MathVerdict": "math",
    "gold_faults": "math",
    "judge_completions": "math",
    "math_reward": "math",
    "strict_math_reward": "math",
    "GraderFault": "faults",
    "BadRow": "faults",
    "CodeReward": "code",
    "code_fraction_reward": "code",
    "code_reward": "code",
    "faulty_rows": "code",
    "grade_code": "code",
    "extract_code": "extract_code",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
