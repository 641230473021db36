"""Exact types that can change: how a twin of each is written down, made, and brought up to date (`wire.py`)."""

import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from mua_rl.rewards.sandbox import plain
from mua_rl.rewards.sandbox.channel import WireError


def is_array(value: Any) -> bool:
    kind = type(value)
    return (
        kind.__module__ == "numpy" and kind.__name__ == "ndarray" and bool(plain.NUMPY_TYPES.fullmatch(value.dtype.str))
    )


def make_array(content: Any) -> Any:
    dtype, shape, data = content
    numpy = sys.modules.get("numpy")  # there if the pool was given it
    if numpy is None or not plain.NUMPY_TYPES.fullmatch(dtype):
        raise WireError("not an array")
    return numpy.frombuffer(bytearray.fromhex(data), dtype=dtype).reshape(shape)


def view_of(value: Any, arrays: dict[int, Any]) -> tuple[str, Any] | None:
    """The content of an array whose elements are all those of one of `arrays`."""
    start = value.__array_interface__["data"][0]
    steps = [(length - 1) * stride for length, stride in zip(value.shape, value.strides, strict=True)]
    first, last = start + sum(min(0, step) for step in steps), start + sum(max(0, step) for step in steps)
    for number, other in arrays.items():
        begin = other.__array_interface__["data"][0]
        if value.size and other.flags.c_contiguous and begin <= first and last + value.itemsize <= begin + other.nbytes:
            return "W", [number, value.dtype.str, list(value.shape), list(value.strides), start - begin]
    return None


def make_view(other: Any, content: Any) -> Any:
    _, dtype, shape, strides, offset = content
    numpy = sys.modules.get("numpy")
    if numpy is None or not is_array(other) or not plain.NUMPY_TYPES.fullmatch(dtype):
        raise WireError("not an array")
    return numpy.ndarray(tuple(shape), dtype, other, offset, tuple(strides))


# Exact types that can change: tag, content, an empty one, and making one equal to the content.
CONTENTS: dict[type, Callable[[Any, Any, int], tuple[str, Any]]] = {
    list: lambda v, encode, depth: ("l", plain.encode_items(v, encode, depth)),
    dict: lambda v, encode, depth: ("d", plain.encode_pairs(v, encode, depth)),
    set: lambda v, encode, depth: ("s", plain.encode_items(v, encode, depth)),
    bytearray: lambda v, encode, depth: ("B", v.hex()),
    deque: lambda v, encode, depth: ("q", [plain.encode_items(v, encode, depth), v.maxlen]),
    Counter: lambda v, encode, depth: ("C", plain.encode_pairs(v, encode, depth)),
    OrderedDict: lambda v, encode, depth: ("O", plain.encode_pairs(v, encode, depth)),
    defaultdict: lambda v, encode, depth: (
        "D",
        [plain.encode(v.default_factory, encode, depth), plain.encode_pairs(v, encode, depth)],
    ),
    array: lambda v, encode, depth: ("A", [v.typecode, v.tobytes().hex()]),
    SimpleNamespace: lambda v, encode, depth: ("n", plain.encode_pairs(vars(v), encode, depth)),
}
MAKERS: dict[type, Callable[[Any], Any]] = {
    **{kind: lambda content, kind=kind: kind() for kind in CONTENTS},  # type: ignore[misc]
    deque: lambda content: deque(maxlen=content[1]),
    array: lambda content: array(content[0]),
}
TAGS = {
    list: "l", dict: "d", set: "s", bytearray: "B", deque: "q", Counter: "C", OrderedDict: "O", defaultdict: "D",
    array: "A", SimpleNamespace: "n",
}  # fmt: skip
KINDS = {tag: kind for kind, tag in TAGS.items()}


def _fill_list(value: list[Any], content: Any, decode: plain.Decode) -> None:
    list.__setitem__(value, slice(None), plain.decode_items(content, decode))


def _fill_dict(value: dict[Any, Any], content: Any, decode: plain.Decode) -> None:
    pairs = plain.decode_pairs(content, decode)
    dict.clear(value)
    dict.update(value, pairs)


def _fill_set(value: set[Any], content: Any, decode: plain.Decode) -> None:
    items = set(plain.decode_items(content, decode))
    set.clear(value)
    set.update(value, items)


def _fill_bytearray(value: bytearray, content: Any, decode: plain.Decode) -> None:
    value[:] = bytes.fromhex(content)


def _fill_deque(value: deque[Any], content: Any, decode: plain.Decode) -> None:
    items = plain.decode_items(content[0], decode)
    value.clear()
    value.extend(items)


def _fill_ordered(value: OrderedDict[Any, Any], content: Any, decode: plain.Decode) -> None:
    pairs = plain.decode_pairs(content, decode)
    value.clear()
    value.update(pairs)


def _fill_defaultdict(value: defaultdict[Any, Any], content: Any, decode: plain.Decode) -> None:
    value.default_factory = plain.decode(content[0], decode)
    _fill_dict(value, content[1], decode)


def _fill_array(value: Any, content: Any, decode: plain.Decode) -> None:
    value[:] = array(value.typecode, bytes.fromhex(content[1]))


def _fill_namespace(value: SimpleNamespace, content: Any, decode: plain.Decode) -> None:
    pairs = plain.decode_pairs(content, decode)
    vars(value).clear()
    vars(value).update(pairs)


FILLERS: dict[type, Callable[[Any, Any, plain.Decode], None]] = {
    list: _fill_list, dict: _fill_dict, set: _fill_set, bytearray: _fill_bytearray, deque: _fill_deque,
    Counter: _fill_dict, OrderedDict: _fill_ordered, defaultdict: _fill_defaultdict, array: _fill_array,
    SimpleNamespace: _fill_namespace,
}  # fmt: skip
