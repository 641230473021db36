"""The rewards on data sets as they are published, in stock TRL's calls and in verl's."""

import importlib.util
import json
import logging

import pytest

import mua_rl.rewards.verl
from mua_rl.errors import UserError
from mua_rl.rewards import code_reward, math_reward, strict_math_reward
from mua_rl.rewards import math as math_module

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 in all.\n#### 72"
MATH = "We have $x^2 = 12$, so $x = \\boxed{2\\sqrt{3}}$, which is positive. " + "Long. " * 100


@pytest.mark.parametrize("reward", [math_reward, strict_math_reward])
def test_a_worked_solution_holds_its_gold_where_a_completion_would(reward):
    completions = ["So \\boxed{72}.", "So \\boxed{24}.", "So \\boxed{\\sqrt{12}}.", "So \\boxed{3}."]
    golds = [GSM8K, GSM8K, MATH, MATH]
    assert reward(completions=completions, answer=golds) == [1.0, 0.0, 1.0, 0.0]
    assert reward(completions=completions, solution=golds, trainer_state=None) == [1.0, 0.0, 1.0, 0.0]
    assert reward(completions=completions, answer=[72, 72, "2\\sqrt{3}", "2\\sqrt{3}"], solution=golds)[:1] == [1.0]


@pytest.mark.parametrize("columns", [{}, {"label": ["72", "72"]}, {"answer": ["72"]}, {"solution": []}])
@pytest.mark.parametrize("reward", [math_reward, strict_math_reward])
def test_a_column_of_golds_that_is_not_there_is_named(reward, columns):
    with pytest.raises(UserError, match=r"`answer` for 2 completions") as error:
        reward(completions=["72", "72"], completion_ids=[[1], [2]], **columns)
    assert all(name in str(error.value) for name in set(columns) - {"answer"})
    assert "completion_ids" not in str(error.value)


def test_a_gold_that_cannot_be_read_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(math_module, "_bad_golds_told", set())
    for _ in range(2):
        assert math_reward(completions=["5", "5"], answer=["\\int_0", "5"]) == [None, 1.0]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "int_0" in told[0]


PROGRAM = "```python\ndef double(x):\n    return 2 * x\n```"
WRONG_PROGRAM = "```python\ndef double(x):\n    return x\n```"
TESTS = ["assert double(2) == 4", "assert double(3) == 6"]


def test_mbpps_own_column_of_tests_is_read():
    assert code_reward(completions=[PROGRAM, WRONG_PROGRAM], test_list=[TESTS, TESTS]) == [1.0, 0.0]


@pytest.mark.parametrize("columns", [{}, {"asserts": [TESTS]}, {"test_list": [TESTS, TESTS]}])
def test_a_column_of_tests_that_is_not_there_is_named(columns):
    with pytest.raises(UserError, match="`tests` for 1 completions"):
        code_reward(completions=[PROGRAM], **columns)


@pytest.fixture(scope="module")
def in_verl():
    """The module as verl loads it: by its path, under a name of verl's."""
    spec = importlib.util.spec_from_file_location("custom_module", mua_rl.rewards.verl.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = [
    ("openai/gsm8k", "#### 72", "72", 1.0),
    ("openai/gsm8k", "#### 71", "72", 0.0),
    ("math", "so \\boxed{\\sqrt{12}}", MATH, 1.0),
    ("math", "so \\boxed{\\{1, 2\\}}", "{1, 2}", 1.0),
    ("mbpp", PROGRAM, {"tests": TESTS}, 1.0),
    ("mbpp", WRONG_PROGRAM, {"tests": TESTS}, 0.0),
    ("mbpp", PROGRAM, json.dumps({"tests": "def check(f):\n    assert f(2) == 4", "entry_point": "double"}), 1.0),
    ("apps", PROGRAM, json.dumps({"inputs": [[2], [3]], "outputs": [4, 6], "fn_name": "double"}), 1.0),
    ("apps", WRONG_PROGRAM, {"inputs": [[2], [3]], "outputs": [4, 6], "fn_name": "double"}, 0.0),
]


def test_verl_gets_a_score_for_each_row(in_verl):
    for source, response, truth, score in ROWS:
        call = {"data_source": source, "solution_str": response, "ground_truth": truth, "extra_info": {"index": 0}}
        assert in_verl.compute_score(**call) == score, call


def test_verl_gets_the_scores_of_a_batch_of_math_and_code(in_verl):
    sources, responses, truths, scores = map(list, zip(*ROWS, strict=True))
    got = in_verl.compute_scores(
        data_sources=sources, solution_strs=responses, ground_truths=truths, extra_infos=[{}] * len(ROWS)
    )
    assert got == scores
    assert in_verl.compute_scores([], [], []) == []


def test_verl_scores_an_unusable_row_zero_and_says_so(in_verl, monkeypatch, caplog):
    monkeypatch.setattr(math_module, "_bad_golds_told", set())
    assert in_verl.compute_score("math", "5", "\\int_0") == 0.0
    assert in_verl.compute_score("mbpp", PROGRAM, {"tests": []}) == 0.0
    assert len(caplog.records) == 2
