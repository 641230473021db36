"""What crosses between the two processes: plain values (`plain.py`), and twins of what can change.

A list, a dict, an object of a prelude class, … that has crossed once exists on both sides, under one number. Each
message brings the twins that have changed since the last one up to date, so that whoever appends to its copy appends
to the other's; an object that comes back is the very one that went, and two places that hold one object still do.
A side that holds the last reference to its copy says so, and the number is forgotten.
"""

import json
import sys
from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import cached_property
from types import MemberDescriptorType
from typing import Any

from mua_rl.rewards.sandbox import changing, plain
from mua_rl.rewards.sandbox.channel import Channel as Channel
from mua_rl.rewards.sandbox.channel import Closed as Closed
from mua_rl.rewards.sandbox.channel import WireError

to_json = json.JSONEncoder(separators=(",", ":")).encode
_CHANGING: tuple[type, ...] = (list, dict, set, bytearray)
_WITHOUT_TWINS: tuple[type, ...] = (type, Enum, BaseException, *plain.BASES)
_SWEPT_REFERENCES = 2  # what sys.getrefcount counts for an object that only its row of the table holds


class _Twin:
    """One row of the table. `sent` is the row's text at the last crossing; `data` is what that text is made from."""

    __slots__ = ("data", "depth", "sent", "value")

    def __init__(self, value: Any, depth: int, data: Any = None) -> None:
        self.value = value
        self.depth = depth
        self.data = data
        self.sent: str | None = None


