"""What the tests hold instead of the program's classes and objects.

A mirror class stands for a class of the program, its instances for that class's objects. Neither lets the program
judge: its own `==` and order are asked only between two of its own objects (`!=` is the opposite of `==`), so that no
expected value is ever sent to it; with anything else an object is compared by what it is: by identity, or by value if
its class derives from a builtin one. Arithmetic with the tests' values reaches only objects that the tests have made
from a class they name, and must give such an object again.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mua_rl.rewards.sandbox import operations

if TYPE_CHECKING:
    from mua_rl.rewards.sandbox.proxy import Leaving, Remote


class Mirror(type):
    """The type of the mirrors of the program's classes."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        """A class statement of the tests, with a class of the program among its bases."""
        handles = [handle_of(base) for base in bases]
        remote = next(handle[0] for handle in handles if handle is not None)
        if any(issubclass(base, BaseException) for base in bases):
            return type.__new__(cls, name, bases, namespace)
        return remote.derive(name, bases, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        handle = handle_of(cls)
        if handle is None:  # a class of the tests that derives from an exception of the program
            return type.__call__(cls, *args, **kwargs)
        return handle[0].construct(cls, handle[1], args, kwargs)

    def __getattr__(cls, name: str) -> Any:
        return attribute(cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        operate(cls, "setattr", name, value)

    def __delattr__(cls, name: str) -> None:
        operate(cls, "delattr", name)


def handle_of(value: Any) -> "tuple[Remote, int] | None":
    """Where the program's object is that `value` stands for; `None` if it stands for none."""
    kind = type(value)
    if issubclass(kind, Mirror):
        return type.__getattribute__(value, "__dict__").get("__mirror__")
    if issubclass(type(kind), Mirror):
        return object.__getattribute__(value, "__handle__")
    return None


_OF_SEALED = {*operations.BINARY, *operations.REFLECTED, *operations.COMPARISONS}


def operate(value: Any, operation: str, *args: Any) -> Any:
    handle = handle_of(value)
    assert handle is not None
    if handle[1] in handle[0].sealed and operation not in _OF_SEALED:
        handle[0].cannot(f"{operation} of an object that an operator has told a collection of the tests")
    return handle[0].operate(operation, handle[1], args)


def attribute(value: Any, name: str) -> Any:
    """An attribute of the program's object, of those that may be asked for.

    Raises:
        AttributeError: It may not, or there is none.
    """
    handle = handle_of(value)
    if handle is None:
        raise AttributeError(name)
    if name[:2] != "__" or name[-2:] != "__":
        return operate(value, "getattr", name)
    if name == "__signature__":
        return handle[0].signature(handle[1])
    result = operate(value, "getattr", name) if name in operations.ATTRIBUTES else None
    if type(result) not in operations.ATTRIBUTES.get(name, ()):
        raise AttributeError(name)
    if isinstance(result, dict) and name == "__annotations__" and not all(isinstance(v, type) for v in result.values()):
        raise AttributeError(name)  # text, which typing.get_type_hints would evaluate
    return result


class _Told:
    """An attribute that every Python class has, asked of the program's object instead."""

    def __init__(self, name: str, of_class: Any) -> None:
        self._name = name
        self._of_class = of_class

    def __get__(self, value: Any, owner: Any = None) -> Any:
        return self._of_class if value is None else attribute(value, self._name)


class Proxy:
    """An object of the program. What its class can do is in the mirror class, see `METHODS`."""

    __handle__ = None

    def __getattr__(self, name: str) -> Any:
        return attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        operate(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        operate(self, "delattr", name)

    def __str__(self) -> str:
        return exactly(str, operate(self, "str"))

    def __repr__(self) -> str:
        return exactly(str, operate(self, "repr"))

    def __format__(self, form: str) -> str:
        return exactly(str, operate(self, "format", form))

    def __dir__(self) -> Any:
        return operate(self, "dir")

    def __copy__(self) -> Any:
        return operate(self, "copy")

    def __deepcopy__(self, memo: Any) -> Any:
        return operate(self, "deepcopy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an object of the program cannot be pickled")

    def __eq__(self, other: Any) -> Any:
        return _equal(self, other, asks=False)

    def __hash__(self) -> int:
        remote, number = handle_of(self)  # type: ignore[misc]
        return remote.hash_of(number)

    __array_ufunc__ = None  # numpy leaves the operators to this class


class Value:
    """An object of the program whose class derives from a number, a text or a tuple: it is one here too."""

    __handle__ = None

    def __getattr__(self, name: str) -> Any:
        return attribute(self, name)

    def __str__(self) -> str:
        return exactly(str, operate(self, "str"))

    def __repr__(self) -> str:
        return exactly(str, operate(self, "repr"))

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Raised:
    """An exception of a class of the program."""

    __handle__ = None

    def __getattr__(self, name: str) -> Any:
        return attribute(self, name)

    def __str__(self) -> str:
        return vars(self).get("__text__", "")


def exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the program answered with another type than {kind.__name__}")
    return value


def _equal(self: Any, other: Any, asks: bool) -> Any:
    remote, number = handle_of(self)  # type: ignore[misc]
    theirs = handle_of(other)
    if theirs is not None and (self is other or asks):
        return self is other or exactly(bool, operate(self, "eq", other))
    value = remote.base_value(number, type(self))
    if theirs is not None:
        return value is not None and value == remote.base_value(theirs[1], type(other))
    if value is not None:
        return value == other
    remote.note("its object was compared with a value of the tests, which never asks its own ==")
    return NotImplemented


def _method(operation: str) -> Callable[..., Any]:
    """What a mirror class does where the program's class can do `operation`."""
    if operation in operations.NUMBERS:
        kind = operations.NUMBERS[operation]

        def number_method(self: Any, *args: Any) -> Any:
            remote, number = handle_of(self)  # type: ignore[misc]
            if number in remote.told:
                remote.cannot(f"{operation}() of an object that was told a value of the tests by an operator")
            value = operate(self, operation, *args)
            return value if kind is None else exactly(kind, value)

        return number_method
    if operation in operations.COMPARISONS:
        return functools.partialmethod(_compare, operation)  # type: ignore[return-value]
    if operation in operations.BINARY or operation in operations.REFLECTED or operation in operations.IN_PLACE:
        return functools.partialmethod(_combine, operation)  # type: ignore[return-value]
    return _OTHERS.get(operation) or (lambda self, *args: operate(self, operation, *args))


def _compare(self: Any, operation: str, other: Any) -> Any:
    if operation == "eq":
        return _equal(self, other, asks=True)
    if handle_of(other) is not None:
        return exactly(bool, operate(self, operation, other))
    handle_of(self)[0].note(f"its object was asked {operation} of a value of the tests")  # type: ignore[index]
    return NotImplemented


def _combine(self: Any, operation: str, other: Any) -> Any:
    handle = handle_of(self)
    assert handle is not None
    if handle_of(other) is not None:
        return operate(self, operation, other)
    base = next((b for b in type(self).__mro__ if b.__module__ == "builtins" and b is not object), None)
    if handle[1] in handle[0].made:
        return handle[0].combine(operation, handle[1], other)
    if base is not None and hasattr(base, operations.METHODS[operation]):
        return getattr(base, operations.METHODS[operation])(self, other)
    handle[0].note("an operator between its object and a value of the tests was not carried out")
    return NotImplemented


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    remote, number = handle_of(self)  # type: ignore[misc]
    return remote.operate("call", number, args, kwargs)


def _iter(self: Any) -> Any:
    iterator = operate(self, "iter")
    if not hasattr(type(iterator), "__next__"):
        raise TypeError("the program's iterator is none")
    return iterator


def _next(self: Any) -> Any:
    remote, number = handle_of(self)  # type: ignore[misc]
    return remote.next(number)


def _contains(self: Any, value: Any) -> bool:
    remote, number = handle_of(self)  # type: ignore[misc]
    if number in remote.made or handle_of(value) is not None:
        return exactly(bool, operate(self, "contains", value))
    if not hasattr(type(self), "__iter__"):
        remote.note("its own `in` is asked only of objects that the tests make from a class they name")
        return False
    return value in list(self)  # all of them: an endless run of guesses never finishes


def _exit(self: Any, *exception: Any) -> Any:
    remote, _ = handle_of(self)  # type: ignore[misc]
    with remote.leave(exception, sys._getframe(1)) as leaving:
        return leaving.allows(operate(self, "exit", *exception))


def _aexit(self: Any, *exception: Any) -> Any:
    remote, _ = handle_of(self)  # type: ignore[misc]
    return _left(self, exception, remote.leave(exception, sys._getframe(1)))


async def _left(self: Any, exception: tuple[Any, ...], leaving: "Leaving") -> bool:
    with leaving:
        return leaving.allows(await operate(self, "aexit", *exception))


def _await(self: Any) -> Any:
    remote, number = handle_of(self)  # type: ignore[misc]
    return remote.wait_for(number)


_OTHERS: dict[str, Callable[..., Any]] = {
    "call": _call, "iter": _iter, "next": _next, "contains": _contains, "exit": _exit, "await": _await,
    "aexit": _aexit,
}  # fmt: skip


def _may_hold(self: Any, value: Any) -> bool:
    return value in list(self)


_NAMESPACE: dict[str, Any] = {name: _method(name) for name in operations.METHODS}


def make_class(
    remote: "Remote",
    number: int,
    name: str,
    doc: str | None,
    bases: list[type],
    abilities: set[str],
    class_abilities: set[str],
    fields: list[str] | None = None,
) -> type:
    """A mirror of the program's class `number`.

    Args:
        bases: Mirrors of its bases, exceptions, prelude classes, and the builtin type that it derives from.
        abilities: Operations that its objects can do.
        class_abilities: Those that the class itself can do, such as `iter` of an enumeration.
        fields: Of a dataclass.
    """
    prelude = [base for base in bases if not isinstance(base, Mirror) and base.__module__ not in ("builtins",)]
    prelude = [base for base in prelude if not issubclass(base, BaseException)]
    own: list[type] = [base for base in bases if base not in prelude]
    namespace: dict[str, Any] = {"__mirror__": (remote, number), "__module__": "solution", "__qualname__": name}
    if any(issubclass(base, BaseException) for base in own):
        own = own if any(issubclass(base, Raised) for base in own) else [Raised, *own]
        namespace["__doc__"] = doc
    else:
        value_base = next((base for base in own if not issubclass(base, Proxy)), None)
        if value_base is None:
            own = own or [Proxy]
            usable = abilities
        else:
            own = [b for b in own if not issubclass(b, Proxy)]
            own = own if any(issubclass(base, Value) for base in own) else [Value, *own]
            usable = abilities & {*operations.BINARY, *operations.REFLECTED, "call"}
        namespace |= {operations.METHODS[ability]: _NAMESPACE[ability] for ability in usable}
        if "eq" in usable:
            namespace["__hash__"] = Proxy.__hash__
        if "iter" in usable and "contains" not in usable:
            namespace["__contains__"] = _may_hold
        if value_base is None:
            namespace["__doc__"] = _Told("__doc__", doc)
            namespace["__module__"] = _Told("__module__", "solution")
            namespace["__dict__"] = _Told("__dict__", {})
            if prelude:
                derived = type(prelude[0])(name, (prelude[0],), {})  # isinstance asks for it
                namespace["__class__"] = property(lambda self: derived)
    if fields is not None:
        like = type(name, (), {"__annotations__": dict.fromkeys(fields, object)})
        like = dataclasses.dataclass(init=False, repr=False, eq=False)(like)
        namespace["__dataclass_fields__"] = like.__dataclass_fields__  # type: ignore[attr-defined]
    mirror = type.__new__(_meta_class(frozenset(class_abilities)), name, tuple(own), namespace)
    for base in prelude:
        if hasattr(base, "register"):  # an ABC
            base.register(mirror)
    return mirror


@functools.lru_cache(256)
def _meta_class(abilities: frozenset[str]) -> type[Mirror]:
    if not abilities:
        return Mirror
    methods = {operations.METHODS[a]: _NAMESPACE[a] for a in abilities - {"call", "eq", "class_getitem"}}
    if "class_getitem" in abilities:
        methods["__getitem__"] = lambda cls, key: cls
    return type("Mirror", (Mirror,), methods)
