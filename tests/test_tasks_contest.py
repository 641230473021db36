"""Published formats of code: rows as they come, right and wrong solutions of each, and rows that are not fit."""

import base64
import json
import pickle
import zlib

import pytest

from mua_rl.envs.tasks import get_task, with_whole_path
from mua_rl.errors import UserError
from mua_rl.rewards.code import shared_pool
from mua_rl.rewards.sandbox.row import parse_row

SUM = {
    "question": "Read n, then n numbers, and print their sum.",
    "input_output": json.dumps({"inputs": ["2\n3 4\n", "1\n-5\n"], "outputs": ["7\n", "-5\n"]}),
    "solutions": json.dumps(["input()\nprint(sum(map(int, input().split())))"]),
    "starter_code": "",
    "difficulty": "interview",
}
EVENS = {
    "question": "Keep the even numbers of a list.",
    "input_output": json.dumps(
        {"fn_name": "evens", "inputs": [[[1, 2]], [[4, 5]], [[6]]], "outputs": [[2], [4], [6]]},
    ),
    "solutions": json.dumps(["def evens(xs): return [x for x in xs if x % 2 == 0]"]),
    "starter_code": "def evens(xs):\n\t",
}
LARGEST = {  # as most rows of APPS with functions: results are wrapped
    "question": "Find the largest number that occurs once, or -1.",
    "input_output": json.dumps(
        {"fn_name": "largest", "inputs": [[[5, 7, 7]], [[3, 3]], [[]]], "outputs": [[5], [-1], [-1]]},
    ),
    "solutions": json.dumps(
        [
            "class Solution:\n    def largest(self, xs: List[int]) -> int:\n"
            "        count = Counter(xs)\n        return max((x for x in xs if count[x] == 1), default=-1)",
        ]
    ),
    "starter_code": "class Solution:\n    def largest(self, xs: List[int]) -> int:\n        ",
}
APPS_ROWS = {
    "standard input": (
        SUM,
        [
            "print(sum(map(int, open('/dev/stdin').read().split()[1:])))",
            "import sys\nprint(sum(map(int, sys.stdin.read().split()[1:])))",
        ],
        ["print(7)", "input()\nprint(max(map(int, input().split())))", "print(1 / 0)"],
    ),
    "bare lists of one": (
        EVENS,
        [
            "def evens(xs):\n    return [x for x in xs if not x % 2]",
            "evens = lambda xs: list(filter(lambda x: x % 2 == 0, xs))",
            "class Solution:\n    def evens(self, xs: List[int]):\n        return [x for x in xs if x & 1 == 0]",
        ],
        [
            "def evens(xs):\n    return xs",
            "def evens(xs):\n    return 2 if xs[0] == 1 else [x for x in xs if x % 2 == 0]",
            "def evens(xs):\n    return []",
        ],
    ),
    "wrapped results": (
        LARGEST,
        [
            "def largest(xs):\n    return max([x for x in xs if xs.count(x) == 1] or [-1])",
            "class Solution:\n    def largest(self, xs: List[int]) -> int:\n"
            "        return reduce(max, (x for x, n in Counter(xs).items() if n == 1), -1)",
        ],
        [
            "def largest(xs):\n    return max(xs, default=-1)",
            "def largest(xs):\n    return -1",
            "class Solution:\n    def smallest(self, xs):\n        return -1",
        ],
    ),
}


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


