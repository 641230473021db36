"""One worker of the pool: two zygotes (`zygote.py`), one for programs and one for tests.

Each execution forks a fresh child of each, joined by a socket pair. The trainer's side here compiles, evaluates and
unpickles nothing of either; time limits are kept here, by SIGKILL.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mua_rl.errors import UserError
from mua_rl.rewards.faults import BadRow, GraderFault
from mua_rl.rewards.sandbox import stdio
from mua_rl.rewards.sandbox.row import Row
from mua_rl.rewards.sandbox.script import OUT_OF_MEMORY_STATUS
from mua_rl.rewards.sandbox.settings import Settings
from mua_rl.rewards.sandbox.verdict import Reason, Verdict

_START_SECONDS: Final = 60.0
_REAP_SECONDS: Final = 20.0
_TESTS_MEMORY_BYTES: Final = 1 << 30
_TESTS_CPU_SECONDS: Final = 3600  # their process serves many rows; each has its wall-clock limit
_FOLDER: Final = Path(__file__).parent

# Loads this folder alone: its parents are stand-ins, so that the trainer's libraries stay out of the zygote.
_BOOTSTRAP: Final = """
import importlib.util, sys, types
for name in ("mua_rl", "mua_rl.rewards"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
spec = importlib.util.spec_from_file_location("mua_rl.rewards.sandbox", sys.argv[2] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[2]])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
from mua_rl.rewards.sandbox.zygote import main
main()
"""
_ENVIRONMENT: Final = {
    "PYTHONHASHSEED": "0",  # the order of sets, and so a verdict that hangs on it, is the same in every run
    "MALLOC_ARENA_MAX": "1",  # or each thread takes 64 MiB of the address space
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8",
}


class Died(Exception):
    """A zygote has gone, or does not answer."""


class TestsDied(Died):
    """The process that runs the tests ended before it had said all. The worker can go on."""

    __test__ = False  # not a class of pytest's


class Zygote:
    """The trainer's end of one zygote process. Not thread-safe."""

    def __init__(self, settings: Settings, memory_bytes: int, cpu_seconds: int) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        trainer = os.pidfd_open(os.getpid())
        packages = [path for path in sys.path if path and os.path.isdir(path)]
        config = {
            "control": theirs.fileno(),
            "trainer": trainer,
            "isolation": settings.isolation,
            "memory_bytes": memory_bytes,
            "cpu_seconds": cpu_seconds,
            "threads": settings.threads,
            "modules": settings.modules,
            "search_paths": packages if settings.modules else [],
        }
        command = [sys.executable, "-S", "-P", "-s", "-B", "-X", "utf8", "-c", _BOOTSTRAP]
        try:
            self._process = subprocess.Popen(
                [*command, json.dumps(config), str(_FOLDER)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                cwd="/",
                pass_fds=(theirs.fileno(), trainer),
                start_new_session=True,
            )
        except OSError as error:
            self.control.close()
            raise GraderFault(f"the sandbox's interpreter {sys.executable} does not start: {error}") from error
        finally:
            theirs.close()
            os.close(trainer)
        self._wait_until_ready(settings.isolation)

    def _wait_until_ready(self, isolation: str) -> None:
        try:
            reply = json.loads(self._receive(_START_SECONDS))
        except Died:
            self.close()
            assert self._process.stderr is not None
            trace = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            raise GraderFault(f"the sandbox did not start: {trace[-1] if trace else 'no reply'}") from None
        finally:
            if self._process.poll() is None and self._process.stderr:
                self._process.stderr.close()
        self.reads_confined: bool = reply.get("reads_confined", False)
        if "error" in reply:
            self.close()
            advice = "; isolation='process' is weaker and needs less" if isolation == "strong" else ""
            raise UserError(f"the {isolation} sandbox cannot be had here: {reply['error']}{advice}.")

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, role: bytes, fds: Sequence[int]) -> None:
        """Fork a child in `role` with copies of `fds`."""
        try:
            socket.send_fds(self.control, [b"R" + role], list(fds))
        except OSError as error:
            raise Died from error

    def finish(self) -> int:
        """Kill the child, if it has not ended; returns its wait status once all that it started is gone."""
        try:
            self.control.send(b"K")
        except OSError as error:
            raise Died from error
        return struct.unpack("=i", self._receive(_REAP_SECONDS))[0]

    def _receive(self, seconds: float) -> bytes:
        if not _wait([self.control.fileno()], seconds):
            raise Died
        try:
            message = self.control.recv(1 << 16)
        except OSError as error:
            raise Died from error
        if not message:
            raise Died
        return message

    def close(self) -> None:
        """End the zygote and whatever it runs; returns when all of it is gone."""
        with contextlib.suppress(OSError):  # a shutdown is seen even where a forked process still holds the socket
            self.control.shutdown(socket.SHUT_RDWR)
        self.control.close()  # the zygote, which runs nothing untrusted itself, kills its child and ends
        try:
            self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _wait(fds: list[int], seconds: float) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}


