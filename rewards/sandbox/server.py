"""A loaded program's answers to what the tests ask of it.

Nothing here decides anything: the code under test can change all of it, and gains nothing but wrong answers.
"""

import builtins
import functools
import inspect
import io
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from mua_rl.rewards.sandbox import borrowed, errors, operations, plain, wire
from mua_rl.rewards.sandbox.channel import TooLarge, WireError

_BUILTIN_NAMES = {id(value): name for name, value in vars(builtins).items() if callable(value)}
_VALUE_BASES = tuple(plain.BASES)
_CONTAINER_BASES: tuple[Any, ...] = (list, dict, set, bytearray)
_STEP_SECONDS = 0.002  # how long the program's event loop runs before that of the tests has its turn


class _Stop(Exception):
    """An iterator of the program is exhausted."""


class Server:
    """What is on the program's side of the channel.

    Args:
        channel: To the process of the tests.
        module: The program's module.
    """

    def __init__(self, channel: wire.Channel, module: types.ModuleType) -> None:
        self._channel = channel
        self._module = module
        self._classes: dict[str, type] = {}
        self._twins = wire.Twins(1, self._encode, self._decode, self._classes)
        self._objects: list[Any] = [None]
        self._numbers: dict[int, int] = {}  # id() of an object -> its place in _objects, which keeps it alive
        self._described: set[int] = set()  # classes that the tests know of, or that the next message tells of
        self._news: list[list[Any]] = []
        self._given: set[int] = set()  # builtin functions that came from the tests
        self._stubs: dict[int, tuple[str, int, Any]] = {}
        self._from_tests: dict[int, tuple[int, BaseException]] = {}
        self._output: io.BytesIO | None = None
        self._loop: Any = None
        self._tasks: dict[int, Any] = {}
        self._prelude_names: set[str] = set()

    def after_prelude(self) -> None:
        """Note the classes that the prelude has defined: their instances cross by value, also if redefined later."""
        self._prelude_names = {name for name, value in vars(self._module).items() if isinstance(value, type)}

    def after_source(self) -> None:
        """Note which classes of the prelude the program has defined anew."""
        found = ((name, vars(self._module).get(name)) for name in self._prelude_names)
        self._classes.update((name, value) for name, value in found if isinstance(value, type))

    def serve(self) -> None:
        """Answer until the tests hang up."""
        while True:
            try:
                request = self._channel.receive()
            except wire.Closed:
                return
            self._answer(request)

    def _answer(self, request: Any) -> None:
        try:
            target, args, kwargs = (*self._twins.unpack(*request[1:4]), ())[:3]
            value = self._perform(request[0], target, args, dict(kwargs))
            kind = "r"
        except _Stop:
            kind, value = "stop", None
        except wire.Closed:
            os._exit(0)
        except BaseException as error:
            self.send_error(error)
            return
        self.send(kind, value)

    def _perform(self, operation: str, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if operation == "bind":
            self._listen(args)
            own = vars(self._module)
            return tuple((name in own, own.get(name)) for name in target)
        if operation == "derive":
            return self._derive(*args)
        value = self._objects[target]
        if operation == "next":
            try:
                return next(value)
            except StopIteration as error:
                raise _Stop from error
        if operation == "seed":
            return random.seed(*args)
        if operation == "base":
            return _base_value(value)
        if operation == "signature":
            return _signature(value)
        if operation in ("start", "step", "cancel"):
            return self._drive(operation, target, value)
        return operations.PERFORM[operation](value, *args, **kwargs)

    def send(self, kind: str, value: Any) -> None:
        """Send a message; an error in its stead if it cannot cross."""
        try:
            try:
                self._send(kind, value)
            except TooLarge as error:
                self._refuse(f"its answer cannot cross: {error}")
            except WireError as error:
                self._refuse(f"its answer cannot cross: {error}")
        except wire.Closed:
            os._exit(0)

    def send_error(self, error: BaseException) -> None:
        """Send an exception."""
        errors.forget_frames(error)
        try:
            self.send("x", error)
        except wire.Closed:
            raise
        except BaseException as fault:  # an exception whose own code raises
            self.send("x", RuntimeError(type(fault).__name__))

    def _send(self, kind: str, value: Any) -> None:
        text = f'["{kind}",{self._twins.pack(value)}'
        try:
            self._channel.send(f"{text},{wire.to_json(self._news)},{self._printed()}]")
        except TooLarge:
            self._twins.take_back()
            raise
        self._twins.commit()
        self._news.clear()

    def _refuse(self, reason: str) -> None:
        self._channel.send(f'["n",{wire.to_json(reason)},[],[],[],""]')

    # Standard output and input, if the tests look at them.

    def _listen(self, options: tuple[str, ...]) -> None:
        if "output" in options:
            self._output = io.BytesIO()
            sys.stdout = io.TextIOWrapper(self._output, "utf-8", "surrogatepass", write_through=True)
        if "input" in options:
            builtins.input = self._stub("input")
            sys.stdin = _Input(self._stub("readline"), self._stub("read"))
        if "print" in options:
            builtins.print = self._stub("print")

    def _printed(self) -> str:
        if self._output is None or not self._output.tell():
            return '""'
        text = self._output.getvalue().decode("utf-8", "surrogatepass")
        self._output.seek(0)
        self._output.truncate()
        return wire.to_json(text)

    # Coroutines.

    def _drive(self, operation: str, number: int, value: Any) -> Any:
        import asyncio

        if operation == "start":
            self._loop = self._loop or asyncio.new_event_loop()
            self._tasks[number] = asyncio.ensure_future(value, loop=self._loop)
            return None
        task = self._tasks[number]
        if operation == "cancel":
            task.cancel()
        self._loop.run_until_complete(asyncio.wait([task], timeout=_STEP_SECONDS))
        if operation == "cancel" or not task.done():
            return (False, None)
        try:
            return (True, task.result())
        except StopAsyncIteration as error:
            raise _Stop from error

    # Values that are neither plain nor have twins.

    def _encode(self, value: Any) -> Any:
        if id(value) in self._stubs:
            tag, number, _ = self._stubs[id(value)]
            return {tag: number}
        if id(value) in self._given:
            return {"n": _BUILTIN_NAMES[id(value)]}
        kind = type(value)
        if isinstance(value, type):
            return self._encode_class(value)
        if issubclass(kind, BaseException):
            return self._encode_error(value)
        base = next((c for c in _VALUE_BASES if issubclass(kind, c)), None)
        if base is not None:
            return {"v": [self._number(value), self._mirror(kind), self._twins.encode(plain.BASES[base](value))]}
        base = next((c for c in _CONTAINER_BASES if issubclass(kind, c)), None)
        # A class of the program has methods that the tests may want.
        if base is not None and kind.__module__ != "solution":
            return self._twins.encode(base(value))
        hashed: Any = kind.__hash__ is object.__hash__
        if not hashed:
            try:
                hashed = hash(value) if kind.__hash__ is not None else None
            except Exception:
                hashed = None
        return {"h": [self._number(value), self._mirror(kind), hashed]}

    def _number(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return number

    def _encode_class(self, kind: type) -> Any:
        if issubclass(kind, BaseException):
            if self._classes.get(kind.__name__) is kind:
                return {"p": kind.__name__}
            if kind.__module__ == "builtins":
                return {"n": kind.__name__}
            if errors.is_library_class(kind):
                return {"L": [kind.__module__, kind.__qualname__, errors.nearest_builtin(kind)]}
        return self._mirror(kind)

    def _mirror(self, kind: type) -> Any:
        """The number of a class, of which the tests are told before they need it."""
        number = self._number(kind)
        if number in self._described:
            return {"C": number}
        self._described.add(number)
        bases = [self._twins.encode(b) for b in kind.__bases__ if b.__module__ == "solution" or _is_error(b)]
        base = next((c.__name__ for c in (*_VALUE_BASES, *_CONTAINER_BASES) if issubclass(kind, c)), None)
        doc = kind.__doc__ if type(kind.__doc__) is str else None
        abilities, class_abilities = _abilities(inspect.getmro(kind)), _abilities(inspect.getmro(type(kind)))
        if hasattr(kind, "__class_getitem__"):
            class_abilities = (*class_abilities, "class_getitem")
        fields = list(kind.__dataclass_fields__) if hasattr(kind, "__dataclass_fields__") else None
        self._news.append([number, kind.__name__, doc, bases, abilities, class_abilities, base, fields])
        return {"C": number}

    def _encode_error(self, error: BaseException) -> Any:
        if id(error) in self._from_tests:
            return {"T": self._from_tests[id(error)][0]}
        kind = self._encode_class(type(error))
        arguments, attributes = self._part(_arguments(error)), self._part(tuple(vars(error).items()))
        try:
            text = str(error)[: 1 << 16]
        except Exception:
            text = ""
        number = self._number(error) if "C" in kind else None
        cause = error.__cause__ and self._encode_error(error.__cause__)
        return {"X": [kind, arguments, attributes, text, number, cause]}

    def _part(self, values: tuple[Any, ...]) -> Any:
        """`values` of an exception, or none of them if they cannot cross."""
        try:
            return self._twins.encode(values)
        except Exception:
            return {"t": []}

    def _decode(self, tag: str, content: Any) -> Any:
        if tag == "H":
            return self._objects[content]
        if tag == "n":
            self._given.add(id(getattr(builtins, content)))
            return getattr(builtins, content)
        if tag == "L":
            return errors.library_class(*content) or Exception
        if tag == "X":
            return self._error(*content)
        if tag == "o":
            known = next((stub for _, number, stub in self._stubs.values() if number == content), None)
            return known or self._keep("o", content, object())
        if tag == "lent":
            known = next(
                (stub for t, number, stub in self._stubs.values() if (t, number) == ("lent", content[0])), None
            )
            if known is not None:
                return known
            return self._keep("lent", content[0], borrowed.stand_in(self._stub(content[0]), content[1]))
        if tag == "async":
            return _stepped(self._stub(content))
        if tag == "k":
            stub = self._stub(content[0])
            _describe(stub, *content[1:])
            return stub
        return self._keep("k", content, _pulled(self._stub(content)))

    def _keep(self, tag: str, number: int, stub: Any) -> Any:
        self._stubs[id(stub)] = (tag, number, stub)
        return stub

    def _error(self, kind: Any, arguments: Any, number: int) -> BaseException:
        error = errors.build(self._twins.decode(kind), self._twins.decode(arguments), {})
        self._from_tests[id(error)] = (number, error)
        return error

    def _stub(self, number: Any) -> Callable[..., Any]:
        """A function that calls a function of the tests."""
        known = next((stub for tag, n, stub in self._stubs.values() if tag == "k" and n == number), None)
        if known is not None:
            return known

        def callback(*args: Any, **kwargs: Any) -> Any:
            self._send("k", (number, args, tuple(kwargs.items())))
            while True:
                reply = self._channel.receive()
                if reply[0] == "r":
                    return self._twins.unpack(*reply[1:4])
                if reply[0] == "x":
                    raise self._twins.unpack(*reply[1:4])
                self._answer(reply)  # the tests' function calls the program in its turn

        return self._keep("k", number, callback)

    def _derive(self, name: str, bases: tuple[type, ...], members: Any) -> type:
        wrappers = {"staticmethod": staticmethod, "classmethod": classmethod, "property": property}
        namespace = {key: wrappers[kind](value) if kind in wrappers else value for key, kind, value in members}
        return types.new_class(name, bases, {}, lambda body: body.update(namespace, __module__="solution"))


class _Input:
    """Standard input, read by the tests."""

    def __init__(self, readline: Callable[..., str], read: Callable[..., str]) -> None:
        self.readline = readline
        self.read = read

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")

    def readlines(self) -> list[str]:
        return list(self)


async def _stepped(step: Callable[[], tuple[bool, Any]]) -> Any:
    import asyncio

    while True:
        done, value = step()
        if done:
            return value
        await asyncio.sleep(0)


def _pulled(pull: Callable[[], tuple[bool, Any]]) -> Iterator[Any]:
    while True:
        more, value = pull()
        if not more:
            return
        yield value


def _describe(stub: Any, name: str | None, doc: str | None, parameters: list[Any] | None) -> None:
    """Give a stub what decorators look at."""
    if name is not None and parameters is not None:
        stub.__name__ = stub.__qualname__ = name
        stub.__doc__ = doc
        stub.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    n, inspect._ParameterKind(kind), default=None if optional else inspect.Parameter.empty
                )
                for n, kind, optional in parameters
            ]
        )


