"""Names that tests use without importing them, because a solution would have imported them.

They are the library's, of the tests' own process: a program that brought its own `isclose` would be told the expected
value and would judge itself.
"""

import ast
import importlib
import sys
from typing import Any

_ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot", "dt": "datetime"}
_COMPUTING = (
    "math", "collections", "itertools", "functools", "statistics", "heapq", "bisect", "datetime", "cmath", "numpy",
    "numpy.testing",
)  # fmt: skip
_OTHERS = (
    "fractions", "decimal", "typing", "copy", "io", "types", "enum", "pathlib", "contextlib", "unittest",
    "unittest.mock", "pytest",
)  # fmt: skip
_CERTAIN = {
    "isclose", "allclose", "deepcopy", "defaultdict", "namedtuple", "permutations", "combinations", "islice", "pi",
    "inf", "nan", "approx", "timedelta", "reduce", "partial", "cmp_to_key", "redirect_stdout", "patch", "raises",
    "array_equal", "assert_allclose", "assert_array_equal", "assert_almost_equal",
    "Counter", "OrderedDict", "ChainMap", "Decimal", "Fraction", "StringIO", "BytesIO", "Path", "PurePath", "Enum",
    "IntEnum", "TestCase", "Mock", "MagicMock", "SimpleNamespace",
}  # fmt: skip
"""Names that mean the library's whenever tests use them beside what they test."""


def library_names(names: list[str], root: str, trees: list[ast.Module]) -> dict[str, Any]:
    """Those of the free `names` of tests that mean something of the library.

    A name is the library's if it is used as a module (`math.isclose`), or is one that the library has and nobody
    would ask a program for (`Counter`, `isclose`), or stands in one statement with another free name (`f(2) ==
    sqrt(2)`); but never if it is the entry point, or all that the tests could be about. Where there is an entry point,
    every lower-case name that a computing module has is the library's.

    Raises:
        LookupError: Of a module that the sandbox does not have.
    """
    others = [name for name in names if name != root]
    if not others or (not root and len(others) < 2):
        return {}
    modules = {_root(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    helpers = _used_together(trees, {*others, root})
    called = {_root(n.func) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)}
    found: dict[str, Any] = {}
    for name in others:
        if name in modules and (name in _ALIASES or name in sys.stdlib_module_names) and not name.startswith("_"):
            found[name] = _import(_ALIASES.get(name, name), name)
            continue
        certain = name in _CERTAIN or _is_hint(name, called)
        if certain or ((root or name in helpers) and not name[:1].isupper()):
            module = next((m for m in (*_COMPUTING, *(_OTHERS if certain else ())) if _has(m, name)), None)
            if module is not None:
                found[name] = getattr(sys.modules[module], name)
            elif name in _CERTAIN:
                raise LookupError(f"the tests use {name} without importing it, and the sandbox does not have it")
    if not root and len(found) == len(others):
        return {}
    return found


def _is_hint(name: str, called: set[str]) -> bool:
    return name[:1].isupper() and name in sys.modules["typing"].__all__ and name not in called


def _has(module: str, name: str) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and name in getattr(loaded, "__all__", vars(loaded)) and hasattr(loaded, name)


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LookupError(f"the tests use {name} without importing it, and the sandbox has no {module}") from error


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _used_together(trees: list[ast.Module], free: set[str]) -> set[str]:
    """Free names that share a statement with another one."""
    together: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assert, ast.Expr, ast.Assign, ast.Return)):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in free}
                if len(names) > 1:
                    together |= names
    return together