class Twins:
    """One side's table.

    Args:
        first: 0 or 1: this side gives even numbers or odd ones.
        encode_other, decode_other: For what is neither plain nor has a twin: handles and the like.
        classes: Classes of the prelude by name: their instances have twins.
    """

    def __init__(
        self,
        first: int,
        encode_other: Callable[[Any], Any],
        decode_other: Callable[[str, Any], Any],
        classes: dict[str, type],
    ) -> None:
        self._next = first
        self._parity = first
        self._encode_unknown = encode_other
        self._decode_unknown = decode_other
        self._classes = classes
        self._table: dict[int, _Twin] = {}
        self._numbers: dict[int, int] = {}  # id() of an object -> its number; the table keeps it alive
        self._queue: deque[int] = deque()
        self._released: list[int] = []
        self._rows: dict[int, str] = {}

    def pack(self, value: Any) -> str:
        """`value`, and all that has changed, as the JSON text of three things that `unpack` takes.

        Raises:
            TooLarge: Nested deeper than `plain.MAX_DEPTH`.
            WireError: Something cannot cross.
        """
        self._queue.clear()
        self._rows.clear()
        known = list(self._table)
        try:
            encoded = plain.encode(value, self._encode)
            for number in known:
                twin = self._table[number]
                unused = sys.getrefcount(twin.value) == _SWEPT_REFERENCES  # nobody here can reach it any more
                self._encode_row(number, twin)
                if unused and number not in self._rows:  # nor has changed it while somebody could
                    self._forget(number)
                    self._released.append(number)
            while self._queue:
                number = self._queue.popleft()
                if number in self._table:
                    self._encode_row(number, self._table[number])
        except BaseException:
            self.take_back()
            raise
        return f"{to_json(encoded)},[{','.join(self._rows.values())}],{self._released}"

    def commit(self) -> None:
        """Note that what was packed last has been sent."""
        for number, row in self._rows.items():
            self._table[number].sent = row
        self._rows.clear()
        self._released.clear()

    def take_back(self) -> None:
        """Note that what was packed last will not be sent."""
        for number in [n for n, twin in self._table.items() if twin.sent is None and twin.data is None]:
            self._forget(number)
        self._rows.clear()

    def _forget(self, number: int) -> None:
        twin = self._table.pop(number, None)
        if twin is not None:
            del self._numbers[id(twin.value)]

    def _encode_row(self, number: int, twin: _Twin) -> None:
        tag, content = self._content(twin.value, twin.depth)
        row = to_json([number, tag, content])
        if twin.data is not None:
            twin.sent, twin.data = to_json(twin.data), None
        if row != twin.sent:
            self._rows[number] = row

    def _encode(self, value: Any, depth: int) -> Any:
        number = self._numbers.get(id(value))
        if number is None:
            kind = type(value)
            if kind in changing.MAKERS or self._class_name(value) or changing.is_array(value):
                return {"@": self._add(value, depth)}
            if isinstance(value, type) and self._classes.get(value.__name__) is value:
                return {"p": value.__name__}
            if self._classes.get(kind.__name__) is kind and not isinstance(value, BaseException):
                if isinstance(value, Enum):
                    return {"E": [kind.__name__, value.name]}
                base = next(base for base in plain.BASES if isinstance(value, base))
                content = plain.encode(plain.BASES[base](value), self._encode, depth)
                return {"I": [kind.__name__, content, plain.encode_pairs(_attributes(value), self._encode, depth)]}
            return self._encode_unknown(value)
        twin = self._table[number]
        if depth > twin.depth:  # what is deep below an object that crossed before counts too
            twin.depth = depth
            if not self._class_name(value):
                self._queue.append(number)
        return {"@": number}

    def _add(self, value: Any, depth: int) -> int:
        number, self._next = self._next, self._next + 2
        self._table[number] = _Twin(value, depth)
        self._numbers[id(value)] = number
        self._queue.append(number)
        return number

    def _class_name(self, value: Any) -> str | None:
        """The name of the value's class, if that is a class of the prelude whose instances have twins."""
        kind = type(value)
        if self._classes and self._classes.get(kind.__name__) is kind and not isinstance(value, _WITHOUT_TWINS):
            return kind.__name__
        return None

    def _content(self, value: Any, depth: int) -> tuple[str, Any]:
        name = self._class_name(value)
        if name is not None:
            attributes = plain.encode_pairs(_attributes(value), self._encode, 0)
            base = next((base for base in _CHANGING if isinstance(value, base)), None)
            return f"p:{name}", [base and changing.CONTENTS[base](value, self._encode, 0), attributes]
        encoder = changing.CONTENTS.get(type(value))
        if encoder is not None:
            return encoder(value, self._encode, depth)
        crossed_before: dict[int, Any] = {}
        for number, twin in self._table.items():
            if twin.value is value:
                break
            if changing.is_array(twin.value):
                crossed_before[number] = twin.value
        return changing.view_of(value, crossed_before) or (
            "N",
            [value.dtype.str, list(value.shape), value.tobytes().hex()],
        )

    def encode(self, value: Any) -> Any:
        """A part of what is being packed."""
        return plain.encode(value, self._encode)

    def decode(self, data: Any) -> Any:
        """A part of what is being unpacked."""
        return plain.decode(data, self._decode)

    def unpack(self, data: Any, rows: Any, released: Any) -> Any:
        """What `pack` was given. Objects are made without running their classes' code.

        Raises:
            WireError: This is nothing that `pack` makes.
        """
        if type(rows) is not list or type(released) is not list:
            raise WireError("not a packed value")
        for number in released:
            if type(number) is not int:
                raise WireError("not a number")
            self._forget(number)
        for row in rows:
            self._make(row)
        # Objects first: sets and dicts of them need their hashes.
        for row in sorted(rows, key=lambda row: row[1][:1] != "p"):
            try:
                self._fill(self._table[row[0]].value, row[1], row[2])
            except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, BufferError) as error:
                raise WireError("bad content of an object") from error
        return plain.decode(data, self._decode)

    def _make(self, row: Any) -> None:
        if type(row) is not list or len(row) != 3 or type(row[0]) is not int or type(row[1]) is not str:
            raise WireError("not an object")
        number, tag, content = row
        twin = self._table.get(number)
        if twin is None:
            if number % 2 == self._parity:
                raise WireError("no such object")
            try:
                if tag == "W":  # a view of an array that crossed before
                    value = changing.make_view(self._table[content[0]].value, content)
                else:
                    value = self._new(tag, content)
            except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
                raise WireError("not an object") from error
            self._table[number] = _Twin(value, 0, row)
            self._numbers[id(value)] = number
        elif self._tag(twin.value) == tag.replace("W", "N"):
            twin.data, twin.sent = row, None
        else:
            raise WireError("an object of another type")

    def _tag(self, value: Any) -> str:
        name = self._class_name(value)
        return f"p:{name}" if name else changing.TAGS.get(type(value), "N")

    def _new(self, tag: str, content: Any) -> Any:
        if tag == "N":
            return changing.make_array(content)
        if tag[:2] != "p:":
            return changing.MAKERS[changing.KINDS[tag]](content)
        kind = self._classes[tag[2:]]
        if issubclass(kind, _WITHOUT_TWINS):
            raise WireError("not an object")
        base: Any = next((base for base in _CHANGING if issubclass(kind, base)), object)
        return base.__new__(kind)

    def _fill(self, value: Any, tag: str, content: Any) -> None:
        if tag[:2] == "p:":
            base = next((base for base in _CHANGING if isinstance(value, base)), None)
            if base is not None:
                if content[0][0] != changing.TAGS[base]:
                    raise WireError("not its base's value")
                changing.FILLERS[base](value, content[0][1], self._decode)
            _set_attributes(value, plain.decode_pairs(content[1], self._decode))
        elif tag == "W":
            pass  # its elements are those of the other array
        elif tag == "N":
            value[...] = changing.make_array(content)
        else:
            changing.FILLERS[type(value)](value, content, self._decode)

    def _decode(self, tag: str, content: Any) -> Any:
        if tag == "@":
            if type(content) is not int or content not in self._table:
                raise WireError("no such object")
            return self._table[content].value
        if tag == "p":
            return self._class(content)
        if tag == "E" and type(content) is list and len(content) == 2 and type(content[1]) is str:
            member = getattr(self._class(content[0]), "__members__", {}).get(content[1])
            if member is not None:
                return member
        if tag == "I" and type(content) is list and len(content) == 3:
            return self._subvalue(self._class(content[0]), *content[1:])
        return self._decode_unknown(tag, content)

    def _class(self, name: Any) -> type:
        if type(name) is not str or name not in self._classes:
            raise WireError("no such class")
        return self._classes[name]

    def _subvalue(self, kind: type, content: Any, attributes: Any) -> Any:
        """A value of a prelude class whose base does not change, such as a named tuple."""
        base = next((base for base in plain.BASES if issubclass(kind, base)), None)
        value = plain.decode(content, self._decode)
        if base is None or type(value) is not base or issubclass(kind, Enum):
            raise WireError("not its base's value")
        make: Any = base.__new__
        value = make(kind, value)
        _set_attributes(value, plain.decode_pairs(attributes, self._decode))
        return value


