"""The sandbox survives faults, leaves no orphan, keeps its limits, and is refused where it does not hold."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mua_rl
from mua_rl.errors import UserError
from mua_rl.rewards.faults import BadRow, GraderFault
from mua_rl.rewards.sandbox import isolation, selftest
from mua_rl.rewards.sandbox import worker as worker_module
from mua_rl.rewards.sandbox.pool import Pool
from mua_rl.rewards.sandbox.row import Row, parse_row
from mua_rl.rewards.sandbox.settings import Settings
from mua_rl.rewards.sandbox.verdict import Reason

ROOT = Path(__file__).parents[1]
ROW = parse_row("assert f(3) == 7")
RIGHT = "def f(x): return 2 * x + 1"
SLEEP = "import time\ntime.sleep(60)"


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(Settings(workers=1, seconds=20.0)) as pool:
        yield pool


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> set[int]:
    return {pid}.union(*map(descendants, children(pid)))


def running(pids: set[int]) -> set[int]:
    """Those of `pids` that are more than a zombie waiting for this machine's process 1."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(pid)
    return found


@pytest.mark.parametrize("which", ["programs", "tests"])
@pytest.mark.parametrize("part", ["outer", "inner"])
@pytest.mark.slow
def test_a_killed_zygote_is_replaced_while_it_is_at_work(pool: Pool, which: str, part: str) -> None:
    (worker,) = pool._workers
    outer = getattr(worker, which).pid
    victim = outer if part == "outer" else children(outer)[0]
    slow = "import time\ntime.sleep(0.5)\n" + RIGHT
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(pool.run(slow, ROW)))
    thread.start()
    time.sleep(0.2)
    os.kill(victim, signal.SIGKILL)
    thread.join(30)
    assert verdicts and verdicts[0].ok
    assert pool.run(RIGHT, ROW).ok


@pytest.mark.slow
def test_a_killed_idle_process_of_the_tests_is_replaced(pool: Pool) -> None:
    assert pool.run(RIGHT, ROW).ok
    (worker,) = pool._workers
    (tester,) = children(children(worker.tests.pid)[0])
    os.kill(tester, signal.SIGKILL)
    assert pool.run(RIGHT, ROW).ok


