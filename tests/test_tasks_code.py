"""Code tasks: published formats, reference solutions, and rows that test nothing."""

import gzip
import json

import pytest

from mua_rl.envs.code_tasks import function_body
from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError

HUMANEVAL_ROW = {
    "task_id": "Test/0",
    "prompt": "from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    \"\"\"Sum.\"\"\"\n",
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}  # fmt: skip
MBPP_ROW = {
    "task_id": 1,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
    "test_setup_code": "",
    "challenge_test_list": ["assert double(0) == 0"],
}


def score(task, split, completions):
    columns = {name: split[name] for name in split.column_names if name != "prompt"}
    return task.correct(prompts=split["prompt"], completions=completions, **columns)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def one_liners():
    return get_task("one-liners", bad_rows="refuse")


def test_every_embedded_reference_solution_passes_and_the_splits_are_disjoint(one_liners):
    """`bad_rows="refuse"`: loading runs each solution, and an empty program, against the tests."""
    train, held_out = one_liners.train(False), one_liners.held_out(False)
    assert (len(train), len(held_out)) == (68, 23)
    assert not set(train["entry_point"]) & set(held_out["entry_point"])
    assert not set(train["prompt"]) & set(held_out["prompt"])


def test_one_liners_score_continuations_and_code_blocks(one_liners):
    row = one_liners.train(False).select([0] * 5)
    assert row["entry_point"][0] == "add"
    completions = [
        "    return a + b\n",
        "    return a + b\n\n\ndef subtract(a, b):\n    return a -",  # goes on until its tokens run out
        "```python\ndef add(a, b):\n    return a + b\n```",
        "    return a - b\n",
        "I do not know.",
    ]
    assert score(one_liners, row, completions) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_chat_models_are_asked_for_a_code_block(one_liners):
    prompt = one_liners.held_out(True)["prompt"][0]
    assert prompt[0]["role"] == "user" and "```python\ndef " in prompt[0]["content"]


@pytest.mark.parametrize(
    ("completion", "prelude", "body"),
    [
        ("    return 1\n\nprint(", "def f():\n", "    return 1\n\n"),
        ("    x = 1\n\n    return x", "def f():\n", "    x = 1\n\n    return x"),
        ("\n    return 1\ndef g", "def f():\n", "\n    return 1\n"),
        ("def f():\n    return 1\nx = 2", "def f():\n", "def f():\n    return 1\nx = 2"),
        ("    return 1\nx", None, "    return 1\nx"),
        (None, "def f():\n", ""),
        ([{"role": "assistant", "content": "  return 1\nx"}], "def f():\n", "  return 1\n"),
    ],
)
def test_a_continuation_ends_with_its_function(completion, prelude, body):
    assert function_body(completion, prelude) == body


def test_humaneval_reads_its_published_file_and_has_no_training_split(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(HUMANEVAL_ROW) + "\n").encode()))
    task = get_task(f"humaneval:{path}", bad_rows="refuse")
    split = task.held_out(False).select([0] * 3)
    completions = [
        "    return sum(xs)\n\nprint(",
        "    return 3\n",
        "```python\ndef total(xs):\n    return sum(xs)\n```",
    ]
    assert score(task, split, completions) == [1.0, 0.0, 1.0]
    with pytest.raises(UserError, match="evaluation only"):
        task.train(False)


@pytest.mark.parametrize(
    "row",
    [
        MBPP_ROW,
        {
            "prompt": "Double.",
            "code": MBPP_ROW["code"],
            "test_imports": ["import math"],
            "test_list": MBPP_ROW["test_list"],
        },
    ],
    ids=["full", "sanitized"],
)
def test_mbpp_reads_both_published_forms(tmp_path, row):
    write_jsonl(tmp_path / "test.jsonl", [row])
    task = get_task(f"mbpp:{tmp_path}", bad_rows="refuse")
    split = task.held_out(True).select([0] * 2)
    assert "assert double(2) == 4" in split["prompt"][0][0]["content"]
    completions = ["```python\ndef double(x):\n    return x + x\n```", "```python\ndef double(x):\n    return 4\n```"]
    assert score(task, split, completions) == [1.0, 0.0]


def test_bad_code_rows_are_reported_with_their_line(tmp_path, caplog):
    rows = [
        MBPP_ROW,
        {**MBPP_ROW, "code": "def double(x):\n    return x"},
        {**MBPP_ROW, "test_list": [], "challenge_test_list": []},
        {**MBPP_ROW, "test_list": ["assert 1 == 1 or double(2) == 4"], "challenge_test_list": []},
        {**MBPP_ROW, "test_list": ["assert double(2) =="]},
        {**MBPP_ROW, "code": "while True:\n    pass"},
    ]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    assert len(get_task(f"mbpp:{path}").held_out(False)) == 1
    for line, reason in [
        (2, "own solution does not pass (wrong"),
        (3, "'test_list' is empty"),
        (4, "its tests"),
        (5, "cannot be run"),
        (6, "own solution does not pass (timeout"),
    ]:
        assert any(f"{path}:{line}:" in shown and reason in shown for shown in caplog.text.splitlines()), (line, reason)


def test_jsonl_rows_with_tests_are_code(tmp_path):
    rows = [
        {"prompt": f"Add {i}.", "tests": [f"assert f(1) == {i + 1}"], "solution": f"def f(x):\n    return x + {i}"}
        for i in range(1, 30)
    ] + [{"prompt": "Read and double.", "tests": [{"input": "2\n", "output": "4\n"}]}]
    task = get_task(f"jsonl:{write_jsonl(tmp_path / 'rows.jsonl', rows)}", bad_rows="refuse")
    train, held_out = task.train(True), task.held_out(True)
    assert len(train) + len(held_out) == 30
    row = train.select([0])
    number = int(row["prompt"][0][0]["content"].split()[1].rstrip("."))
    assert score(task, row, [f"```python\ndef f(x):\n    return x + {number}\n```"]) == [1.0]


def test_tests_that_an_empty_program_passes_are_refused(tmp_path):
    row = {"prompt": "Print nothing.", "tests": [{"input": "1\n", "output": ""}]}
    task = get_task(f"jsonl:{write_jsonl(tmp_path / 'rows.jsonl', [row])}")
    with pytest.raises(UserError, match=r"rows.jsonl:1: its tests pass a program that does nothing"):
        task.train(True)


def test_jsonl_does_not_mix_answers_and_tests(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(20)] + [
        {"prompt": f"{i}!", "tests": ["x"]} for i in range(20)
    ]
    with pytest.raises(UserError, match="mixes rows"):
        get_task(f"jsonl:{write_jsonl(tmp_path / 'rows.jsonl', rows)}")
