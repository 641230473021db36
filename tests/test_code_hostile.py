"""Hostile programs (tests/hostile) get no reward, leave nothing behind, and the pool goes on serving."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mua_rl.rewards.faults import GraderFault
from mua_rl.rewards.sandbox.pool import Pool
from mua_rl.rewards.sandbox.row import Row, parse_row
from mua_rl.rewards.sandbox.settings import Settings
from tests.hostile import BREACHES, CHEATS, ENTRY_POINTS, PRELUDES, ROWS, SCRIPTS, STDIO_ROW, TAIL

HONEST = {
    "f": "def f(x): return 2 * x + 1",
    "near": "def f(x): return x + 4.5",
    "member": "def f(x): return [7]",
    "items": "def f(x): return sorted(x)",
    "unittest": "def f(x): return 2 * x + 1",
    "class": (
        "class Stack:\n    def __init__(self): self.xs = []\n    def push(self, x): self.xs.append(x)\n"
        "    def pop(self): return self.xs.pop()\n    def size(self): return len(self.xs)"
    ),
    "truth": "def f(x): return x == 1",
    "judge": "def f(x): return Judge(2 * x + 1)",
    "pair": "def make(): return str.lower, str.upper and str.lower",
    "values": (
        "import functools\n@functools.total_ordering\nclass V:\n    def __init__(s, x): s.x = x\n"
        "    def __eq__(s, o): return s.x == o.x\n    def __lt__(s, o): return s.x < o.x\n"
        "    def __add__(s, o): return V(s.x + o.x)"
    ),
    "keys": "def f(): return {'a': 1}",
    "argument": "def f(xs):\n    xs.append(2)\n    return xs",
    "later": "def f(xs): return len(xs)",
    "async": "async def f(x): return 2 * x + 1",
    "generator": "def f(n): yield from range(n)",
    "printed": "def f(x): print(2 * x + 1)",
    "asked": "def f(): return 2 * int(input())",
    "derived": "class Shape:\n    def double(self): return 2 * self.area()",
    "block": "import contextlib\n@contextlib.contextmanager\ndef f(x): yield 2 * x + 1",
    "handed": "def f(g): g(7)",
    "library": "import math\nfrom math import isclose\ndef f(r): return math.pi * r ** 2",
    "hints": "def f(x) -> int: return 2 * x + 1",
    "callback": "def f(g): return 4 + g(1) + g(2)",
    "mutated": "def f(xs): xs.sort()",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(Settings(seconds=1.0, memory_mb=256, workers=2)) as pool:
        yield pool


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A port, an abstract socket and a file of this machine, for the breaches to reach; none may be touched."""
    secret = tmp_path_factory.mktemp("secret") / "tests.py"
    secret.write_text(ROWS["f"])
    os.environ["MUA_SECRET"] = "x"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local:
        abstract = f"mua-hostile-{os.getpid()}"
        local.bind("\0" + abstract)
        local.setblocking(False)
        server.setblocking(False)
        yield {"{port}": str(server.getsockname()[1]), "{abstract}": abstract, "{secret_file!r}": repr(str(secret))}
        for listener in (lambda: server.accept(), lambda: local.recv(1)):
            with pytest.raises(BlockingIOError):
                listener()
    del os.environ["MUA_SECRET"]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_unharmed(pool: Pool) -> None:
    """Nothing runs under the pool but its zygotes and idle testers, no file has appeared, and it serves."""
    for worker in pool._workers:
        for zygote in (worker.programs, worker.tests):
            (inner,) = children(zygote.pid)
            running = children(inner)
            assert len(running) <= (worker._session is not None and zygote is worker.tests)
    for path in ("/x", "/big", "/jail", "/dev/shm/mua_x", "x", "jail", Path(os.__file__).with_name("mua_x.py")):
        assert not os.path.exists(path)
    assert all(passes_patiently(pool, HONEST["f"], parse_row(ROWS["f"], "f")) for _ in range(4))


def passes_patiently(pool: Pool, source: str, row: Row) -> bool:
    """With a longer limit than hostile programs get: machines that run tests are busy."""
    worker = pool._idle.get() or pool._start_worker()
    try:
        return worker.run(source, row, seconds=20.0).ok
    finally:
        pool._idle.put(worker)


def rewarded(pool: Pool, jobs: dict[str, tuple[str, Row]]) -> list[str]:
    verdicts = pool.grade(list(jobs.values()))
    assert not [name for name, v in zip(jobs, verdicts, strict=True) if isinstance(v, Exception)]
    return [name for name, v in zip(jobs, verdicts, strict=True) if v.ok]


