"""What crosses between the process of the tests and the process of the untrusted code: plain data, in tagged JSON.

Both sides encode and decode with this module, so honest values arrive as the same exact builtin types. The side of the
tests never relies on that: whatever bytes arrive, `decode` builds exact builtin types from them or raises `WireError`.
Nothing is unpickled, evaluated or formatted.
"""

import builtins
import json
import os
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_MESSAGE_BYTES = 8 << 20
"""Longest message that is accepted; a longer one is refused before any of it is decoded."""

MAX_DEPTH = 100
"""Deepest nesting of containers that is sent or accepted. Objects of prelude classes may be chained deeper."""

_SCALARS = frozenset({int, float, str, bool, type(None)})
_ATOMS = frozenset({float, str, bool, type(None)})  # JSON carries every value of these types
_ARRAY_KINDS = frozenset("biufc")  # of numpy's arrays and numbers, those that are plain numbers
_INT64 = 1 << 63

# Types that both sides may name; as values they are harmless.
TYPES: dict[str, type] = {
    t.__name__: t
    for t in (int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object)
}
TYPES["NoneType"] = type(None)
_TYPE_NAMES = {t: name for name, t in TYPES.items()}


class WireError(Exception):
    """A value that cannot cross, or a message that is not one of ours."""


class TooLarge(WireError):
    """A value that is nested too deeply, or a message that is too long."""


class Closed(Exception):
    """The other process has gone."""