class Worker:
    """A pair of zygotes. Not thread-safe: the pool hands it to one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._session: socket.socket | None = None  # to the process that runs tests, while it can take another row
        self.programs = Zygote(settings, settings.memory_mb << 20, int(settings.seconds) + 2)
        try:
            self.tests = Zygote(settings, _TESTS_MEMORY_BYTES, _TESTS_CPU_SECONDS)
        except BaseException:
            self.programs.close()
            raise

    def close(self) -> None:
        """Kill both zygotes and whatever they run."""
        if self._session is not None:
            self._session.close()
        self.programs.close()
        self.tests.close()

    def run(self, source: str, row: Row, fraction: bool = False, seconds: float | None = None) -> Verdict:
        """Grade a program, within `seconds` (default: those of the settings).

        One that SIGKILL has ended has a second try: it may have come from outside, as when memory runs out.

        Raises:
            BadRow: The row's tests cannot be run.
            TestsDied: The process that ran them ended.
            Died: A zygote is gone; this worker is of no more use.
        """
        grade = self._run_scripts if row.kind == "stdio" else self._run_tests
        verdict = grade(source, row, fraction, seconds or self.settings.seconds)
        if verdict.reason is Reason.KILLED and verdict.detail.endswith(_describe(signal.SIGKILL)):
            verdict = grade(source, row, fraction, seconds or self.settings.seconds)
        return verdict

    def _run_tests(self, source: str, row: Row, fraction: bool, seconds: float) -> Verdict:
        ours, result = os.pipe()
        program_end, tests_end = socket.socketpair()
        program_fds = [_memory_file({"prelude": row.prelude, "source": source}), program_end.detach()]
        tests_fds = [_memory_file({**vars(row), "fraction": fraction}), tests_end.detach(), result]
        try:
            try:
                self.programs.start(b"C", program_fds)
                self._send_tests(tests_fds)
            finally:
                for fd in program_fds + tests_fds:
                    os.close(fd)
            lines, timed_out = _read_report(ours, time.monotonic() + seconds)
        finally:
            os.close(ours)
        program_status = self.programs.finish()
        reuse = bool(lines) and lines[-1] == ["reuse"]
        tests_status = 0 if reuse else self._end_session()
        return _verdict(lines[:-1] if reuse else lines, timed_out, program_status, tests_status)

    def _send_tests(self, fds: list[int]) -> None:
        """Hand a job to the process that runs tests; a new one is forked unless the last offered itself again."""
        if self._session is None:
            self._session, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self.tests.start(b"T", [theirs.fileno()])
        try:
            socket.send_fds(self._session, [b"J"], fds)
        except OSError as error:
            raise Died("the tests' process has gone") from error

    def _end_session(self) -> int:
        assert self._session is not None
        self._session.close()
        self._session = None
        return self.tests.finish()

    def _run_scripts(self, source: str, row: Row, fraction: bool, seconds: float) -> Verdict:
        passed, failure = 0, None
        end = time.monotonic() + self.settings.total_seconds
        for given, expected in row.tests:
            left = end - time.monotonic()
            outcome = self._run_script(source, row.prelude, given, expected, min(seconds, left))
            if outcome.ok:
                passed += 1
                continue
            failure = failure or outcome
            if not fraction or outcome.reason is Reason.TIMEOUT:  # the others would most likely take as long
                break
        if failure is None:
            return Verdict(Reason.PASSED, passed, len(row.tests))
        return Verdict(failure.reason, passed, len(row.tests), failure.detail)

    def _run_script(self, source: str, prelude: str, given: str, expected: str, seconds: float) -> Verdict:
        ours, output = os.pipe()
        fds = [_memory_file({"prelude": prelude, "source": source}), _memory_file(given), output]
        try:
            try:
                self.programs.start(b"S", fds)
            finally:
                for fd in fds:
                    os.close(fd)
            deadline = time.monotonic() + seconds
            text, timed_out = _read_until(ours, deadline, self.settings.output_bytes)
            status = self.programs.finish() if timed_out or text is None else self._wait_for_exit(deadline)
        finally:
            os.close(ours)
        if text is None:
            return Verdict(Reason.ERROR, detail=f"more than {self.settings.output_bytes} bytes of output")
        if timed_out or status is None:
            return Verdict(Reason.TIMEOUT, detail="time limit")
        if status:
            reason = _ended(status)
            failed = reason is Reason.KILLED and os.WIFEXITED(status)  # an exception, or an exit status of its own
            return Verdict(Reason.ERROR if failed else reason, detail=_describe(status))
        return Verdict(Reason.PASSED, 1) if stdio.same_output(text, expected) else Verdict(Reason.WRONG)

    def _wait_for_exit(self, deadline: float) -> int | None:
        """The script's own wait status after it has closed its output; `None` if it had to be killed."""
        ended = bool(_wait([self.programs.control.fileno()], deadline - time.monotonic()))
        status = self.programs.finish()
        return status if ended else None


