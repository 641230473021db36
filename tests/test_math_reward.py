"""The math reward: what is right, what is wrong, and what no policy can get a reward with."""

import subprocess
import sys

import pytest

from mua_rl.rewards.format import WatchedFormatReward, format_reward
from mua_rl.rewards.math import (
    MathVerdict,
    gold_faults,
    judge_answers,
    judge_completions,
    math_reward,
    strict_math_reward,
)

RIGHT = [
    # GSM8K
    ("72", "She sold 48+24 = 72 clips.\n#### 72"),
    ("1000", "#### $1,000.00"),
    ("18", "The answer is 18 dollars."),
    (72, "#### 72"),
    (0.5, "\\boxed{\\frac12}"),
    ("5", "\\boxed{x = 5}"),
    ("5", "\\boxed{x = 2 + 3 = 5}"),
    ("120", "\\boxed{5!=120}"),
    ("no solution", "\\boxed{No solution}"),
    ("\\frac{1}{3}", "\\boxed{\\frac{1}{3} \\approx 0.33}"),
    ("5", "\\boxed{\\left(5\\right)}"),
    # MATH
    ("12_8", "\\boxed{12_{8}}"),
    ("(12)_8", "\\boxed{10 = 12_8}"),
    ("12_{8}", "\\boxed{12}"),  # the question names the base
    ("1101_2", "\\boxed{1,101}"),
    ("DEE_{16}", "\\boxed{\\text{DEE}_{16}}"),
    ("1E3_{16}", "\\boxed{1E3}"),
    ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
    ("$2\\sqrt{3}$", "\\boxed{2\\sqrt3}"),
    ("x^2+1", "\\boxed{1+x^2}"),
    ("3x+4y+14=0", "\\boxed{-3x-4y-14=0}"),
    ("\\frac{\\pi}{2}", "\\boxed{1.570796}"),
    ("(1,2)", "\\boxed{\\left(1, 2\\right)}"),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}"),
    ("-2,1", "\\boxed{1,-2}"),
    ("1 \\pm \\sqrt{19}", "\\boxed{1 \\pm \\sqrt{19}}"),
    ("[0,1) \\cup (2,\\infty)", "\\boxed{[0,1)\\cup(2,\\infty)}"),
    ("\\text{Evelyn}", "\\boxed{Evelyn}"),
    ("\\text{(C)}", "\\boxed{\\text{C}}"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}}"),
    ("2^{10}", "\\boxed{1024}"),
    ("1-\\frac{1}{\\mathrm{e}}", "\\boxed{1-\\frac1e}"),
    ("\\emptyset", "\\boxed{\\varnothing}"),
    ("(1, \\sqrt2)", "\\boxed{\\left\\langle 1, \\sqrt{2} \\right\\rangle}"),
    ("0.\\overline{3}", "\\boxed{\\frac13}"),
    ("f'(x) = 2x", "\\boxed{2x}"),
    ("y'' + y = 0", "\\boxed{y^{\\prime\\prime} + y = 0}"),
    ("3 feet 4 inches", "\\boxed{3 \\text{ feet and } 4 \\text{ inches}}"),
    ("\\text{5 red and 3 blue}", "\\boxed{3 blue and 5 red}"),
    ("7 \\text{ R } 2", "\\boxed{7 r 2}"),
    ("1 and 2", "\\boxed{2, 1}"),
    ("2024-01-05", "\\boxed{2024-1-5}"),
]

