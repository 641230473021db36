"""One row's tests, in whichever of the published forms, as the sandbox takes them."""

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from mua_rl.rewards.faults import BadRow


@dataclass(frozen=True)
class Row:
    """Tests for programs.

    Attributes:
        kind: "code" (Python tests: assert statements, `check(candidate)`, unittest classes, `test…` functions), "calls"
            (arguments and expected results) or "stdio" (standard input and expected standard output).
        tests: Python sources; or pairs (arguments, result), each as JSON text; or pairs (input, output).
        entry_point: The function or class under test, or an expression for it, such as `Solution().twoSum`. Without
            it, the program's names are those that the tests use and do not define.
        prelude: Code that the program may rely on (the code of its prompt). Both sides run it, apart from each other.
        setup: Code that only the tests rely on.
        may_be_wrapped: Whether the results of "calls" are lists of one that may stand for their items, as in APPS: a
            program is right with either, if it keeps to it.
    """

    kind: str
    tests: tuple[Any, ...]
    entry_point: str = ""
    prelude: str = ""
    setup: str = ""
    may_be_wrapped: bool = False


def parse_row(tests: Any, entry_point: Any = None, prelude: Any = None, setup: Any = None) -> Row:
    """Recognize a row's tests.

    Args:
        tests: Python source; a list of Python sources (MBPP); `{"inputs": […], "outputs": […]}`, with `fn_name` if they
            are arguments and results (APPS); a list of `{"input": …, "output": …}` (LiveCodeBench, `testtype`
            "functional" if they are arguments, one JSON value a line, and result); or JSON text of the latter three.
        entry_point, prelude, setup: As in `Row`; `None` is none. `setup` may be a list of lines (MBPP's imports).

    Raises:
        BadRow: There are no tests, or they have no known form.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):  # Python source can begin with a bracket too
            tests = json.loads(tests)
    texts = {"entry_point": entry_point, "prelude": prelude, "setup": setup}
    for name, text in texts.items():
        if isinstance(text, (list, tuple)) and all(isinstance(line, str) for line in text):
            texts[name] = "\n".join(text)
        elif text is None:
            texts[name] = ""
        elif not isinstance(text, str):
            raise BadRow(f"{name} is a {type(text).__name__}; it must be text")
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, dict):
        return _from_columns(tests, texts)
    if not isinstance(tests, (list, tuple)) or not tests:
        raise BadRow("there are no tests in this row")
    if all(isinstance(test, str) for test in tests):
        sources = tuple(test for test in tests if test.strip())
        if not sources:
            raise BadRow("there are no tests in this row")
        return Row("code", sources, **texts)
    if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        if any(test.get("testtype") == "functional" for test in tests):
            try:
                pairs = [([json.loads(v) for v in t["input"].splitlines()], json.loads(t["output"])) for t in tests]
            except (ValueError, AttributeError, TypeError, RecursionError) as error:
                raise BadRow(f"a functional test is not JSON: {error}") from error
            return _calls(pairs, texts)
        return Row("stdio", tuple((_text(t["input"]), _text(t["output"])) for t in tests), **texts)
    raise BadRow("tests must be Python source, a list of it, {inputs, outputs}, or a list of {input, output}")


def _from_columns(tests: dict[str, Any], texts: dict[str, Any]) -> Row:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, (list, tuple)) or not isinstance(outputs, (list, tuple)) or not inputs:
        raise BadRow("there are no tests in this row: no inputs and outputs")
    if len(inputs) != len(outputs):
        raise BadRow(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if not tests.get("fn_name"):
        return Row("stdio", tuple((_text(i), _text(o)) for i, o in zip(inputs, outputs, strict=True)), **texts)
    texts["entry_point"] = texts["entry_point"] or tests["fn_name"]
    # APPS wraps the results of most rows in lists of one; where one is no such list, all of the row's are bare.
    may_be_wrapped = all(isinstance(output, (list, tuple)) and len(output) == 1 for output in outputs)
    return _calls(list(zip(inputs, outputs, strict=True)), texts, may_be_wrapped)


def _calls(pairs: list[Any], texts: dict[str, Any], may_be_wrapped: bool = False) -> Row:
    if not texts["entry_point"]:
        raise BadRow("tests of arguments and results need an entry_point")
    if not all(isinstance(args, (list, tuple)) for args, _ in pairs):
        raise BadRow("the arguments of a call are not a list")
    tests = tuple((json.dumps(args), json.dumps(result)) for args, result in pairs)
    return Row("calls", tests, **texts, may_be_wrapped=may_be_wrapped)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else str(value)