def _attributes(value: Any) -> dict[str, Any]:
    """The state of an object of a prelude class: its `__dict__` and its slots, without what is cached in it."""
    cached = {name for kind in type(value).__mro__ for name, own in vars(kind).items() if type(own) is cached_property}
    attributes = {name: own for name, own in getattr(value, "__dict__", {}).items() if name not in cached}
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if type(slot) is MemberDescriptorType and hasattr(value, name):
                attributes[name] = slot.__get__(value)
    return attributes


def _set_attributes(value: Any, attributes: dict[str, Any]) -> None:
    """Make the state of `value` that of `attributes`, past its class's own `__setattr__`."""
    if set(map(type, attributes)) - {str}:
        raise WireError("not attributes")
    state = getattr(value, "__dict__", {})
    for name in [name for name in state if name not in attributes]:
        del state[name]
    for name, content in attributes.items():
        own = next((vars(kind)[name] for kind in type(value).__mro__ if name in vars(kind)), None)
        if type(own) is MemberDescriptorType:
            own.__set__(value, content)
        elif callable(own) or hasattr(type(own), "__get__") or name[:2] == "__":
            raise WireError("an attribute would hide one of its class")  # such as a method that the tests call
        else:
            state[name] = content


def refuse(value: Any) -> Any:
    """For `Twins`, where only plain data may occur."""
    raise WireError("not plain")


def refuse_tag(tag: str, content: Any) -> Any:
    """The same, for what arrives."""
    raise WireError("not plain")


def pack(value: Any, other: Callable[[Any], Any] = refuse, classes: dict[str, type] | None = None) -> list[Any]:
    """One value alone, as JSON-ready data."""
    return json.loads(f"[{Twins(0, other, refuse_tag, classes or {}).pack(value)}]")


def unpack(data: Any, other: Callable[[str, Any], Any] = refuse_tag, classes: dict[str, type] | None = None) -> Any:
    """What `pack` was given.

    Raises:
        WireError: `data` is nothing that `pack` makes.
    """
    if type(data) is not list or len(data) != 3:
        raise WireError("not a packed value")
    return Twins(1, refuse, other, classes or {}).unpack(*data)