STDIN_TESTS = [{"input": f"{i}\n", "output": f"{i * i}\n", "testtype": "stdin"} for i in range(3)]
FUNCTIONAL_TESTS = [
    {"input": "[3, 1, 2]\n1", "output": "[1]", "testtype": "functional"},
    {"input": "[3, 1, 2]\n2", "output": "[1, 2]", "testtype": "functional"},
    {"input": "[]\n0", "output": "[]", "testtype": "functional"},
]
LIVECODEBENCH_ROW = {
    "question_title": "Square",
    "question_content": "Print the square of the number in the input.",
    "platform": "atcoder",
    "question_id": "abc001_a",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps(STDIN_TESTS[:1]),
    "private_test_cases": packed(STDIN_TESTS[1:]),
    "metadata": "{}",
}
STARTER = "class Solution:\n    def smallest(self, nums: List[int], k: int) -> List[int]:\n        "
LIVECODEBENCH_ROWS = {
    "standard input, packed": (
        LIVECODEBENCH_ROW,
        [
            "print(int(input()) ** 2)",
            "def main():\n    n = int(input())\n    print(n * n)\n\nif __name__ == '__main__':\n    main()",
        ],
        ["print(0)", "n = int(input())\nprint(n + n)", "raise SystemExit"],
    ),
    "functional": (
        LIVECODEBENCH_ROW
        | {
            "question_content": "Return the k smallest numbers, in ascending order.",
            "starter_code": STARTER,
            "public_test_cases": json.dumps(FUNCTIONAL_TESTS[:1]),
            "private_test_cases": json.dumps(FUNCTIONAL_TESTS[1:]),
            "metadata": json.dumps({"func_name": "smallest"}),
        },
        [
            f"{STARTER}return heapq.nsmallest(k, nums)",
            f"{STARTER}return sorted(nums, key=lambda x: min(x, inf))[:k]",
            f"import math\n\n{STARTER}heapify(nums)\n        return [heappop(nums) for _ in range(k)]",
        ],
        [f"{STARTER}return nums[:k]", f"{STARTER}return sorted(nums)[:1]", f"{STARTER}return sorted(nums)[:k + 1]"],
    ),
}


def scores(task, split, programs):
    split = split.select([0] * len(programs))
    columns = {name: split[name] for name in split.column_names if name != "prompt"}
    answers = [[{"role": "assistant", "content": f"Here it is:\n\n```python\n{program}\n```"}] for program in programs]
    return task.correct(prompts=split["prompt"], completions=answers, **columns)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["apps", "taco"])
@pytest.mark.parametrize("kind", APPS_ROWS)
def test_apps_and_taco_tell_right_from_wrong(tmp_path, name, kind):
    row, right, wrong = APPS_ROWS[kind]
    write_jsonl(tmp_path / "test.jsonl", [row])
    task = get_task(f"{name}:{tmp_path}", bad_rows="refuse")
    split = task.held_out(True)
    assert row["question"] in split["prompt"][0][0]["content"]
    assert scores(task, split, right + wrong) == [1.0] * len(right) + [0.0] * len(wrong)


def test_apps_rows_say_what_is_wrong_with_them(tmp_path, caplog):
    rows = [
        SUM,
        SUM | {"input_output": ""},
        SUM | {"input_output": "{"},
        SUM | {"input_output": json.dumps({"inputs": [], "outputs": []})},
        SUM | {"input_output": json.dumps({"inputs": ["1"], "outputs": []})},
        SUM | {"solutions": json.dumps(["print(1)", "print(2)"])},
        EVENS | {"input_output": json.dumps({"fn_name": "evens", "inputs": [7], "outputs": [[1]]})},
        SUM | {"solutions": json.dumps(["print(1)", *json.loads(SUM["solutions"])])},
        SUM | {"solutions": ""},
        SUM | {"solutions": json.dumps([None, 5, *json.loads(SUM["solutions"])])},
        SUM | {"solutions": "no JSON"},
        EVENS | {"input_output": json.dumps({"fn_name": 5, "inputs": [[1]], "outputs": [[1]]})},
        SUM | {"input_output": json.dumps({"inputs": "1", "outputs": "1"})},
        SUM | {"input_output": "[1]"},
    ]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    assert len(get_task(f"apps:{path}").held_out(True)) == 4
    for line, reason in [
        (2, "is empty"),
        (3, "not JSON"),
        (4, "no inputs and outputs"),
        (5, "1 inputs but 0 outputs"),
        (6, "its own solution does not pass (wrong"),
        (7, "not a list"),
        (11, "'solutions' is not JSON"),
        (12, "entry_point is a int"),
        (13, "no inputs and outputs"),
        (14, "holds a list, not a dict"),
    ]:
        assert any(f"{path}:{line}:" in shown and reason in shown for shown in caplog.text.splitlines()), (line, reason)


