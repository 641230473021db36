"""Which trials a sweep runs, on response curves made up for it."""

import math
import random
import statistics
from collections import deque

import pytest
from helpers import make_trial, spec

from mua_rl.analysis.outcomes import best_of
from mua_rl.run.trial import Status, TrialResult
from mua_rl.sweep.early_stop import why_hopeless
from mua_rl.sweep.search import (
    HIGHEST,
    LOWEST,
    Search,
    scan_around,
    scan_range,
)


def outcome(metric, *, before=0.4, error=0.01, diverged=False, stopped=""):
    status = Status.WORSE if diverged else Status.STOPPED if stopped else Status.OK
    return TrialResult(metric, error, before, metric, metric, status, stopped, 100, 1.0)


def curve_with_optimum_at(optimum, breaks_at=math.inf, width=3.0, noise=0.0):
    """Metric against log2 η: a hill over a base of 0.4; training diverges at `breaks_at` and above."""

    def respond(trial):
        if trial.log2_lr >= breaks_at:
            return TrialResult.of_divergence(0.4, 10, 1.0, "not finite")
        draw = random.Random(repr((trial.log2_lr, trial.seed))).gauss(0, noise)
        return outcome(0.4 + 0.5 * math.exp(-(((trial.log2_lr - optimum) / width) ** 2)) + draw)

    return respond


def search(scan, step=1.0, resolution=1.0, seeds=(1, 2), rank=8):
    return Search(spec(rank), tuple(scan), step, resolution, seeds)


def run(search, respond, limit=100):
    """All outcomes of a search, and the rounds in which they came."""
    outcomes, rounds = {}, []
    while trials := search.next_trials(outcomes):
        assert not set(trials) & outcomes.keys(), "a trial is never repeated"
        rounds.append(trials)
        outcomes |= {trial: respond(trial) for trial in trials}
        assert len(outcomes) < limit
    return outcomes, rounds


def rates(outcomes, seed):
    return sorted(trial.log2_lr for trial in outcomes if trial.seed == seed)


def test_a_search_around_a_good_guess_scans_once_and_then_adds_seeds_next_to_the_best():
    outcomes, rounds = run(search(range(-13, -8)), curve_with_optimum_at(-11))
    assert rates(outcomes, 1) == [-13, -12, -11, -10, -9]
    assert rates(outcomes, 2) == [-12, -11, -10]
    assert len(rounds) == 2


def test_a_best_rate_at_either_end_is_gone_past_until_it_lies_between_others():
    for optimum in (-17, -5):
        found = search(range(-13, -8))
        outcomes, _ = run(found, curve_with_optimum_at(optimum, width=6.0))
        assert best_of(found.points(outcomes)) == optimum
        assert {optimum - 1, optimum, optimum + 1} <= set(rates(outcomes, 2))
        assert found.verdict(outcomes) == ""


def test_a_coarse_scan_is_refined_to_the_resolution_around_the_best():
    found = search(range(-19, -2, 4), step=4.0, resolution=0.5)
    outcomes, _ = run(found, curve_with_optimum_at(-8.5, width=4.0))
    assert best_of(found.points(outcomes)) == -8.5
    assert {-9, -8.5, -8} <= set(rates(outcomes, 1))
    assert len(rates(outcomes, 1)) < 14  # and not on a fine grid everywhere


def test_a_diverged_rate_is_never_the_best_and_bounds_the_search_from_above():
    found = search(range(-13, -8))
    outcomes, _ = run(found, curve_with_optimum_at(-8, breaks_at=-9))
    assert best_of(found.points(outcomes)) == -10
    assert max(rates(outcomes, 1)) == -9
    assert found.verdict(outcomes) == ""


def test_where_everything_diverges_the_search_goes_down_until_something_trains():
    found = search(range(-6, -1))
    outcomes, _ = run(found, curve_with_optimum_at(-10, breaks_at=-8))
    assert best_of(found.points(outcomes)) == -10


def test_rates_too_small_to_move_anything_send_the_search_up_though_noise_has_a_best_among_them():
    found = search(range(-22, -17))
    outcomes, _ = run(found, curve_with_optimum_at(-9, width=2.0, noise=0.002), limit=60)
    assert best_of(found.points(outcomes)) == -9
    assert min(rates(outcomes, 1)) == -22  # and not down after the noise


def test_a_gap_between_nothing_learnt_and_divergence_is_searched_to_the_resolution():
    found = search((-12, -10, -8, -6), step=2.0, resolution=0.5)
    outcomes, _ = run(found, curve_with_optimum_at(-7.5, breaks_at=-7, width=0.3))
    assert best_of(found.points(outcomes)) == -7.5


