"""Contest problems in their published formats: programs that read standard input, and functions, rewarded as code.

- `apps` and `taco`: columns `question`, `input_output` (JSON: `inputs`, `outputs`, and `fn_name` for functions),
  `solutions` (JSON) and `starter_code`. Train on `train`, held out `test`; of a lone file one row in eight.
- `livecodebench`: columns `question_content`, `starter_code`, `public_test_cases`, `private_test_cases` (JSON, or what
  that is packed into: base64 of a zlib-compressed pickle of JSON) and `metadata` (JSON, with `func_name` for
  functions). It has one split, held out.

Solutions may use what contest sites have imported before them (`PRELUDE`). Published solutions are tried, up to three
of a row, and the row is bad if none passes; LiveCodeBench has none.
"""

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any, Final

from datasets import Dataset

from mua_rl.envs.code_tasks import code_dataset, code_task, no_training_rows
from mua_rl.envs.row_files import read_split
from mua_rl.envs.rows import Row, RowFault, column, convert_rows
from mua_rl.envs.sandbox_options import sandbox_settings
from mua_rl.envs.tasks import Task, register_task
from mua_rl.rewards.sandbox.settings import Settings

APPS_HUB: Final = "codeparrot/apps"
TACO_HUB: Final = "BAAI/TACO"
LIVECODEBENCH_HUB: Final = "livecodebench/code_generation_lite"

PRELUDE: Final = """\
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, string, sys
from bisect import *
from collections import *
from copy import copy, deepcopy
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, pi, sqrt
from operator import add, itemgetter, mul, or_, xor
from string import ascii_lowercase, ascii_uppercase, digits
from typing import *
sys.setrecursionlimit(50_000)
"""
"""What a solution finds imported, and the depth of recursion that it may use."""

_TRIED_SOLUTIONS: Final = 3
_MOST_TEST_BYTES: Final = 1 << 30
_MEMORY_MB: Final = 1024


@register_task("apps")
def apps(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """Automated Programming Progress Standard (Hendrycks et al. 2021)."""
    return _contest_task("apps", APPS_HUB, None, argument, bad_rows, isolation)


@register_task("taco")
def taco(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """Topics in Algorithmic Code Generation (Li et al. 2023)."""
    return _contest_task("taco", TACO_HUB, "ALL", argument, bad_rows, isolation)


@register_task("livecodebench")
def livecodebench(argument: str | None = None, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """LiveCodeBench's code generation (Jain et al. 2024)."""
    path, settings = sandbox_settings(argument, Settings(isolation=isolation, memory_mb=_MEMORY_MB))

    def held_out(conversational: bool) -> Dataset:
        rows = read_split(path or LIVECODEBENCH_HUB, ("test",))
        problems = convert_rows(rows, lambda row: _livecodebench_problem(row, conversational))
        return code_dataset(problems, "livecodebench", bad_rows, settings)

    return code_task("livecodebench", no_training_rows("livecodebench"), held_out, settings, 2048)


def _contest_task(name: str, hub: str, config: str | None, argument: str | None, bad_rows: str, isolation: str) -> Task:
    path, settings = sandbox_settings(argument, Settings(isolation=isolation, memory_mb=_MEMORY_MB))

    def split(split_name: str, conversational: bool) -> Dataset:
        rows = read_split(path or hub, (split_name,), config=config, key=("question",))
        problems = convert_rows(rows, lambda row: _apps_problem(row, conversational))
        return code_dataset(problems, name, bad_rows, settings)

    return code_task(
        name,
        lambda conversational: split("train", conversational),
        lambda conversational: split("test", conversational),
        settings,
        max_completion_length=2048,
    )


def _apps_problem(row: Row, conversational: bool) -> dict[str, Any]:
    tests = _from_json(row, "input_output", dict)
    solutions = _from_json(row, "solutions", list) if row.columns.get("solutions") else []
    return {
        "prompt": _prompt(column(row, "question"), row, tests.get("fn_name"), conversational),
        "tests": tests,
        "prelude": PRELUDE,
        "entry_point": tests.get("fn_name"),
        "solution": solutions[:_TRIED_SOLUTIONS],
    }


def _livecodebench_problem(row: Row, conversational: bool) -> dict[str, Any]:
    metadata = _from_json(row, "metadata", dict) if row.columns.get("metadata") else {}
    name = metadata.get("func_name")
    tests = [*_from_json(row, "public_test_cases", list), *_private_tests(row)]
    return {
        "prompt": _prompt(column(row, "question_content"), row, name, conversational),
        "tests": tests,
        "prelude": PRELUDE,
        "entry_point": name,
    }


def _prompt(question: str, row: Row, function: str | None, conversational: bool) -> str | list[dict[str, str]]:
    if function:
        task = f"Write the function `{function}`."
    else:
        task = "Write a program that reads from standard input and writes its answer to standard output."
    starter = row.columns.get("starter_code")
    if isinstance(starter, str) and starter.strip():
        task += f" Begin with this code:\n\n{starter.rstrip()}"
    if not conversational:
        return f'"""\n{question}\n\n{task}\n"""\n'
    return [{"role": "user", "content": f"{question}\n\n{task}\n\nReply with a Python code block."}]


def _from_json(row: Row, name: str, kind: type) -> Any:
    """The value of a column that holds JSON, or the value itself, as some copies of the data have it."""
    value = column(row, name, (str, kind))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault(f"column {name!r} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise RowFault(f"column {name!r} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def _private_tests(row: Row) -> list[Any]:
    value = row.columns.get("private_test_cases")
    if not value:
        return []
    if isinstance(value, str) and value.lstrip()[:1] not in ("[", "{"):
        value = _unpacked(value)
    return _from_json(Row({"private_test_cases": value}, row.place), "private_test_cases", list)


class _TextUnpickler(pickle.Unpickler):
    """Reads a pickle of plain values; one that names a class or a function, and so could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpacked(text: str) -> str:
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), _MOST_TEST_BYTES)
        return str(_TextUnpickler(io.BytesIO(data)).load())
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError) as error:
        raise RowFault(f"column 'private_test_cases' cannot be unpacked: {error}") from None