@pytest.mark.parametrize("kind", LIVECODEBENCH_ROWS)
def test_livecodebench_tells_right_from_wrong(tmp_path, kind):
    row, right, wrong = LIVECODEBENCH_ROWS[kind]
    task = get_task(f"livecodebench:{write_jsonl(tmp_path / 'test6.jsonl', [row])}", bad_rows="refuse")
    split = task.held_out(True)
    prompt = split["prompt"][0][0]["content"]
    assert row["question_content"] in prompt and row["starter_code"].strip() in prompt
    assert scores(task, split, right + wrong) == [1.0] * len(right) + [0.0] * len(wrong)
    assert "smallest" in prompt or "standard input" in prompt
    with pytest.raises(UserError, match="livecodebench is for evaluation only"):
        task.train(True)


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit(3)",))


def test_packed_tests_that_would_run_code_are_a_bad_row(tmp_path, caplog):
    harmful = base64.b64encode(zlib.compress(pickle.dumps(_Harmful()))).decode()
    broken = [harmful, "no base64!", base64.b64encode(b"not zlib").decode(), packed("no list")]
    rows = [LIVECODEBENCH_ROW, *(LIVECODEBENCH_ROW | {"private_test_cases": text} for text in broken)]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    assert len(get_task(f"livecodebench:{path}").held_out(True)) == 1
    for line, reason in [(2, "names builtins.exec"), (3, "cannot be unpacked"), (4, "unpacked"), (5, "not a list")]:
        assert any(f"{path}:{line}:" in shown and reason in shown for shown in caplog.text.splitlines()), (line, reason)


COMPARE = """import numpy as np
from math import inf

def is_floats(x) -> bool:
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64
    return isinstance(x, float)


def assertion(out, exp, atol):
    same = out == exp
    atol = 1e-06 if atol == 0 and is_floats(exp) else atol
    if not same and atol != 0:
        assert type(out) == type(exp)
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert same

"""
HUMANEVALPLUS_ROW = {
    "task_id": "HumanEval/900",
    "prompt": "from typing import List\n\n\ndef halves(xs: List[float]) -> List[float]:\n"
    '    """ Halve each number.\n    """\n',
    "canonical_solution": "    return [x / 2 for x in xs]\n",
    "entry_point": "halves",
    "test": COMPARE + "\ndef check(candidate):\n    inputs = [[[1.0, 3.0]], [[]], [[0.3]]]\n"
    "    results = [[0.5, 1.5], [], [0.15]]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n",
}
MBPPPLUS_ROW = {
    "task_id": 900,
    "prompt": "Write a function to halve each number of a list.",
    "code": "def halves(xs):\n    return [x / 2 for x in xs]",
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "test_imports": ["import math"],
    "test_list": ["assert halves([1.0]) == [0.5]", "assert halves([]) == []"],
    "test": COMPARE + "\ninputs = [[[1.0, 3.0]], [[]], [[0.3]]]\nresults = [[0.5, 1.5], [], [0.15]]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(halves(*inp), exp, 0)\n",
}


