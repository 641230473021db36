"""Which statements of a row's tests check something, and which of them would never run.

Decided by the row's text alone, before any program is involved: a row whose tests would not all run is a bad row.
"""

import ast
import functools
from collections.abc import Iterator
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_WITHOUT_CONTENT = {"ctx", "op", "ops", "kind", "type_comment"}
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_FIXTURES = {"setUp", "tearDown", "setUpClass", "tearDownClass", "asyncSetUp", "asyncTearDown"}
_METHOD_FIXTURES = {"setup_method", "teardown_method", "setup_class", "teardown_class"}
_MODULE_FIXTURES = {
    "setUpModule", "tearDownModule", "load_tests", "setup_module", "teardown_module", "setup_function",
    "teardown_function", "pytestmark",
}  # fmt: skip
_CHANGING_DECORATORS = {
    "skip", "skipIf", "skipUnless", "expectedFailure", "xfail", "skipif", "parametrize", "usefixtures", "fixture",
}  # fmt: skip
_EVALUATING = {"eval", "exec", "__import__", "sympify", "parse_expr"}
_UNPICKLING = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
_SEEN_PATCHES = ("builtins.input", "builtins.print", "sys.stdin", "sys.stdout")


@functools.lru_cache(256)
def nodes(tree: ast.AST) -> list[ast.AST]:
    """All statements and expressions of a row's text; several questions are asked of them."""
    found: list[ast.AST] = [tree]
    for node in found:
        for name in node._fields:
            if name in _WITHOUT_CONTENT:
                continue
            content = getattr(node, name, None)
            if isinstance(content, ast.AST):
                found.append(content)
            elif type(content) is list:
                found += [inner for inner in content if isinstance(inner, ast.AST)]
    return found


@functools.lru_cache(256)
def _by_kind(tree: ast.AST) -> dict[type, list[Any]]:
    kinds: dict[type, list[Any]] = {}
    for node in nodes(tree):
        kinds.setdefault(type(node), []).append(node)
    return kinds


def of_kind(tree: ast.AST, *kinds: type) -> list[Any]:
    """The nodes of a row's text that are of these kinds."""
    return [node for kind in kinds for node in _by_kind(tree).get(kind, ())]


def is_check(node: ast.AST) -> bool:
    """Whether this very node fails a test if something is wrong."""
    if isinstance(node, (ast.Assert, ast.Raise)):
        return True
    return isinstance(node, ast.Call) and _name(node.func).startswith(("assert", "fail"))


def holds_check(node: ast.AST) -> bool:
    """Whether a check is in `node`."""
    return any(map(is_check, of_kind(node, ast.Assert, ast.Raise, ast.Call)))


def calls(statements: list[ast.stmt], names: set[str]) -> bool:
    """Whether a function of `names` is called in `statements`."""
    return any(
        isinstance(inner.func, ast.Name) and inner.func.id in names
        for node in statements
        for inner in of_kind(node, ast.Call)
    )


def is_definition(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom))


def statement_checks(node: ast.stmt, functions: set[str]) -> bool:
    """Whether a top-level statement is a test."""
    if is_definition(node):
        return False
    return holds_check(node) or (not isinstance(node, _ASSIGNMENTS) and calls([node], functions))


