r"""Markup goes, and nothing that an answer says: the readings that `math_quick` and Math-Verify start from."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mua_rl.rewards.latex import plain_latex
from mua_rl.rewards.math_quick import quick_verdict

PLAIN = [
    ("\\text{18 dollars}", "18 \\text{dollars}"),
    ("\\textbf{June 20}", "\\text{June }20"),
    ("\\text{\\textbf{18}}", "18"),
    ("5{\\rm\\ cm}", "5\\text{ cm}"),
    ("\\mathrm{e}^2", "\\mathrm{e}^2"),  # a constant, a unit or a variable
    ("\\textcolor{blue}{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("{{x \\over 2} \\over 3}", "\\frac{\\frac{x}{2}}{3}"),
    ("\\sqrt{1 \\over 2}", "\\sqrt{\\frac{1}{2}}"),
    ("{1}/{2}", "1/2"),
    ("\\frac1{20}", "\\frac1{20}"),  # not `\frac120`
    ("\\frac 1{20}", "\\frac 1{20}"),
    ("x^{2}_{1}", "x^{2}_{1}"),
    ("14\\,916", "14,916"),
    ("2½", "2\\frac{1}{2}"),
    ("2\\sqrt{3}\\quad", "2\\sqrt{3}"),
    ("\\begin{pmatrix}1&2\\\\ 3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\ 3&4\\end{pmatrix}"),
    ("\\lbrace 1,\\,2 \\rbrace", "\\{ 1, 2 \\}"),
]


@pytest.mark.parametrize(("text", "plain"), PLAIN)
def test_markup_goes_and_the_rest_stays(text, plain):
    assert plain_latex(text) == plain


LATEX_LIKE = st.text(alphabet="{}\\text frac over 12,.:$%^_()=±½apm\n", max_size=80)


@given(st.one_of(st.text(max_size=60), LATEX_LIKE))
def test_total_on_any_text(text):
    plain_latex(text)


@given(LATEX_LIKE, LATEX_LIKE)
def test_every_answer_has_a_verdict_or_none(gold, answer):
    quick_verdict(gold or "x", answer)


@pytest.mark.parametrize(
    "piece", ["{", "{}", "\\text{", "\\over", "{1\\over ", "\\,", "$", "\\text{a:", "a ", "1 234 ", "\\mathrm{a}"]
)
def test_five_hundred_characters_take_no_time(piece):
    text = (piece * 500)[:500]
    start = time.perf_counter()
    plain_latex(text)
    quick_verdict("x", text)
    quick_verdict(text, "5 cm")
    assert time.perf_counter() - start < 0.5
