"""`jsonl:PATH`: your own rows of prompt and answer, or of prompt and tests.

PATH is a file (JSONL, JSON, CSV, TSV, parquet or Arrow) or a saved `datasets.Dataset`, of which one row in eight is
held out (always the same ones, by a hash of the prompt); or a folder with `train.jsonl` and `test.jsonl` (or
`held_out.jsonl`), in any of these formats, or a saved `DatasetDict`. Columns:

- `prompt`: text, or a list of chat messages. For text, the policy's chat template is applied if it has one.
- either `answer`: the gold answer, or a list of several, any of which is right, for the math reward;
- or `tests`, and where they need it `entry_point`, `prelude` and `setup`, for the code reward (forms:
  `mua_rl.rewards.sandbox.row.parse_row`); a `solution`, if there is one, must pass the tests.

All rows have the same of the two.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

from mua_rl.envs.math_tasks import gold_column, golds, keep_rows_with_golds
from mua_rl.envs.row_files import is_one_table, part_of_file, read_split
from mua_rl.envs.rows import Row, RowFault, column, convert_rows, to_dataset
from mua_rl.envs.sandbox_options import sandbox_settings
from mua_rl.envs.tasks import Task, register_task
from mua_rl.errors import UserError
from mua_rl.rewards.math import math_reward, strict_math_reward
from mua_rl.rewards.sandbox.settings import Settings


@register_task("jsonl")
def jsonl(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """Rows of the user's own."""
    if argument is None:
        raise UserError("the task jsonl needs a path: --task jsonl:/path/to/rows.jsonl")
    path, settings = sandbox_settings(argument, Settings(isolation=isolation))
    if path is None or not Path(path).expanduser().exists():
        raise UserError(f"there is no file or folder {path or argument}.")
    name = f"jsonl:{argument}"
    if _has_tests(path):
        # Imported here: answers alone need no sandbox.
        from mua_rl.envs.code_tasks import code_dataset, code_task

        def code_split(held_out: bool, conversational: bool) -> Dataset:
            rows = convert_rows(_split(path, held_out), lambda row: _code_row(row, conversational))
            return code_dataset(rows, name, bad_rows, settings)

        return code_task(
            name,
            lambda conversational: code_split(False, conversational),
            lambda conversational: code_split(True, conversational),
            settings,
        )
    return Task(
        name=name,
        train=lambda conversational: _math_split(path, False, name, bad_rows, conversational),
        held_out=lambda conversational: _math_split(path, True, name, bad_rows, conversational),
        rewards=(math_reward,),
        correct=math_reward,
        strict=strict_math_reward,
        max_completion_length=512,
    )


def as_prompt(prompt: str | list[dict[str, str]], conversational: bool) -> str | list[dict[str, str]]:
    """A row's prompt in the form that the policy takes.

    Raises:
        UserError: The row has messages, and the policy has no chat template.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if conversational else prompt
    if not conversational:
        raise UserError("the rows' prompts are chat messages, but the model's tokenizer has no chat template.")
    return prompt


def _split(path: str, held_out: bool) -> list[Row]:
    """The rows of one split.

    Raises:
        UserError: They cannot be read, or one split of a file is empty.
    """
    if not is_one_table(Path(path).expanduser()):
        return read_split(path, ("held_out", "test", "validation") if held_out else ("train",))
    return part_of_file(path, read_split(path, ()), held_out, ("prompt",))


def _has_tests(path: str) -> bool:
    whole = is_one_table(Path(path).expanduser())
    rows = read_split(path, ()) if whole else _split(path, False) or _split(path, True)
    kinds = {"tests" in row.columns for row in rows if "prompt" in row.columns}
    if len(kinds) == 2:
        raise UserError(f"{path} mixes rows with `tests` and rows without: make two tasks of them.")
    return True in kinds


def _prompt_column(row: Row) -> Any:
    prompt = column(row, "prompt", (str, list))
    if isinstance(prompt, list) and not all(map(_is_message, prompt)):
        raise RowFault("column 'prompt' is a list of something other than chat messages of text")
    return prompt


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _math_row(row: Row) -> dict[str, Any]:
    return {"prompt": _prompt_column(row), "answer": golds(row)}


def _code_row(row: Row, conversational: bool) -> dict[str, Any]:
    prompt = as_prompt(_prompt_column(row), conversational)
    return {**row.columns, "prompt": prompt, "tests": column(row, "tests", (str, list, dict))}


def _math_split(path: str, held_out: bool, name: str, bad_rows: str, conversational: bool) -> Dataset:
    rows = keep_rows_with_golds(convert_rows(_split(path, held_out), _math_row), name, bad_rows)
    prompts = [as_prompt(row.columns["prompt"], conversational) for row in rows]
    return to_dataset({"prompt": prompts, "answer": gold_column(rows)}, name)
