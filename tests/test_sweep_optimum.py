"""The optimum of a learning-rate curve, on curves whose optimum is known."""

import math

import numpy as np
import pytest

from mua_rl.analysis.optimum import COVERAGE, estimate_optimum
from mua_rl.errors import UserError

NAN = math.nan


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_rise_fast_fall(optimum, width):
    return lambda x: np.exp(-(((x - optimum) / (width * np.where(x < optimum, 2.0, 1.2))) ** 2))


def plateau(optimum, width):
    return lambda x: np.exp(-((np.maximum(np.abs(x - optimum) - 0.8, 0) / (0.9 * width)) ** 2))


def hill_before_a_cliff(optimum, width):
    return lambda x: np.where(x > optimum + 1.2, NAN, np.exp(-(((x - optimum) / (2 * width)) ** 2)))


def rise_up_to_a_cliff(optimum, width):
    return lambda x: np.where(x > optimum, NAN, sigmoid((x - optimum + 2) / (0.9 * width)))


def sweep_of(curve, rng, *, step=1.0, seeds=2, noise=0.03, span=5.0, seed_effect=0.0):
    """Runs on a grid around 0: base 0.1, gain 0.8."""
    lrs = np.arange(-span, span + 0.01, step)
    effects = rng.normal(0, seed_effect, seeds)
    heights = 0.1 + 0.8 * curve(lrs)
    return [
        (lr, height + effects[seed] + rng.normal(0, noise), seed)
        for lr, height in zip(lrs, heights, strict=True)
        for seed in range(seeds)
    ]


def simulate(family, sweeps=40, **options):
    """Over optima between grid points: errors of the estimate in octaves, whether its interval held, and its width."""
    rng = np.random.default_rng(7)
    errors, covered, widths = [], [], []
    for _ in range(sweeps):
        truth, width = rng.uniform(-0.5, 0.5), rng.uniform(0.7, 1.4)
        found = estimate_optimum(sweep_of(family(truth, width), rng, **options))
        errors.append(found.log2_lr - truth)
        covered.append(found.low <= truth <= found.high)
        widths.append(found.high - found.low)
    return np.array(errors), np.array(covered), np.array(widths)


GRIDS = {
    "octaves, two seeds": {"step": 1.0, "seeds": 2, "noise": 0.03},
    "half octaves, eight noisy seeds": {"step": 0.5, "seeds": 8, "noise": 0.15},
    "five learning rates": {"step": 1.0, "seeds": 2, "noise": 0.03, "span": 2.0},
}
FAMILIES = [slow_rise_fast_fall, plateau, hill_before_a_cliff]


