"""Values that do not change, of builtin types and of the library's, in tagged JSON.

Both sides encode and decode with this module, so honest values arrive as the same exact types. The side of the tests
never relies on that: whatever data arrives, `decode` builds exact types from it or raises `WireError`. Nothing is
unpickled, evaluated or formatted.
"""

import re
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

from mua_rl.rewards.sandbox.channel import TooLarge, WireError

MAX_DEPTH = 100
"""Deepest nesting of containers that is sent. Objects of prelude classes may be chained deeper."""

SCALARS = frozenset({int, float, str, bool, type(None)})
ATOMS = SCALARS - {int}  # JSON carries every value of these types
_INT64 = 1 << 63
NUMPY_TYPES = re.compile(r"[<>|=]?([biufcSU][0-9]+|[mM]8(\[[0-9]*[a-zA-Z]+\])?)")
"""numpy's element types that are plain numbers, texts and times."""

# Types that both sides may name; as values they are harmless.
TYPES: dict[str, type] = {
    t.__name__: t
    for t in (
        int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object, slice,
        memoryview, type, type(None), type(...), Counter, OrderedDict, defaultdict, deque, array, date, datetime, time,
        timedelta, timezone, Decimal, Fraction, PosixPath, PurePosixPath, PureWindowsPath, SimpleNamespace,
    )
}  # fmt: skip
TYPE_NAMES = {t: name for name, t in TYPES.items()}
_PATHS = {t.__name__: t for t in (PosixPath, PurePosixPath, PureWindowsPath)}

BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__int__, float: float.__float__, complex: complex.__complex__, str: str.__str__, bytes: bytes.__bytes__,
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}  # fmt: skip
"""Types whose subclasses cross as values, and how to get the value past the subclass's own methods."""

Encode = Callable[[Any, int], Any]
Decode = Callable[[str, Any], Any]


def encode(value: Any, other: Encode, depth: int = 0) -> Any:
    """`value` as JSON-ready data; `other(value, depth)` encodes what is not plain and unchanging.

    Raises:
        TooLarge: Nested deeper than `MAX_DEPTH`.
    """
    kind = type(value)
    if kind is int:
        return value if -_INT64 <= value < _INT64 else {"i": hex(value)}
    if kind in ATOMS:
        return value
    if depth > MAX_DEPTH:
        raise TooLarge("nested too deeply")
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value, other, depth)
    if isinstance(value, type) and value in TYPE_NAMES:
        return {"y": TYPE_NAMES[value]}
    if kind.__module__ == "uuid" and kind.__name__ == "UUID":
        return {"U": value.hex}
    if kind.__module__ == "numpy" and _is_numpy_number(value):
        return {"N": [value.dtype.str, value.tobytes().hex()]}
    return other(value, depth)


def encode_items(values: Any, other: Encode, depth: int) -> list[Any]:
    items = list(values)
    kinds = set(map(type, items))
    if kinds <= ATOMS or (kinds == {int} and min(items) >= -_INT64 and max(items) < _INT64):
        return items
    return [encode(item, other, depth + 1) for item in items]


def encode_pairs(values: Any, other: Encode, depth: int) -> list[Any]:
    return [[encode(k, other, depth + 1), encode(v, other, depth + 1)] for k, v in values.items()]