def _arguments(error: BaseException) -> tuple[Any, ...]:
    if isinstance(error, OSError) and error.filename is not None and len(error.args) == 2:
        return (*error.args, error.filename)  # which its arguments do not keep
    return tuple(error.args)


def _is_error(kind: type) -> bool:
    return issubclass(kind, BaseException)


@functools.lru_cache(256)  # functions are rehearsed in the zygote
def _abilities(ancestry: tuple[type, ...]) -> tuple[str, ...]:
    methods = set().union(*(vars(kind) for kind in ancestry if kind not in (object, type)))
    own = set().union(*(vars(kind) for kind in ancestry if kind.__module__ != "builtins"))
    return tuple(
        name
        for name, method in operations.METHODS.items()
        if method in (own if name in operations.COMPARISONS else methods)
    )


def _base_value(value: Any) -> Any:
    if isinstance(value, list):
        return list.copy(value)
    if isinstance(value, dict):
        return dict.copy(value)
    return {*set.__iter__(value)} if isinstance(value, set) else bytearray(value)


def _signature(function: Any) -> Any:
    """What `proxy.Remote.signature` rebuilds; annotations only where they are classes."""
    signature = inspect.signature(function)

    def hint(value: Any) -> dict[str, Any]:
        return {"annotation": value} if isinstance(value, type) and value is not inspect.Parameter.empty else {}

    rows = []
    for parameter in signature.parameters.values():
        more = hint(parameter.annotation)
        if parameter.default is not inspect.Parameter.empty:
            more["default"] = parameter.default
        rows.append((parameter.name, int(parameter.kind), tuple(more.items())))
    returned = hint(signature.return_annotation)
    return tuple(("return_annotation", value) for value in returned.values()), tuple(rows)
