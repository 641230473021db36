"""The side of the untrusted code: load a program, then answer calls on it (`script` runs it as a script).

Nothing here decides anything: the code under test can change all of it, and gains nothing but wrong answers.
"""

import builtins
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from mua_rl.rewards.sandbox import wire
from mua_rl.rewards.sandbox.server import Server


def serve_calls(job: dict[str, Any], channel_fd: int) -> None:
    """Load `job["source"]`, then do what the tests ask of it until they hang up."""
    module = new_module("solution")
    server = Server(wire.Channel(channel_fd), module)
    try:
        load(job, module, server.after_prelude)
    except BaseException as error:
        server.send_error(error)  # in answer to the first request, whichever it is
        return
    server.after_source()
    server.serve()


_filling: list[bytes] = []


def rehearse() -> None:
    """Serve a few harmless calls in the zygote itself.

    The interpreter then has specialized this module's code and filled its caches once for all children, each of which
    would otherwise do so for itself, in pages that it would first have to copy.
    """
    job = {"prelude": "", "source": "from typing import List\ndef f(x):\n    return [*x]\n"}
    for _ in range(20):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            tests, twins = wire.Channel(ours.fileno()), wire.Twins(0, wire.refuse, wire.refuse_tag, {})
            tests.send(f'["bind",{twins.pack((("f",), ()))}]')
            for argument in ([1, "a"], [[1.5]], [(1, None)]):
                tests.send(f'["call",{twins.pack((1, (argument,), ()))}]')
                twins.commit()
            ours.shutdown(socket.SHUT_WR)
            serve_calls(job, theirs.fileno())
    del sys.modules["solution"]
    # What is free between the zygote's objects is filled: a child would write there, and first copy each page.
    _filling.extend(bytes(size) for size in range(0, 470, 8) for _ in range(100))


def new_module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def load(job: dict[str, Any], module: types.ModuleType, after_prelude: Callable[[], None] = lambda: None) -> None:
    # Compiled apart, so that a `from __future__` in the source is still its first statement.
    if job["prelude"]:
        exec(compile(job["prelude"], "<prelude>", "exec"), module.__dict__)
    after_prelude()
    exec(compile(job["source"], "<solution>", "exec"), module.__dict__)
