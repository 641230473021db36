"""What crosses besides plain values and twins, as the side of the tests sends and rebuilds it.

From the tests go numbers of what stays there (functions, iterators, lent objects, exceptions); from the program come
numbers of its objects, for which mirrors are made. Whatever arrives, nothing is evaluated, imported or looked up but
in tables.
"""

import builtins
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mua_rl.rewards.sandbox import borrowed, errors, mirror, operations, plain, wire
from mua_rl.rewards.sandbox.channel import WireError

if TYPE_CHECKING:
    from mua_rl.rewards.sandbox.proxy import Remote

_BUILTIN_NAMES = {id(value): name for name, value in vars(builtins).items() if callable(value)}
_BASES = {t.__name__: t for t in plain.BASES}
_CHANGING: dict[str, type] = {t.__name__: t for t in (list, dict, set, bytearray)}


class Exchange:
    """The values of one run.

    Args:
        remote: What the mirrors turn to.
        classes: Classes of the prelude.
    """

    def __init__(self, remote: "Remote", classes: dict[str, type]) -> None:
        self._remote = remote
        self.twins = wire.Twins(0, self._encode, self._decode, classes)
        self.bases: dict[type, str] = {}  # of mirror classes: the list, dict or set that the program's derives from
        self.hashes: dict[int, int | None] = {}
        self.callbacks: list[Callable[..., Any]] = []
        self.raised: list[BaseException] = []  # by functions of the tests, while the program was calling them
        self._callback_numbers: dict[int, int] = {}
        self._mirrors: dict[int, type] = {}
        self._proxies: dict[int, Any] = {}
        self._borrowed: dict[int, Any] = {}  # objects of the tests, by the number of what does their operations
        self._given: set[str] = set()  # builtin functions that the tests have handed to the program
        self._coroutines: dict[int, tuple[Any, int]] = {}
        self._sentinels: dict[int, object] = {}

    def _encode(self, value: Any) -> Any:
        handle = mirror.handle_of(value)
        if handle is not None:
            return {"H": handle[1]}
        if id(value) in self._coroutines:
            return {"H": self._coroutines[id(value)][1]}
        if id(value) in _BUILTIN_NAMES:
            self._given.add(_BUILTIN_NAMES[id(value)])
            return {"n": _BUILTIN_NAMES[id(value)]}
        if isinstance(value, BaseException):
            return self._encode_error(value)
        if type(value) is types.TracebackType or value is NotImplemented:
            return None
        if type(value) is object:
            self._sentinels[id(value)] = value
            return {"o": id(value)}
        if isinstance(value, type) and issubclass(value, BaseException):
            return self._encode_error_class(value)
        if borrowed.can_be_borrowed(value):
            return {"lent": [self._lent(value), borrowed.abilities(value)]}
        if callable(value):
            return {"k": [self._callback(value), *_description(value)]}
        if inspect.iscoroutine(value):
            return {"async": self._callback(_stepping(value))}
        if hasattr(type(value), "__next__"):
            return {"g": self._callback(functools.partial(_pull, value))}
        for base in (bool, *_BASES.values(), *_CHANGING.values()):
            if isinstance(value, base):
                return self.twins.encode(base(value))
        raise WireError(f"{type(value).__name__} object")

    def _encode_error(self, error: BaseException) -> dict[str, Any]:
        named = self._encode_error_class(type(error))
        try:
            arguments = self.twins.encode(error.args)
        except WireError:
            arguments = {"t": []}
        number = next((i for i, other in enumerate(self.raised) if other is error), len(self.raised))
        if number == len(self.raised):
            self.raised.append(error)
        return {"X": [named, arguments, number]}

    def _encode_error_class(self, kind: type) -> dict[str, Any]:
        if errors.is_library_class(kind) and kind.__module__ != "builtins":
            return {"L": [kind.__module__, kind.__qualname__]}
        return {"n": errors.nearest_builtin(kind)}

    def _lent(self, value: Any) -> int:
        number = next((n for n, other in self._borrowed.items() if other is value), None)
        if number is None:
            number = self._callback(borrowed.lend(value))
            self._borrowed[number] = value
        return number

    def _callback(self, function: Callable[..., Any]) -> int:
        number = self._callback_numbers.setdefault(id(function), len(self.callbacks))
        if number == len(self.callbacks):
            self.callbacks.append(function)
        return number

    def _decode(self, tag: str, content: Any) -> Any:
        if tag == "C":
            if type(content) is not int or content not in self._mirrors:
                raise WireError("no such class")
            return self._mirrors[content]
        if tag == "k" and type(content) is int and 0 <= content < len(self.callbacks):
            return self.callbacks[content]
        if tag == "lent" and type(content) is int and content in self._borrowed:
            return self._borrowed[content]
        if tag == "o" and type(content) is int and content in self._sentinels:
            return self._sentinels[content]
        if tag == "n" and type(content) is str and (content in self._given or content in errors.RAISABLE):
            return getattr(builtins, content)  # none that the tests did not hand out: one could be eval
        if tag == "T" and type(content) is int and 0 <= content < len(self.raised):
            return self.raised[content]
        if tag == "L" and type(content) is list and len(content) == 3:
            return errors.library_class(*content[:2]) or errors.RAISABLE.get(content[2], RuntimeError)
        if tag == "h" and type(content) is list and len(content) == 3:
            return self._proxy(*content)
        if tag == "v" and type(content) is list and len(content) == 3:
            return self._value(*content)
        if tag == "X" and type(content) is list and len(content) == 6:
            return self._error(*content)
        raise WireError("not a value")

    def learn(self, content: Any) -> None:
        """Make the mirror of a class that the program's side tells of."""
        if type(content) is not list or len(content) != 8:
            raise WireError("not a class")
        number, name, doc, bases, abilities, class_abilities, base, fields = content
        if (
            type(number) is not int
            or type(name) is not str
            or type(doc) not in (str, type(None))
            or type(bases) is not list
        ):
            raise WireError("not a class")
        kinds = [self._class(each) for each in bases]
        if base in _BASES and not any(issubclass(kind, _BASES[base]) for kind in kinds):
            kinds.append(_BASES[base])
        able = operations.METHODS.keys() & set(abilities)
        class_able = {*operations.METHODS, "class_getitem"} & set(class_abilities)
        if fields is not None and not all(type(field) is str and field.isidentifier() for field in fields):
            raise WireError("not fields")
        try:
            kind = mirror.make_class(self._remote, number, name, doc, kinds, able, class_able, fields)
        except (TypeError, ValueError) as error:
            raise WireError(f"a class cannot be mirrored: {error}") from error
        if base in _CHANGING:
            self.bases[kind] = base
        self._mirrors.setdefault(number, kind)

    def _class(self, content: Any) -> type:
        if type(content) is dict and content.keys() == {"n"}:
            kind: Any = errors.RAISABLE.get(content["n"], RuntimeError)
        else:
            kind = self.twins.decode(content)
        if not isinstance(kind, type):
            raise WireError("not a class")
        return kind

    def _proxy(self, number: Any, kind: Any, value: Any) -> Any:
        if type(number) is not int:
            raise WireError("not a number")
        if number not in self._proxies:
            cls = self._class(kind)
            if not issubclass(cls, mirror.Proxy):
                raise WireError("not a proxy's class")
            proxy: Any = object.__new__(cls)
            object.__setattr__(proxy, "__handle__", (self._remote, number))
            self.hashes[number] = value if type(value) is int else id(proxy) if value is True else None
            if cls.__name__ == "coroutine" and hasattr(cls, "__await__"):
                coroutine = _awaited(proxy)
                self._coroutines[id(coroutine)] = (coroutine, number)
                proxy = coroutine
            self._proxies[number] = proxy
        return self._proxies[number]

    def _value(self, number: Any, kind: Any, content: Any) -> Any:
        if type(number) is not int:
            raise WireError("not a number")
        if number not in self._proxies:
            cls: Any = self._class(kind)
            value = self.twins.decode(content)
            if (
                not issubclass(cls, mirror.Value)
                or not isinstance(value, cls.__mro__[-2])
                or type(value) not in _BASES.values()
            ):
                raise WireError("not its base's value")
            make: Any = type(value).__new__
            self._proxies[number] = make(cls, value)
            object.__setattr__(self._proxies[number], "__handle__", (self._remote, number))
        return self._proxies[number]

    def _error(self, kind: Any, arguments: Any, attributes: Any, text: Any, number: Any, cause: Any) -> BaseException:
        if type(number) is int and number in self._proxies:
            return self._proxies[number]
        cls = self._class(kind)
        args, state = self.twins.decode(arguments), self.twins.decode(attributes)
        if not issubclass(cls, BaseException) or type(args) is not tuple or type(state) is not tuple:
            raise WireError("not an exception")
        error = errors.build(cls, args, dict(state))
        if isinstance(error, mirror.Raised) and type(number) is int and type(text) is str:
            vars(error).update(__handle__=(self._remote, number), __text__=text)
            self._proxies[number] = error
        if cause is not None:
            origin = self.twins.decode(cause)
            error.__cause__ = origin if isinstance(origin, BaseException) else None
        return error


def _description(function: Any) -> list[Any]:
    """Name, docstring and parameters of a function of the tests, for decorators of the program."""
    if not isinstance(function, (types.FunctionType, types.MethodType)):
        return [None, None, None]
    parameters = inspect.signature(function).parameters.values()
    rows = [[each.name, int(each.kind), each.default is not each.empty] for each in parameters]
    return [function.__name__, function.__doc__, rows]


def _pull(iterator: Iterator[Any]) -> tuple[bool, Any]:
    for value in iterator:
        return True, value
    return False, None


def _stepping(coroutine: Any) -> Callable[[], tuple[bool, Any]]:
    """What runs a coroutine of the tests a step further; the event loop of the tests turns between two steps."""
    awaited: list[Any] = []

    def step() -> tuple[bool, Any]:
        if awaited and awaited[-1] is not None and not awaited[-1].done():
            return False, None
        try:
            awaited[:] = [coroutine.send(None)]
        except StopIteration as end:
            return True, end.value
        return False, None

    return step


async def _awaited(proxy: Any) -> Any:
    return await proxy