def test_a_task_that_no_rate_learns_ends_and_says_so():
    found = search(range(-13, -8))
    outcomes, _ = run(found, lambda trial: outcome(0.4) if trial.log2_lr < -6 else outcome(0.1, diverged=True))
    assert "no run got better" in found.verdict(outcomes)


def test_a_search_stays_within_bounds_and_reports_an_optimum_at_them():
    rising, falling = search(range(-5, 0)), search(range(-23, -19))
    outcomes, _ = run(rising, lambda trial: outcome(0.6 + 0.01 * trial.log2_lr))
    assert rising.verdict(outcomes) == f"the best learning rate is the largest that was tried, 2^{HIGHEST:g}"
    outcomes, _ = run(falling, lambda trial: outcome(0.6 - 0.01 * trial.log2_lr))
    assert falling.verdict(outcomes) == f"the best learning rate is the smallest that was tried, 2^{LOWEST:g}"


def test_a_lucky_first_seed_at_a_wrong_rate_is_found_out_by_the_other_seeds():
    respond = curve_with_optimum_at(-11)

    def lucky(trial):
        return outcome(0.95) if (trial.log2_lr, trial.seed) == (-13, 1) else respond(trial)

    found = search(range(-14, -8), seeds=(1, 2, 3))
    outcomes, _ = run(found, lucky)
    assert best_of(found.points(outcomes)) == -11
    assert set(rates(outcomes, 3)) >= {-12, -11, -10}


def test_the_plan_depends_on_outcomes_alone_not_on_the_order_in_which_they_came():
    found, respond = search(range(-19, -2, 4), step=4.0, resolution=0.5), curve_with_optimum_at(-8.5, noise=0.05)
    everything, _ = run(found, respond)
    for seed in range(5):
        trials = list(everything)
        random.Random(seed).shuffle(trials)
        some = {trial: everything[trial] for trial in trials}
        assert found.next_trials(some) == []
        assert best_of(found.points(some)) == best_of(found.points(everything))


def test_trials_of_other_curves_do_not_count():
    found = search(range(-13, -8))
    others = {make_trial(16, "B", "1", lr, 1): outcome(0.9) for lr in range(-13, -8)}
    assert [trial.log2_lr for trial in found.next_trials(others)] == [-13, -12, -11, -10, -9]


def test_of_equal_rates_the_smaller_is_the_best():
    assert best_of({-9.0: [outcome(0.9)], -10.0: [outcome(0.9)], -11.0: [outcome(0.5)]}) == -10


@pytest.mark.parametrize("stopped", [outcome(0.9, stopped="hopeless"), outcome(math.nan), outcome(0.9, diverged=True)])
def test_a_rate_with_one_run_that_was_stopped_or_diverged_is_not_the_best(stopped):
    assert best_of({-9.0: [outcome(0.9), stopped], -10.0: [outcome(0.5)]}) == -10


def test_one_seed_that_always_diverges_does_not_hide_an_optimum_that_the_others_have():
    found, respond = search(range(-13, -8), seeds=(1, 2, 3)), curve_with_optimum_at(-11)
    healthy, _ = run(found, respond)
    outcomes, _ = run(found, lambda trial: outcome(0.1, diverged=True) if trial.seed == 2 else respond(trial))
    assert best_of(found.points(outcomes)) == best_of(found.points(healthy))
    assert found.verdict(outcomes) == ""
    assert len(outcomes) <= 2 * len(healthy)


def test_a_run_that_diverged_among_others_counts_as_the_worst_of_its_curve():
    diverged = outcome(0.2, diverged=True)
    assert best_of({-9.0: [outcome(0.9), outcome(0.9), diverged], -10.0: [outcome(0.8)], -11.0: [outcome(0.5)]}) == -10
    assert best_of({-9.0: [outcome(0.9), outcome(0.9), diverged], -10.0: [outcome(0.7)], -11.0: [outcome(0.5)]}) == -9


def test_scans_are_powers_of_two_that_halving_takes_to_the_resolution():
    assert scan_around(-11.2, known=True, resolution=1) == ((-13, -12, -11, -10, -9), 1)
    assert scan_around(-11.2, known=False, resolution=1) == ((-15, -13, -11, -9, -7), 2)
    assert scan_around(-11.2, known=True, resolution=0.5) == ((-13, -12, -11, -10, -9), 1)
    assert scan_range(-14, -10, 1) == ((-14, -13, -12, -11, -10), 1)
    assert scan_range(-14, -14, 1) == ((-14,), 1)
    lrs, step = scan_around(-8, known=False, resolution=0.75)
    assert math.log2(step / 0.75).is_integer()
    assert -8.25 in lrs


