"""Programs that read standard input: the ways to read and to end, what their failures are called, and their limits."""

import time
from collections.abc import Iterator

import pytest

from mua_rl.rewards.sandbox.pool import Pool
from mua_rl.rewards.sandbox.row import parse_row
from mua_rl.rewards.sandbox.settings import Settings
from mua_rl.rewards.sandbox.verdict import Reason

ROW = parse_row([{"input": "3 4\n5\n", "output": "12\n"}])


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(Settings(workers=1, seconds=1.0, total_seconds=2.0)) as pool:
        yield pool


@pytest.mark.parametrize(
    "program",
    [
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        "print(sum(map(int, open(0).read().split())))",
        "from pathlib import Path\nprint(sum(map(int, Path('/dev/stdin').read_text().split())))",
        "with open('/dev/stdin') as file:\n    print(sum(int(word) for line in file for word in line.split()))",
        "import sys\nsys.stdin = open('/dev/stdin')\nprint(sum(map(int, input().split())) + int(input()))",
        "import fileinput\nprint(sum(int(word) for line in fileinput.input('/dev/stdin') for word in line.split()))",
        "import io, os\nread = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\nprint(len(read()) * 3)",
        "import sys\nsys.stderr = open('/dev/null', 'w')\nprint(1, file=sys.stderr)\nprint(12)",
        "print(12, file=open('/dev/stdout', 'w'))",
        "print(12)\nexit()",
        "print(12)\nquit(0)",
        "print(12)\nraise SystemExit",
    ],
)
def test_input_is_read_and_programs_end_in_any_usual_way(pool: Pool, program: str) -> None:
    assert pool.run(program, ROW).ok


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("1 / 0", Reason.ERROR),
        ("print(12", Reason.ERROR),
        ("print(input(), input(), input())", Reason.ERROR),
        ("print(12)\nraise ValueError", Reason.ERROR),
        ("print(12)\nexit(3)", Reason.ERROR),
        ("print(12)\nexit('no')", Reason.ERROR),
        ("import os\nos._exit(9)", Reason.ERROR),
        ("import ctypes\nctypes.string_at(0)", Reason.KILLED),
        ("x = [0] * 10**10", Reason.MEMORY),
        ("while True: pass", Reason.TIMEOUT),
        ("print(13)", Reason.WRONG),
        ("exit()", Reason.WRONG),
    ],
)
def test_failures_have_their_own_names(pool: Pool, program: str, reason: Reason) -> None:
    assert pool.run(program, ROW).reason is reason


def test_a_program_has_a_limit_for_all_of_its_tests(pool: Pool) -> None:
    row = parse_row([{"input": str(i), "output": str(i)} for i in range(50)])
    start = time.monotonic()
    verdict = pool.run("import time\ntime.sleep(0.5)\nprint(input())", row, fraction=True)
    assert verdict.reason is Reason.TIMEOUT and 0 < verdict.passed < 5 and verdict.total == 50
    assert time.monotonic() - start < 10
    assert pool.run("print(input())", row).ok


def test_the_limit_for_all_tests_is_ten_of_one_unless_said() -> None:
    assert Settings(seconds=3.0).total_seconds == 30.0
