"""Exceptions on the wire. Their classes cross by name; an exception of the program's own class keeps its object."""

import builtins
import sys
from typing import Any

RAISABLE: dict[str, type[BaseException]] = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type)
    and issubclass(value, BaseException)
    and not name.startswith(("Stop", "BaseExceptionGroup", "GeneratorExit", "KeyboardInterrupt"))
}
"""Builtin exceptions that a program may raise in the tests: StopIteration, for one, would silently end a loop."""

_NEVER = {
    "solution",
    "__main__",
    "unittest",
    "pytest",
    "_pytest",
    "doctest",
    "mua_rl",
}  # the latter steer the running of tests


def nearest_builtin(kind: type) -> str:
    """The name of the builtin class nearest to `kind`."""
    return next(c.__name__ for c in kind.__mro__ if c.__module__ == "builtins" and hasattr(builtins, c.__name__))


def library_class(module: Any, name: Any) -> type[BaseException] | None:
    """The exception class of a module that this process has loaded; nothing is imported or evaluated for it."""
    if type(module) is not str or type(name) is not str or module.split(".")[0] in _NEVER:
        return None
    loaded = sys.modules.get(module)
    kind = vars(loaded).get(name) if loaded is not None else None
    # `getattr` would ask the class of a class that lies; vars and type do not.
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration):
        return kind
    return None


def is_library_class(kind: type) -> bool:
    """Whether the other process finds `kind` under its name, if it has loaded its module."""
    return library_class(kind.__module__, kind.__qualname__) is kind


def build(kind: type[BaseException], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    """An exception, without running the code of its class, but for builtin ones."""
    if issubclass(kind, Exception) and "Group" in kind.__name__ and len(arguments) == 2:
        arguments = (arguments[0], list(arguments[1]))
    try:
        error = kind(*arguments) if kind.__module__ == "builtins" else kind.__new__(kind, *arguments)
    except (TypeError, ValueError):  # UnicodeDecodeError and its like insist on certain arguments
        error = (ValueError if issubclass(kind, ValueError) else RuntimeError)(*arguments)
    for name, value in attributes.items():
        if type(name) is str and (name[:2] != "__" or name == "__notes__"):
            try:
                object.__setattr__(error, name, value)
            except (AttributeError, TypeError):
                continue
    return error


def forget_frames(error: BaseException, depth: int = 5) -> None:
    """Let go of the frames in an exception's tracebacks, and of all that they hold."""
    error.__traceback__ = None
    for other in (error.__cause__, error.__context__):
        if other is not None and depth:
            forget_frames(other, depth - 1)