WRONG = [
    ("72", "#### 73"),
    ("72", "\\boxed{48+24}"),  # the question copied down
    ("243", "\\boxed{3^5}"),
    ("120", "\\boxed{5!}"),
    ("5", "\\boxed{5 \\text{ or } 6}"),
    ("5", "\\boxed{4, 5}"),
    ("5", "\\boxed{x >= 5}"),  # a bound is no value
    ("5", "\\boxed{x<=5}"),
    ("5", "\\boxed{x != 5}"),
    ("5", "\\boxed{x \\ne 4 = 5}"),
    ("5", "\\boxed{5 \\geqslant x = 5}"),
    ("stop", "\\boxed{post}"),  # words, not products of letters
    ("HHT", "\\boxed{THH}"),
    ("\\text{cab}", "\\boxed{abc}"),
    ("B A C", "\\boxed{A B C}"),  # an order
    ("12_8", "\\boxed{12_9}"),  # equal to Math-Verify, which leaves subscripts out
    ("1101_2", "\\boxed{1101_{10}}"),
    ("12_8", "\\boxed{10}"),  # its value: the question copied down
    ("12_8", "\\boxed{14_6}"),
    ("12_8", "\\boxed{x = 11_8, y = 12_8}"),
    ("12_8", "\\boxed{12_8 = 10}"),
    ("12_8", "\\boxed{x \\ne 7 = 12_8}"),
    ("1E3_{16}", "\\boxed{1000}"),
    ("DEE_{16}", "\\boxed{EDE_{16}}"),
    ("12", "\\boxed{12_8}"),
    ("10", "\\boxed{12_8}"),
    ("5", "\\boxed{x=4 \\text{ or } x=5}"),
    ("5", "\\boxed{x=4, x=5}"),
    ("5", "\\boxed{\\pm 5}"),
    ("5", "\\boxed{5}\\boxed{6}"),
    ("5", "<answer>it is 5</answer>"),
    ("0", "\\boxed{10^{-9}}"),
    ("5", "\\boxed{5 million}"),
    ("5", "\\boxed{nan}"),
    ("5", "\\boxed{٥}"),
    ("2\\sqrt{3}", "\\boxed{2}"),  # what Math-Verify reads from an unwrapped gold
    ("2\\sqrt{3}", "\\boxed{3.46}"),
    ("2\\sqrt{3}", "\\boxed{garbage 2\\sqrt{3}}"),
    ("2\\sqrt{3}", "\\boxed{2\\sqrt{3}, 5}"),
    ("\\sqrt{2}\\cdot 10^{-9}", "\\boxed{0.0}"),  # equal to Math-Verify
    ("\\pi \\cdot 10^{-20}", "\\boxed{\\sqrt{2} \\cdot 10^{-20}}"),  # equal to Math-Verify
    ("(1,2)", "\\boxed{(2,1)}"),
    ("(0, \\sqrt{2})", "\\boxed{(10^{-9}, 1.414214)}"),
    ("x+1", "\\boxed{x}"),
    ("x+1", "\\boxed{\u0661+x}"),
    ("\\text{Evelyn}", "\\boxed{Bob}"),
    ("x > 5", "\\boxed{x < 5}"),
    ("0.\\overline{3}", "\\boxed{0.3}"),
    # Equal to Math-Verify, which leaves primes out and multiplies words and numbers:
    ("f'(x)", "\\boxed{f(x)}"),
    ("y'' + y = 0", "\\boxed{y' + y = 0}"),
    ("y' = 2y", "\\boxed{y = 2y}"),
    ("3 feet 4 inches", "\\boxed{4 feet 3 inches}"),
    ("2 hours 30 minutes", "\\boxed{60 hours minutes}"),
    ("7 \\text{ R } 2", "\\boxed{2 \\text{ R } 7}"),
    ("12 remainder 3", "\\boxed{3 remainder 12}"),
    ("2024-01-05", "\\boxed{2018}"),
    ("3/4/2024", "\\boxed{6/8/2024}"),
]


@pytest.mark.parametrize(("gold", "completion"), RIGHT)
def test_right_answers_score_one(gold, completion):
    assert math_reward(completions=[completion], answer=[gold]) == [1.0]


@pytest.mark.parametrize(("gold", "completion"), WRONG)
def test_wrong_answers_score_zero(gold, completion):
    assert math_reward(completions=[completion], answer=[gold]) == [0.0]


