"""The side of the tests: run a row's own tests, unchanged, against proxies for what the program defines.

This process never runs the program's code. It reports, in JSON lines on a pipe that only the trainer reads:
`["total", n]`, then `["ok"]` or `["bad", reason, detail]` for each test, and `["end"]`; or `["fault", message]` when
the row itself is at fault; last, `["reuse"]` if the process can take another row. A program that hangs up or talks
nonsense ends the run, and this process, at once.
"""

import ast
import builtins
import functools
import json
import os
import random
import socket
import symtable
import sys
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from mua_rl.rewards.sandbox import checks, wire
from mua_rl.rewards.sandbox.collect import Test, code_tests, estimate
from mua_rl.rewards.sandbox.library_names import library_names
from mua_rl.rewards.sandbox.proxy import HungUp, Remote

MAX_ROWS_PER_PROCESS = 100
"""A process that runs tests is used again, up to this often, as long as they leave no trace in it."""

_STATELESS_MODULES = {
    "__future__", "bisect", "cmath", "collections", "copy", "datetime", "fractions", "functools", "heapq", "itertools",
    "math", "numbers", "operator", "random", "re", "statistics", "string", "typing",
}  # fmt: skip
_REACHING_OUT = {"setattr", "delattr", "globals", "vars", "exec", "eval", "compile", "open"}


class _RowFault(Exception):
    """The row's own code is at fault."""


def serve(session_fd: int) -> None:
    """Run jobs as they come over the session's socket, each with three file descriptors: the job, the program's
    channel and the result pipe. Returns when the process should not be used for another row."""
    with socket.socket(fileno=session_fd) as session:
        for count in range(1, MAX_ROWS_PER_PROCESS + 1):
            _, fds, _, _ = socket.recv_fds(session, 1, 3)
            if len(fds) != 3:
                return
            with os.fdopen(fds[0], "rb") as file:
                job = json.loads(file.read())
            reusable = _run(job, channel_fd=fds[1], result_fd=fds[2], may_go_on=count < MAX_ROWS_PER_PROCESS)
            os.close(fds[1])
            os.close(fds[2])
            if not reusable:
                return
            random.seed(0)


def _run(job: dict[str, Any], channel_fd: int, result_fd: int, may_go_on: bool) -> bool:
    """Run the tests of `job` (keys as in `row.Row`) and report; tells whether this process takes another row."""
    report = _Report(result_fd, stop_at_first=not job["fraction"])
    texts = (job["prelude"], job["setup"], *(job["tests"] if job["kind"] == "code" else []))
    reusable = may_go_on and _leaves_no_trace(texts)
    try:
        for counts, test in _prepare(job, wire.Channel(channel_fd), report):
            report.outcome(test, counts)
        report.end()
    except _Finished:
        pass
    except _RowFault as error:
        report.fault(str(error))
    except BaseException as error:
        report.fault(f"{type(error).__name__} in the grader's own code")
        return False
    if reusable:
        report.offer_reuse()
    return reusable


@functools.lru_cache(128)  # completions of one prompt share their row
def _leaves_no_trace(texts: tuple[str, ...]) -> bool:
    """Whether these texts of the row can change nothing outside their own namespace: no attribute is assigned and only
    modules without state are imported. Decided by the row's text alone; when in doubt, the process is not used again.
    """
    for text in texts:
        try:
            tree = _parse(text)
        except _RowFault:
            return False
        for node in checks.nodes(tree):
            if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                owner = node.value
                if not isinstance(owner, ast.Name) or (isinstance(node, ast.Attribute) and owner.id != "self"):
                    return False
            if isinstance(node, ast.Attribute) and (node.attr.startswith("__") or node.attr == "seed"):
                return False
            if isinstance(node, ast.Name) and (node.id in _REACHING_OUT or node.id.startswith("__")):
                return False
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            if not set(modules) <= _STATELESS_MODULES:
                return False
    return True


class _Finished(Exception):
    """Nothing more is to be run for this row. Raised outside of any test's code only."""


