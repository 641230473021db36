"""Who runs a trial, and whether it still does: what tells a long run from one whose process is dead."""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT_SECONDS = 15.0
"""Between two signs of life."""
SILENCE_SECONDS = 8 * BEAT_SECONDS
"""Without a sign of life, after which a worker elsewhere is taken for dead."""


@dataclass(frozen=True)
class Worker:
    """A process that runs trials.

    Attributes:
        name: Its name, which no other worker ever has.
        place: The kernel and the process namespace in which `pid` means something; "" where there is no telling.
        pid, started: The process, and when its kernel says that it began, since process ids come back.
        machine: What it runs on, for the reader: seconds compare on one machine only.
    """

    name: str
    place: str
    pid: int
    started: str
    machine: str = ""

    @classmethod
    def this_process(cls) -> "Worker":
        """The calling process, under a new name."""
        pid = os.getpid()
        machine = f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores"
        return cls(uuid.uuid4().hex, _place(), pid, _start_of(pid), machine)


class Watch:
    """Tells which workers live. One in the same place is looked up; any other must give signs of life.

    No two clocks are compared: what counts is how long this process has seen no new sign.

    Args:
        signs: Gives the newest sign of life of each worker, by name.
    """

    def __init__(self, signs: Callable[[], dict[str, Any]]) -> None:
        self.signs = signs
        self.here = _place()
        self.seen: dict[str, tuple[Any, float]] = {}

    def is_alive(self, worker: Worker) -> bool:
        """Whether the process is there, or at least has not been silent for long."""
        if self.here and worker.place == self.here:
            return _start_of(worker.pid) == worker.started
        sign = self.signs().get(worker.name)
        if worker.name not in self.seen or self.seen[worker.name][0] != sign:
            self.seen[worker.name] = (sign, time.monotonic())
        return time.monotonic() - self.seen[worker.name][1] < SILENCE_SECONDS


@contextlib.contextmanager
def heartbeat(beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` now and every `BEAT_SECONDS`, from a thread of its own, for as long as the context lasts."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a database that is busy for a moment; the next beat tries again
                beat()

    beat()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" where there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    state, started = fields[0], fields[19]
    return "" if state in "ZX" else started