@pytest.mark.parametrize(
    "completion", [None, [], {}, 5, "", "\x00", "\ud800", [None], "\\boxed{\ud800}", "\\boxed{\x00}"]
)
@pytest.mark.parametrize("gold", ["72", "x^2"])
def test_total_on_odd_completions(completion, gold):
    assert math_reward(completions=[completion], answer=[gold]) == [0.0]


def test_conversational_completions_score_as_plain_ones():
    assert math_reward(completions=[[{"role": "assistant", "content": "#### 5"}]], answer=["5"]) == [1.0]


def test_an_empty_batch_is_empty():
    assert math_reward(completions=[], answer=[]) == []


@pytest.mark.parametrize("gold", ["", "  ", None, [], {}, True, float("nan"), float("inf"), "\\int_0", "{", "9" * 501])
def test_a_bad_gold_gives_no_score_and_a_reason(gold):
    """`None`: TRL leaves the row out. Scoring it 0 would punish every answer, also the right one."""
    assert math_reward(completions=["\\boxed{5}"], answer=[gold]) == [None]
    assert gold_faults([gold])[0]


def test_good_golds_have_no_fault():
    golds = ["72", "$\\frac{1}{2}$", "10\\%", "2\\sqrt{3}", "x^2+1", "\\text{Evelyn}", "(1,2)", 5, 0.25]
    golds += ["12_8", "(12)_8", "DEE_{16}"]
    assert gold_faults(golds) == [None] * len(golds)


def test_long_answers_are_not_read():
    assert judge_answers([("x", "x+" * 400 + "x")]) == [MathVerdict.UNREADABLE]


def test_strict_reward_wants_the_exact_form_only():
    completions = ["so \\boxed{5}.", "it is 5", "\\boxed{4} \\boxed{5}", "\\boxed{6}"]
    assert strict_math_reward(completions=completions, answer=["5"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert math_reward(completions=completions, answer=["5"] * 4) == [1.0, 1.0, 1.0, 0.0]


def test_metrics_are_fractions_of_the_batch():
    logged = {}
    completions = ["#### 5", "nothing", "\\boxed{" + "1" * 600 + "}", "\\boxed{x}"]
    math_reward(completions=completions, answer=["5", "5", "x", "x"], log_metric=logged.__setitem__)
    assert logged == {"math/timeout": 0.0, "math/error": 0.0, "math/no_answer": 0.25, "math/unreadable": 0.25}


def test_verdicts_say_why():
    verdicts = judge_completions(["#### 5", "#### 6", "?", "\\boxed{}"], ["5", "5", "5", "5"])
    assert verdicts == ["right", "wrong", "no_answer", "no_answer"]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think> <answer>5</answer>", 1.0),
        ("<think>\na\nb\n</think>\n<answer>\n5\n</answer>\n", 1.0),
        ("a</think><answer>5</answer>", 1.0),  # the chat template wrote <think>
        ("<think></think><answer>5</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<answer>5</answer>", 0.0),
        ("<think>a</think> so <answer>5</answer>", 0.0),
        ("<think>a</think><answer>5</answer> more", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a<think>b</think></think><answer>5</answer>", 0.0),
        ("<answer>5</answer><think>a</think>", 0.0),
        (None, 0.0),
        ("<think>" * 100_000, 0.0),
        ("<think>" + " " * 100_000 + "</think>", 0.0),
    ],
)
def test_format_reward(text, score):
    assert format_reward(completions=[text]) == [score]


def test_format_only_wins_are_logged():
    logged = {}
    reward = WatchedFormatReward(math_reward)
    completions = ["<think>a</think><answer>5</answer>", "<think>a</think><answer>6</answer>", "5", "6"]
    scores = reward(completions=completions, answer=["5"] * 4, log_metric=logged.__setitem__)
    assert scores == [1.0, 1.0, 0.0, 0.0]
    assert logged == {"format_only": 0.25}


def test_importing_rewards_loads_neither_torch_nor_sympy():
    code = (
        "import sys, mua_rl.rewards as r; r.math_reward(completions=['#### 5'], answer=['5']); r.format_reward;"
        "print([m for m in ('torch', 'sympy', 'math_verify', 'trl', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