def test_a_scan_at_the_bounds_stays_within_them():
    assert min(scan_around(-23, known=False, resolution=1)[0]) == LOWEST
    assert max(scan_around(-2, known=True, resolution=1)[0]) == HIGHEST


def rising(rate, steps, noise=0.02, start=0.4):
    draw = random.Random(rate)
    return [(k + 1, start + rate * k + draw.gauss(0, noise)) for k in range(steps)]


def test_a_run_that_falls_below_its_start_is_hopeless_but_not_before_it_had_time():
    assert why_hopeless(rising(-0.002, 50), [], 100).startswith("the reward fell")
    assert why_hopeless(rising(-0.002, 30), [], 100) == ""
    assert why_hopeless(rising(0.0, 50), [], 100) == ""


def test_a_run_far_behind_its_peers_is_hopeless_but_not_with_too_few_of_them_or_in_their_noise():
    peers = [rising(rate, 100) for rate in (0.003, 0.004, 0.005)]
    assert "peers" in why_hopeless(rising(0.0005, 50), peers, 100)
    assert why_hopeless(rising(0.0005, 50), peers[:2], 100) == ""
    assert why_hopeless(rising(0.003, 50), peers, 100) == ""
    assert why_hopeless(rising(0.0005, 50, noise=0.5), peers, 100) == ""


def test_peers_count_at_the_same_step_only():
    late = [[(step, 0.4 if step < 60 else 0.9) for step in range(1, 101)] for _ in range(3)]
    assert why_hopeless(rising(0.0, 50, noise=0.0), late, 100) == ""
    short = [rising(0.01, 20) for _ in range(3)]
    assert why_hopeless(rising(0.0, 50), short, 100) == ""


def test_returns_below_zero_are_judged_by_their_gain():
    assert (
        why_hopeless([(k, -1000 + 5 * k) for k in range(50)], [[(k, -1000 + 6 * k) for k in range(100)]] * 3, 100) == ""
    )
    fallen = [(k, -300 - 5 * k + 7 * (k % 3)) for k in range(50)]
    assert why_hopeless(fallen, [], 100).startswith("the reward fell")


def constant_policy(seed, episodes_per_step, length, steps=50):
    """What SB3 logs of a policy that does not change: the mean over its last 100 episodes, at each of 50 rollouts.

    Args:
        episodes_per_step: How many environments there are.
        length: Length and return of an episode, from a generator.
    """
    draw, newest, curve = random.Random(seed), deque(maxlen=100), []
    under_way = [[0, *length(draw)] for _ in range(episodes_per_step)]
    for step in range(1, steps + 1):
        for episode in under_way:
            left = 128
            while left:
                taken = min(left, episode[1] - episode[0])
                left, episode[0] = left - taken, episode[0] + taken
                if episode[0] == episode[1]:
                    newest.append(episode[2])
                    episode[:] = [0, *length(draw)]
        if newest:
            curve.append((step * 128 * episodes_per_step, statistics.fmean(newest)))
    return curve, steps * 128 * episodes_per_step


EPISODES = {
    "CartPole": lambda draw: (8 + int(draw.expovariate(1 / 12)),) * 2,
    "Pendulum": lambda draw: (200, draw.gauss(-600, 350)),
    "Acrobot": lambda draw: (n := min(500, 60 + int(draw.expovariate(1 / 60))), -float(n)),
}


def is_stopped(curve, steps, independent=None):
    return any(why_hopeless(curve[: k + 1], [], steps, independent) for k in range(len(curve)))


@pytest.mark.parametrize("task", EPISODES)
def test_a_policy_that_does_not_change_is_stopped_in_at_most_one_run_of_a_hundred(task):
    """Its rewards are running means over 100 episodes, of which the short ones end first."""
    stopped = sum(is_stopped(*constant_policy(seed, 8, EPISODES[task])) for seed in range(100))
    assert stopped <= 1


@pytest.mark.parametrize("independent", [None, True])
def test_independent_rewards_that_do_not_change_are_stopped_as_seldom(independent):
    def white(seed):
        draw = random.Random(seed)
        return [(k, draw.gauss(0.4, 0.05)) for k in range(1, 61)]

    assert sum(is_stopped(white(seed), 60, independent) for seed in range(200)) <= 2


def test_a_collapse_of_independent_rewards_is_seen_at_the_next_tenth():
    def collapsing(seed):
        draw = random.Random(seed)
        return [(k, draw.gauss(500 if k < 15 else 10, 80 if k < 15 else 2)) for k in range(1, 51)]

    assert all(is_stopped(collapsing(seed)[:20], 50, independent=True) for seed in range(40))
