"""Which part of a completion is its answer: the documented order, and what is refused."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mua_rl.rewards.completions import completion_text
from mua_rl.rewards.extract_math import extract_answer

FOUND = [
    # the last box wins, whatever its nesting
    ("\\boxed{4} then \\boxed{5}", "5", "boxed"),
    ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", "boxed"),
    ("\\boxed{\\boxed{5}}", "5", "boxed"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", "boxed"),
    ("\\boxed 7 apples", "7", "boxed"),
    ("\\fbox{7}", "7", "boxed"),
    ("\\boxed{5} and 6 more", "5", "boxed"),
    # a box before ####, #### before a bare answer block, a marker before any number
    ("\\boxed{5}\n#### 6", "5", "boxed"),
    ("#### 72", "72", "####"),
    ("#### 71\nno\n#### 72\n", "72", "####"),
    ("#### 72 is it, not 73", "72 is it, not 73", "####"),
    ("<answer>5 or 6</answer>", "5 or 6", "answer"),
    ("<answer>\\boxed{5}</answer> 6", "5", "boxed"),
    ("<answer>#### 5</answer>", "5", "####"),
    ("<answer>4</answer><answer>5</answer>", "5", "answer"),
    ("<answer>5", "5", "answer"),
    # thoughts do not count
    ("<think>\\boxed{3}</think> so 5.", "5", "number"),
    ("<think>\\boxed{3}</think><answer>5</answer>", "5", "answer"),
    # the last number of unmarked prose
    ("3 + 4 = 7.", "7", "number"),
    ("It costs $1,234.50 now", "$1,234.50", "number"),
    ("x=-3", "-3", "number"),
    ("one half, 1/2.", "1/2", "number"),
    ("Answer: **5**", "5", "number"),
    ("the answer is $14{,}916$", "$14{,}916", "number"),
]

NOTHING = [
    "", " ", "no number", "\\boxed{5", "\\boxed{4} and then \\boxed{5", "\\boxed{}", "\\boxed{ } 5", "#### ",
    "</think>",
    "5, 6", "5 and 6", "5 or 6", "5, or 6", "either 1/2/3", "5-6", "5 + 6", "x > 5", "x \\geq 5", "\\frac{10}{9}",
    "(7, 6)", "a_{3}", "2^10", "a5", "5x", "\\sqrt 5", "\\pm 5",
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "marker"), FOUND)
def test_order_of_extraction(text, answer, marker):
    extract = extract_answer(text)
    assert extract is not None
    assert (extract.text, extract.marker) == (answer, marker)


@pytest.mark.parametrize("text", NOTHING)
def test_no_answer_is_made_up(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("so \\boxed{5}.", True),
        ("so $\\boxed{5}$.<|im_end|>", True),
        ("<think>3</think> <answer>5</answer>\n", True),
        ("reasons\n#### 5\n", True),
        ("\\boxed{5} or 6", False),
        ("\\boxed{5}" + " " * 2001 + "or maybe 6", False),
        ("#### 5\n" + "\n" * 2001 + "or maybe 6", False),
        ("\\boxed{4} \\boxed{5}", False),
        ("#### 4\n#### 5", False),
        ("<answer>5</answer> more", False),
        ("<answer>5", False),
        ("it is 5", False),
    ],
)
def test_strict_form_is_one_marker_at_the_end(text, final):
    extract = extract_answer(text)
    assert extract is not None and extract.final is final


@pytest.mark.parametrize(
    "text",
    [
        "a" * 10**6,
        "\\boxed{" * 10**5,
        "{" * 10**6,
        "#" * 10**6,
        "5 " * 10**6,
        ",5" * 10**6,
        "<answer>" * 10**5,
        "1," * 10**6,
        "$" * 10**6,
        "</think>" * 10**5,
        "\\boxed{" + "{}" * 10**6,
        " " * 10**6 + "5",
        "-" * 10**6,
    ],
)
def test_a_million_characters_take_no_time(text):
    start = time.perf_counter()
    extract_answer(text)
    assert time.perf_counter() - start < 2.0  # about 0.05 s; a quadratic scan would take minutes


@given(st.text())
def test_total_on_any_text(text):
    extract_answer(text)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "b"),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}], "a"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "a"),
        ({"content": "a"}, "a"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "user", "content": "a"}], ""),
        (None, ""),
        ([], ""),
        ([None, 3], ""),
        (5, ""),
        (b"a", ""),
    ],
)
def test_completion_text_is_total(completion, text):
    assert completion_text(completion) == text
