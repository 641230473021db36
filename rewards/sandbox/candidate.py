"""The side of the untrusted code: load a program, then answer calls on it (`script` runs it as a script).

Nothing here decides anything: the code under test can change all of it, and gains nothing but wrong answers.
"""

import builtins
import os
import socket
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from mua_rl.rewards.sandbox import wire


def serve_calls(job: dict[str, Any], channel_fd: int) -> None:
    """Load `job["source"]`, then do what the tests ask of it until they hang up."""
    module = new_module("solution")
    server = _Server(wire.Channel(channel_fd), module)
    try:
        load(job, module, server.after_prelude)
    except BaseException as error:
        server.send_error(error)
        return
    server.send(["r", [None, []], None])
    server.serve()


def rehearse() -> None:
    """Serve a few harmless calls in the zygote itself.

    The interpreter then has specialized this module's code and filled its caches once for all children, each of which
    would otherwise do so for itself, in pages that it would first have to copy.
    """
    job = {"prelude": "", "source": "from typing import List\ndef f(x):\n    return [*x]\n"}
    for _ in range(20):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            tests = wire.Channel(ours.fileno())
            tests.send(["bind", ["f"], None])
            for argument in ([1, "a"], [[1.5]], [(1, None)]):
                tests.send(["call", 0, wire.pack([[argument], {}], wire.refuse, {})])
            ours.shutdown(socket.SHUT_WR)
            serve_calls(job, theirs.fileno())
    del sys.modules["solution"]


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


class _Next(Exception):
    """An iterator of the program is exhausted."""


def _next(iterator: Iterator[Any]) -> Any:
    try:
        return next(iterator)
    except StopIteration as error:
        raise _Next from error


# What the tests may do to an object of the program; the same names as in `tester`.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "getattr": getattr, "setattr": setattr, "delattr": delattr, "iter": iter, "next": _next, "len": len, "bool": bool,
    "str": str, "repr": repr, "int": int, "float": float, "dir": dir, "reversed": reversed,
    "abs": abs, "neg": lambda x: -x, "pos": lambda x: +x, "invert": lambda x: ~x,
    "getitem": lambda x, key: x[key], "setitem": lambda x, key, value: x.__setitem__(key, value),
    "delitem": lambda x, key: x.__delitem__(key),
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "matmul": lambda x, y: x @ y,
    "truediv": lambda x, y: x / y, "floordiv": lambda x, y: x // y, "mod": lambda x, y: x % y,
    "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y,
    "enter": lambda x: x.__enter__(), "exit": lambda x: x.__exit__(None, None, None),
    "isinstance": lambda cls, x: isinstance(x, cls), "issubclass": lambda cls, x: issubclass(x, cls),
}  # fmt: skip


_PLAIN_BASES: tuple[Any, ...] = (bool, int, float, str, bytes)
_CONTAINER_BASES: tuple[Any, ...] = (list, tuple, dict, set, frozenset)


class _Server:
    def __init__(self, channel: wire.Channel, module: types.ModuleType) -> None:
        self._channel = channel
        self._module = module
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}  # id() of an object -> its place in _objects, which keeps it alive
        self._stubs: dict[int, Any] = {}
        self._prelude_names: set[str] = set()

    def after_prelude(self) -> None:
        """Note the classes that the prelude has defined: their instances cross by value, also if redefined later."""
        self._prelude_names = {name for name, value in vars(self._module).items() if isinstance(value, type)}

    def serve(self) -> None:
        while True:
            try:
                request = self._channel.receive()
            except wire.Closed:
                return
            self._answer(request)

    def _answer(self, request: Any) -> None:
        operation, target, packed = request
        try:
            if operation == "bind":
                value, changed = [self._describe(name) for name in target], None
                self.send(["r", self._pack(value), changed])
                return
            args, kwargs = self._unpack(packed)
            arguments = [*args, *kwargs.values()]
            before = self._pack(arguments) if _mutable(arguments) else None
            value = _OPERATIONS[operation](self._objects[target], *args, **kwargs)
            after = self._pack(arguments) if before is not None else None
            message = ["r", self._pack(value), after if after != before else None]
        except _Next:
            message = ["stop"]
        except wire.Closed:
            os._exit(0)
        except BaseException as error:
            self.send_error(error)
            return
        self.send(message)

    def _describe(self, name: str) -> Any:
        """A name of the program for the tests: [found, the exception class it is or None, the value]."""
        if name not in vars(self._module):
            return [False, None, None]
        value = vars(self._module)[name]
        if isinstance(value, type) and issubclass(value, BaseException):
            return [True, next(c.__name__ for c in value.__mro__ if c.__module__ == "builtins"), None]
        return [True, None, value]

    def send(self, message: Any) -> None:
        try:
            self._channel.send(message)
        except wire.WireError as error:
            self.send_error(error)

    def send_error(self, error: BaseException) -> None:
        custom = type(error).__name__ if type(error).__module__ != "builtins" else None
        self._channel.send(["x", wire.exception_name(error), wire.exception_arguments(error), custom])

    def _classes(self) -> dict[str, type]:
        found = ((name, vars(self._module).get(name)) for name in self._prelude_names)
        return {name: value for name, value in found if isinstance(value, type)}

    def _pack(self, value: Any) -> list[Any]:
        return wire.pack(value, self._encode_other, self._classes())

    def _unpack(self, data: Any) -> Any:
        return wire.unpack(data, self._decode_other, self._classes())

    def _encode_other(self, value: Any) -> Any:
        kind = type(value)
        base = next((c for c in _PLAIN_BASES if isinstance(value, c)), None)
        if base is not None:  # numpy's numbers, IntEnum and the like: the value itself
            return wire.encode(base.__new__(base, value), self._encode_other)
        base = next((c for c in _CONTAINER_BASES if isinstance(value, c)), None)
        # A class of the program has methods that the tests may want; its named tuples are data.
        if base is not None and (kind.__module__ != "solution" or hasattr(kind, "_fields")):
            return wire.encode(base(value), self._encode_other)
        if id(value) in self._stubs:
            return {"K": self._stubs[id(value)][0]}
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        flags = ("c" if callable(value) else "") + ("n" if hasattr(kind, "__next__") else "")
        return {"h": [number, flags + ("i" if hasattr(kind, "__iter__") or hasattr(kind, "__getitem__") else "")]}

    def _decode_other(self, tag: str, content: Any) -> Any:
        if tag == "H":
            return self._objects[content]
        if tag == "n":
            return getattr(builtins, content)
        stub = self._stub(content) if tag == "k" else self._stub_iterator(content)
        self._stubs[id(stub)] = (content, stub)
        return stub

    def _stub(self, number: int) -> Callable[..., Any]:
        """A function that calls a function of the tests."""

        def callback(*args: Any, **kwargs: Any) -> Any:
            self._channel.send(["k", number, self._pack([list(args), kwargs])])
            while True:
                reply = self._channel.receive()
                if reply[0] == "r":
                    return self._unpack(reply[1])
                if reply[0] == "x":
                    raise getattr(builtins, reply[1])(*reply[2])
                self._answer(reply)  # the tests' function calls the program in its turn

        return callback

    def _stub_iterator(self, number: int) -> Iterator[Any]:
        pull = self._stub(number)
        while True:
            more, value = pull()
            if not more:
                return
            yield value


def _mutable(args: list[Any]) -> bool:
    return any(type(arg) not in (int, float, str, bool, type(None), bytes, complex) for arg in args)
