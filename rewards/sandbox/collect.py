"""The tests in a row's Python text, in the order in which they run."""

import ast
import inspect
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from mua_rl.rewards.sandbox import checks

Test = Callable[[], Any]


def estimate(trees: list[ast.Module]) -> int:
    """How many tests `code_tests` will find, as far as the text shows; at least 1."""
    if len(trees) > 1:
        return len(trees)
    names = [n.name for n in checks.of_kind(trees[0], ast.FunctionDef, ast.AsyncFunctionDef)]
    functions = sum(name.startswith("test") for name in names) + ("check" in names)
    return max(1, functions + sum(checks.statement_checks(node, set(names)) for node in trees[0].body))


def code_tests(entry_point: str, trees: list[ast.Module], namespace: dict[str, Any]) -> Iterator[tuple[bool, Test]]:
    """One test for each text if there are several, else for each top-level statement that checks something; then
    `check(candidate)`, the methods of unittest and pytest classes, and functions called `test…`."""
    if len(trees) > 1:
        functions = {n.name for tree in trees for n in checks.of_kind(tree, ast.FunctionDef, ast.AsyncFunctionDef)}
        units = [(_asserted(tree), checks.unit_checks(tree, functions), index) for index, tree in enumerate(trees)]
    else:
        functions = {n.name for n in checks.of_kind(trees[0], ast.FunctionDef, ast.AsyncFunctionDef)}
        units = [([node], checks.statement_checks(node, functions), 0) for node in trees[0].body]
    for nodes, counts, index in units:
        yield counts, _runner(nodes, namespace, index)
    checked = [nodes for nodes, counts, _ in units if counts]
    defined = {n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)}
    if "check" in defined and entry_point and not _called(checked, "check"):
        yield True, lambda: namespace["check"](eval(entry_point, namespace))
    for name, value in sorted(namespace.items()):
        if isinstance(value, type) and value.__dict__.get("__module__") == "__main__":
            if issubclass(value, unittest.TestCase):
                for case in unittest.TestLoader().loadTestsFromTestCase(value):
                    yield True, _unittest_runner(case)
            elif name.startswith("Test"):
                for method in [key for key in dir(value) if key.startswith("test")]:
                    yield True, _method_runner(value, method)
        elif name.startswith("test") and isinstance(value, types.FunctionType) and value.__globals__ is namespace:
            called = _called(checked, name)
            yield not called, (lambda: None) if called else _waiting(value)


def _called(units: list[list[ast.stmt]], name: str) -> bool:
    return any(checks.calls(nodes, {name}) for nodes in units)


def _asserted(tree: ast.Module) -> list[ast.stmt]:
    """The statements of one test of a list; a lone expression is what must hold."""
    expression = checks.lone_expression(tree)
    if expression is None:
        return tree.body
    return [ast.copy_location(ast.Assert(expression, None), expression)]


def _runner(nodes: list[ast.stmt], namespace: dict[str, Any], index: int) -> Test:
    code = compile(ast.Module(nodes, []), checks.file_name(index), "exec")
    return lambda: exec(code, namespace)


def _waiting(function: Callable[[], Any]) -> Test:
    def run() -> None:
        result = function()
        if inspect.iscoroutine(result):
            import asyncio  # here, since it would make every process larger, and so slower to fork

            asyncio.run(result)

    return run


def _method_runner(kind: type, name: str) -> Test:
    """One method of a pytest class, on an object of its own."""

    def run() -> None:
        case: Any = kind()
        for step in ("setup_class", "setup_method"):
            getattr(case, step, lambda *args: None)(*_wanted(case, step))
        try:
            _waiting(getattr(case, name))()
        finally:
            for step in ("teardown_method", "teardown_class"):
                getattr(case, step, lambda *args: None)(*_wanted(case, step))

    return run


def _wanted(case: Any, step: str) -> tuple[Any, ...]:
    """pytest hands the method to those fixtures that take it."""
    return (None,) if hasattr(case, step) and inspect.signature(getattr(case, step)).parameters else ()


def _unittest_runner(case: unittest.TestCase | unittest.TestSuite) -> Test:
    def run_case() -> None:
        result = _Result()
        unittest.TestSuite([case]).run(result)
        if result.error is not None:
            raise result.error
        if result.skipped or result.testsRun != 1 or not result.wasSuccessful():
            raise AssertionError("not a success")

    return run_case


class _Result(unittest.TestResult):
    """Keeps the first exception, without formatting any."""

    error: BaseException | None = None

    def addError(self, test: Any, err: Any) -> None:
        self.error = self.error or err[1]

    def addFailure(self, test: Any, err: Any) -> None:
        self.error = self.error or err[1]

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.error = self.error or err[1]
