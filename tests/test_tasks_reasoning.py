"""reasoning-gym's generators as tasks, and its scorers kept from evaluating a policy's text."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

import reasoning_gym
from reasoning_gym.factory import DATASETS

from mua_rl.envs import reasoning_tasks
from mua_rl.envs.reasoning_tasks import parse_options
from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError
from mua_rl.rewards import reasoning_worker
from mua_rl.rewards.completions import last_number
from mua_rl.rewards.reasoning_worker import EVALUATE_PYTHON, EVALUATE_SYMPY, READ_VERSION, is_harmless


def score(reward, split, completions, **extra):
    columns = {name: split[name] for name in split.column_names if name != "prompt"}
    return reward(prompts=split["prompt"], completions=completions, **columns, **extra)


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    monkeypatch.setattr(reasoning_tasks, "HELD_OUT_PROBLEMS", 4)


def test_answers_are_scored_by_the_generators_own_scorer():
    task = get_task("reasoning-gym:chain_sum,size=8,max_terms=3")
    split = task.held_out(False)
    entry = reasoning_gym.create_dataset("chain_sum", seed=10**9, size=4, max_terms=3)[0]
    assert entry["question"] in split["prompt"][0]
    row = split.select([0] * 4)
    completions = [f"<answer>{entry['answer']}</answer>", "<answer>x</answer>", entry["answer"], None]
    assert score(task.correct, row, completions) == [1.0, 0.0, 0.0, 0.0]
    logged = {}
    score(task.rewards[0], row, completions, log_metric=logged.__setitem__)
    assert logged == {"reasoning/timeout": 0.0, "reasoning/error": 0.0, "reasoning/no_answer": 0.5}


def test_splits_are_disjoint():
    """The generators draw problem i from seed + i, so that neighbouring seeds overlap."""
    task = get_task("reasoning-gym:chain_sum,size=64")
    assert not set(task.train(False)["prompt"]) & set(task.held_out(False)["prompt"])


def test_the_last_number_of_a_bare_reply_may_be_the_answer():
    """What a small policy can do that knows no tags: its prompt is the question alone, and no format is rewarded."""
    task = get_task("reasoning-gym:chain_sum,min_terms=2,max_terms=2,size=8,answer=number")
    row = task.held_out(True).select([0] * 4)
    entry = reasoning_gym.create_dataset("chain_sum", seed=10**9, size=4, min_terms=2, max_terms=2)[0]
    assert row["prompt"][0] == [{"role": "user", "content": entry["question"]}]
    completions = [f"It is 1, no: {entry['answer']}.", entry["answer"], f"{entry['answer']} or 0.5", "no idea"]
    assert score(task.correct, row, completions) == [1.0, 1.0, 0.0, 0.0]
    assert len(task.rewards) == 1 and task.reward_weights is None
    logged = {}
    score(task.rewards[0], row, completions, log_metric=logged.__setitem__)
    assert logged["reasoning/no_answer"] == 0.25


def test_the_whole_reply_may_be_the_answer():
    task = get_task("reasoning-gym:spell_backward,size=8,answer=text")
    row = task.held_out(False).select([0] * 2)
    gold = reasoning_gym.create_dataset("spell_backward", seed=10**9, size=4)[0]["answer"]
    assert score(task.correct, row, [f" {gold}\n", f"<answer>{gold}</answer>"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("7 - 9 = -2.", "-2"), ("9-7", "7"), ("it is 3.50!", "3.50"), ("-1 to\n-12", "-12"), ("none", None), ("", None)],
)
def test_the_last_number_is_read_with_its_sign_and_not_with_an_operator(text, number):
    assert last_number(text) == number


def test_both_splits_have_the_size_that_was_asked_for():
    task = get_task("reasoning-gym:chain_sum,size=16,held_out_size=9")
    assert (len(task.train(False)), len(task.held_out(False))) == (16, 9)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("answer=letters", "answer is 'letters'; it is one of tags, number, text"),
        ("answer=[1]", "answer is "),
        ("size=0", "size is 0"),
        ("held_out_size=many", "held_out_size is 'many'"),
        ("size=True", "size is True"),
    ],
)
def test_an_unusable_option_is_named(options, fault):
    with pytest.raises(UserError, match=re.escape(fault)):
        get_task(f"reasoning-gym:chain_sum,{options}")


def test_options_are_literals_or_text():
    assert parse_options("a,n=3,x=0.5,flag=True,word=abc") == ("a", {"n": 3, "x": 0.5, "flag": True, "word": "abc"})


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"composite"}))
@pytest.mark.slow
def test_every_generator_is_a_task(name):
    """`composite` mixes other generators and needs to be told which."""
    if name in ("knight_swap", "futoshiki", "zebra_puzzles"):
        pytest.skip("takes seconds to make a problem; tried by hand")
    split = get_task(f"reasoning-gym:{name},size=4").held_out(True)
    assert len(split) >= 3
    assert score(get_task(f"reasoning-gym:{name}").correct, split.select([0]), ["<answer></answer>"]) == [0.0]


def test_the_lists_of_evaluating_scorers_are_complete():
    """Fails when a new version of the library evaluates answers in another generator."""
    root = Path(reasoning_gym.__file__).parent
    evaluating = {
        file.stem
        for file in root.rglob("*.py")
        if re.search(r"\b(?:eval|exec|parse_expr|sympify)\(\s*(?:\w*answer|ans|user_\w+|response)\b", file.read_text())
    }
    assert evaluating == EVALUATE_PYTHON | EVALUATE_SYMPY


def test_a_version_whose_scorers_nobody_has_read_is_refused_by_the_task_and_by_the_worker(monkeypatch):
    pinned = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert f"reasoning-gym=={READ_VERSION}" in pinned["project"]["optional-dependencies"]["tasks"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.26")
    with pytest.raises(UserError, match=r"0\.1\.26 is installed.*pip install reasoning-gym=="):
        get_task("reasoning-gym:chain_sum")
    with pytest.raises(SystemExit, match=r"0\.1\.26 is installed"):
        reasoning_worker.load()


HOSTILE = [
    "__import__('os').system('touch HACKED')",
    "().__class__.__base__.__subclasses__()",
    "open('HACKED', 'w')",
    "exit()",
    "x.func.__globals__",
    "eval('1')",
    "print(1)",
    "lambda: 1",
    "[x for x in [1]]",
    "9**9**9**9",
    "9^(9^(9^9))",
    "2**100000000",
    "100000!",
    "Integral(x**2, x)",  # the question, handed back as its own answer
    "1" * 2000,
    "x;y",
    "x=1",
    "(x:=1)",
    "f'{x}'",
    "x\x00",
]


@pytest.mark.parametrize("answer", HOSTILE)
@pytest.mark.parametrize("name", sorted(EVALUATE_SYMPY))
def test_no_hostile_text_reaches_sympys_evaluation(name, answer):
    assert not is_harmless(name, answer)


@pytest.mark.parametrize("answer", [a for a in HOSTILE if "(" in a or "__" in a or "**" in a or "for" in a or ";" in a])
@pytest.mark.parametrize("name", sorted(EVALUATE_PYTHON))
def test_no_call_reaches_pythons_eval(name, answer):
    assert not is_harmless(name, answer)


@pytest.mark.parametrize("name", sorted(EVALUATE_PYTHON | EVALUATE_SYMPY))
@pytest.mark.slow
def test_the_generators_own_answers_are_harmless(name):
    problems = reasoning_gym.create_dataset(name, seed=0, size=20)
    answers = [answer for answer in (problems[i]["answer"] for i in range(20)) if answer and "Integral" not in answer]
    assert answers and all(is_harmless(name, answer) for answer in answers)
