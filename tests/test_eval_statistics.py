"""pass@k, intervals and paired tests against brute force and known values."""

import itertools
import math

import numpy as np
import pytest

from mua_rl.evaluation.statistics import mcnemar_exact, mean_estimate, paired_difference, pass_at_k
from mua_rl.run.trial import is_clear


def test_a_difference_is_clear_beyond_two_standard_errors_and_in_one_direction():
    assert is_clear(0.21, standard_error=0.1) and is_clear(1e-9, standard_error=0)
    assert not any(is_clear(difference, standard_error=0.1) for difference in (0.2, 0, -0.21, math.nan))
    assert not is_clear(0, standard_error=0) and not is_clear(1, standard_error=math.nan)


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (4, 0), (4, 1), (4, 3), (6, 2), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, right):
    answers = [1] * right + [0] * (samples - right)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_the_undefined(samples, right, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, right, k)


def test_zeros_and_ones_get_wilsons_interval():
    estimate = mean_estimate([1] * 8 + [0] * 2)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    nothing = mean_estimate([0] * 20)
    assert nothing.low == 0 and nothing.high == pytest.approx(0.1611, abs=1e-4)


def test_shares_that_are_all_the_same_have_an_interval_of_some_width():
    estimate = mean_estimate([0.5] * 10)
    assert estimate.low < 0.5 < estimate.high


@pytest.mark.parametrize("shares", [True, False])
def test_intervals_cover_the_truth_about_95_times_in_100(shares):
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        rates = rng.beta(2, 3, 100)  # mean 0.4
        values = rng.binomial(8, rates) / 8 if shares else (rng.random(100) < rates).astype(float)
        estimate = mean_estimate(values.tolist(), seed=trial)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 180 <= covered <= 199


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(10, 0) == pytest.approx(2 / 1024)
    assert mcnemar_exact(2, 9) == mcnemar_exact(9, 2) == pytest.approx(0.06543, abs=1e-5)


def test_binary_results_are_compared_by_mcnemar():
    first, second = [0] * 12 + [1] * 8, [1] * 10 + [0] * 2 + [1] * 8
    result = paired_difference(first, second)
    assert (result.test, result.better, result.worse) == ("McNemar exact", 10, 0)
    assert result.difference.value == 0.5 and result.p_value == pytest.approx(2 / 1024)
    assert paired_difference(second, first).difference.value == -0.5


def test_shares_are_compared_by_permutation_which_agrees_with_enumeration():
    first, second = [0.5, 0.25, 0.0, 0.75, 0.5], [0.75, 0.5, 0.25, 0.5, 0.5]
    result = paired_difference(first, second)
    differences = [b - a for a, b in zip(first, second, strict=True) if a != b]
    flips = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=4)
    ]
    assert result.p_value == sum(f >= abs(sum(differences)) - 1e-9 for f in flips) / 16
    assert paired_difference(first, first).p_value == 1.0


def test_p_values_are_uniform_enough_when_nothing_differs():
    rng = np.random.default_rng(1)
    small = 0
    for trial in range(100):
        a, b = rng.integers(0, 5, (2, 60)) / 4
        small += paired_difference(a, b, seed=trial).p_value < 0.05
    assert small <= 12


def test_a_thousand_problems_are_compared_with_a_tiny_p_value():
    rng = np.random.default_rng(2)
    a = rng.integers(0, 5, 1000) / 8
    assert paired_difference(a, a + rng.integers(0, 3, 1000) / 8).p_value < 1e-3


def test_unpaired_lengths_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1.0], [1.0, 0.0])
