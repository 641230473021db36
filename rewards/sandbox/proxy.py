"""What the tests hold instead of the program's functions, classes and objects.

A proxy sends operations to the other process. It never lets the program judge: equality and hashing are identity, order
is not defined, `in` goes through the elements, and an operator reaches the program only if both operands are its own,
so that no expected value is ever sent to it. Whatever comes back is plain data or another proxy.
"""

import builtins
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from mua_rl.rewards.sandbox import wire

_RAISABLE: dict[str, type[BaseException]] = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("Stop") and "Group" not in name
}  # StopIteration would silently end a loop of the tests
_RAISABLE["SystemExit"] = SystemExit
_BUILTIN_NAMES = {id(value): name for name, value in vars(builtins).items() if callable(value)}


_BASES: tuple[Any, ...] = (bool, int, float, str, list, tuple, dict, set)  # subclasses cross as these


class HungUp(BaseException):
    """The program's process is gone or talks nonsense. Tests cannot go on, whatever they catch: see `Remote`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Unsupported(BaseException):
    """The tests do something that cannot cross: a fault of the row, not of the program."""


class Remote:
    """The program, as seen from the tests.

    Args:
        channel: To the program's process.
        abort: Called with `HungUp` or `Unsupported`; must not return. It does not raise, since tests that catch
            exceptions, or expect one, would then pass.
        classes: Classes of the prelude, whose instances cross by value.
    """

    def __init__(self, channel: wire.Channel, abort: Callable[[BaseException], Any], classes: dict[str, type]) -> None:
        self._channel = channel
        self._abort = abort
        self._classes = classes
        self._proxies: dict[int, Any] = {}
        self._callbacks: list[Callable[..., Any]] = []
        self._callback_numbers: dict[int, int] = {}
        self._lock = threading.RLock()  # tests may have threads; a callback's own requests are in its thread
        self._exceptions: dict[str, type[BaseException]] = {}
        self.uses = 0  # how often the tests turned to the program

    def wait_until_loaded(self) -> None:
        """Raises what the program raised while it was being loaded."""
        self._reply(expect_stop=False)

    def bind(self, names: list[str]) -> dict[str, Any]:
        """Those of `names` that the program defines: data, proxies, and exception classes of the same builtin base."""
        found = self._request("bind", names, None)
        bound: dict[str, Any] = {}
        if type(found) is not list or len(found) != len(names):
            self._abort(HungUp("error", "protocol"))
        for name, entry in zip(names, found, strict=True):
            if type(entry) is not list or len(entry) != 3:
                self._abort(HungUp("error", "protocol"))
            exists, base, value = entry
            if exists is True and type(base) is str:
                bound[name] = self._exceptions[name] = type(name, (_RAISABLE.get(base, Exception),), {})
            elif exists is True:
                bound[name] = value
        return bound

    def operate(self, operation: str, number: int, *args: Any, **kwargs: Any) -> Any:
        """Do something to the program's object `number`; its changes to list, dict, … arguments are made here too."""
        packed = self._pack([list(args), kwargs])
        self.uses += 1
        return self._request(operation, number, packed, (*args, *kwargs.values()))

    def next(self, number: int) -> Any:
        self.uses += 1
        return self._request("next", number, self._pack([[], {}]), expect_stop=True)

    def _request(
        self, operation: str, target: Any, packed: Any, args: tuple[Any, ...] = (), expect_stop: bool = False
    ) -> Any:
        with self._lock:
            try:
                self._channel.send([operation, target, packed])
            except wire.Closed:
                self._abort(HungUp("killed", "the program's process ended"))
            except wire.WireError as error:
                self._cannot_send(error)
            return self._reply(args, expect_stop)

    def _reply(self, args: tuple[Any, ...] = (), expect_stop: bool = False) -> Any:
        """Serve the program's callbacks until its answer comes."""
        while True:
            try:
                message = self._channel.receive()
                kind = message[0] if type(message) is list and message else None
                if kind == "r" and len(message) == 3:
                    value = self._unpack(message[1])
                    if message[2] is not None:
                        _copy_changes(list(args), self._unpack(message[2]))
                    return value
                if kind == "k" and len(message) == 3:
                    self._serve_callback(message[1], message[2])
                    continue
                error = self._error(message) if kind == "x" else None
            except wire.Closed:
                self._abort(HungUp("killed", "the program's process ended"))
            except MemoryError:
                self._abort(HungUp("memory", "the answer is too large"))
            except (wire.WireError, RecursionError) as fault:
                self._abort(HungUp("error", f"protocol: {fault}"))
            if error is not None:
                raise error
            if kind == "stop" and expect_stop:
                raise StopIteration
            self._abort(HungUp("error", "protocol"))

    def _error(self, message: list[Any]) -> BaseException:
        if len(message) != 4 or type(message[1]) is not str or type(message[2]) is not list:
            raise wire.WireError("not an error")
        kind = self._exceptions.get(message[3]) if type(message[3]) is str else None
        kind = kind or _RAISABLE.get(message[1], RuntimeError)
        arguments = [a for a in wire.decode(message[2], _refuse) if type(a) in (str, int, float, bool)]
        try:
            error = kind(*arguments)
        except TypeError:  # UnicodeDecodeError and its like insist on certain arguments
            error = ValueError(*arguments)
        error.from_program = True  # type: ignore[attr-defined]
        return error

    def _serve_callback(self, number: Any, packed: Any) -> None:
        if type(number) is not int or not 0 <= number < len(self._callbacks):
            raise wire.WireError("no such callback")
        arguments = self._unpack(packed)
        if type(arguments) is not list or len(arguments) != 2:
            raise wire.WireError("not a call")
        args, kwargs = arguments
        if type(args) is not list or type(kwargs) is not dict or set(map(type, kwargs)) - {str}:
            raise wire.WireError("not a call")
        try:
            reply = ["r", self._pack(self._callbacks[number](*args, **kwargs))]
        except Exception as error:
            reply = ["x", wire.exception_name(error), wire.exception_arguments(error)]
        try:
            self._channel.send(reply)
        except wire.WireError as error:
            self._cannot_send(error)

    def _pack(self, value: Any) -> list[Any]:
        try:
            return wire.pack(value, self._encode_other, self._classes)
        except wire.WireError as error:
            return self._cannot_send(error)

    def _cannot_send(self, error: wire.WireError) -> Any:
        """The row's fault, unless the size may come from what the program has answered before."""
        if self.uses > 1 and isinstance(error, wire.TooLarge):
            self._abort(HungUp("error", f"its answer cannot be handed back: {error}"))
        return self._abort(Unsupported(f"a value of the tests cannot cross: {error}"))

    def _unpack(self, data: Any) -> Any:
        return wire.unpack(data, self._decode_other, self._classes)

    def _encode_other(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Proxy):
            return {"H": number_of(value)}
        if id(value) in _BUILTIN_NAMES:
            return {"n": _BUILTIN_NAMES[id(value)]}
        if callable(value):
            return {"k": self._callback(value)}
        if hasattr(type(value), "__next__"):
            return {"g": self._callback(functools.partial(_pull, value))}
        base = next((c for c in _BASES if isinstance(value, c)), None)
        if base is not None:
            return wire.encode(base(value), self._encode_other)
        raise wire.WireError(f"{type(value).__name__} object; define its class in the prelude")

    def _callback(self, function: Callable[..., Any]) -> int:
        number = self._callback_numbers.setdefault(id(function), len(self._callbacks))
        if number == len(self._callbacks):
            self._callbacks.append(function)
        return number

    def _decode_other(self, tag: str, content: Any) -> Any:
        if tag == "K" and type(content) is int and 0 <= content < len(self._callbacks):
            return self._callbacks[content]
        if tag == "h" and type(content) is list and len(content) == 2:
            number, flags = content
            if type(number) is int and type(flags) is str:
                if number not in self._proxies:
                    self._proxies[number] = _proxy_class(frozenset(flags) & frozenset("cin"))(self, number)
                return self._proxies[number]
        raise wire.WireError("not a value")