@pytest.mark.parametrize(("name", "row"), [("humanevalplus", HUMANEVALPLUS_ROW), ("mbppplus", MBPPPLUS_ROW)])
def test_evalplus_rows_tell_right_from_wrong_with_numpy_in_their_tests(tmp_path, name, row):
    write_jsonl(tmp_path / "test.jsonl", [row])
    task = get_task(f"{name}:{tmp_path},seconds=30", bad_rows="refuse")
    right = [
        "def halves(xs):\n    return [x / 2 for x in xs]",
        "def halves(xs):\n    return [0.5 * x + 1e-12 if x else x for x in xs] if xs != [1.0] else [0.5]",
        "import numpy as np\ndef halves(xs):\n    return (np.array(xs) / 2).tolist()",
    ]
    wrong = [
        "def halves(xs):\n    return [0.5]",
        "def halves(xs):\n    return [x // 2 for x in xs]",
        "def halves(xs):\n    return [x / 2 + 1e-3 for x in xs]",
        "def halves(xs):\n    return [0.5] if xs == [1.0] else []",
    ]
    assert scores(task, task.held_out(True), right + wrong) == [1.0] * 3 + [0.0] * 4
    with pytest.raises(UserError, match=f"{name} is for evaluation only"):
        task.train(True)


def test_options_of_the_sandbox_stand_behind_the_path(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "my rows, all.jsonl", [{"prompt": "x", "tests": ["assert f() == 1"]}] * 9)
    task = get_task(f"jsonl:{path},seconds=2.5,modules=numpy+yaml,memory_mb=1024")
    settings = task.correct.settings
    assert (settings.seconds, settings.total_seconds, settings.memory_mb) == (2.5, 25.0, 1024)
    assert settings.modules == ("numpy", "yaml")
    assert get_task("mbpp:seconds=9").correct.settings.seconds == 9.0
    assert get_task("humanevalplus:seconds=9").correct.settings.modules == ("numpy",)
    monkeypatch.chdir(tmp_path)
    assert with_whole_path("apps:my rows, all.jsonl,seconds=2") == f"apps:{path},seconds=2"
    assert with_whole_path("apps:seconds=2") == "apps:seconds=2"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mbpp:seconds=soon", "seconds=soon is not a number"),
        ("mbpp:memory_mb=1", "memory_mb=1 is below 64"),
        ("mbpp:modules=numpy+nowhere", "names 'nowhere', which is not installed"),
        ("mbpp:modules=", "names '', which is not installed"),
        ("mbpp:seconds=5,total_seconds=1", "total_seconds=1.0 is below seconds=5.0"),
        ("jsonl:nothing.jsonl,seconds=5", "no file or folder nothing.jsonl"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_clear_line(spec, message):
    with pytest.raises(UserError, match=message):
        get_task(spec)


@pytest.mark.parametrize(
    ("outputs", "program", "right"),
    [
        ([["a"], ["b"]], "def f(x): return 'ab'[x]", True),
        ([["a"], ["b"]], "def f(x): return ['ab'[x]]", True),
        ([["a"], ["b"]], "def f(x): return 'a' if x == 0 else ['b']", False),
        ([["a"], ["b"]], "def f(x): return [['ab'[x]]]", False),
        ([[[1, 2]], [[3]]], "def f(x): return ([1, 2], [3])[x]", True),
        ([[[1, 2]], [[3]]], "def f(x): return [((1, 2), (3,))[x]]", True),
        ([[[1, 2]], [[3]]], "def f(x): return (1, 2) if x == 0 else 3", False),
        ([[None], [{"1": True}]], "def f(x): return None if x == 0 else {1: True}", True),
        ([[1], [2, 3]], "def f(x): return ([1], [2, 3])[x]", True),
        ([[1], [2, 3]], "def f(x): return (1, [2, 3])[x]", False),
        ([1, [2]], "def f(x): return (1, [2])[x]", True),
        ([1, [2]], "def f(x): return (1, 2)[x]", False),
    ],
)
def test_results_that_are_lists_of_one_may_stand_for_their_items_in_all_tests_or_none(outputs, program, right):
    row = parse_row({"fn_name": "f", "inputs": [[0], [1]], "outputs": outputs})
    assert shared_pool().run(program, row).ok is right