def _memory_file(content: Any) -> int:
    """A file in memory with `content`: text as it is, anything else as JSON."""
    data = content.encode(errors="surrogatepass") if isinstance(content, str) else json.dumps(content).encode()
    fd = os.memfd_create("job", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _read_until(fd: int, deadline: float, limit: int) -> tuple[bytes | None, bool]:
    """All that comes up to the end, or None if that is more than `limit` bytes; and whether the deadline passed."""
    chunks: list[bytes] = []
    size = 0
    while True:
        if not _wait([fd], deadline - time.monotonic()):
            return b"".join(chunks), True
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return b"".join(chunks), False
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            return None, False


def _read_report(fd: int, deadline: float) -> tuple[list[Any], bool]:
    """The report's lines so far (`tester.run`), and whether the deadline passed."""
    data, timed_out = _read_until(fd, deadline, 64 << 20)
    return [json.loads(line) for line in (data or b"").split(b"\n")[:-1]], timed_out


def _verdict(lines: list[Any], timed_out: bool, program_status: int, tests_status: int) -> Verdict:
    passed = sum(line[0] == "ok" for line in lines)
    failures = [line for line in lines if line[0] == "bad"]
    total = max([passed + max(1, len(failures)), *(line[1] for line in lines if line[0] == "total")])
    for line in lines:
        if line[0] == "fault":
            raise BadRow(line[1])
    if lines and lines[-1] == ["end"] and not failures:
        return Verdict(Reason.PASSED, passed, passed)
    if failures:
        reason, detail = Reason(failures[0][1]), failures[0][2]
        if reason is Reason.KILLED:
            reason, detail = _ended(program_status), f"{detail}: {_describe(program_status)}"
        return Verdict(reason, passed, total, detail)
    if timed_out:
        return Verdict(Reason.TIMEOUT, passed, total, "time limit")
    raise TestsDied(f"the tests' process ended early: {_describe(tests_status)}")


def _ended(status: int) -> Reason:
    """The reason that a wait status speaks for."""
    if os.WIFEXITED(status):
        return Reason.MEMORY if os.WEXITSTATUS(status) == OUT_OF_MEMORY_STATUS else Reason.KILLED
    return Reason.TIMEOUT if os.WTERMSIG(status) == signal.SIGXCPU else Reason.KILLED


def _describe(status: int) -> str:
    if os.WIFEXITED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    return f"signal {os.WTERMSIG(status)}"
