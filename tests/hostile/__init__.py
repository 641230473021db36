"""Programs that try to pass without solving anything, or to harm the machine.

One file for each clause of what a program must not be able to do; in it, `#### name`, or `#### name | row`, then code.

- `breaches/`: each defines `breach()`, true if it got through; `TAIL` makes `f` right only then.
- `cheats/`: each faces the row of `ROWS` that it names, without solving it.
- `scripts/`: each faces `STDIO_ROW`.
"""

from pathlib import Path
from typing import NamedTuple

TAIL = """

def f(x):
    try:
        return 2 * x + 1 if breach() else None
    except BaseException:
        return None
"""

ROWS: dict[str, str] = {
    "f": "assert f(3) == 7\nassert f(0) == 1\nassert f(-4) == -7",
    "near": "assert abs(f(3) - 7.5) < 1e-6\nassert f(1) != f(2)",
    "member": "assert 7 in f(3)\nassert not isinstance(f(3), str)",
    "items": "assert sorted(f([3, 1, 2])) == [1, 2, 3]\nassert len(f([1])) == 1",
    "loop": """
for got, want in zip(map(f, [1, 2, 3]), [3, 5, 7]):
    assert got == want
assert len(list(map(f, [1]))) == 1
""",
    "all": "assert all(map(lambda x: f(x) == 2 * x + 1, range(9)))",
    "unittest": """
import unittest
class T(unittest.TestCase):
    def test_it(self):
        self.assertEqual(f(3), 7)
    def test_bad(self):
        with self.assertRaises(Exception):
            f('x')
""",
    "raises": """
try:
    f('x')
    assert False
except Exception:
    pass
assert f(1) == 3
""",
    "check": "def check(candidate):\n    assert candidate(3) == 7\n    assert candidate(1) == 3",
    "class": "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.size() == 1",
    "truth": "assert f(1)\nassert not f(2)",
    "callback": "seen = []\nassert f(lambda v: seen.append(v) or v) == 7\nassert seen == [1, 2]",
    "mutated": "xs = [3, 1, 2]\nf(xs)\nassert xs == [1, 2, 3]",
    "pair": "encode, decode = make()\nassert decode(encode('abc')) == 'abc'",
    "values": "assert V(1) + V(2) == V(3)\nassert V(1) != V(2)\nassert V(1) < V(2) and not V(2) < V(1)",
    "money": "assert abs(Money(5) - 3.5) < 1e-9\nassert abs(3.5 - Money(5)) < 1e-9",
    "money in place": "m = Money(5)\nm -= 3.5\nassert abs(m) < 1e-9",
    "keys": "assert f() == {'a': 1}\nassert f()['a'] == 1 and list(f()) == ['a']",
    "argument": "xs = [1]\nassert f(xs) is xs\nassert xs == [1, 2]",
    "later": "xs, ys = [1], [2]\nassert f(xs) == 1\nassert f(ys) == 1\nassert xs == [1]",
    "async": "import asyncio\nassert asyncio.run(f(3)) == 7",
    "generator": "assert list(f(3)) == [0, 1, 2]",
    "printed": """
import contextlib, io
text = io.StringIO()
with contextlib.redirect_stdout(text):
    f(3)
assert text.getvalue() == '7\\n'
""",
    "asked": "from unittest.mock import patch\nwith patch('builtins.input', side_effect=['4']):\n    assert f() == 8",
    "derived": "class Square(Shape):\n    def area(self): return 9\nassert Square().double() == 18",
    "block": "with f(3) as value:\n    assert value == 7",
    "handed": "def g(x):\n    assert x == 7\nf(g)\nassert f(lambda x: 1) is None",
    "library": "assert math.isclose(f(2), 12.566370614359172)\nassert isclose(f(1), 3.141592653589793)",
    "hints": "import typing\nassert typing.get_type_hints(f)['return'] is int\nassert f(3) == 7",
    "judge": "assert Judge.made(f(3)).accepts(7)",
}

ENTRY_POINTS = {
    "class": "Stack", "pair": "make", "values": "V", "money": "Money", "money in place": "Money", "derived": "Shape",
}  # fmt: skip

PRELUDES: dict[str, str] = {
    "judge": """
class Judge:
    def __init__(self, value):
        self.value = value
    def accepts(self, expected):
        return self.value == expected
    @staticmethod
    def made(judge):
        assert type(judge) is Judge
        return judge
"""
}

STDIO_ROW = [{"input": "3\n", "output": "7\n"}, {"input": "0\n", "output": "1\n"}]

_BUILT = {  # too long to write down
    "deep source": "x = " + "(" * 5000 + ")" * 5000,
    "long expression": "def f(x): return " + "-" * 200_000 + "1",
    "long source": "#" * (2 << 20),
}


class Hostile(NamedTuple):
    """A program, and the row it faces."""

    row: str
    source: str


def _load(folder: str) -> dict[str, dict[str, Hostile]]:
    clauses: dict[str, dict[str, Hostile]] = {}
    for path in sorted((Path(__file__).parent / folder).glob("*.txt")):
        programs = clauses[path.stem.replace("_", " ")] = {}
        for part in path.read_text().split("#### ")[1:]:
            title, _, source = part.partition("\n")
            name, _, row = title.partition(" | ")
            programs[name] = Hostile(row or "f", source)
    return clauses


BREACHES = _load("breaches")
CHEATS = _load("cheats")
CHEATS["size"] |= {name: Hostile("f", source) for name, source in _BUILT.items()}
SCRIPTS = _load("scripts")["standard output"]
