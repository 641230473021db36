"""Hard limits on Math-Verify: they hold in any thread and process, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mua_rl.errors import UserError
from mua_rl.rewards import math, worker_pool
from mua_rl.rewards.faults import GraderFault
from mua_rl.rewards.math import WORKER_MODULE, MathVerdict, judge_answers
from mua_rl.rewards.worker_pool import Failure, WorkerPool, shared_pool

HOSTILE = [
    "9^{9^{9^{9}}}",
    "10000000!",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\sum_{n=1}^{10^{12}} \\frac{1}{n^2+n+1}",
    "\\int_0^1 e^{e^{e^{x}}} \\sin(x^x) dx",
    "(x+y+z+1)^{10000}",
    "(" * 200 + "1" + ")" * 200,
    "{" * 200 + "1" + "}" * 200,
    "\\frac{1}{" * 60 + "2" + "}" * 60,
    "-" * 490,
    "__import__('os').system('touch HACKED')",
    "\\text{__import__('os')._exit(0)}",
    "exit()",
    "\\begin{pmatrix}" + "1&" * 200 + "1\\end{pmatrix}",
]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def idle_processes(pool):
    return [worker.process.pid for worker in pool._idle]


def gone_within(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(WORKER_MODULE, workers=2, seconds=1.0)
    yield pool
    pool.close()


@pytest.mark.slow
def test_hostile_answers_are_not_right_and_end_in_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = WorkerPool(WORKER_MODULE, workers=2, seconds=0.5)
    start = time.monotonic()
    verdicts = pool.ask([("x^2 + 1", answer) for answer in HOSTILE])
    assert "right" not in verdicts
    assert time.monotonic() - start < 5.0 * len(HOSTILE)  # half a second each, and a new worker after each kill
    assert os.listdir(tmp_path) == []
    pids = idle_processes(pool)
    pool.close()
    assert gone_within(pids, 5)


@pytest.mark.slow
def test_the_pool_serves_on_after_kills(pool):
    assert pool.ask([("x^2 + 1", "9^{9^{9^{9}}}"), ("2x", "x+x")]) == ["timeout", "right"]


@pytest.mark.slow
def test_a_timeout_is_told_from_a_wrong_answer(pool):
    assert pool.ask([("x^2+1", "9^{9^{9^{9}}}"), ("x", "y")]) == ["timeout", "wrong"]


def test_a_worker_has_loaded_what_algebra_needs_before_it_serves():
    """Or its first answer pays: most of a second, and on a busy machine more than the limit."""
    code = (
        "import sys, time\n"
        "from mua_rl.rewards import math_worker\n"
        "math_worker._WARM_UP = math_worker._WARM_UP[:int(sys.argv[1])]\n"
        "judge = math_worker.load()\n"
        "start = time.process_time()\n"
        "assert judge((r'5\\sqrt{7}', r'\\sqrt{175}')) == 'right'\n"
        "assert judge((r'\\frac{x}{x+2}', r'1-\\frac{2}{x+2}')) == 'right'\n"
        "print(time.process_time() - start)\n"
    )
    command = [sys.executable, "-c", code]
    cold, warm = (float(subprocess.run([*command, n], capture_output=True, check=True).stdout) for n in ("0", "99"))
    assert warm < cold / 2


SLOW_ONCE = """
import pathlib, sys, time
from mua_rl.rewards.worker_loop import serve
def load():
    def answer(request):
        mark = pathlib.Path(request)
        tries = len(mark.read_text()) if mark.exists() else 0
        mark.write_text("x" * (tries + 1))
        if tries == 0:
            time.sleep(60)
        return "here"
    return answer
