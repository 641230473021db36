"""Programs are found in the ways in which models write them, and nothing takes long to search."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mua_rl.rewards.code import grade_code
from mua_rl.rewards.extract_code import continues, extract_code
from mua_rl.rewards.sandbox.row import parse_row

PROMPT = 'def f(x):\n    """Twice x."""\n'


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First:\n```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```\nOutput:\n```\n2\n```\n", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n", "x = 1\n"),
        ("Use this:\n```Python3\nx = 1", "x = 1"),
        ("<think>```python\nx = 1\n```</think>```python\nx = 2\n```", "x = 2\n"),
        ("```json\n{}\n```", None),
        ("```python\n```", None),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("x = 1\nprint(x)", "x = 1\nprint(x)"),
        ("I cannot do this.", None),
        ("", None),
        (None, None),
        (7, None),
        ([], None),
        ([{"role": "user", "content": "```python\nx = 1\n```"}], None),
        ([{"role": "assistant", "content": "```python\nx = 1\n```"}], "x = 1\n"),
        ([{"role": "assistant", "content": None}], None),
    ],
)
def test_the_program_is_found_in_the_completion(completion: Any, code: str | None) -> None:
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    "completion",
    [
        "    return 2 * x\n",
        "```python\n    return 2 * x\n```",
        "    y = x\n    return 2 * y",
        "    return 2 * x\n```\n\nIt doubles.",
        "    return 2 * x\n\n```python\nprint(f(1))\n```",
        '    """\n    ```\n    f(1)\n    ```\n    """\n    return 2 * x',
    ],
)
def test_a_continuation_is_put_behind_its_prompt(completion: str) -> None:
    assert extract_code(completion, PROMPT, "f").startswith(PROMPT + "    ")
    assert grade_code([completion], [parse_row("assert f(3) == 6", "f", PROMPT)])[0].ok


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.none(), st.lists(st.dictionaries(st.text(), st.text())), st.integers()))
def test_extraction_takes_anything(completion: Any) -> None:
    assert extract_code(completion, PROMPT, "f") is None or isinstance(extract_code(completion, PROMPT, "f"), str)


@pytest.mark.parametrize(
    "text",
    [
        *("`" * 10**6, "```\n" * 10**5, "a " * 10**6, "a." * 10**6, "(" * 10**6, "\n" * 10**6, "~~ " * 10**6),
        *("> " + " " * 10**6 + "x```", "`a` " * 10**5 + "```", "```python " + "a=b" * 10**6 + " x", "a, " * 10**6),
        *("x ```" + " " * 10**6 + "x y", "<answer>" * 10**5, "a[1" * 10**6, "1. " * 10**6 + "```", "text```\n" * 10**5),
    ],
    ids=lambda text: repr(text[:8]),
)
def test_extraction_is_fast_on_long_text(text: str) -> None:
    start = time.monotonic()
    extract_code(text, PROMPT, "f")
    extract_code(text)
    continues(text, PROMPT, "f")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "completion",
    [
        "1. The function:\n\n   ```python\n   x = 1\n   ```\n\n2. It is one.",
        "- ```python\n  x = 1\n  ```",
        "1) first\n   * then\n     ```py\n     x = 1\n     ```\n",
        "\t```python\n\tx = 1\n\t```",
        "1. ```python\nx = 1\n```",
        "> Quoted:\n> ```python\n> x = 1\n> ```",
        "Solution: ```python\nx = 1\n```",
        "Use `x`: ```\nx = 1\n```",
        "**Final:** ```py\nx = 1\n``` and that is it.",
        "```python\nx = 1```\nThat is it.",
        "<answer>```python\nx = 1\n```</answer>",
        '```python title="my file.py" linenums=1\nx = 1\n```',
        "```{.python .numberLines}\nx = 1\n```",
        "```{python}\nx = 1\n```",
        "``` python\nx = 1\n```",
        "```Python 3\nx = 1\n```",
        "```python3.11\nx = 1\n```",
        "```python:solution.py\nx = 1\n```",
        "```language-python\nx = 1\n```",
        "```\npython\nx = 1\n```",
        "~~~python\nx = 1\n~~~",
        "````python\nx = 1\n````",
        "````markdown\n# Answer\n```python\nx = 1\n```\n````",
        "```python\nx = 1\n```\nIn a shell:\n```bash\npython x.py\n```",
        "x = 1\n```\n\nThe prompt had opened the block.",
        " x = 1\n",
        "Sure, here it is:\n\n    x = 1\n\nThat is it.",
        "Here is the program:\n\nx = 1\n\n- It sets x.\n",
        "<think>x = 2</think>\n\n<answer>\nx = 1\n</answer>",
        "[PYTHON]\nx = 1\n[/PYTHON]\n[TESTS]\nassert x == 1",
    ],
)
def test_a_program_is_found_however_it_is_set(completion: str) -> None:
    assert (extract_code(completion) or "").strip() == "x = 1"


@pytest.mark.parametrize(
    "program",
    [
        "a, b = map(int, input().split())\nprint(a + b)\n",
        "for _ in range(int(input())):\n    print(1)\n",
        "with open(0) as f:\n    print(f.read())\n",
        "total: dict[str, int] = {}\nprint(total)\n",
        'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return x\n',
        "print('```')\n",
        'print("""\nThese are words.\n""")\n',
    ],
)
@pytest.mark.parametrize("form", ["{}", "```python\n{}```", "Here it is:\n\n{}\nIt is done."])
def test_nothing_of_a_program_is_taken_for_prose_or_a_fence(program: str, form: str) -> None:
    if form != "```python\n{}```" and "```\n" in program:
        pytest.skip("unfenced, its own fence is one")
    assert extract_code(form.format(program)) == program


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("```python\ndef f(x):\n    return 2\n```\nUsage:\n```python\nprint(f(1))\n```", "def f(x):\n    return 2\n"),
        ("```\ndef f(x):\n    return 2\n```\nUsage:\n```python\nprint(f(1))\n```", "def f(x):\n    return 2\n"),
        ("```python\ndef f(x):\n    return 2\n```\nBetter:\n```python\nf = abs\n```", "f = abs\n"),
    ],
)
def test_the_last_block_that_defines_the_entry_point_counts(completion: str, code: str) -> None:
    assert extract_code(completion, "", "f") == code


@pytest.mark.parametrize(
    "usage",
    [
        "print(f(1))",
        "assert f(1) == 2",
        "f(1)",
        "result = f(1)\nprint(result)",
        "x = 1\nwhile f(x) == 2: pass",
        "f == 1",
    ],
)
@pytest.mark.parametrize("definition", ["def f(x):\n    return 2\n", "f = lambda x: 2\n", "class f(int): pass\n"])
def test_without_an_entry_point_what_the_tests_call_goes_before_its_use(definition: str, usage: str) -> None:
    completion = f"```python\n{definition}```\nFor example:\n```python\n{usage}\n```"
    assert extract_code(completion, tests=("assert f(1) == 2", "assert sorted(f(2))")) == definition
    assert extract_code(completion, tests=("assert g(1) == 2",)) == usage + "\n"
    assert extract_code(completion) == usage + "\n"


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [
        ("    return x", True),
        ("\n    return x\ndef g", True),
        (" return x", True),
        (" Sure, here is the function:\n\n```python\ndef f(x):\n    return x\n```", False),
        ("  ```python\ndef f(x):\n    return x\n```", False),
        ("   1. First, the function:", False),
        (" def f(x):\n    return x", False),
        (" import math\n\ndef f(x):\n    return x", False),
        ("    import math\n    return x\n\ndef f(x):", True),
        ("return x", False),
    ],
)
def test_only_what_is_indented_code_goes_on_in_the_prompt(text: str, goes_on: bool) -> None:
    assert continues(text, PROMPT, "f") is goes_on