class _Report:
    """The only way to a verdict."""

    def __init__(self, fd: int, stop_at_first: bool) -> None:
        self._fd = fd
        self._stop_at_first = stop_at_first
        self._count = 0
        self._failed = False
        self.remote: Remote | None = None

    def total(self, count: int) -> None:
        """Say how many tests there will be; an estimate, corrected by `end`."""
        self._write(["total", count])

    def outcome(self, test: Test, counts: bool) -> None:
        """Run one test, or statements between tests, which count only if they fail."""
        try:
            test()
        except ImportError as error:
            seen = self.remote is not None and self.remote.has_seen(error)
            if not seen and not getattr(error, "from_program", False):
                raise _RowFault(f"the tests import {error.name}, which the sandbox does not have") from error
            self.bad(*_reason(error))
        except BaseException as error:
            self.bad(*_reason(error))
        else:
            lost = self.remote.lost_check if self.remote is not None else None
            if lost is not None:
                self.remote.lost_check = None  # type: ignore[union-attr]
                self.bad("wrong", "an assertion of the tests failed where only the program saw it")
            elif counts:
                self._count += 1
                self._write(["ok"])

    def bad(self, reason: str, detail: str) -> None:
        self._count += 1
        self._failed = True
        if self.remote is not None and self.remote.notes:
            detail = f"{detail} ({'; '.join(self.remote.notes)})"
        self._write(["bad", reason, detail])
        if self._stop_at_first:
            raise _Finished

    def offer_reuse(self) -> None:
        self._write(["reuse"])

    def end(self) -> None:
        if not self._count:
            raise _RowFault("there are no tests in this row")
        self._write(["end"])

    def fault(self, message: str) -> None:
        self._write(["fault", message[:500]])

    def abort(self, error: BaseException) -> None:
        """End the run, from within whatever the tests are doing."""
        if isinstance(error, HungUp):
            self._write(["bad", error.reason, error.detail])
        else:
            self.fault(str(error))
        os._exit(0)

    def _write(self, line: list[Any]) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")


def _reason(error: BaseException) -> tuple[str, str]:
    kind = type(error).__name__
    if not getattr(error, "from_program", False):
        return ("wrong" if isinstance(error, AssertionError) else "error"), f"{kind} in the tests"
    return ("memory" if isinstance(error, MemoryError) else "error"), f"the program raised {kind}"


def _prepare(job: dict[str, Any], channel: wire.Channel, report: _Report) -> Iterator[tuple[bool, Test]]:
    """Load the row's own code and the program; gives the steps to take, in order, and which of them are tests."""
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    unittest.main = lambda *args, **kwargs: None  # type: ignore[assignment]  # we run the test cases ourselves
    texts = job["tests"] if job["kind"] == "code" else []
    root = (job["entry_point"] or "").split("(")[0].split(".")[0].strip()
    trees, pending_checks = _checked(tuple(texts), job["setup"], root)
    if job["prelude"]:
        _execute(_parse(job["prelude"]), namespace, "prelude")
    classes = {
        name: value for name, value in namespace.items() if isinstance(value, type) and value.__module__ == "tests"
    }
    classes.pop(root, None)
    namespace["__name__"] = "__main__"  # the tests are the main program: what stands behind a main guard runs too
    if job["setup"]:
        _execute(_parse(job["setup"]), namespace, "setup")
    names = [name for name in _free_names(texts, namespace) if name != root]
    try:
        known = library_names(names, root, trees)
    except LookupError as error:
        raise _RowFault(str(error)) from error
    namespace.update(known)
    names = [name for name in names if name not in known]
    if job["kind"] == "code" and not names and not checks.uses(trees, root):
        raise _RowFault("the tests never use the program")
    remote = report.remote = Remote(channel, report.abort, classes, pending_checks)
    remote.write = lambda text: sys.stdout.write(text)
    alternatives = [root, "Solution"] if job["kind"] == "calls" else [root]
    try:
        bound = remote.bind([name for name in alternatives if name] + names, _options(texts))
    except BaseException as error:
        report.bad(*_reason(error))
        raise _Finished from error
    if root and not bound.keys() & set(alternatives):
        report.bad("error", f"the program does not define {root}")
        raise _Finished
    namespace.update(bound)
    if any(_seeds(tree) for tree in trees):
        _seed_both(remote)
    if job["kind"] == "calls":
        report.total(len(job["tests"]))
        entry_point = job["entry_point"] if root in bound else f"Solution().{job['entry_point']}"
        return _call_tests(job["tests"], entry_point, namespace, job["may_be_wrapped"])
    report.total(estimate(trees))
    return code_tests(job["entry_point"], trees, namespace)