def _is_numpy_number(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ != "ndarray" and dtype is not None and NUMPY_TYPES.fullmatch(dtype.str) is not None


def _encode_time(v: Any, other: Encode, depth: int) -> list[Any]:
    return [v.hour, v.minute, v.second, v.microsecond, encode(v.tzinfo, other, depth + 1), v.fold]


def _encode_delta(v: timedelta, other: Encode, depth: int) -> dict[str, Any]:
    return {"l": [v.days, v.seconds, v.microseconds]}


def _encode_path(v: Any, other: Encode, depth: int) -> dict[str, Any]:
    return {"P": [type(v).__name__, str(v)]}


_ENCODERS: dict[type, Callable[[Any, Any, int], dict[str, Any]]] = {
    tuple: lambda v, other, depth: {"t": encode_items(v, other, depth)},
    frozenset: lambda v, other, depth: {"z": encode_items(v, other, depth)},
    bytes: lambda v, other, depth: {"b": v.hex()},
    complex: lambda v, other, depth: {"c": [v.real, v.imag]},
    range: lambda v, other, depth: {"r": [encode(n, other) for n in (v.start, v.stop, v.step)]},
    slice: lambda v, other, depth: {"S": encode_items((v.start, v.stop, v.step), other, depth)},
    Fraction: lambda v, other, depth: {"F": [hex(v.numerator), hex(v.denominator)]},
    Decimal: lambda v, other, depth: {"D": str(v)},
    type(Ellipsis): lambda v, other, depth: {"e": 0},
    date: lambda v, other, depth: {"a": [v.year, v.month, v.day]},
    datetime: lambda v, other, depth: {"w": [v.year, v.month, v.day, *_encode_time(v, other, depth)]},
    time: lambda v, other, depth: {"m": _encode_time(v, other, depth)},
    timedelta: _encode_delta,
    timezone: lambda v, other, depth: {"u": encode_items(v.__getinitargs__(), other, depth)},
    PosixPath: _encode_path,
    PurePosixPath: _encode_path,
    PureWindowsPath: _encode_path,
    type({}.keys()): lambda v, other, depth: {"V": ["k", encode_items(v, other, depth)]},
    type({}.values()): lambda v, other, depth: {"V": ["v", encode_items(v, other, depth)]},
    type({}.items()): lambda v, other, depth: {"V": ["i", [encode_items(pair, other, depth) for pair in v]]},
}


def decode(data: Any, other: Decode) -> Any:
    """The value that `encode` was given; `other(tag, content)` rebuilds what is not plain and unchanging.

    Raises:
        WireError: `data` is nothing that `encode` makes.
    """
    if type(data) in SCALARS:
        return data
    if type(data) is not dict or len(data) != 1:
        raise WireError("not a value")
    ((tag, content),) = data.items()
    decoder = _DECODERS.get(tag)
    if decoder is None:
        return other(tag, content)
    try:
        return decoder(content, other)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise WireError(f"bad content of {tag!r}") from error


def decode_items(items: Any, other: Decode) -> list[Any]:
    if type(items) is not list:
        raise WireError("not a list")
    if set(map(type, items)) <= SCALARS:
        return items
    return [decode(item, other) for item in items]


def decode_pairs(pairs: Any, other: Decode) -> dict[Any, Any]:
    return {decode(k, other): decode(v, other) for k, v in pairs}


def _decode_time(c: Any, other: Decode) -> dict[str, Any]:
    names = ("hour", "minute", "second", "microsecond", "tzinfo", "fold")
    return dict(zip(names, [*c[:4], decode(c[4], other), c[5]], strict=True))


def _text(content: Any) -> str:
    if type(content) is not str:
        raise WireError("not a text")
    return content


def _uuid(content: Any) -> Any:
    from uuid import UUID  # here, since few need it

    return UUID(hex=_text(content))


def _numpy_number(content: Any) -> Any:
    dtype, data = content
    numpy = sys.modules.get("numpy")  # there if the pool was given it
    if numpy is None or not NUMPY_TYPES.fullmatch(dtype):
        raise WireError("not a number of numpy's")
    return numpy.frombuffer(bytes.fromhex(data), dtype=dtype)[0]


def _view(content: Any, other: Decode) -> Any:
    kind, items = content
    if kind == "i":
        return dict(tuple(decode_items(pair, other)) for pair in items).items()
    values = decode_items(items, other)
    return dict.fromkeys(values).keys() if kind == "k" else dict(enumerate(values)).values()


_DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    "i": lambda c, other: int(c, 16),
    "t": lambda c, other: tuple(decode_items(c, other)),
    "z": lambda c, other: frozenset(decode_items(c, other)),
    "b": lambda c, other: bytes.fromhex(c),
    "c": lambda c, other: complex(*c),
    "r": lambda c, other: range(*[decode(n, other) for n in c]),
    "S": lambda c, other: slice(*decode_items(c, other)),
    "F": lambda c, other: Fraction(int(c[0], 16), int(c[1], 16)),
    "D": lambda c, other: Decimal(_text(c)),
    "e": lambda c, other: ...,
    "a": lambda c, other: date(*c),
    "w": lambda c, other: datetime(c[0], c[1], c[2], **_decode_time(c[3:], other)),
    "m": lambda c, other: time(**_decode_time(c, other)),
    "l": lambda c, other: timedelta(*c),
    "u": lambda c, other: timezone(*decode_items(c, other)),
    "P": lambda c, other: _PATHS[c[0]](_text(c[1])),
    "U": lambda c, other: _uuid(c),
    "V": _view,
    "N": lambda c, other: _numpy_number(c),
    "y": lambda c, other: TYPES[c],
}