serve(load)
"""


def test_a_request_that_timed_out_is_asked_once_more_of_a_new_worker(monkeypatch, tmp_path):
    (tmp_path / "slow_once.py").write_text(SLOW_ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = WorkerPool("slow_once", workers=1, seconds=0.5)
    assert pool.ask([str(tmp_path / "mark")]) == ["here"]
    assert (tmp_path / "mark").read_text() == "xx"
    pool.close()


class LosingPool:
    """A pool that loses a request once, and then finds it right."""

    def __init__(self, failure, lost):
        self.failure, self.lost, self.asked = failure, lost, []

    def ask(self, pairs):
        replies = [self.failure if i < self.lost and not self.asked else "right" for i in range(len(pairs))]
        self.asked += pairs
        return replies


@pytest.mark.parametrize("failure", [Failure.TIMEOUT, Failure.KILLED, Failure.MEMORY])
def test_a_lost_verdict_is_not_remembered(failure):
    pool, pair = LosingPool(failure, 1), (f"x^2+{failure}", "x")
    assert judge_answers([pair], pool=pool) == [failure]
    assert judge_answers([pair], pool=pool) == [MathVerdict.RIGHT]
    assert judge_answers([pair], pool=pool) == [MathVerdict.RIGHT]
    assert len(pool.asked) == 2


@pytest.mark.parametrize(("lost", "messages"), [(0, 0), (1, 0), (2, 1), (50, 1)])
def test_more_lost_verdicts_than_one_in_a_hundred_are_told_once(monkeypatch, caplog, lost, messages):
    monkeypatch.setattr(math, "_losses", math._LossMonitor())
    pairs = [(f"x^2+{lost}y+{i}", "x") for i in range(100)]
    for _ in range(2):
        judge_answers(pairs, pool=LosingPool(Failure.TIMEOUT, lost))
    told = [record.getMessage() for record in caplog.records if record.name == math.__name__]
    assert len(told) == messages
    assert all(f"{lost} of 100 answers" in message for message in told)


@pytest.mark.slow
def test_limits_hold_off_the_main_thread(pool):
    verdicts = []
    pairs = [("x^2+1", "9^{9^{9^{9}}}"), ("2x", "x+x")]
    thread = threading.Thread(target=lambda: verdicts.extend(pool.ask(pairs)))
    thread.start()
    thread.join(30)
    assert verdicts == ["timeout", "right"]


def test_the_callers_alarm_is_left_alone(pool):
    """Math-Verify's own timeouts cancel it."""
    rang = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        pool.ask([("2x", "x+x")] * 3)
        time.sleep(0.4)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_many_threads_share_one_pool(pool):
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: pool.ask([(f"{i}x", f"x\\cdot {i}"), ("x", "y")])}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: ["right", "wrong"] for i in range(8)}


def test_a_worker_killed_from_outside_costs_no_verdict(pool):
    pool.ask([("2x", "x+x"), ("x", "y")] * 4)
    pids = idle_processes(pool)
    assert len(pids) > 1
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert pool.ask([("2x", "x+x")]) == ["right"]
    assert pool.ask([("2x", "x+x"), ("x", "y")]) == ["right", "wrong"]


def test_closing_leaves_no_process():
    pool = WorkerPool(WORKER_MODULE, workers=1)
    pool.ask([("2x", "x+x")])
    pids = idle_processes(pool)
    assert pids and all(map(alive, pids))
    pool.close()
    assert gone_within(pids, 5)


@pytest.mark.parametrize("answer", ["x+x", "9^{9^{9^{9}}}"])
def test_a_trainer_killed_with_kill_9_leaves_no_orphan(answer):
    """With the worker idle, and with it stuck in a computation."""
    code = (
        "import sys, threading, time\n"
        "from mua_rl.rewards.worker_pool import WorkerPool\n"
        "pool = WorkerPool('mua_rl.rewards.math_worker', workers=1, seconds=2.0)\n"
        "pool.ask([('2x', 'x+x')])\n"
        "print(pool._idle[0].process.pid, flush=True)\n"
        "pool.ask([('2x', sys.argv[1])])\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, answer], stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    time.sleep(0.3)
    assert alive(worker)
    trainer.kill()
    trainer.wait()
    assert gone_within([worker], 8)


def test_a_forked_child_makes_its_own_workers():
    shared = shared_pool(WORKER_MODULE)
    shared.ask([("2x", "x+x")])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        verdicts = shared_pool(WORKER_MODULE).ask([("2x", "x+x")])
        os.write(writer, b"own" if shared_pool(WORKER_MODULE) is not shared and verdicts == ["right"] else b"no")
        shared_pool(WORKER_MODULE).close()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 3) == b"own"
    assert shared.ask([("3x", "x+2x")]) == ["right"]


def test_a_worker_that_cannot_start_is_a_fault_not_a_zero(monkeypatch, tmp_path):
    (tmp_path / "broken_worker.py").write_text("raise SystemExit('no Math-Verify here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(GraderFault, match="no Math-Verify here"):
        WorkerPool("broken_worker", workers=1).ask([("x", "y")])


@pytest.mark.parametrize("value", ["0", "-1", "two", "٢", ""])
def test_a_bad_worker_count_is_refused(monkeypatch, value):
    monkeypatch.setenv("MUA_RL_REWARD_WORKERS", value)
    with pytest.raises(UserError, match="MUA_RL_REWARD_WORKERS"):
        worker_pool._workers_from_environment()


@pytest.mark.slow
def test_memory_is_bounded():
    pool = WorkerPool(WORKER_MODULE, workers=1, seconds=20.0)
    worker_limit = worker_pool.WORKER_MEMORY_BYTES
    pool.ask([("2x", "x+x")])
    with open(f"/proc/{idle_processes(pool)[0]}/limits") as limits:
        line = next(line for line in limits if line.startswith("Max address space"))
    assert line.split()[3] == str(worker_limit)
    pool.close()