@pytest.mark.parametrize(
    ("row", "program"),
    [
        (ROW, f"import time\ntime.sleep(1)\n{RIGHT}"),
        (parse_row([{"input": "3", "output": "7"}]), "import time\ntime.sleep(1)\nprint(2 * int(input()) + 1)"),
    ],
    ids=["calls", "standard input"],
)
def test_a_program_killed_from_outside_has_a_second_try(pool: Pool, row: Row, program: str) -> None:
    (worker,) = pool._workers
    zygote = descendants(worker.programs.pid)

    def kill() -> None:
        while not (victims := running(descendants(worker.programs.pid)) - zygote):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(victims.pop(), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert pool.run(program, row).ok
    killer.join()
    assert pool._workers == {worker}


@pytest.mark.slow
def test_a_sandbox_that_fails_twice_is_a_fault_not_a_verdict(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise worker_module.Died("on purpose")

    monkeypatch.setattr(worker_module.Worker, "run", fail)
    with pytest.raises(GraderFault, match="on purpose"):
        pool.run(RIGHT, ROW)
    monkeypatch.undo()
    assert pool.run(RIGHT, ROW).ok


@pytest.mark.parametrize("program", ["def f(x): return 1", "def f(x): return 2"])
def test_a_program_whose_tests_crash_gets_a_verdict_and_the_pool_serves_on(
    pool: Pool, program: str, caplog: pytest.LogCaptureFixture
) -> None:
    crashing = parse_row("import ctypes\nif f(1) == 1:\n    ctypes.string_at(0)\nassert f(1) == 2")
    verdict = pool.run(program, crashing)
    if program.endswith("2"):
        assert verdict.ok and not caplog.records
    else:
        assert verdict.reason is Reason.CRASHED and "signal 11" in verdict.detail
        assert program in caplog.text
    assert pool.run(RIGHT, ROW).ok


def test_a_sandbox_that_one_program_breaks_is_that_program_s_verdict(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = worker_module.Worker.run

    def die_on_it(self: worker_module.Worker, source: str, *args: object, **kwargs: object) -> object:
        if source == "break":
            raise worker_module.Died("on purpose")
        return run(self, source, *args, **kwargs)

    monkeypatch.setattr(worker_module.Worker, "run", die_on_it)
    assert pool.run("break", ROW).reason is Reason.CRASHED
    assert pool.run(RIGHT, ROW).ok


def test_a_trainer_killed_with_9_leaves_no_orphan() -> None:
    script = (
        "from mua_rl.rewards.sandbox.pool import Pool\n"
        "from mua_rl.rewards.sandbox.row import parse_row\n"
        "from mua_rl.rewards.sandbox.settings import Settings\n"
        "pool = Pool(Settings(workers=1, seconds=60.0))\n"
        "print('ready', flush=True)\n"
        f"pool.run({SLEEP!r}, parse_row('assert f(3) == 7'))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        deadline = time.monotonic() + 20
        while len(descendants(trainer.pid)) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)  # trainer, two zygotes of two processes, program and tests
        below = descendants(trainer.pid) - {trainer.pid}
        assert len(below) == 6
        trainer.kill()
    while running(below) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running(below) == set()


def test_a_thread_that_starts_the_pool_may_end(pool: Pool) -> None:
    made: list[Pool] = []
    thread = threading.Thread(target=lambda: made.append(Pool(Settings(workers=1))))
    thread.start()
    thread.join()
    time.sleep(0.1)
    with made[0] as started:
        assert started.run(RIGHT, ROW).ok
        verdicts = []
        threads = [threading.Thread(target=lambda: verdicts.append(started.run(RIGHT, ROW))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [verdict.ok for verdict in verdicts] == [True] * 8


def test_the_time_limit_holds_for_a_stopped_process(pool: Pool) -> None:
    (worker,) = pool._workers
    started = time.monotonic()
    assert worker.run(SLEEP, ROW, seconds=0.3).reason is Reason.TIMEOUT
    assert time.monotonic() - started < 5


def test_slow_tests_are_limited_too(pool: Pool) -> None:
    (worker,) = pool._workers
    assert worker.run(RIGHT, parse_row("f(1)\nwhile True: pass\nassert True"), seconds=0.3).reason is Reason.TIMEOUT
    assert pool.run(RIGHT, ROW).ok


@pytest.mark.parametrize(
    "tests",
    [
        "",
        [],
        "x = 1",
        "assert True",
        "assert f(3 == 7",
        "import nothing_of_this_name\nassert f(3) == 7",
        "while True",
        "return f(3)",
    ],
)
def test_a_row_that_cannot_be_run_is_a_fault_of_its_own(pool: Pool, tests: object) -> None:
    with pytest.raises(BadRow):
        pool.run(RIGHT, parse_row(tests))
    assert pool.run(RIGHT, ROW).ok


def test_tests_that_change_their_process_do_not_reach_the_next_row(pool: Pool) -> None:
    changing = "import math\nmath.isclose = lambda *a: True\nassert f(3) == 7"
    assert pool.run(RIGHT, parse_row(changing)).ok
    for _ in range(3):
        assert not pool.run(RIGHT, parse_row("import math\nassert math.isclose(f(3), 8)")).ok


def test_identical_programs_run_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = Pool.run
    monkeypatch.setattr(Pool, "run", lambda self, *args: runs.append(args) or run(self, *args))
    verdicts = pool.grade([(RIGHT, ROW), ("def f(x): return 0", ROW), (RIGHT, ROW)])
    assert [getattr(v, "ok", None) for v in verdicts] == [True, False, True]
    assert len(runs) == 2


def test_a_sandbox_with_a_hole_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # A probe that reports one protection as missing stands in for a kernel that lacks it.
    hole = selftest.PROBE.replace("return PROBES[name]()", "return name != 'the network' and PROBES[name]()")
    monkeypatch.setattr(selftest, "PROBE", hole)
    with pytest.raises(UserError, match="the network"):
        Pool(Settings(workers=1))


def test_every_probed_way_to_signal_is_one_where_nothing_bars_it() -> None:
    # A probe whose call fails anyway would find any sandbox safe.
    script = selftest.PROBE + "print([i for i, way in enumerate(SIGNALS) if blocked(way)])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize(
    "aim",
    ["fcntl.fcntl(a, fcntl.F_SETOWN, {pid})", "fcntl.fcntl(a, 15, struct.pack('=ii', 1, {pid}))"],
    ids=["F_SETOWN", "F_SETOWN_EX"],
)
def test_the_kernel_kills_nobody_for_a_program_at_the_process_level(aim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "PROBED", ())  # the filter itself is on trial
    with Pool(Settings(isolation="process", workers=1, seconds=20.0)) as pool:
        user, (worker,) = None, pool._workers
        if os.geteuid() == 0:  # programs then have a user id of their own, which their victims must share
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: worker.programs.pid)
                user = isolation.unused_host_id()
        victim = subprocess.Popen(["sleep", "60"], user=user)
        try:
            attack = (
                "import fcntl, os, socket, struct\na, b = socket.socketpair()\n"
                f"for aim in (lambda: {aim.format(pid=victim.pid)}, lambda: fcntl.fcntl(a, 10, 9),\n"
                "    lambda: fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC), lambda: b.send(b'x')):\n"
                "    try: aim()\n"
                "    except OSError: pass\n"
            )
            assert pool.run(attack + RIGHT, ROW).ok
            with pytest.raises(subprocess.TimeoutExpired):
                victim.wait(0.2)
        finally:
            victim.kill()
            victim.wait()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to have less of its rights")
@pytest.mark.parametrize("lost", ["-mknod", "-dac_read_search", "-dac_read_search,-dac_override"])
def test_as_root_programs_at_the_process_level_load_modules_and_read_nothing_else(tmp_path: Path, lost: str) -> None:
    """The interpreter may be under /root, and root may lack rights, as in a container."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    program = (
        "def f(x):\n"
        "    import email.mime.text, encodings.idna, json.tool, logging.handlers, xml.sax\n"
        "    from concurrent.futures import ThreadPoolExecutor\n"
        f"    for path in ({str(secret)!r}, '/etc/shadow', '/proc/self/environ'):\n"
        "        try:\n"
        "            open(path)\n"
        "        except OSError:\n"
        "            x += 1\n"
        "    return x + len('\xfc'.encode('cp1252'))"
    )
    script = (
        "from mua_rl.rewards.sandbox.pool import Pool\n"
        "from mua_rl.rewards.sandbox.row import parse_row\n"
        "from mua_rl.rewards.sandbox.settings import Settings\n"
        "with Pool(Settings(isolation='process', workers=1)) as pool:\n"
        f"    print(pool.run({program!r}, parse_row('assert f(3) == 7')).reason.value)\n"
    )
    command = ["setpriv", "--bounding-set", lost, sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout == "passed\n", result.stderr


@pytest.mark.slow
def test_where_namespaces_are_forbidden_strong_is_refused_and_process_works(tmp_path: Path) -> None:
    """A seccomp filter as containers have it, without unshare."""
    script = (
        "import ctypes, struct, sys\n"
        "code = [(0x20, 0, 0, 0), (0x15, 0, 1, 272), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)]\n"
        "program = b''.join(struct.pack('=HBBI', *i) for i in code)\n"
        "class P(ctypes.Structure): _fields_ = [('n', ctypes.c_ushort), ('f', ctypes.c_char_p)]\n"
        "libc = ctypes.CDLL(None)\n"
        "assert libc.prctl(38, 1, 0, 0, 0) == 0\n"
        "assert libc.prctl(22, 2, ctypes.byref(P(4, program)), 0, 0) == 0\n"
        "from mua_rl.exits import run_command\n"
        "from mua_rl.rewards.sandbox.pool import Pool\n"
        "from mua_rl.rewards.sandbox.row import parse_row\n"
        "from mua_rl.rewards.sandbox.settings import Settings\n"
        "def main():\n"
        "    with Pool(Settings(isolation=sys.argv[1], workers=1)) as pool:\n"
        f"        print(pool.run({RIGHT!r}, parse_row('assert f(3) == 7')).reason.value)\n"
        "run_command(main)\n"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the filter above knows x86_64's system calls")
    strong = subprocess.run([sys.executable, "-c", script, "strong"], capture_output=True, text=True, timeout=60)
    assert strong.returncode == 2
    assert "namespaces" in strong.stderr and "isolation='process'" in strong.stderr
    process = subprocess.run([sys.executable, "-c", script, "process"], capture_output=True, text=True, timeout=60)
    assert process.stdout == "passed\n", process.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become another user")
@pytest.mark.parametrize("isolation", ["strong", "process"])
def test_an_ordinary_user_has_a_sandbox_too(tmp_path_factory: pytest.TempPathFactory, isolation: str) -> None:
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if _is_recent(p)), None)
    if python is None:
        pytest.skip("no interpreter that others than root may run")
    folder = Path("/tmp") / f"mua-user-{os.getpid()}-{isolation}"  # pytest's own folders are closed to others
    try:
        package = folder / "mua_rl"
        (package / "rewards").mkdir(parents=True)
        shutil.copy(Path(mua_rl.__path__[0]) / "errors.py", package)
        shutil.copy(ROOT / "rewards" / "faults.py", package / "rewards")
        shutil.copytree(ROOT / "rewards" / "sandbox", package / "rewards" / "sandbox")
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        script = (
            "from mua_rl.rewards.sandbox.pool import Pool\n"
            "from mua_rl.rewards.sandbox.row import parse_row\n"
            "from mua_rl.rewards.sandbox.settings import Settings\n"
            f"with Pool(Settings(isolation={isolation!r}, workers=1)) as pool:\n"
            f"    print(pool.run({RIGHT!r}, parse_row('assert f(3) == 7')).reason.value)\n"
        )
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        result = subprocess.run(
            [*user, python, "-B", "-c", script],
            env={"PYTHONPATH": str(folder)},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )
        if isolation == "strong" and "cannot be had here" in result.stderr:
            pytest.skip(result.stderr.splitlines()[-1])  # this machine keeps user namespaces to root
        assert result.stdout == "passed\n", result.stderr
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_recent(python: str) -> bool:
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    return os.access(python, os.X_OK) and subprocess.run([python, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    "bad", [{"isolation": "docker"}, {"seconds": 0}, {"memory_mb": 1}, {"workers": -1}, {"total_seconds": 1}]
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Settings(**bad)