def encode(value: Any, other: Callable[[Any], dict[str, Any]], depth: int = 0) -> Any:
    """`value` as JSON-ready data; `other` encodes what is not plain (handles, callbacks, prelude objects).

    Raises:
        TooLarge: Nested deeper than `MAX_DEPTH`.
    """
    kind = type(value)
    if kind is int:
        return value if -_INT64 <= value < _INT64 else {"i": hex(value)}
    if kind in _ATOMS:
        return value
    if depth > MAX_DEPTH:
        raise TooLarge("nested too deeply")
    if kind is list:
        return _encode_items(value, other, depth)
    if kind is dict:
        return {"d": _encode_pairs(value, other, depth)}
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value, other, depth)
    if kind is type and value in _TYPE_NAMES:
        return {"y": _TYPE_NAMES[value]}
    if kind.__module__ == "numpy" and getattr(getattr(value, "dtype", None), "kind", "O") in _ARRAY_KINDS:
        if kind.__name__ == "ndarray":
            return {"N": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
        return encode(value.item(), other)
    return other(value)


def _encode_items(items: Any, other: Callable[[Any], dict[str, Any]], depth: int) -> list[Any]:
    items = list(items)
    kinds = set(map(type, items))
    if kinds <= _ATOMS or (kinds == {int} and min(items) >= -_INT64 and max(items) < _INT64):
        return items
    return [encode(item, other, depth + 1) for item in items]


def _encode_pairs(pairs: Any, other: Callable[[Any], dict[str, Any]], depth: int) -> list[Any]:
    return [[encode(k, other, depth + 1), encode(v, other, depth + 1)] for k, v in pairs.items()]


_ENCODERS: dict[type, Callable[[Any, Any, int], dict[str, Any]]] = {
    tuple: lambda v, other, depth: {"t": _encode_items(v, other, depth)},
    set: lambda v, other, depth: {"s": _encode_items(v, other, depth)},
    frozenset: lambda v, other, depth: {"z": _encode_items(v, other, depth)},
    deque: lambda v, other, depth: {"q": [_encode_items(v, other, depth), v.maxlen]},
    Counter: lambda v, other, depth: {"C": _encode_pairs(v, other, depth)},
    OrderedDict: lambda v, other, depth: {"O": _encode_pairs(v, other, depth)},
    bytes: lambda v, other, depth: {"b": v.hex()},
    bytearray: lambda v, other, depth: {"B": v.hex()},
    complex: lambda v, other, depth: {"c": [v.real, v.imag]},
    range: lambda v, other, depth: {"r": [encode(n, other) for n in (v.start, v.stop, v.step)]},
    Fraction: lambda v, other, depth: {"F": [hex(v.numerator), hex(v.denominator)]},
    Decimal: lambda v, other, depth: {"D": str(v)},
    type(Ellipsis): lambda v, other, depth: {"e": 0},
}


def decode(data: Any, other: Callable[[str, Any], Any], depth: int = 0) -> Any:
    """The value that `encode` was given; `other(tag, content)` rebuilds what is not plain.

    Raises:
        WireError: `data` is nothing that `encode` makes.
    """
    kind = type(data)
    if kind in _SCALARS:
        return data
    if depth > MAX_DEPTH:
        raise TooLarge("nested too deeply")
    if kind is list:
        return _decode_items(data, other, depth)
    if kind is not dict or len(data) != 1:
        raise WireError("not a value")
    ((tag, content),) = data.items()
    decoder = _DECODERS.get(tag)
    if decoder is None:
        return other(tag, content)
    try:
        return decoder(content, other, depth)
    except (TypeError, ValueError, ArithmeticError, KeyError) as error:
        raise WireError(f"bad content of {tag!r}") from error


def _decode_items(items: Any, other: Callable[[str, Any], Any], depth: int) -> list[Any]:
    if type(items) is not list:
        raise WireError("not a list")
    if set(map(type, items)) <= _SCALARS:
        return items
    return [decode(item, other, depth + 1) for item in items]


def _decode_pairs(pairs: Any, other: Callable[[str, Any], Any], depth: int) -> dict[Any, Any]:
    return {decode(k, other, depth + 1): decode(v, other, depth + 1) for k, v in pairs}


def _decimal(text: Any) -> Decimal:
    if type(text) is not str:
        raise WireError("not a decimal")
    return Decimal(text)


def _array(content: Any) -> Any:
    dtype, shape, data = content
    numpy = sys.modules.get("numpy")  # there if the pool was given it
    if numpy is None or type(dtype) is not str or dtype[1:2] not in _ARRAY_KINDS or not dtype[2:].isdigit():
        raise WireError("not an array")
    return numpy.frombuffer(bytearray.fromhex(data), dtype=dtype).reshape(shape)


_DECODERS: dict[str, Callable[[Any, Any, int], Any]] = {
    "i": lambda c, other, depth: int(c, 16),
    "d": _decode_pairs,
    "t": lambda c, other, depth: tuple(_decode_items(c, other, depth)),
    "s": lambda c, other, depth: set(_decode_items(c, other, depth)),
    "z": lambda c, other, depth: frozenset(_decode_items(c, other, depth)),
    "q": lambda c, other, depth: deque(_decode_items(c[0], other, depth), c[1]),
    "C": lambda c, other, depth: Counter(_decode_pairs(c, other, depth)),
    "O": lambda c, other, depth: OrderedDict(_decode_pairs(c, other, depth)),
    "b": lambda c, other, depth: bytes.fromhex(c),
    "B": lambda c, other, depth: bytearray.fromhex(c),
    "c": lambda c, other, depth: complex(*c),
    "r": lambda c, other, depth: range(*_decode_items([decode(n, other) for n in c], other, depth)),
    "F": lambda c, other, depth: Fraction(int(c[0], 16), int(c[1], 16)),
    "D": lambda c, other, depth: _decimal(c),
    "N": lambda c, other, depth: _array(c),
    "e": lambda c, other, depth: ...,
    "y": lambda c, other, depth: TYPES[c],
}


_to_json = json.JSONEncoder(separators=(",", ":")).encode


class Channel:
    """Length-prefixed JSON messages over a stream socket's file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._received = b""

    def send(self, message: Any) -> None:
        """Send one message.

        Raises:
            TooLarge: It is longer than `MAX_MESSAGE_BYTES`.
            Closed: Nobody is there to read it.
        """
        data = _to_json(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise TooLarge("message too long")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise Closed from error

    def receive(self) -> Any:
        """The next message, as JSON data that nothing has been checked about.

        Raises:
            WireError: Too long, or not JSON.
            Closed: No further message will come.
        """
        size = int.from_bytes(self._read(4), "big")
        if size > MAX_MESSAGE_BYTES:
            raise TooLarge("message too long")
        try:
            return json.loads(self._read(size))
        except (ValueError, RecursionError) as error:
            raise WireError("not JSON") from error

    def _read(self, size: int) -> bytes:
        chunks, missing = [self._received], size - len(self._received)
        while missing > 0:
            try:
                chunk = os.read(self._fd, max(missing, 1 << 16))
            except OSError as error:
                raise Closed from error
            if not chunk:
                raise Closed
            chunks.append(chunk)
            missing -= len(chunk)
        data = b"".join(chunks)
        self._received = data[size:]
        return data[:size]


def pack(value: Any, other: Callable[[Any], dict[str, Any]], classes: dict[str, type]) -> list[Any]:
    """`value` encoded, with a table of the instances of `classes` in it: they cross by value, chained or cyclic too."""
    table: list[Any] = []
    index: dict[int, int] = {}

    def encode_other(item: Any) -> dict[str, Any]:
        kind = type(item)
        if classes.get(kind.__name__) is not kind or not hasattr(item, "__dict__"):
            return other(item)
        if id(item) not in index:
            index[id(item)] = len(table)
            table.append(item)
        return {"o": index[id(item)]}

    encoded = encode(value, encode_other)
    rows: list[Any] = []
    while len(rows) < len(table):
        item = table[len(rows)]
        rows.append([type(item).__name__, encode(vars(item), encode_other)])
    return [encoded, rows]


def unpack(data: Any, other: Callable[[str, Any], Any], classes: dict[str, type]) -> Any:
    """What `pack` was given. Instances are made without running their classes' code.

    Raises:
        WireError: `data` is nothing that `pack` makes.
    """
    if type(data) is not list or len(data) != 2 or type(data[1]) is not list:
        raise WireError("not a packed value")
    encoded, rows = data
    instances: list[Any] = []

    def decode_other(tag: str, content: Any) -> Any:
        if tag != "o":
            return other(tag, content)
        if type(content) is not int or not 0 <= content < len(instances):
            raise WireError("no such object")
        return instances[content]

    for row in rows:
        if type(row) is not list or len(row) != 2 or type(row[0]) is not str or row[0] not in classes:
            raise WireError("not an object")
        try:
            instances.append(object.__new__(classes[row[0]]))
        except TypeError as error:
            raise WireError("not an object") from error
    for instance, row in zip(instances, rows, strict=True):
        attributes = decode(row[1], decode_other)
        if type(attributes) is not dict or set(map(type, attributes)) - {str}:
            raise WireError("not attributes")
        if any(hasattr(type(instance), name) for name in attributes):
            raise WireError("an attribute would hide one of its class")  # such as a method that the tests call
        instance.__dict__.update(attributes)
    return decode(encoded, decode_other)


def exception_name(error: BaseException) -> str:
    """The name of the builtin class nearest to the error's own."""
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins" and hasattr(builtins, c.__name__))


def exception_arguments(error: BaseException) -> list[Any]:
    """The error's arguments where they are plain text and numbers; nothing else of it crosses."""
    try:
        arguments = list(error.args)
    except Exception:
        return []
    if set(map(type, arguments)) <= _ATOMS | {int}:
        return [a[:2000] if type(a) is str else encode(a, refuse) for a in arguments[:8]]
    return []


def refuse(value: Any) -> dict[str, Any]:
    """For `encode`, where only plain data may occur."""
    raise WireError("not plain")
