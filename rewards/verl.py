"""The rewards in verl's form: its `custom_reward_function.path` is this file, the `name` there a function of it.

verl gives the text of a response and its row's `reward_model["ground_truth"]`. A text or a number there is the gold of
the math reward (a worked solution too); a mapping with `tests`, or its JSON, are the columns of the code reward, with
`entry_point`, `prelude` and `setup` where the row needs them; one with `inputs` and `outputs` is its `tests`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mua_rl.rewards.code import code_reward
from mua_rl.rewards.math import math_reward


def compute_score(
    data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **reward_kwargs: Any
) -> float:
    """1.0 for a right response, else 0.0: for verl's managers that score one by one.

    A row whose gold or tests cannot be used scores 0.0 whatever the response, with a warning in the log: verl has no
    way to leave a row out.

    Args:
        data_source: Not used: the form of `ground_truth` tells math from code.
        solution_str: The response.
        ground_truth: The gold answer, or the columns of the tests.
        extra_info: Not used.
        reward_kwargs: Not used.

    Raises:
        GraderFault: The grader does not work.
        UserError: The sandbox cannot be had here.
    """
    return compute_scores([data_source], [solution_str], [ground_truth])[0]


def compute_scores(
    data_sources: Sequence[Any],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Any] | None = None,
    **reward_kwargs: Any,
) -> list[float]:
    """`compute_score` of a batch at once, on all workers: for verl's `reward_model.reward_manager=batch`."""
    tests = [_columns_of_tests(truth) for truth in ground_truths]
    math = [i for i, columns in enumerate(tests) if columns is None]
    code = [i for i, columns in enumerate(tests) if columns is not None]
    golds = [ground_truths[i] for i in math]
    scores = dict(zip(math, math_reward(completions=[solution_strs[i] for i in math], answer=golds), strict=True))
    if code:
        columns: dict[str, Any] = {
            name: [(tests[i] or {}).get(name) for i in code] for name in ("tests", "entry_point", "prelude", "setup")
        }
        graded = code_reward(completions=[solution_strs[i] for i in code], **columns)
        scores.update(zip(code, graded, strict=True))
    return [scores[i] or 0.0 for i in range(len(tests))]


def _columns_of_tests(truth: Any) -> Mapping[str, Any] | None:
    if isinstance(truth, str) and truth.lstrip().startswith("{"):
        try:
            truth = json.loads(truth)
        except ValueError:  # a formula begins with a brace too
            return None
    if not isinstance(truth, Mapping):
        return None
    if "inputs" in truth and "outputs" in truth:  # verl's own code rows hold one row's tests and nothing else
        return {"tests": dict(truth)}
    return truth if "tests" in truth else None
