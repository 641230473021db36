"""The program, as seen from the tests: requests to its process, and what they hold of it (`mirror.py`)."""

import builtins
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from mua_rl.rewards.sandbox import mirror, wire
from mua_rl.rewards.sandbox.channel import TooLarge, WireError
from mua_rl.rewards.sandbox.exchange import Exchange

_CHANGING: dict[str, type] = {t.__name__: t for t in (list, dict, set, bytearray)}


class HungUp(BaseException):
    """The program's process is gone or talks nonsense. Tests cannot go on, whatever they catch: see `Remote`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Unsupported(BaseException):
    """The tests do something that cannot cross: a fault of the row, not of the program."""


class Remote:
    """The program.

    Args:
        channel: To the program's process.
        abort: Called with `HungUp` or `Unsupported`; must not return. It does not raise, since tests that catch
            exceptions, or expect one, would then pass.
        classes: Classes of the prelude, whose instances cross by value.
        has_checks: Whether checks are still to come in a `with` block of the tests: file name and line of the `with`,
            line of the exception.
    """

    def __init__(
        self,
        channel: wire.Channel,
        abort: Callable[[BaseException], Any],
        classes: dict[str, type],
        has_checks: Callable[[str, int, int], bool] = lambda *place: True,
    ) -> None:
        self._channel = channel
        self._abort = abort
        self._has_checks = has_checks
        self._exchange = Exchange(self, classes)
        self._twins = self._exchange.twins
        self._serving = 0
        self._decoding = False
        self._lock = threading.RLock()  # tests may have threads; a callback's own requests are in its thread
        self._named: set[int] = set()
        self.made: set[int] = set()  # objects that the tests made from a class that they name
        self.told: set[int] = set()  # those to which an operator has told a value of the tests
        self.sealed: set[int] = set()  # those of them that were told more than a number
        self.lost_check: BaseException | None = None  # a failed assertion that the program could have swallowed
        self.notes: list[str] = []
        self.uses = 0  # how often the tests turned to the program
        self.write: Callable[[str], Any] | None = None  # for what the program prints, if the tests look at it

    def bind(self, names: list[str], options: list[str]) -> dict[str, Any]:
        """Those of `names` that the program defines: data and mirrors.

        Args:
            names: Of the program.
            options: "output" to be handed what the program prints, "input" to be asked for what it reads.

        Raises:
            BaseException: What the program raised while it was being loaded.
        """
        found = self._request("bind", (tuple(names), tuple(options)))
        if type(found) is not tuple or len(found) != len(names):
            self._abort(HungUp("error", "protocol"))
        bound = {}
        for name, entry in zip(names, found, strict=True):
            if type(entry) is not tuple or len(entry) != 2:
                self._abort(HungUp("error", "protocol"))
            if entry[0] is True:
                bound[name] = entry[1]
                # Whether a name stands for a class is for the row to say, not for the program.
                if isinstance(entry[1], mirror.Mirror) and name[:1].isupper():
                    self._named.add(self._number(entry[1]))
        return bound

    def note(self, text: str) -> None:
        """Keep a reason for which the program may fail though it is right."""
        if text not in self.notes:
            self.notes.append(text)

    def cannot(self, reason: str) -> Any:
        """End the run: the program is asked something that does not cross."""
        return self._abort(HungUp("not_carried", reason))

    def seed(self, *values: Any) -> None:
        """Seed the program's `random` as the tests seed theirs."""
        self._request("seed", (0, values, ()))

    def has_seen(self, error: BaseException) -> bool:
        """Whether an exception of the tests went through the program."""
        return any(error is other for other in self._exchange.raised)

    # What mirrors do.

    def operate(
        self, operation: str, number: int, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do something to the program's object `number`."""
        self.uses += 1
        return self._request(operation, (number, args, tuple(kwargs.items()) if kwargs else ()))

    def next(self, number: int) -> Any:
        self.uses += 1
        return self._request("next", (number, (), ()), StopIteration)

    def construct(self, kind: type, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a class of the program."""
        value = self.operate("call", number, args, kwargs)
        if number in self._named and type(value) is kind:
            self.made.add(self._number(value))
        return value

    def combine(self, operation: str, number: int, other: Any) -> Any:
        """An operator between an object that the tests made and a value of theirs: an object again, or nothing."""
        value = self.operate(operation, number, (other,))
        if mirror.handle_of(value) is None or not isinstance(value, mirror.Proxy):
            self.cannot(f"{operation} of its object and a value of the tests gives plain data")
        self.made.add(self._number(value))
        if operation not in ("iadd", "imul", "iand", "ior"):  # those of a collection
            self.told.add(self._number(value))
            if type(other) not in (int, float, complex, bool):  # the whole of an expected value, it may be
                self.sealed.add(self._number(value))
        return value

    def base_value(self, number: int, kind: type) -> Any:
        """The content of an object whose class derives from a list, a dict or a set and has no `==` of its own."""
        base = next((self._exchange.bases[c] for c in kind.__mro__ if c in self._exchange.bases), None)
        if base is None or "__eq__" in vars(kind):
            return None
        return mirror.exactly(_CHANGING[base], self._request("base", (number, (), ())))

    def hash_of(self, number: int) -> int:
        value = self._exchange.hashes.get(number)
        if value is None:
            raise TypeError("unhashable object of the program")
        return value

    def leave(self, exception: tuple[Any, ...], frame: types.FrameType) -> "Leaving":
        """What watches over the program's `__exit__`, called with `exception` in a block of `frame`."""
        error = exception[1]
        if error is None:
            return Leaving(self, None, checks=False)
        if isinstance(error, AssertionError):
            self.lost_check = self.lost_check or error
        line = error.__traceback__.tb_lineno if error.__traceback__ is not None else 0
        return Leaving(self, error, self._has_checks(frame.f_code.co_filename, frame.f_lineno, line))

    def wait_for(self, number: int) -> Iterator[None]:
        """`__await__`: the program's event loop and the tests' take turns."""
        self.operate("start", number)
        try:
            yield
            while True:
                done, value = self._request("step", (number, (), ()), StopAsyncIteration)
                if done:
                    return value
                yield
        except GeneratorExit:
            raise
        except BaseException as error:
            if not getattr(error, "from_program", False) and not isinstance(error, StopAsyncIteration):
                self.operate("cancel", number)
            raise

    def signature(self, number: int) -> inspect.Signature:
        """Of a function of the program, for `inspect.signature`."""
        rows = self.operate("signature", number)
        if type(rows) is not tuple:
            raise AttributeError("__signature__")
        parameters = [
            inspect.Parameter(name, inspect._ParameterKind(kind), **dict(more)) for name, kind, more in rows[1]
        ]
        return inspect.Signature(parameters, **dict(rows[0]))

    def derive(self, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        """A class of the tests that derives from one of the program: it is made there, its methods stay here."""
        if "__classcell__" in namespace:
            self._abort(Unsupported(f"class {name} of the tests derives from the program's and uses super()"))
        if any(mirror.handle_of(base) is None for base in bases):
            self._abort(Unsupported(f"class {name} of the tests derives from the program's and from another"))
        members: list[tuple[str, str, Any]] = []
        for key, value in namespace.items():
            if key in ("__module__", "__qualname__", "__doc__", "__annotations__"):
                continue
            kind = type(value).__name__
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            elif not isinstance(value, types.FunctionType):
                kind = "data"
            members.append((key, kind, value))
        return self.operate("derive", 0, (name, bases, tuple(members)))

    def _number(self, value: Any) -> int:
        handle = mirror.handle_of(value)
        return handle[1] if handle is not None else -1

    # The conversation.

    def _request(self, operation: str, content: Any, stop: type[BaseException] | None = None) -> Any:
        with self._lock:
            if self._decoding:  # a set or dict compares objects of equal hashes while it is rebuilt
                return False
            try:
                self._send(operation, content)
            except WireError as error:
                self._cannot_send(error)
            content = None  # or these arguments would look as if they were in use
            return self._reply(stop)

    def _send(self, kind: str, content: Any) -> None:
        try:
            self._channel.send(f'["{kind}",{self._twins.pack(content)}]')
            self._twins.commit()
        except wire.Closed:
            if kind != "bind":  # it may have said why before it ended
                self._abort(HungUp("killed", "the program's process ended"))

    def _receive(self) -> list[Any]:
        try:
            message = self._channel.receive()
            if type(message) is not list or len(message) != 6 or type(message[0]) is not str:
                raise WireError("not a message")
            self._decoding = True
            for description in message[4]:
                self._exchange.learn(description)
            message[1] = self._twins.unpack(*message[1:4])
        except wire.Closed:
            self._abort(HungUp("killed", "the program's process ended"))
        except MemoryError:
            self._abort(HungUp("memory", "the answer is too large"))
        except Exception as fault:  # whatever the data makes of this side's code
            self._abort(HungUp("error", f"protocol: {fault}"))
        finally:
            self._decoding = False
        if type(message[5]) is str and message[5] and self.write is not None:
            self.write(message[5])
        return message

    def _reply(self, stop: type[BaseException] | None = None) -> Any:
        """Serve the program's callbacks until its answer comes."""
        while True:
            kind, content, *_ = self._receive()
            if kind == "r":
                return content
            if kind == "k":
                self._serve_callback(content)
            elif kind == "x" and isinstance(content, BaseException):
                if not self.has_seen(content):
                    content.from_program = True  # type: ignore[attr-defined]
                raise content
            elif kind == "stop" and stop is not None:
                raise stop
            elif kind == "n" and type(content) is str:
                self._abort(HungUp("error", content[:200]))
            else:
                self._abort(HungUp("error", "protocol"))

    def _serve_callback(self, content: Any) -> None:
        whole = type(content) is tuple and len(content) == 3
        number, args, kwargs = content if whole else (-1, (), None)
        if type(args) is not tuple or type(kwargs) is not tuple:
            self._abort(HungUp("error", "protocol: not a call"))
        try:
            names = dict(kwargs)  # type: ignore[arg-type]
            function = self._patched(number) if type(number) is str else self._exchange.callbacks[number]
        except (TypeError, ValueError, LookupError, AttributeError):
            self._abort(HungUp("error", "protocol: no such callback"))
        self._serving += 1
        try:
            reply: tuple[str, Any] = ("r", function(*args, **names))
        except Exception as error:
            if isinstance(error, AssertionError) and not getattr(error, "from_program", False):
                self.lost_check = self.lost_check or error
            reply = ("x", error)
        try:
            self._send(*reply)
        except WireError as error:
            self._cannot_send(error)
        finally:
            self._serving -= 1

    def _patched(self, name: str) -> Callable[..., Any]:
        """What the tests have put in the place of the functions that the program reads and writes with."""
        places = {
            "input": (builtins, "input"), "print": (builtins, "print"), "readline": (sys.stdin, "readline"),
            "read": (sys.stdin, "read"),
        }  # fmt: skip
        owner, attribute = places[name]
        return getattr(owner, attribute)

    def _cannot_send(self, error: WireError) -> Any:
        """The row's fault, unless the program may have had a part in it."""
        if self._serving:
            self._abort(HungUp("not_carried", f"what a function of the tests gave to it cannot cross: {error}"))
        if self.uses > 1 and isinstance(error, TooLarge):
            self._abort(HungUp("error", f"its answer cannot be handed back: {error}"))
        return self._abort(Unsupported(f"a value of the tests cannot cross: {error}"))


class Leaving:
    """A block of the tests that an exception ends: the program can swallow or replace that, but no coming check."""

    def __init__(self, remote: Remote, error: BaseException | None, checks: bool) -> None:
        self._remote = remote
        self._error = error
        self._checks = checks

    def __enter__(self) -> "Leaving":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._error is not None and self._checks:
            raise self._error from None

    def allows(self, result: Any) -> bool:
        """Whether the exception is swallowed, as the program wants it."""
        if self._error is None or not result:
            return False
        if self._checks or isinstance(self._error, AssertionError):
            self._remote.note("its __exit__ suppressed an exception in a block with checks still to come")
            return False
        return True