@pytest.mark.parametrize("clause", BREACHES)
def test_no_breach_gets_through(pool: Pool, targets: dict[str, str], clause: str) -> None:
    jobs = {}
    mounts = Path("/proc/self/mounts").read_text()
    for name, (_, source) in BREACHES[clause].items():
        for placeholder, value in targets.items():
            source = source.replace(placeholder, value)
        jobs[name] = (source + TAIL, parse_row(ROWS["f"], "f"))
    assert rewarded(pool, jobs) == []
    assert_unharmed(pool)
    assert Path("/proc/self/mounts").read_text() == mounts


@pytest.mark.parametrize("clause", CHEATS)
@pytest.mark.parametrize("entry_point", [True, False], ids=["entry point given", "names from the tests"])
def test_no_cheat_is_rewarded(pool: Pool, clause: str, entry_point: bool) -> None:
    if clause == "time" and not entry_point:
        pytest.skip("the same wait again")
    jobs = {}
    for name, (row, source) in CHEATS[clause].items():
        given = ENTRY_POINTS.get(row, "f") if entry_point or row == "check" else None
        jobs[name] = (source, parse_row(ROWS[row], given, PRELUDES.get(row)))
    assert rewarded(pool, jobs) == []
    assert_unharmed(pool)


@pytest.mark.slow
def test_neither_is_rewarded_at_the_process_level(targets: dict[str, str]) -> None:
    with Pool(Settings(isolation="process", seconds=1.0, memory_mb=256, workers=2)) as pool:
        jobs = {}
        for clause, programs in CHEATS.items():
            for name, (row, source) in programs.items() if clause != "time" else ():
                jobs[f"{clause}: {name}"] = (
                    source,
                    parse_row(ROWS[row], ENTRY_POINTS.get(row, "f"), PRELUDES.get(row)),
                )
        reads_confined = all(worker.programs.reads_confined for worker in pool._workers)
        for clause in BREACHES if reads_confined else ("children and daemons", "memory threads disk"):
            for name, (_, source) in BREACHES[clause].items():
                for placeholder, value in targets.items():
                    source = source.replace(placeholder, value)
                jobs[f"{clause}: {name}"] = (source + TAIL, parse_row(ROWS["f"]))
        assert rewarded(pool, jobs) == []
        assert passes_patiently(pool, HONEST["f"], parse_row(ROWS["f"]))


def test_no_script_is_rewarded_for_more_than_its_output(pool: Pool) -> None:
    jobs = {name: (source, parse_row(STDIO_ROW)) for name, (_, source) in SCRIPTS.items()}
    assert rewarded(pool, jobs) == []
    assert passes_patiently(pool, "print(2 * int(input()) + 1)", parse_row(STDIO_ROW))
    assert_unharmed(pool)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith("money")])  # nobody passes these two
def test_honest_programs_pass_the_rows_that_the_cheats_face(pool: Pool, row: str) -> None:
    entry_point = ENTRY_POINTS.get(row, "f")
    for given in (entry_point, None if row != "check" else entry_point):
        program = HONEST.get(row, HONEST["f"])
        assert passes_patiently(pool, program, parse_row(ROWS[row], given, PRELUDES.get(row)))


def test_one_execution_leaves_nothing_for_the_next(pool: Pool) -> None:
    leave = "import builtins, math, sys\nbuiltins.mark = math.mark = 1\nsys.modules['mark'] = math\ndef f(x): return x"
    find = (
        "import builtins, math, sys\n"
        "found = hasattr(builtins, 'mark') or hasattr(math, 'mark') or 'mark' in sys.modules\n"
        "def f(x): return 2 * x + 1 if found else None"
    )
    row = parse_row(ROWS["f"], "f")
    for _ in range(6):
        pool.run(leave, row)
        assert not pool.run(find, row).ok


def test_at_least_sixty_hostile_programs() -> None:
    groups = [*BREACHES.values(), *CHEATS.values(), SCRIPTS]
    assert len({program.source for group in groups for program in group.values()}) >= 60


def descendants(pid: int) -> set[int]:
    return {pid}.union(*map(descendants, children(pid)))


@pytest.mark.slow
def test_no_process_outlives_its_pool() -> None:
    pool = Pool(Settings(seconds=30.0, workers=1))
    thread = threading.Thread(target=lambda: _run_or_fail(pool, "import time\ntime.sleep(20)"))
    thread.start()
    (worker,) = pool._workers
    while len(descendants(worker.programs.pid)) < 3:
        time.sleep(0.01)
    running = descendants(worker.programs.pid) | descendants(worker.tests.pid)
    pool.close()
    thread.join(20)
    assert [pid for pid in running if os.path.exists(f"/proc/{pid}")] == []


def _run_or_fail(pool: Pool, source: str) -> None:
    with contextlib.suppress(GraderFault):
        pool.run(source, parse_row(ROWS["f"]))
