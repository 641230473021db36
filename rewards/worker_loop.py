"""The worker's side of `worker_pool`: reads requests on stdin, writes replies on stdout, dies with the trainer.

Three things bound a worker's life, each without the help of the other two: the pool's SIGKILL; a kernel timer with the
default action, which a library stuck in C cannot swallow; and the end of stdin or a changed parent, which say that the
trainer is gone.
"""

import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

_PARENT_POLL_SECONDS = 2.0


def serve(load: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer requests until stdin ends. The command line holds the pool's seconds per request and the memory limit.

    Args:
        load: Imports what the verifier needs, and returns the function from a request to its reply. Both are what JSON
            can carry.
    """
    seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parent = os.getppid()
    answer = load()
    os.nice(5)  # from here on the trainer goes first; until here it waits
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # whatever a library prints is no reply
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    reply({"value": "ready"})
    pending = b""
    while True:
        while b"\n" not in pending:
            readable, _, _ = select.select([0], [], [], _PARENT_POLL_SECONDS)
            if os.getppid() != parent:
                return
            if readable:
                chunk = os.read(0, 65536)  # unbuffered, so that select tells the truth
                if not chunk:
                    return
                pending += chunk
        line, _, pending = pending.partition(b"\n")
        # One second after the pool's own limit: for a worker whose trainer was killed in the meantime.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        try:
            message = {"value": answer(json.loads(line))}
        except MemoryError:
            message = {"failure": "memory"}
        except Exception:  # RecursionError, or anything that a parser raises on nonsense
            message = {"failure": "error"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(message)
