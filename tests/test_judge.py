"""A run that cannot learn is recognised by its metrics, and no other run is."""

import math

import pytest

from mua_rl.run.judge import PATIENCE, why_no_learning


def step(reward=0.3, gradient=0.5, even=0.2, cut=0.1, length=100.0):
    return {
        "reward": reward,
        "grad_norm": gradient,
        "frac_reward_zero_std": even,
        "completions/clipped_ratio": cut,
        "completions/mean_length": length,
    }


LEARNING = [step(reward=0.2 + 0.01 * k) for k in range(8)]
MASKED = [step(reward=0.0, gradient=0.0, even=1.0, cut=1.0, length=256.0)] * PATIENCE
EVEN = [step(reward=0.0, gradient=0.0, even=1.0)] * PATIENCE


@pytest.mark.parametrize(
    ("history", "cause", "cure"),
    [
        (LEARNING + MASKED, "all completions were cut off", "a quarter of it with --lr"),
        (MASKED, "all completions were cut off", "raise --max_completion_length"),
        (EVEN, "the completions of no prompt differed in reward", "problems of another difficulty"),
        (LEARNING + EVEN, "the completions of no prompt differed in reward", "a quarter of it with --lr"),
        ([step(gradient=0.01, even=1.0)] * PATIENCE, "no prompt differed in reward", "another difficulty"),  # --beta
        ([step(gradient=0.0)] * PATIENCE, "the gradient was zero", "--log_completions"),
        ([step(reward=math.nan)] * PATIENCE, "no completion had a score", "--log_completions"),
        ([step(reward=None)] * PATIENCE, "no completion had a score", "--log_completions"),
        ([step()] * PATIENCE + [step(reward=0.1, length=3.0)] * PATIENCE, "from 100 to 3 tokens", "--lr"),
    ],
)
def test_a_run_that_cannot_learn_is_told_cause_and_cure_in_one_line(history, cause, cure):
    reason = why_no_learning(history)
    assert cause in reason
    assert cure in reason
    assert "\n" not in reason
    assert why_no_learning([*history[:-1], step()]) == ""


@pytest.mark.parametrize(
    "history",
    [
        [],
        LEARNING * 5,
        EVEN[1:],
        LEARNING + [step(reward=1.0, gradient=0.0, even=1.0)] * PATIENCE,  # all solved
        [step(cut=1.0)] * 2 * PATIENCE,  # cut off, and yet rewarded
        [step()] * PATIENCE + [step(reward=0.6, length=3.0)] * PATIENCE,  # short answers are better ones
        [step(length=4.0)] * PATIENCE + [step(reward=0.2, length=1.0)] * PATIENCE,
        [{"reward": 0.2}] * 2 * PATIENCE,
    ],
)
def test_a_run_that_learns_or_has_learnt_goes_on(history):
    assert why_no_learning(history) == ""


def test_fewer_entries_are_enough_where_each_is_of_several_steps():
    assert why_no_learning(EVEN[:2], patience=2).startswith("the completions of no prompt")
