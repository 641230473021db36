"""Objects of the tests in the program's hands: fakes and files that tests pass to what they test.

They stay where they are. The program's process holds a stand-in, whose operations are done here; of attributes it sees
those without an underscore in front, so that nothing leads from them to the tests' code, and it can hide none of
those that the object's class has.
"""

import io
import unittest
from collections.abc import Callable
from typing import Any

from mua_rl.rewards.sandbox import operations

_FILES = (io.StringIO, io.BytesIO)
_ROW_MODULES = ("__main__", "tests")
_CONFIGURING = ("assert", "configure_mock", "reset_mock", "attach_mock", "mock_add_spec")
_TEXTS = ("str", "repr", "hash")


def can_be_borrowed(value: Any) -> bool:
    """Whether a stand-in may be made: for objects of the row's own classes, mocks, and files in memory."""
    kind = type(value)
    if isinstance(value, (unittest.TestCase, type, BaseException)):
        return False
    return kind in _FILES or kind.__module__ in (*_ROW_MODULES, "unittest.mock")


def abilities(value: Any) -> list[str]:
    """The operations that the object's class can do."""
    methods = set().union(*(vars(kind) for kind in type(value).__mro__ if kind is not object))
    return [name for name, method in operations.METHODS.items() if method in methods]


def lend(value: Any) -> Callable[..., Any]:
    """What does an operation on `value` for the program."""
    allowed = {*abilities(value), *_TEXTS}

    def perform(operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation in ("getattr", "setattr"):
            name, *content = args
            if type(name) is not str or name.startswith(("_", *_CONFIGURING)):
                raise AttributeError(name)
            if operation == "getattr":
                return getattr(value, name)
            if hasattr(type(value), name) or type(value).__module__ not in _ROW_MODULES:
                raise AttributeError(name)
            return setattr(value, name, *content)
        if operation not in allowed:
            raise TypeError(f"{operation} is not possible")
        if operation == "next":
            for item in value:
                return True, item
            return False, None
        return operations.PERFORM[operation](value, *args, **kwargs)

    return perform


def stand_in(perform: Callable[..., Any], able: list[str]) -> Any:
    """The program's side of a borrowed object; `perform` asks the tests."""

    def method(operation: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: perform(operation, *args, **kwargs)

    def following(self: Any) -> Any:
        more, item = perform("next")
        if not more:
            raise StopIteration
        return item

    namespace: dict[str, Any] = {operations.METHODS[name]: method(name) for name in able}
    namespace |= {f"__{name}__": method(name) for name in ("getattr", "setattr", "str", "repr")}
    if "next" in able:
        namespace |= {"__next__": following, "__iter__": lambda self: self}
    if "eq" in able:
        namespace["__hash__"] = method("hash")
    return type("Borrowed", (), namespace)()