def _pull(iterator: Iterator[Any]) -> tuple[bool, Any]:
    for value in iterator:
        return True, value
    return False, None


def _refuse(tag: str, content: Any) -> Any:
    raise wire.WireError("not plain")


def _copy_changes(old: Any, new: Any) -> None:
    """Make `old`, a container of the tests that was passed to the program, equal to `new`, in place."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, tuple)) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            if type(before) is type(after) and _updatable(before):
                _copy_changes(before, after)
            elif isinstance(old, list):
                old[i] = after
    elif type(old).__module__ == "numpy":
        if getattr(old, "shape", None) == new.shape:
            old[...] = new
    elif isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, deque):
        old.clear()
        old.extend(new)
    elif _has_state(old):
        vars(old).clear()
        vars(old).update(vars(new))


def _updatable(value: Any) -> bool:
    containers = (list, tuple, dict, set, bytearray, deque)
    return isinstance(value, containers) or type(value).__module__ == "numpy" or _has_state(value)


def _has_state(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (Proxy, type)) and not callable(value)


def number_of(proxy: "Proxy") -> int:
    return object.__getattribute__(proxy, "_number")


def _operate(proxy: "Proxy", operation: str, *args: Any, **kwargs: Any) -> Any:
    return object.__getattribute__(proxy, "_remote").operate(operation, number_of(proxy), *args, **kwargs)


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the program answered with another type than {kind.__name__}")
    return value


def _unary(operation: str, kind: type | None = None) -> Callable[["Proxy"], Any]:
    def method(self: "Proxy") -> Any:
        value = _operate(self, operation)
        return value if kind is None else _exactly(kind, value)

    return method


def _binary(operation: str) -> Callable[["Proxy", Any], Any]:
    def method(self: "Proxy", other: Any) -> Any:
        return _operate(self, operation, other) if isinstance(other, Proxy) else NotImplemented

    return method


class Proxy:
    __slots__ = ("_number", "_remote")

    def __init__(self, remote: Remote, number: int) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return _operate(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _operate(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _operate(self, "delattr", name)

    def __getitem__(self, key: Any) -> Any:
        return _operate(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _operate(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _operate(self, "delitem", key)

    def __exit__(self, *exception: Any) -> Any:
        return _operate(self, "exit")

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Proxy) and _exactly(bool, _operate(self, "isinstance", value))

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, Proxy) and _exactly(bool, _operate(self, "issubclass", value))

    __enter__ = _unary("enter")
    __len__ = _unary("len", int)
    __bool__ = _unary("bool", bool)
    __str__ = _unary("str", str)
    __repr__ = _unary("repr", str)
    __int__ = _unary("int", int)
    __float__ = _unary("float", float)
    __abs__ = _unary("abs")
    __neg__ = _unary("neg")
    __pos__ = _unary("pos")
    __invert__ = _unary("invert")
    __add__ = _binary("add")
    __sub__ = _binary("sub")
    __mul__ = _binary("mul")
    __matmul__ = _binary("matmul")
    __truediv__ = _binary("truediv")
    __floordiv__ = _binary("floordiv")
    __mod__ = _binary("mod")
    __and__ = _binary("and")
    __or__ = _binary("or")
    __xor__ = _binary("xor")


class _Callable(Proxy):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _operate(self, "call", *args, **kwargs)


class _Iterable(Proxy):
    __slots__ = ()
    __reversed__ = _unary("reversed")

    def __iter__(self) -> Any:
        iterator = _operate(self, "iter")
        if not hasattr(iterator, "__next__"):
            raise TypeError("the program's iterator is none")
        return iterator

    def __contains__(self, value: Any) -> bool:
        return value in list(self)  # all of them: an endless run of guesses never finishes


class _Iterator(Proxy):
    __slots__ = ()

    def __next__(self) -> Any:
        return object.__getattribute__(self, "_remote").next(number_of(self))


@functools.cache
def _proxy_class(flags: frozenset[str]) -> type[Proxy]:
    bases = [base for flag, base in (("c", _Callable), ("i", _Iterable), ("n", _Iterator)) if flag in flags]
    return type("Proxy", tuple(bases) or (Proxy,), {"__slots__": ()})
