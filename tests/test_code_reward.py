"""The code reward: forms of tests, what crosses between the processes, extraction, and TRL's signature."""

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mua_rl.rewards.code import (
    CodeReward,
    code_fraction_reward,
    code_reward,
    faulty_rows,
    reason_shares,
    shared_pool,
)
from mua_rl.rewards.faults import BadRow
from mua_rl.rewards.sandbox import wire
from mua_rl.rewards.sandbox.pool import Pool
from mua_rl.rewards.sandbox.row import parse_row
from mua_rl.rewards.sandbox.stdio import same_output
from mua_rl.rewards.sandbox.verdict import Reason, Verdict


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    yield shared_pool()


LINKED_LIST = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next

def build(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head

def values(node):
    found = []
    while node:
        found.append(node.val)
        node = node.next
    return found
"""

# name -> (columns, right program, wrong program)
FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "assert statements": (
        {"tests": "assert add(1, 2) == 3\nassert add(0, 0) == 0"},
        "def add(a, b): return a + b",
        "def add(a, b): return 3",
    ),
    "MBPP's list": (
        {"tests": ["assert add(1, 2) == 3", "assert math.isclose(add(.1, .2), .3)"], "setup": ["import math"]},
        "def add(a, b): return a + b",
        "def add(a, b): return 3",
    ),
    "HumanEval's check": (
        {
            "tests": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == helper(2)\n",
            "entry_point": "double",
            "prelude": 'def helper(x):\n    return x + x\n\ndef double(x):\n    """Twice x."""\n',
        },
        "def double(x): return helper(x)",
        "def helper(x): return 0\ndef double(x): return 0",
    ),
    "unittest": (
        {
            "tests": (
                "import unittest\nclass TestAdd(unittest.TestCase):\n"
                "    def setUp(self): self.n = 2\n"
                "    def test_sum(self): self.assertEqual(add(self.n, 2), 4)\n"
                "    def test_error(self):\n        with self.assertRaises(TypeError): add(1, 'x')\n"
                "    def test_many(self):\n        for i in range(3):\n            with self.subTest(i=i):\n"
                "                self.assertEqual(add(i, 1), i + 1)\n"
                "if __name__ == '__main__':\n    unittest.main()\n"
            )
        },
        "def add(a, b): return a + b",
        "def add(a, b): return 4",
    ),
    "pytest's functions": (
        {"tests": "def test_a():\n    assert add(1, 1) == 2\ndef test_b():\n    assert add(1, 2) == 3"},
        "def add(a, b): return a + b",
        "def add(a, b): return 2",
    ),
    "standard input and output": (
        {"tests": [{"input": "2\n1 2\n", "output": "3\n"}, {"input": "1\n5\n", "output": "5"}]},
        "n = int(input())\nprint(sum(map(int, input().split())))",
        "print(3)",
    ),
    "APPS, input and output": (
        {"tests": json.dumps({"inputs": ["2\n", "3\n"], "outputs": ["4\n", "9\n"]})},
        "import sys\nif __name__ == '__main__':\n    n = int(sys.stdin.read())\n    print(n * n)",
        "print(4)",
    ),
    "APPS, calls": (
        {"tests": {"fn_name": "pair", "inputs": [[1, 2], [3, 4]], "outputs": [[[2, 1]], [[4, 3]]]}},
        "def pair(a, b): return (b, a)",
        "def pair(a, b): return (a, b)",
    ),
    "APPS, calls whose results are lists, one of them of one": (
        {"tests": {"fn_name": "up_to", "inputs": [[1], [2]], "outputs": [[1], [1, 2]]}},
        "def up_to(n): return [*range(1, n + 1)]",
        "def up_to(n): return [*range(n)]",
    ),
    "LiveCodeBench, calls of a method": (
        {
            "tests": [{"input": "[2, 7]\n9", "output": "[0, 1]", "testtype": "functional"}],
            "entry_point": "twoSum",
        },
        "class Solution:\n    def twoSum(self, nums, target): return [0, 1]",
        "class Solution:\n    def twoSum(self, nums, target): return [1, 0]",
    ),
    "LeetCode's method": (
        {
            "tests": "def check(candidate):\n    assert candidate(nums=[1, 2], k=1) == 3\n",
            "entry_point": "Solution().total",
        },
        "from typing import List\nclass Solution:\n    def total(self, nums: List[int], k: int): return sum(nums)",
        "class Solution:\n    def total(self, nums, k): return k",
    ),
    "LeetCode's linked list": (
        {
            "tests": (
                "def check(candidate):\n    assert values(candidate(build([1, 2, 3]))) == [3, 2, 1]\n"
                "    long = list(range(5000))\n    assert values(candidate(build(long))) == long[::-1]\n"
            ),
            "entry_point": "Solution().reverse",
            "prelude": LINKED_LIST,
        },
        "class Solution:\n    def reverse(self, head):\n        last = None\n        while head:\n"
        "            head.next, last, head = last, head, head.next\n        return last",
        "class Solution:\n    def reverse(self, head): return head",
    ),
    "a linked list that the program defines anew": (
        {"tests": "assert values(same(build([1]))) == [1]", "prelude": LINKED_LIST},
        LINKED_LIST + "def same(x): return ListNode(x.val)",
        LINKED_LIST + "def same(x): return ListNode(2)",
    ),
    "a class with state": (
        {
            "tests": (
                "s = Stack()\nassert len(s) == 0\ns.push(4)\ns.push([1])\nassert s.pop() == [1]\nassert s.size == 1\n"
                "assert list(s) == [4] and s[0] == 4 and str(s) == 'Stack(4)' and bool(s)\n"
                "s[0] = 5\nassert s.pop() == 5\n"
                "try:\n    s.pop()\n    assert False\nexcept Empty:\n    pass\n"
                "assert isinstance(s, Stack) and not isinstance(3, Stack)\n"
                "assert (Stack() + Stack()).size == 0\n"
            ),
            "entry_point": "Stack",
        },
        "class Empty(LookupError): pass\n"
        "class Stack:\n    def __init__(self): self.xs = []\n    def push(self, x): self.xs.append(x)\n"
        "    def pop(self):\n        if not self.xs: raise Empty('no')\n        return self.xs.pop()\n"
        "    size = property(lambda self: len(self.xs))\n    def __len__(self): return len(self.xs)\n"
        "    def __iter__(self): return iter(self.xs)\n    def __getitem__(self, i): return self.xs[i]\n"
        "    def __setitem__(self, i, x): self.xs[i] = x\n    def __add__(self, other): return Stack()\n"
        "    def __str__(self): return f'Stack({self.xs[0]})'",
        "class Empty(LookupError): pass\nclass Stack:\n    def __len__(self): return 0\n    def push(self, x): pass\n"
        "    def pop(self): return 5",
    ),
    "functions as arguments": (
        {
            "tests": [
                "assert twice(lambda x: x + 1, 1) == 3",
                "assert twice(str.upper, 'a') == 'A'",
                "assert twice(abs, -2) == 2",
            ]
        },
        "def twice(f, x): return f(f(x))",
        "def twice(f, x): return f(x)",
    ),
    "functions as results": (
        {"tests": "plus = adder(2)\nassert plus(3) == 5\nassert list(map(plus, [1, 2])) == [3, 4]"},
        "def adder(n): return lambda x: x + n",
        "def adder(n): return lambda x: x",
    ),
    "errors inside a function of the tests": (
        {"tests": "def bad(x):\n    raise KeyError(x)\nassert guard(bad, 1) == 'none'"},
        "def guard(f, x):\n    try: return f(x)\n    except KeyError: return 'none'",
        "def guard(f, x):\n    return f(x)",
    ),
    "endless generators": (
        {
            "tests": (
                "from itertools import islice\nassert list(islice(count(), 4)) == [0, 1, 2, 3]\n"
                "g = count()\nassert next(g) == 0"
            )
        },
        "def count():\n    n = 0\n    while True:\n        yield n\n        n += 1",
        "def count():\n    while True: yield 0",
    ),
    "iterators as arguments": (
        {"tests": "assert total(iter([1, 2])) == 3\nassert total(i for i in range(4)) == 6"},
        "def total(xs): return sum(xs)",
        "def total(xs): return 3",
    ),
    "changed arguments": (
        {
            "tests": (
                "xs = [3, [2, 1], {}]\nys = xs[1]\nassert change(xs) is None\nassert xs == [3, [1, 2], {'a': 1}]\n"
                "assert ys == [1, 2]"
            )
        },
        "def change(xs):\n    xs[1].sort()\n    xs[2]['a'] = 1",
        "def change(xs):\n    xs[1].sort()",
    ),
    "exceptions": (
        {
            "tests": (
                "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
                "        with self.assertRaises(ValueError) as caught: f(0)\n"
                "        self.assertEqual(str(caught.exception), 'bad 0')\n"
                "        with self.assertRaisesRegex(ZeroDivisionError, 'zero'): f(1)\n"
            )
        },
        "def f(x):\n    if x: return 1 / 0\n    raise ValueError(f'bad {x}')",
        "def f(x):\n    raise ValueError('bad 0')",
    ),
    "types": (
        {
            "tests": "\n".join(
                f"v = f({value})\nassert v == {value} and type(v) is type({value})"
                for value in (
                    "1",
                    "True",
                    "None",
                    "1.5",
                    "float('inf')",
                    "-0.0",
                    "10 ** 40",
                    "'a\\ud800'",
                    "b'x'",
                    "(1, [2])",
                    "{1: 'a', 'b': (2,)}",
                    "{1, 2}",
                    "frozenset([1])",
                    "1j",
                    "range(3)",
                    "bytearray(b'x')",
                    "...",
                    "{(1, 2): {3: {4}}}",
                    "int",
                    "[[], {}, ()]",
                )
            )
        },
        "def f(x): return x",
        "def f(x): return None",
    ),
    "types of the library": (
        {
            "tests": (
                "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
                "assert f('deque') == deque([1, 2]) and f('count') == Counter('aab') and f('default') == {'a': [1]}\n"
                "assert f('fraction') == Fraction(1, 3) and f('decimal') == Decimal('1.10') and f('named') == (1, 2)\n"
                "assert f('enum') == 2 and dict(f('items')) == {'a': 1} and list(f('map')) == [1, 2]\n"
            )
        },
        "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\nimport enum\n"
        "class E(enum.IntEnum):\n    A = 2\nP = namedtuple('P', 'x y')\nd = defaultdict(list)\nd['a'].append(1)\n"
        "def f(k):\n    return dict(deque=deque([1, 2]), count=Counter('aab'), default=d, fraction=Fraction(1, 3),\n"
        "        decimal=Decimal('1.10'), named=P(1, 2), enum=E.A, items={'a': 1}.items(), map=map(int, '12'))[k]",
        "def f(k): return None",
    ),
    "names of the tests that the program has too": (
        {
            "tests": (
                "def apply(f, x):\n    xs = [f(x) for x in [x]]\n    return xs[0]\n"
                "assert apply(f, 1) == 2\nassert x(1) == 1"
            )
        },
        "def f(v): return 2 * v\ndef x(v): return v\ndef apply(f, x): return 2\nxs = 1",
        "def f(v): return v\ndef x(v): return v\ndef apply(f, x): return 2",
    ),
    "a future import": (
        {"tests": "assert f(1) == 1", "prelude": "import math\n"},
        "from __future__ import annotations\ndef f(x: Unknown): return x",
        "from __future__ import annotations\ndef f(x): return 2",
    ),
    "threads and asyncio": (
        {"tests": "assert f(3) == 6"},
        "import asyncio\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "async def g(x):\n    await asyncio.sleep(0)\n    return x\n"
        "def f(x):\n    with ThreadPoolExecutor(4) as pool:\n"
        "        return sum(pool.map(lambda i: asyncio.run(g(i)), range(x + 1)))",
        "def f(x): return 0",
    ),
    "a script with late threads and exit hooks": (
        {"tests": [{"input": "1", "output": "1\n2\n3"}]},
        "import atexit, threading, time\natexit.register(lambda: print(3))\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print(2))).start()\nprint(input())",
        "print(1)\nprint(2)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_tests_tells_right_from_wrong(pool: Pool, form: str) -> None:
    columns, right, wrong = FORMS[form]
    row = parse_row(**columns)
    for fraction in (False, True):
        assert pool.run(right, row, fraction) == Verdict(Reason.PASSED, *[pool.run(right, row, fraction).total] * 2)
        verdict = pool.run(wrong, row, fraction)
        assert not verdict.ok and verdict.fraction < 1
        assert verdict.reason in (Reason.WRONG, Reason.ERROR)


@pytest.mark.parametrize(
    ("program", "passed"),
    [("def f(x): return x", 4), ("def f(x): return 1", 1), ("def f(x):\n    assert x != 2\n    return x", 3), ("", 0)],
)
def test_the_fraction_counts_tests(pool: Pool, program: str, passed: int) -> None:
    row = parse_row([f"assert f({i}) == {i}" for i in range(4)])
    verdict = pool.run(program, row, fraction=True)
    assert (verdict.passed, verdict.fraction) == (passed, passed / 4)


def test_a_hang_keeps_the_fraction_so_far(pool: Pool) -> None:
    row = parse_row("assert f(0) == 0\nassert f(1) == 1\nassert f(2) == 2")
    worker = pool._idle.get() or pool._start_worker()
    try:
        verdict = worker.run("def f(x):\n    while x > 0: pass\n    return x", row, fraction=True, seconds=0.5)
    finally:
        pool._idle.put(worker)
    assert verdict.reason is Reason.TIMEOUT
    assert verdict.fraction == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x): return 0", Reason.WRONG),
        ("def f(x): raise ValueError", Reason.ERROR),
        ("def g(x): return 7", Reason.ERROR),
        ("def f(x)", Reason.ERROR),
        ("def f(x): return bytearray(1 << 40)", Reason.MEMORY),
        ("import os\nos._exit(0)", Reason.KILLED),
    ],
)
def test_verdicts_carry_their_reason(pool: Pool, program: str, reason: Reason) -> None:
    assert pool.run(program, parse_row("assert f(3) == 7", "f")).reason is reason


def test_what_does_not_cross_has_a_reason_of_its_own(pool: Pool) -> None:
    row = parse_row("import threading\nassert f(lambda v: threading.Lock(), 3) == 3", "f")
    verdict = pool.run("def f(g, x): return g(x)", row)
    assert verdict.reason is Reason.NOT_CARRIED and "lock" in verdict.detail
    row = parse_row("assert V(3) - 1.5 == V(1.5)\nassert abs(V(3) - 1.5) < 2", "V")
    verdict = pool.run(
        "class V:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return s.x == o.x\n"
        "    def __sub__(s, k): return V(s.x - k)\n    def __abs__(s): return abs(s.x)",
        row,
    )
    assert (verdict.reason, verdict.passed) == (Reason.NOT_CARRIED, 1) and "abs()" in verdict.detail


COMPLETIONS = ["```python\ndef f(x): return x\n```", "```python\ndef f(x): return 1\n```", "no"]
TESTS = ["assert f(1) == 1\nassert f(2) == 2"] * 3


def test_the_reward_has_trl_s_form() -> None:
    metrics: dict[str, float] = {}
    rewards = code_reward(
        prompts=["p"] * 3, completions=COMPLETIONS, tests=TESTS, log_metric=metrics.__setitem__, other_column=[0] * 3
    )
    assert rewards == [1.0, 0.0, 0.0]
    assert metrics["code/no_code"] == pytest.approx(1 / 3)
    assert metrics["code/passed"] == pytest.approx(1 / 3)
    assert sum(metrics.values()) == pytest.approx(1)
    assert code_fraction_reward(completions=COMPLETIONS, tests=TESTS) == [1.0, 0.5, 0.0]
    assert (code_reward.__name__, code_fraction_reward.__name__) == ("code_reward", "code_fraction_reward")


def test_the_reward_works_in_any_thread() -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(code_reward(completions=COMPLETIONS, tests=TESTS)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0, 0.0, 0.0]] * 4


def test_bad_rows_are_none_with_one_warning_or_raise(caplog: pytest.LogCaptureFixture) -> None:
    metrics: dict[str, float] = {}
    reward = CodeReward()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = reward(
                completions=COMPLETIONS[:1] * 3, tests=[None, "assert f(", TESTS[0]], log_metric=metrics.__setitem__
            )
            assert got == [None, None, 1.0]
    assert metrics["code/grader_fault"] == pytest.approx(2 / 3)
    assert len(caplog.records) == 2
    with pytest.raises(BadRow):
        CodeReward(on_bad_row="raise")(completions=COMPLETIONS[:1], tests=[None])


def test_rows_that_their_own_solution_fails_are_found() -> None:
    right, unfit, broken = (parse_row(t) for t in ("assert f(1) == 1", "assert f(1) == 2", "assert f(1"))
    faults = faulty_rows([right, unfit, broken], ["def f(x): return x"] * 3)
    assert faults.keys() == {1, 2}
    assert "its own solution fails" in faults[1] and "compile" in faults[2]


@pytest.mark.parametrize("depth", [60, 5000])
def test_answers_that_cannot_be_handed_back_are_wrong_not_faults(pool: Pool, depth: int) -> None:
    program = f"def f(x):\n    for _ in range({depth}): x = [x]\n    return x"
    verdict = pool.run(program, parse_row("y = f(f(f(1)))\nassert y == 1"))
    assert verdict.reason is Reason.ERROR


def test_shares_of_reasons_add_up() -> None:
    verdicts = [Verdict(Reason.TIMEOUT), Verdict(Reason.PASSED, 1), BadRow("x"), Verdict(Reason.TIMEOUT)]
    shares = reason_shares(verdicts)
    assert shares["timeout"] == 0.5
    assert sum(shares.values()) == 1


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        (b"1\n", "1", True),
        (b"1  \n\n", "1\n", True),
        (b"1.50\n", "1.5\n", True),
        (b"1 2\n", "1  2", True),
        (b"1\n2", "1 2", False),
        (b" 1", "1", True),
        (b"nan", "nan", True),
        (b"NaN", "nan", False),
        (b"1e3", "1000", True),
        (b"1.0000001", "1", False),
        (b"\xff", "1", False),
        (b"yes", "Yes", False),
        (b"", "", True),
    ],
)
def test_outputs_are_compared_by_lines_and_numbers(output: bytes, expected: str, same: bool) -> None:
    assert same_output(output, expected) is same


def _refuse(*args: Any) -> Any:
    raise wire.WireError("not plain")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner)
        | st.sets(st.integers() | st.text())
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(plain)
def test_plain_data_crosses_exactly(value: Any) -> None:
    encoded = json.loads(json.dumps(wire.pack(value, _refuse, {})))
    decoded = wire.unpack(encoded, _refuse, {})
    assert repr(decoded) == repr(value) or decoded == value
    assert type(decoded) is type(value)


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*"idtszqCObBcrFDeyNoh", "x"]), inner, max_size=2),
    max_leaves=20,
)


@settings(max_examples=500, deadline=None)
@given(st.lists(json_data, max_size=3) | json_data)
def test_forged_data_is_plain_or_refused(data: Any) -> None:
    try:
        value = wire.unpack(data, _refuse, {})
    except wire.WireError:
        return
    assert type(value).__module__ in ("builtins", "collections", "decimal", "fractions")