def lone_expression(tree: ast.Module) -> ast.expr | None:
    """The expression that is all of one test of a list, such as `f(3) == 7`: it is what must hold."""
    if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr) and not holds_check(tree):
        value = tree.body[0].value
        if isinstance(value, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            return value
        if isinstance(value, ast.Call) and _name(value.func) in ("all", "any", "isclose", "allclose", "isinstance"):
            return value
    return None


def unit_checks(tree: ast.Module, functions: set[str]) -> bool:
    """Whether one test of a list checks something."""
    return holds_check(tree) or lone_expression(tree) is not None or calls(tree.body, functions)


def _prepares(node: ast.stmt) -> bool:
    return is_definition(node) or isinstance(node, (*_ASSIGNMENTS, ast.Pass))


class PendingChecks:
    """For `with` blocks: whether a check is still to come at an exception's line. Files are `file_name(index)`."""

    def __init__(self, trees: list[ast.Module]) -> None:
        self._trees = trees

    def __call__(self, file: str, line: int, error_line: int) -> bool:
        for index, tree in enumerate(self._trees):
            for block in of_kind(tree, ast.With, ast.AsyncWith):
                if (file_name(index), block.lineno) == (file, line):
                    return self._checks(block.body, error_line)
        return True  # not in a block of the tests: in an ExitStack, say

    def _checks(self, body: list[ast.stmt], error_line: int) -> bool:
        pending = [node for node in body if (node.end_lineno or node.lineno) >= error_line]
        # A raise of the tests is what such a block is there to suppress.
        found = [inner for node in pending for inner in nodes(node) if is_check(inner)]
        functions = {n.name for tree in self._trees for n in of_kind(tree, *_FUNCTIONS)}
        return calls(pending, functions) or any(not isinstance(inner, ast.Raise) for inner in found)


def file_name(index: int) -> str:
    """What the code of a row's test `index` is compiled under."""
    return f"<tests {index}>"


def fault(trees: list[ast.Module], entry_point: str, setup: ast.Module | None = None) -> str | None:
    """Why not all of these tests would run or check something; `None` if they would."""
    every = [*trees, setup] if setup is not None else trees
    functions = {n.name for tree in every for n in of_kind(tree, *_FUNCTIONS)}
    for number, tree in enumerate(trees if len(trees) > 1 else [], 1):
        if not unit_checks(tree, functions) and not all(map(_prepares, tree.body)):
            return f"test {number} of the list checks nothing"
    return next(
        (reason for rule in (_unsafe, _unused, _changed, _repeated) for tree in every for reason in rule(tree)), None
    ) or next(_unrun(every, entry_point), None)


def uses(trees: list[ast.Module], entry_point: str) -> bool:
    """Whether the entry point is named in the tests, or looked at in `check(candidate)`."""
    if any(node.id == entry_point for tree in trees for node in of_kind(tree, ast.Name)):
        return True
    for tree in trees:
        for check in of_kind(tree, ast.FunctionDef):
            parameter = check.args.args[0].arg if check.name == "check" and check.args.args else None
            if entry_point and any(node.id == parameter for node in of_kind(check, ast.Name)):
                return True
    return False


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _unsafe(tree: ast.Module) -> Iterator[str]:
    """Text of the program's must not be evaluated where the verdict is made."""
    for node in of_kind(tree, ast.ImportFrom):
        if (node.module or "").split(".")[0] in _UNPICKLING:
            yield f"the tests unpickle ({node.module}), which could run the program's data"
    for node in of_kind(tree, ast.Call):
        name = _name(node.func)
        owner = _name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
        if (name in _EVALUATING or (name == "compile" and not owner)) and not constant:
            yield f"the tests call {name}(), which could run the program's text in their own process"
        if owner in _UNPICKLING and name in ("load", "loads", "open", "Unpickler"):
            yield f"the tests call {owner}.{name}(), which could run the program's data in their own process"
        if owner == "doctest":
            yield "the tests run doctests, whose failures are only printed"
        if name in ("patch", "object", "dict", "setattr") and (name == "patch" or owner in ("patch", "monkeypatch")):
            target = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ast.unparse(node)
            if target not in _SEEN_PATCHES and not ast.unparse(node).startswith("patch.object(sys, 'std"):
                yield f"the tests patch {target!s}, which the program's process does not see"


def _unused(tree: ast.Module) -> Iterator[str]:
    """Comparisons that nobody looks at."""
    if lone_expression(tree) is not None:
        return
    for node in of_kind(tree, ast.Assert):
        if isinstance(node.test, ast.Tuple) and node.test.elts:
            yield f"line {node.lineno} asserts a tuple, which always holds"
    expected_to_raise = {
        id(inner) for node in of_kind(tree, ast.With, ast.Try) for inner in node.body if isinstance(inner, ast.Expr)
    }
    waiting = {node.name for node in of_kind(tree, ast.AsyncFunctionDef)}
    if of_kind(tree, ast.Yield, ast.YieldFrom):
        waiting |= {node.name for node in of_kind(tree, ast.FunctionDef) if _yields(node)}
    for node in of_kind(tree, ast.Expr):
        value: ast.AST = node.value
        if isinstance(value, ast.Call) and _name(value.func) == "print" and len(value.args) == 1:
            value = value.args[0]
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in waiting:
            yield f"line {node.lineno} calls {value.func.id}, whose body does not run so"
        if isinstance(value, ast.Compare) and id(node) not in expected_to_raise:
            yield f"line {node.lineno} compares without an assert"


def _changed(tree: ast.Module) -> Iterator[str]:
    """What decides in another runner whether and how tests run."""
    for node in of_kind(tree, *_FUNCTIONS, ast.ClassDef):
        for decorator in node.decorator_list:
            name = _name(decorator.func if isinstance(decorator, ast.Call) else decorator)
            if name in _CHANGING_DECORATORS:
                yield f"{node.name} is decorated with {name}, which is not supported"
    for statement in tree.body:
        names = [statement.name] if isinstance(statement, _FUNCTIONS) else []
        if isinstance(statement, ast.Assign):
            names = [_name(target) for target in statement.targets]
        for name in _MODULE_FIXTURES.intersection(names):
            yield f"{name} of the tests would not be called"


def _repeated(tree: ast.Module) -> Iterator[str]:
    """Definitions that a later one of the same name hides."""
    for node in of_kind(tree, ast.Module, ast.ClassDef):
        seen: set[str] = set()
        for inner in node.body:
            if isinstance(inner, (*_FUNCTIONS, ast.ClassDef)) and not inner.decorator_list:
                if inner.name in seen and holds_check(inner):
                    yield f"{inner.name} is defined twice: the first would not run"
                seen.add(inner.name)


def _unrun(trees: list[ast.Module], entry_point: str) -> Iterator[str]:
    """Functions and methods with checks in them that nothing calls."""
    used = {_name(node) for tree in trees for node in of_kind(tree, ast.Name, ast.Attribute)}
    for tree in trees:
        yield from _Collector(used, entry_point).unrun(tree, None)


class _Collector:
    def __init__(self, used: set[str], entry_point: str) -> None:
        self._used = used
        self._entry_point = entry_point
        self._cases: set[str] = set()
        self._inner: set[str] = set()  # classes within something else, which are not collected

    def unrun(self, parent: ast.AST, owner: ast.ClassDef | None) -> Iterator[str]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.expr):
                continue
            if isinstance(node, ast.ClassDef):
                if any(_name(base).endswith("TestCase") or _name(base) in self._cases for base in node.bases):
                    self._cases.add(node.name)
                if isinstance(parent, (*_FUNCTIONS, ast.ClassDef)):
                    self._inner.add(node.name)
                yield from self.unrun(node, node)
            elif isinstance(node, _FUNCTIONS):
                if _own_checks(node):
                    reason = self._reason(node, owner, top=isinstance(parent, (ast.Module, ast.If, ast.Try)))
                    if reason:
                        yield reason
                yield from self.unrun(node, None)
            else:
                yield from self.unrun(node, owner)

    def _reason(self, node: _Function, owner: ast.ClassDef | None, top: bool) -> str | None:
        name = f"{owner.name}.{node.name}" if owner else node.name
        arguments = node.args
        required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
        required += sum(default is None for default in arguments.kw_defaults)
        if owner is None:
            collected = top and node.name.startswith("test")
            if node.name == "check" and top and node.name not in self._used:
                return None if self._entry_point else "check(candidate) needs an entry_point, or it is never called"
        else:
            if owner.name in self._cases:
                collected = node.name.startswith("test")
                fixture = node.name in _FIXTURES or (node.name == "runTest")
            else:
                collected = node.name.startswith("test") and (owner.name.startswith("Test") or owner.name in self._used)
                fixture = node.name in _METHOD_FIXTURES and owner.name.startswith("Test")
                if owner.name.startswith("Test") and any(getattr(n, "name", "") == "__init__" for n in owner.body):
                    return f"{owner.name} has an __init__, so that pytest leaves it out"
            collected = collected and owner.name not in self._inner
            if fixture or (node.name.startswith("__") and owner.name in self._used):
                return None
            waited_for = any(_name(base).startswith("IsolatedAsyncio") for base in owner.bases)
            if collected and isinstance(node, ast.AsyncFunctionDef) and owner.name in self._cases and not waited_for:
                return f"{name} is async in a class that does not wait for it"
            required -= not any(_name(d) == "staticmethod" for d in node.decorator_list)
        if not collected:
            return None if node.name in self._used else f"{name} checks something, and nothing calls it"
        if node.name in self._used:
            return None
        if required > 0:
            return f"{name} takes arguments: fixtures are not supported"
        if owner is None and node.decorator_list:
            return f"{name} is decorated: what would run is not known"
        if _yields(node):
            return f"{name} is a generator, whose body would not run"
        return None


def _yields(node: _Function) -> bool:
    return any(isinstance(inner, (ast.Yield, ast.YieldFrom)) for inner in _own_nodes(node))


def _own_checks(node: _Function) -> bool:
    """Whether a function checks something outside of functions within it."""
    return any(is_check(inner) and not isinstance(inner, ast.Raise) for inner in _own_nodes(node))


def _own_nodes(node: _Function) -> Iterator[ast.AST]:
    waiting: list[Any] = list(node.body)
    while waiting:
        inner = waiting.pop()
        yield inner
        if not isinstance(inner, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(inner)
