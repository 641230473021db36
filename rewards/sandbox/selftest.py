"""Programs that a new pool runs before it serves: what they must not be able to do, asked of the sandbox itself."""

from typing import Final

from mua_rl.rewards.sandbox.row import Row

# The probe is ours, so its answers can be believed.
PROBE: Final = r"""
import os, sys, fcntl, signal, socket, struct, threading, ctypes

def blocked(action):
    try:
        action()
    except (OSError, AttributeError):  # an older C library lacks some names
        return True
    return False

def fork():
    if os.fork() == 0:
        os._exit(0)

def connect():
    socket.socket().connect(("127.0.0.1", 9))

def start_threads():
    gate = threading.Event()
    threads = []
    try:
        for _ in range(2000):
            threads.append(threading.Thread(target=gate.wait, daemon=True))
            threads[-1].start()
    except RuntimeError:
        return True
    finally:
        gate.set()
    return False

def big():
    try:
        return len(bytearray(1 << 40)) < 0
    except MemoryError:
        return True

def call(name, *arguments):
    if getattr(ctypes.CDLL(None), name)(*arguments) < 0:
        raise OSError

def flags():
    return fcntl.fcntl(END, fcntl.F_GETFL)

END, _ = socket.socketpair()
PID = os.getpid()
SIGNALS = [  # ways to signal, or to have the kernel do it; each is one that succeeds where it is not barred
    lambda: os.kill(PID, 0),
    lambda: signal.pthread_kill(threading.get_ident(), 0),
    lambda: call("sigqueue", PID, 0, None),
    lambda: call("timer_create", 1, None, ctypes.create_string_buffer(8)),
    lambda: call("prctl", 1, 0, 0, 0, 0),  # PR_SET_PDEATHSIG
    lambda: fcntl.fcntl(END, fcntl.F_SETOWN, PID),
    lambda: fcntl.fcntl(END, fcntl.F_SETSIG, signal.SIGIO),
    lambda: fcntl.fcntl(END, 15, struct.pack("=ii", 1, PID)),  # F_SETOWN_EX, F_OWNER_PID
    lambda: fcntl.fcntl(END, fcntl.F_SETFL, flags() | os.O_ASYNC),
    lambda: fcntl.ioctl(END, 0x5452, struct.pack("=i", 1)),  # FIOASYNC
    lambda: fcntl.ioctl(END, 0x8901, struct.pack("=i", PID)),  # FIOSETOWN
    lambda: fcntl.ioctl(END, 0x8902, struct.pack("=i", PID)),  # SIOCSPGRP
]

PROBES = {
    "new processes": lambda: blocked(fork),
    "new programs": lambda: blocked(lambda: os.execv(sys.executable, ["python"])),
    "the network": lambda: blocked(connect),
    "writing files": lambda: blocked(lambda: os.open("/tmp/mua_probe", os.O_CREAT | os.O_WRONLY, 0o600)),
    "memory outside its limit": lambda: blocked(lambda: os.memfd_create("x")),
    "too much memory": big,
    "too many threads": start_threads,
    "signals to others": lambda: all(map(blocked, SIGNALS)),
    "tracing": lambda: blocked(lambda: call("ptrace", 0, 0, 0, 0)),
    "new namespaces": lambda: blocked(lambda: call("unshare", 0x10000000)),
    "an environment": lambda: not os.environ,
    "the files of this machine": lambda: not os.path.exists("/etc") and not os.path.exists("/proc"),
    "other processes": lambda: os.getpid() == 1 and os.getppid() == 0,
}

def probe(name):
    return PROBES[name]()
"""
PROBED: Final = (
    "new processes", "new programs", "the network", "writing files", "memory outside its limit", "too much memory",
    "too many threads", "signals to others", "tracing", "new namespaces", "an environment",
    "the files of this machine", "other processes",
)  # fmt: skip
TOO_MANY_THREADS: Final = "too many threads"
STRONG_ONLY: Final = ("the files of this machine", "other processes")


def probe_rows(isolation: str, threads_limited: bool) -> dict[str, Row]:
    """For each thing that must be out of reach, by name, a row that `PROBE` passes if it is."""
    rows = {}
    for name in PROBED:
        promised = (isolation == "strong" or name not in STRONG_ONLY) and (threads_limited or name != TOO_MANY_THREADS)
        if promised:
            rows[name] = Row("code", (f"assert probe({name!r}) is True",), entry_point="probe")
    return rows


SLEEPER: Final = "import time\n\ndef f():\n    time.sleep(60)\n"
SLEEPER_ROW: Final = Row("code", ("f()",), entry_point="f")

HARMLESS: Final = "def f():\n    return 1\n"
HARMLESS_ROW: Final = Row("code", ("assert f() == 1",), entry_point="f")