@pytest.fixture(scope="module")
def simulation():
    """By grid and shape."""
    return {(name, family): simulate(family, **grid) for name, grid in GRIDS.items() for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_estimate_is_less_than_a_quarter_octave_off_on_average(simulation, grid, family):
    errors, _, _ = simulation[grid, family]
    assert abs(errors.mean()) < 0.25


def test_the_interval_holds_the_truth_about_as_often_as_it_says(simulation):
    covered = np.concatenate([covered for _, covered, _ in simulation.values()])
    two_standard_errors = 2 * math.sqrt(COVERAGE * (1 - COVERAGE) / len(covered))
    assert COVERAGE - two_standard_errors < covered.mean() < 0.985, "rather a little too often than not often enough"


def test_the_interval_is_about_an_octave_wide(simulation):
    assert np.mean([widths for _, _, widths in simulation.values()]) < 1.2


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("seeds", [1, 8])
def test_the_scatter_is_what_sweeps_with_other_seeds_differ_by(family, seeds):
    rng, options = np.random.default_rng(5), {"step": 0.5, "seeds": seeds, "noise": 0.15}
    found = [estimate_optimum(sweep_of(family(0.2, 1.0), rng, **options)) for _ in range(60)]
    scatter = math.sqrt(np.mean([optimum.scatter**2 for optimum in found]))
    assert 0.8 < scatter / np.std([optimum.log2_lr for optimum in found]) < 1.4
    assert scatter < math.sqrt(np.mean([optimum.draws.var() for optimum in found])), "seeds are not all that is unknown"


def test_runs_without_noise_have_next_to_no_scatter():
    rng = np.random.default_rng(5)
    assert estimate_optimum(sweep_of(slow_rise_fast_fall(0.2, 1.0), rng, step=0.5, seeds=4, noise=0.0)).scatter < 0.1


def test_a_curve_that_rises_up_to_a_cliff_has_its_optimum_at_the_last_rate_that_survives():
    errors, covered, _ = simulate(rise_up_to_a_cliff, step=0.5, seeds=3)
    assert np.all(errors <= 0), "never beyond the cliff"
    assert np.mean(errors) > -0.5, "and within a grid step of it"
    assert np.mean(covered) >= 0.75


def test_more_seeds_narrow_the_interval_and_more_noise_widens_it():
    def width(**options):
        rng = np.random.default_rng(1)
        found = [estimate_optimum(sweep_of(slow_rise_fast_fall(0.2, 1.0), rng, **options)) for _ in range(8)]
        return np.mean([optimum.high - optimum.low for optimum in found])

    assert width(seeds=8, noise=0.2) < 0.8 * width(seeds=2, noise=0.2)
    assert width(seeds=4, noise=0.02) < 0.8 * width(seeds=4, noise=0.3)


def test_the_fit_is_steadier_than_the_best_run():
    rng, fitted, luckiest = np.random.default_rng(3), [], []
    for _ in range(40):
        points = sweep_of(slow_rise_fast_fall(0.0, 1.2), rng, step=0.5, seeds=3, noise=0.1)
        fitted.append(estimate_optimum(points).log2_lr)
        luckiest.append(max(points, key=lambda point: point[1])[0])
    assert np.std(fitted) < 0.7 * np.std(luckiest)


def test_a_lucky_run_at_a_wrong_rate_is_not_the_best():
    points = sweep_of(slow_rise_fast_fall(0.0, 1.0), np.random.default_rng(0), step=0.5, seeds=4, noise=0.05)
    points = [(lr, 1.1 if (lr, seed) == (3.0, 2) else value, seed) for lr, value, seed in points]
    assert abs(estimate_optimum(points).log2_lr) < 0.5


def test_seeds_that_were_run_near_the_best_only_do_not_move_it_by_being_better_seeds():
    curve = plateau(0.0, 1.0)
    everywhere = [(float(lr), float(curve(lr)), 0) for lr in np.arange(-5, 5.1)]
    lucky_seed = [(lr, value + 0.2, 1) for lr, value, _ in everywhere if lr in (0, 1, 2)]
    assert abs(estimate_optimum(everywhere + lucky_seed).log2_lr) < 0.3


def test_rates_at_which_most_runs_diverge_are_never_the_best():
    rising = [(lr, 0.1 * lr + (NAN if lr > 4 else 0.0), 0) for lr in range(8)]
    found = estimate_optimum(rising)
    assert found.log2_lr <= found.largest == 4
    assert 4 < found.high <= 5
    assert found.edge == ""


def test_one_diverged_seed_counts_as_the_worst_of_the_curve():
    points = [(lr, value, seed) for lr, value in enumerate([0.1, 0.5, 0.8, 0.8, 0.5, 0.1]) for seed in range(3)]
    unstable = [(lr, NAN if (lr, seed) == (3, 0) else value, seed) for lr, value, seed in points]
    assert estimate_optimum(points).log2_lr == pytest.approx(2.5, abs=0.15)
    assert estimate_optimum(unstable).log2_lr < 2.3


@pytest.mark.parametrize("worst", [0.1, -10.0, -1e6])
def test_a_deep_fall_past_the_top_does_not_bend_it(worst):
    values = [0.1, 0.15, 0.4, 0.7, 0.8, 0.75, 0.3, worst]
    found = estimate_optimum([(lr, value, 0) for lr, value in enumerate(values)])
    assert found.log2_lr == pytest.approx(4.1, abs=0.3)
    assert found.value == pytest.approx(0.8, abs=0.05)


def test_a_flat_top_gives_its_middle_and_its_whole_width():
    values = [0.1, 0.1, 0.5, 0.8, 0.8, 0.8, 0.8, 0.5, 0.1]
    found = estimate_optimum([(lr, value + 0.001 * seed, seed) for lr, value in enumerate(values) for seed in range(3)])
    assert found.log2_lr == pytest.approx(4.5, abs=0.3)
    assert found.plateau[0] <= 3.75
    assert found.plateau[1] >= 5.25
    assert found.plateau[0] > 2
    assert found.plateau[1] < 7


@pytest.mark.parametrize(("slope", "edge"), [(1, "right"), (-1, "left")])
def test_an_optimum_at_an_end_of_the_grid_is_said_to_be_there(slope, edge):
    found = estimate_optimum([(lr, 0.5 + 0.05 * slope * lr, seed) for lr in range(-4, 5) for seed in (0, 1)])
    assert found.edge == edge
    assert slope * found.log2_lr > 3


def test_an_optimum_between_others_is_at_no_edge():
    values = [0.2, 0.5, 0.8, 0.5, 0.2]
    assert estimate_optimum([(lr, v, s) for lr, v in enumerate(values) for s in (0, 1)]).edge == ""


def test_the_unit_of_the_metric_its_sign_and_the_order_of_runs_do_not_matter():
    points = sweep_of(slow_rise_fast_fall(0.3, 1.0), np.random.default_rng(5), noise=0.05)
    found = estimate_optimum(points)
    assert estimate_optimum(points[::-1]).log2_lr == found.log2_lr
    returns = estimate_optimum([(lr, 1000 * value - 700, seed) for lr, value, seed in points])
    assert returns.log2_lr == pytest.approx(found.log2_lr, abs=0.06)
    assert returns.value == pytest.approx(1000 * found.value - 700, abs=20)
    losses = estimate_optimum([(lr, -value, seed) for lr, value, seed in points], higher_is_better=False)
    assert losses.log2_lr == pytest.approx(found.log2_lr, abs=0.06)
    assert losses.value == pytest.approx(-found.value, abs=0.02)


def test_the_fitted_curve_is_smooth_near_the_top_and_the_runs_means_elsewhere():
    points = [(lr, value, 0) for lr, value in enumerate([0.1, 0.2, 0.6, 0.8, 0.7, 0.2, NAN])]
    found = estimate_optimum(points)
    assert found.value_at(0) == pytest.approx(0.1)
    assert found.value_at(0.5) == pytest.approx(0.15)
    assert found.value_at(3) == pytest.approx(0.8, abs=0.05)
    assert found.value_at(6) == pytest.approx(0.1), "diverged: the worst"
    assert found.value_at(-3) == found.value_at(0)
    assert found.covers(2.5)
    assert not found.covers(-3)
    assert not found.covers(6.5)


def test_a_curve_of_equal_values_has_its_optimum_anywhere_on_the_grid():
    found = estimate_optimum([(lr, 500.0, seed) for lr in range(5) for seed in (0, 1)])
    assert found.plateau == (0, 4)
    assert found.value == pytest.approx(500)


def test_learning_rates_on_no_round_grid_are_fitted_too():
    values = {-9.95: 0.8, -9.9: 0.79, -13.37: 0.2, -7.77: NAN}
    found = estimate_optimum([(lr, value, 0) for lr, value in values.items()])
    assert -11.5 < found.log2_lr <= -9.9


def test_steps_that_no_eighth_of_an_octave_divides_end_at_the_last_rate_before_a_cliff():
    values = {-12.0: 0.0, -11.3: 1.0, -10.6: NAN}
    found = estimate_optimum([(lr, value, seed) for lr, value in values.items() for seed in (0, 1, 2)])
    assert found.plateau[1] <= found.log2_lr == found.largest == -11.3


def test_the_estimate_lies_in_its_interval_also_where_nearly_all_draws_are_at_one_end():
    values = [9.727, 59.818, 89.909, 100.0, 90.091, 60.181, 10.272, -59.637]
    found = estimate_optimum([(-9.41 + k, value, 0) for k, value in enumerate(values)], higher_is_better=False)
    assert found.low <= found.log2_lr <= found.high


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "there are none"),
        ([(-8.0, 0.5, 0), (-8.0, 0.6, 1)], "there is one"),
        ([(-8.0, NAN, 0), (-7.0, math.inf, 0)], "diverged at every learning rate from 2\\^-8 to 2\\^-7"),
    ],
)
def test_a_curve_without_an_optimum_is_refused_with_what_to_do(points, message):
    with pytest.raises(UserError, match=message):
        estimate_optimum(points)
