"""The embedded tasks: sums and products of one- and two-digit numbers, in words for chat models, in symbols for others.

The 20,000 problems are split once and for all by a hash, so that the held-out ones are in no run's training set, nor in
the corpus of the embedded model (`scripts/pretrain_embedded.py`). Differences, which that model has never seen, are a
task for supervised finetuning to begin (`scripts/finetune_text.py`).
"""

import random
import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset

from mua_rl.envs.tasks import Task, register_task
from mua_rl.rewards.completions import completion_text

TRAIN_PROBLEMS = 8192
HELD_OUT_PROBLEMS = 512
_HELD_OUT_ONE_IN = 8
_INTEGER = re.compile(r"-?\d+")

Problem = tuple[int, str, int]
Draw = Callable[[random.Random, bool], Problem]


def is_held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the held-out split: one in eight does, the same ones for ever."""
    return zlib.crc32(repr(problem).encode()) % _HELD_OUT_ONE_IN == 0


def draw_problem(rng: random.Random, held_out: bool, operators: str = "+*") -> Problem:
    """One problem of a split: each operand has one or two digits with equal chance, as has each operator."""
    while True:
        first, second = _operand(rng), _operand(rng)
        problem = (first, rng.choice(operators), second)
        if is_held_out(problem) == held_out:
            return problem


def draw_easy_problem(rng: random.Random, held_out: bool) -> Problem:
    """One problem of a split: a sum as in `draw_problem`, or, with equal chance, a product of digits."""
    while True:
        operator = rng.choice("+*")
        first, second = (_operand(rng) if operator == "+" else rng.randrange(10) for _ in range(2))
        if is_held_out(problem := (first, operator, second)) == held_out:
            return problem


def _operand(rng: random.Random) -> int:
    return rng.randrange(10) if rng.random() < 0.5 else rng.randrange(10, 100)


def solve(problem: Problem) -> int:
    """The right answer."""
    first, operator, second = problem
    return {"+": first + second, "*": first * second, "-": first - second}[operator]


def last_integer_is_right(completions: list, answer: list[int], **_: Any) -> list[float | None]:
    """1.0 where the last integer of the completion is the answer, else 0.0 (also where there is no integer)."""
    scores: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        found = _INTEGER.findall(completion_text(completion))
        # The length limit keeps int() off numbers of thousands of digits, which Python refuses to convert.
        scores.append(float(bool(found) and len(found[-1]) < 20 and int(found[-1]) == right))
    return scores


def _split(draw: Draw, held_out: bool, conversational: bool) -> Dataset:
    rng = random.Random(1 if held_out else 0)
    size = HELD_OUT_PROBLEMS if held_out else TRAIN_PROBLEMS
    problems = [draw(rng, held_out) for _ in range(size)]
    if conversational:
        prompts: list = [[{"role": "user", "content": f"What is {a} {op} {b}?"}] for a, op, b in problems]
    else:
        prompts = [f"{a}{op}{b}=" for a, op, b in problems]
    return Dataset.from_dict({"prompt": prompts, "answer": [solve(problem) for problem in problems]})


def _task(name: str, draw: Draw) -> Task:
    return Task(
        name=name,
        train=lambda conversational: _split(draw, False, conversational),
        held_out=lambda conversational: _split(draw, True, conversational),
        rewards=(last_integer_is_right,),
        correct=last_integer_is_right,
        max_completion_length=32,
    )


@register_task("arithmetic")
def arithmetic() -> Task:
    """Sums and products of one- and two-digit numbers; the last integer of the reply counts."""
    return _task("arithmetic", draw_problem)


@register_task("easy-arithmetic")
def easy_arithmetic() -> Task:
    """Sums of one- and two-digit numbers and products of digits, for small chat models to learn in a minute."""
    return _task("easy-arithmetic", draw_easy_problem)


@register_task("differences")
def differences() -> Task:
    """Differences of one- and two-digit numbers; the last integer of the reply counts."""
    return _task("differences", partial(draw_problem, operators="-"))
