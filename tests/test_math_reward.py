"""The math reward: what is right, what is wrong, and what no policy can get a reward with."""

import json
import subprocess
import sys
from pathlib import Path

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

HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE / "data" / "math_cases.jsonl").read_text(encoding="utf-8").splitlines()]
"""Completion, gold, expected score and kind; `differs` names the argument of docs/math_verdicts.md."""


@pytest.fixture(scope="module")
def scores():
    completions, golds = [case["completion"] for case in CASES], [case["gold"] for case in CASES]
    return math_reward(completions=completions, answer=golds)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{index + 1}: {CASES[index]['kind']}")
def test_every_case_has_its_score(scores, index):
    assert scores[index] == CASES[index]["expect"], CASES[index]


def test_every_gold_of_the_cases_equals_itself():
    golds = [case["gold"] for case in CASES]
    assert gold_faults(golds) == [None] * len(golds)
    itself = [f"\\boxed{{{gold}}}" for gold in golds]
    assert math_reward(completions=itself, answer=golds) == [1.0] * len(golds)


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