@functools.lru_cache(128)  # completions of one prompt share their row
def _checked(texts: tuple[str, ...], setup: str, root: str) -> tuple[list[ast.Module], Callable[[str, int, int], bool]]:
    trees = [_parse(text) for text in texts]
    reason = checks.fault(trees, root, _parse(setup) if setup else None)
    if reason:
        raise _RowFault(reason)
    return trees, checks.PendingChecks(trees)


def _seed_both(remote: Remote) -> None:
    """Have `random.seed` of the tests seed the program's generator too."""
    seed_here = random.seed

    def seed(*values: Any) -> None:
        seed_here(*values)
        remote.seed(*values)

    random.seed = seed  # type: ignore[assignment]


def _seeds(tree: ast.Module) -> bool:
    return any(
        isinstance(call.func, ast.Attribute) and call.func.attr == "seed" for call in checks.of_kind(tree, ast.Call)
    )


def _options(texts: list[str]) -> list[str]:
    """What of the program's surroundings the tests look at."""
    text = "\n".join(texts)
    options = ["output"] if "stdout" in text or "capsys" in text else []
    options += ["input"] if "input" in text or "stdin" in text else []
    return options + (["print"] if "builtins.print" in text else [])


@functools.lru_cache(128)  # the trees are read only
def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text, "<tests>")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _RowFault(f"the row's code does not compile: {type(error).__name__}: {error}") from error


def _execute(tree: ast.Module, namespace: dict[str, Any], part: str) -> None:
    try:
        exec(compile(tree, "<row>", "exec"), namespace)
    except BaseException as error:
        raise _RowFault(f"the {part} fails before any program is involved: {type(error).__name__}: {error}") from error


def _free_names(texts: list[str], namespace: dict[str, Any]) -> list[str]:
    """Global names that the tests use and nothing on this side defines: decided by the row alone, not by the program.

    Builtins are not among them: a program's own `abs` or `AssertionError` does not take the place of the tests' ones.
    """
    used: set[str] = set()
    defined = {*namespace, *vars(builtins)}
    for text in texts:
        try:
            top = symtable.symtable(text, "<tests>", "exec")
        except SyntaxError as error:
            raise _RowFault(f"the row's code does not compile: {error}") from error
        tables = [top]
        while tables:
            table = tables.pop()
            tables += table.get_children()
            for symbol in table.get_symbols():
                if (table is top or symbol.is_global()) and symbol.is_referenced():
                    used.add(symbol.get_name())
                if table is top and (symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()):
                    defined.add(symbol.get_name())
    return sorted(used - defined)


def _call_tests(
    cases: list[Any], entry_point: str, namespace: dict[str, Any], may_be_wrapped: bool
) -> Iterator[tuple[bool, Test]]:
    """APPS and LiveCodeBench: arguments and expected results as JSON, which has no tuples."""
    forms: list[Callable[[Any], Any]] = [lambda expected: expected]
    if may_be_wrapped:
        forms.append(lambda expected: expected[0])

    def test(args: list[Any], expected: Any) -> None:
        result = _as_json(eval(entry_point, namespace)(*args))
        right = [form for form in forms if result == form(expected)]
        assert right
        forms[:] = right  # the program keeps to it

    for args, expected in cases:
        yield True, functools.partial(test, json.loads(args), json.loads(expected))


def _as_json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value
