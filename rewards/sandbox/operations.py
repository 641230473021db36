"""The fixed set of things that tests may do to an object of the program: names on the wire and Python's methods.

Whatever else Python knows (numpy's protocols, pickling, `__getattribute__`, …) never reaches the program.
"""

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

_ARITHMETIC = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor",
)  # fmt: skip
IN_PLACE = {f"i{name}": f"__i{name}__" for name in _ARITHMETIC}
BINARY = {name: f"__{name}__" for name in (*_ARITHMETIC, "divmod")}
REFLECTED = {f"r{name}": f"__r{name}__" for name in (*_ARITHMETIC, "divmod")}
COMPARISONS = {name: f"__{name}__" for name in ("eq", "lt", "le", "gt", "ge")}
NUMBERS: dict[str, type | None] = {
    "int": int, "float": float, "complex": complex, "index": int, "bool": bool, "len": int, "bytes": bytes,
    "abs": None, "neg": None, "pos": None, "invert": None, "round": None, "trunc": None, "floor": None, "ceil": None,
}  # fmt: skip
"""Operations on one object, and the exact type that their result must have."""
OTHERS = (
    "call", "iter", "next", "reversed", "getitem", "setitem", "delitem", "contains", "enter", "exit",
    "await", "aiter", "anext", "aenter", "aexit",
)  # fmt: skip

METHODS: dict[str, str] = {
    **BINARY, **REFLECTED, **IN_PLACE, **COMPARISONS, **{name: f"__{name}__" for name in (*NUMBERS, *OTHERS)},
}  # fmt: skip
"""Those that a class may have or lack, under the methods that say so."""

ATTRIBUTES: dict[str, tuple[type, ...]] = {
    "__name__": (str,), "__qualname__": (str,), "__module__": (str, type(None)), "__doc__": (str, type(None)),
    "__dict__": (dict,), "__defaults__": (tuple, type(None)), "__kwdefaults__": (dict, type(None)),
    "__slots__": (tuple, list, str), "__match_args__": (tuple,), "__annotations__": (dict,),
}  # fmt: skip
"""The attributes between double underscores that come from the program, and the types that they may have."""


def _round(x: Any, digits: Any = None) -> Any:
    return round(x) if digits is None else round(x, digits)


_NAMES = {"and": operator.and_, "or": operator.or_, "divmod": divmod}
_FUNCTIONS = {name: _NAMES.get(name) or getattr(operator, name) for name in BINARY}
PERFORM: dict[str, Callable[..., Any]] = {
    **_FUNCTIONS,
    **{f"r{name}": lambda x, y, function=function: function(y, x) for name, function in _FUNCTIONS.items()},
    **{name: getattr(operator, name) for name in IN_PLACE},
    **{name: getattr(operator, name) for name in (*COMPARISONS, "abs", "neg", "pos", "invert", "index", "contains")},
    "int": int, "float": float, "complex": complex, "bool": bool, "len": len, "bytes": bytes, "round": _round,
    "trunc": math.trunc, "floor": math.floor, "ceil": math.ceil, "str": str, "repr": repr, "format": format,
    "hash": hash, "dir": dir, "copy": copy.copy, "deepcopy": copy.deepcopy,
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "getattr": getattr, "setattr": setattr, "delattr": delattr,
    "iter": iter, "reversed": reversed, "getitem": operator.getitem, "setitem": operator.setitem,
    "delitem": operator.delitem, "enter": lambda x: type(x).__enter__(x),
    "exit": lambda x, *exception: type(x).__exit__(x, *exception),
    "aiter": lambda x: x.__aiter__(), "anext": lambda x: x.__anext__(), "aenter": lambda x: x.__aenter__(),
    "aexit": lambda x, *exception: x.__aexit__(*exception),
}  # fmt: skip
"""How the program's process does them."""
