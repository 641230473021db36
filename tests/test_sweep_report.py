"""What the rows of finished sweeps say, on sweeps whose optima are known."""

import math
import multiprocessing
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from mua_rl.arms.arm import Arm, Outcome
from mua_rl.errors import UserError
from mua_rl.sweep import report
from mua_rl.sweep.cheaper import small_sweeps
from mua_rl.sweep.measured import FFT, Context, curve_name, distance, slope, sweeps_of
from mua_rl.sweep.movements import read_movements
from mua_rl.sweep.regret import DividedByTen, Fixed, Unchanged, regrets
from mua_rl.sweep.rows import COLUMNS, Row, append, read, read_all
from mua_rl.sweep.transfer import (
    BareRule,
    Calibrated,
    EqualMovement,
    Prediction,
    RankCorrected,
    Unmoved,
    calibrated,
    evidence,
    fit_exponent,
    leave_one_out,
    prediction_tests,
)
from mua_rl.sweep.transfer import Test as Comparison

SIZES = Context(width=512, outputs=256)
FFT_OPTIMUM = -12.3
SCHEMES = (("B", "1"), ("A", "1"), ("A", "1/r"))


def outcome(metric=0.5, *, before=0.1, stopped="", steps=60, seconds=10.0):
    return Outcome(metric, 0.01, before, metric, metric, False, stopped, steps, seconds)


def row(arm, result, *, task="arithmetic", base="base", algorithm="grpo"):
    return Row(algorithm, task, base, arm, result, "a machine")


def optimum_of(rank, init, alpha, exponent):
    """log2 η*: Init[B] moves by (r/m)^-exponent from FFT's, Init[A] as the theory says."""
    if rank is None:
        return FFT_OPTIMUM
    if init == "B":
        return FFT_OPTIMUM - exponent * math.log2(rank / SIZES.outputs)
    return -6.0 if alpha == "1/r" else -6.0 - 0.5 * math.log2(rank)


def sweep_rows(ranks=(4, 16, 64), schemes=SCHEMES, *, exponent=0.25, fft=True, seeds=2, noise=0.01, **where):
    """Hills with one scale and a cliff three octaves past the top."""
    rng = np.random.default_rng(len(where.get("task", "")))
    rows = []
    for curve in [(rank, *scheme) for scheme in schemes for rank in ranks] + [FFT] * fft:
        best = optimum_of(*curve, exponent)
        for log2_lr in np.arange(math.floor(best) - 4, math.floor(best) + 5, 0.5):
            for seed in range(seeds):
                height = 0.8 * math.exp(-(((log2_lr - best) / 2.2) ** 2))
                result = outcome(float(0.1 + height + rng.normal(0, noise)), seconds=10.0 if curve[0] else 40.0)
                if log2_lr > best + 3:
                    result = Outcome.of_divergence(0.1, 20, 3.0, "not finite")
                rows.append(row(Arm(*curve, float(log2_lr), seed), result, **where))
    return rows


def sweeps(rows, context=SIZES):
    return sweeps_of(rows, contexts=lambda key: context)


@pytest.fixture(scope="module")
def quarter():
    """A sweep whose Init[B] optima fall as r^(-1/4)."""
    return sweeps(sweep_rows())


# The CSV


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(Arm(8, "B", "1/sqrt(r)", -11.5, 3), outcome(1 / 3), task='odd, "task"', base="hub/base"),
        row(Arm(None, "", "", -14.0, 0), outcome(0.1, stopped="hopeless:\nit fell")),
    ]
    append(tmp_path / "deep" / "sweep.csv", rows)
    append(tmp_path / "deep" / "sweep.csv", [])
    assert read(tmp_path / "deep" / "sweep.csv") == rows


def test_a_diverged_run_comes_back_with_its_nan(tmp_path):
    append(tmp_path / "sweep.csv", [row(Arm(8, "B", "1", -3.0, 0), Outcome.of_divergence(0.1, 7, 1.5, "not finite"))])
    (found,) = read(tmp_path / "sweep.csv")
    assert math.isnan(found.outcome.metric)
    assert found.outcome.diverged is True
    assert found.outcome.steps == 7


def _append_many(path, rank):
    for seed in range(50):
        append(path, [row(Arm(rank, "B", "1", -10.0, seed), outcome(0.5))] * 3)


def test_processes_that_append_at_once_lose_no_line_and_write_one_header(tmp_path):
    path = tmp_path / "sweep.csv"
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would spend its time on imports
    processes = [fork.Process(target=_append_many, args=(path, rank)) for rank in (1, 2, 3, 4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert path.read_text().count("algorithm") == 1
    assert len(read(path)) == 4 * 50 * 3


def test_a_line_that_a_crash_cut_off_is_named_and_does_not_spoil_the_next(tmp_path):
    path, first, last = (
        tmp_path / "sweep.csv",
        row(Arm(8, "B", "1", -9.0, 0), outcome()),
        row(Arm(8, "B", "1", -8.0, 0), outcome()),
    )
    append(path, [first])
    whole = path.read_text()
    path.write_text(whole + "grpo,arithmetic,ba")
    append(path, [last])
    with pytest.raises(UserError, match=r"line 3 .*too few values.*delete the line"):
        read(path)
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not line.endswith(",ba\n")))
    assert read(path) == [first, last]


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("rank", "8.5", "rank is '8.5'"),
        ("rank", "-8", "rank -8"),
        ("init", "C", "init 'C'"),
        ("alpha", "two", "cannot read the multiplier 'two'"),
        ("log2_lr", "nan", "log2_lr is nan"),
        ("metric", "", "metric is ''"),
        ("diverged", "maybe", "diverged is 'maybe'"),
        ("machine", "one,more", "too many"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_line(tmp_path, column, value, fault):
    path = tmp_path / "sweep.csv"
    append(path, [row(Arm(8, "B", "1", -9.0, seed), outcome()) for seed in (0, 1)])
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    cells[COLUMNS.index(column)] = value
    path.write_text("\n".join([*lines[:2], ",".join(cells)]))
    with pytest.raises(UserError, match="line 3") as error:
        read(path)
    assert fault in str(error.value)


def test_a_file_that_is_no_sweeps_csv_is_refused_for_reading_and_appending(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("task,rank\narithmetic,8\n")
    with pytest.raises(UserError, match="lacks the columns algorithm, base"):
        read(path)
    with pytest.raises(UserError, match="lacks the columns"):
        append(path, [row(Arm(8, "B", "1", -9.0, 0), outcome())])
    assert path.read_text() == "task,rank\narithmetic,8\n"
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.csv")


def test_a_run_in_two_files_counts_once_as_the_last_has_it(tmp_path):
    old, new = row(Arm(8, "B", "1", -9.0, 0), outcome(0.2)), row(Arm(8, "B", "1", -9.0, 0), outcome(0.3))
    other = row(Arm(8, "B", "1", -9.0, 0), outcome(0.4), base="another base")
    append(tmp_path / "a.csv", [old])
    append(tmp_path / "b.csv", [new, other])
    assert read_all([tmp_path / "a.csv", tmp_path / "b.csv"]) == [new, other]


# Optima and slopes


def test_each_curve_has_its_optimum_where_it_was_put(quarter):
    for curve, measured in quarter[0].curves.items():
        assert measured.optimum.log2_lr == pytest.approx(optimum_of(*curve, 0.25), abs=0.2), curve_name(curve)
    assert list(quarter[0].curves)[-1] == FFT


def test_rows_of_fft_are_one_curve_whatever_their_init_says():
    rows = [replace(r, arm=replace(r.arm, init="B", alpha="1")) if r.arm.seed else r for r in sweep_rows(schemes=())]
    (sweep,) = sweeps(rows)
    assert list(sweep.curves) == [FFT]
    assert len(sweep.fft.points) == len(rows)


def test_two_curves_of_the_same_runs_are_not_known_to_have_the_same_optimum():
    curves = [FFT, (8, "B", "1"), (64, "B", "1")]
    rows = [row(Arm(*curve, lr, 0), outcome(0.9)) for curve in curves for lr in (-12.0, -11.0, -10.0, -9.0)]
    (sweep,) = sweeps(rows)
    for curve in curves[1:]:
        octaves, low, high = distance(sweep.curves[curve], sweep.fft)
        assert octaves == 0 and low < -1 and high > 1
    _, low, high = distance(sweep.curves[8, "B", "1"], sweep.curves[64, "B", "1"])
    assert low < -1 and high > 1


def test_tasks_bases_and_algorithms_are_sweeps_of_their_own():
    rows = [r for task in ("x", "y") for r in sweep_rows((4,), SCHEMES[:1], task=task)]
    rows += sweep_rows((4,), SCHEMES[:1], base="other") + sweep_rows((4,), SCHEMES[:1], algorithm="ppo")
    assert [str(sweep) for sweep in sweeps(rows)] == [
        "grpo arithmetic other", "grpo x base", "grpo y base", "ppo arithmetic base",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "true", "theory"), [(("B", "1"), -0.25, 0), (("A", "1"), -0.5, -0.5), (("A", "1/r"), 0, 0)]
)
def test_slopes_are_found_with_the_theorys_beside_them(quarter, scheme, true, theory):
    found = slope(quarter, scheme)
    assert found.low <= true <= found.high
    assert found.high - found.low < 0.3
    assert found.theory == pytest.approx(theory, abs=1e-6)
    assert found.ranks == [4, 16, 64]


def test_a_slope_over_several_sweeps_is_known_better_than_over_one(quarter):
    many = sweeps([r for task in ("x", "xy", "xyz", "xyzt") for r in sweep_rows(task=task)])
    pooled, alone = slope(many, ("B", "1")), slope(quarter, ("B", "1"))
    assert pooled.high - pooled.low < 0.7 * (alone.high - alone.low)
    assert pooled.low <= -0.25 <= pooled.high


def test_the_theorys_slope_is_left_open_where_it_depends_on_an_unknown_width():
    rows = sweep_rows((4, 64), (("B", "1/r"),))
    assert slope(sweeps(rows, Context()), ("B", "1/r")).theory is None
    assert slope(sweeps(rows, Context(width=2**14)), ("B", "1/r")).theory == pytest.approx(1)
    assert slope(sweeps(sweep_rows(), Context()), ("A", "1")).theory == pytest.approx(-0.5)


def test_a_rank_whose_optimum_is_at_the_edge_of_its_grid_counts_in_no_slope_and_no_prediction():
    rows = [r for r in sweep_rows() if not (r.arm.rank == 64 and r.arm.log2_lr > -13)]
    assert sweeps(rows)[0].curves[64, "B", "1"].optimum.edge == "right"
    assert slope(sweeps(rows), ("B", "1")).ranks == [4, 16]
    touched = {m.curve for test in prediction_tests(sweeps(rows), BareRule()) for m in (test.source, test.target)}
    assert (64, "B", "1") not in touched
    assert (16, "B", "1") in touched


def test_a_run_that_was_stopped_early_is_never_the_best():
    best = optimum_of(4, "B", "1", 0.25)
    rows = [
        replace(r, outcome=outcome(5.0, stopped="hopeless")) if r.arm.log2_lr > best + 2 else r
        for r in sweep_rows((4,), SCHEMES[:1], fft=False)
    ]
    assert sweeps(rows)[0].curves[4, "B", "1"].optimum.log2_lr == pytest.approx(best, abs=0.25)


def test_another_value_than_the_metric_can_be_compared():
    rows = [
        replace(r, outcome=replace(r.outcome, metric=0.3, reward_mean=r.outcome.metric))
        for r in sweep_rows((4,), SCHEMES[:1])
    ]
    (sweep,) = sweeps_of(rows, "reward_mean")
    assert sweep.curves[4, "B", "1"].optimum.log2_lr == pytest.approx(optimum_of(4, "B", "1", 0.25), abs=0.25)


# Rules


def pairs(tests):
    return {(test.source.curve, test.target.curve) for test in tests}


def test_the_bare_rule_predicts_within_a_scheme_and_between_init_b_and_fft_and_nothing_else(quarter):
    covered = pairs(prediction_tests(quarter, BareRule()))
    assert ((4, "B", "1"), FFT) in covered
    assert (FFT, (4, "B", "1")) in covered
    assert ((4, "A", "1"), (16, "A", "1/r")) in covered
    assert ((4, "A", "1"), FFT) not in covered
    assert ((4, "A", "1"), (4, "B", "1")) not in covered


def test_the_rule_with_the_right_exponent_hits_where_the_bare_rule_misses(quarter):
    def errors(rule):
        tests = prediction_tests(quarter, rule)
        return {(t.source.curve[0], t.target.curve[0]): t for t in tests if t.source.curve[1] != "A"}

    bare, corrected = errors(BareRule()), errors(RankCorrected(0.25))
    assert bare.keys() == corrected.keys()
    assert bare[4, None].error == pytest.approx(0.25 * math.log2(256 / 4), abs=0.25)
    assert not bare[4, None].is_hit
    assert not bare[4, None].is_covered
    assert all(test.is_hit for test in corrected.values())
    assert np.mean([test.is_covered for test in corrected.values()]) > 0.8
    assert {test.kind for test in corrected.values()} == {"within Init[B]", "FFT ↔ Init[B]"}


def test_init_a_is_predicted_as_the_theory_says_whatever_the_correction(quarter):
    def of_init_a(rule):
        return [t.prediction for t in prediction_tests(quarter, rule) if t.source.curve[1] == "A"]

    assert of_init_a(RankCorrected(0.5)) == of_init_a(BareRule())
    assert all(test.is_hit for test in prediction_tests(quarter, BareRule()) if test.source.curve[1] == "A")


def test_without_the_layers_outputs_the_correction_predicts_ranks_but_not_fft():
    covered = pairs(prediction_tests(sweeps(sweep_rows(), Context(width=512)), RankCorrected(0.25)))
    assert ((4, "B", "1"), (64, "B", "1")) in covered
    assert not any(FFT in pair for pair in covered)


def test_an_interval_counts_the_sources_uncertainty_and_the_rules_own_error(quarter):
    source = quarter[0].curves[4, "B", "1"]
    exact, rough = (Calibrated(BareRule(), {"FFT, Init[B]": spread}).predict(source, FFT, SIZES) for spread in (0, 1))
    assert exact.log2_interval == pytest.approx((source.optimum.low, source.optimum.high))
    assert rough.log2_lr == exact.log2_lr
    assert rough.log2_interval[0] == pytest.approx(
        exact.log2_lr - math.hypot(exact.log2_lr - exact.log2_interval[0], 1.645), abs=1e-3
    )
    assert rough.log2_interval[1] > exact.log2_interval[1] + 1


def test_a_measured_optimum_is_covered_if_its_own_interval_reaches_the_stated_one(quarter):
    source, target = quarter[0].curves[4, "B", "1"], quarter[0].fft

    def covers(off, own):
        blurred = replace(target.optimum, low=target.optimum.log2_lr - own, high=target.optimum.log2_lr + own)
        centre = target.optimum.log2_lr + off
        prediction = Prediction(centre, (centre - 0.3, centre + 0.3))
        return Comparison("", quarter[0], source, replace(target, optimum=blurred), prediction, off).is_covered

    for sign in (-1, 1):
        assert covers(0.29 * sign, 0.0)
        assert not covers(0.31 * sign, 0.0)
        assert covers(0.49 * sign, 0.4)  # 0.5 = √(0.3² + 0.4²)
        assert not covers(0.51 * sign, 0.4)


def test_a_perfect_rule_hits_but_for_what_other_seeds_would_have_changed(quarter):
    def steady(measured, scatter):
        return replace(measured, optimum=replace(measured.optimum, scatter=scatter))

    def hit(*scatters):
        source, target = map(steady, (quarter[0].curves[4, "B", "1"], quarter[0].fft), scatters)
        return Comparison("", quarter[0], source, target, Prediction(0.0), error=9.0).perfect_hit

    assert hit(0.3, 0.4) == hit(0.4, 0.3) == pytest.approx(0.683, abs=1e-3)  # within one standard deviation
    assert hit(3.0, 4.0) < 0.1
    assert hit(0.0, 0.0) == 1


def test_a_prediction_on_the_targets_plateau_is_as_good_as_the_best_however_far_from_the_optimum(quarter):
    source, target = quarter[0].curves[4, "B", "1"], quarter[0].fft
    best = target.optimum.log2_lr

    def test_at(off, scatter=0.0):
        still = replace(source, optimum=replace(source.optimum, scatter=0.0))
        flat = replace(target, optimum=replace(target.optimum, plateau=(best - 2.0, best + 1.0), scatter=scatter))
        return Comparison("", quarter[0], still, flat, Prediction(best + off), off)

    assert [test_at(off).is_as_good for off in (-2.1, -1.9, 0.0, 0.9, 1.1)] == [False, True, True, True, False]
    assert not test_at(-1.9).is_hit
    assert test_at(9.0).perfect_as_good == 1
    assert test_at(9.0, scatter=1.0).perfect_as_good == pytest.approx(0.819, abs=1e-3)  # -2 to +1 standard deviations


def test_no_rule_leaves_the_rate_unchanged_for_just_the_pairs_that_the_theory_covers(quarter):
    unmoved = prediction_tests(quarter, Unmoved())
    assert pairs(unmoved) == pairs(prediction_tests(quarter, BareRule()))
    assert all(test.prediction.log2_lr == test.source.optimum.log2_lr for test in unmoved)


def test_a_rule_that_is_right_hits_about_as_often_as_a_perfect_rule_is_said_to():
    noisy = sweeps([r for i in range(12) for r in sweep_rows(schemes=SCHEMES[:1], task="x" * i, noise=0.25)])
    tests = prediction_tests(noisy, RankCorrected(0.25))
    ceiling = np.mean([test.perfect_hit for test in tests])
    assert 0.5 < ceiling < 0.9
    assert np.mean([test.is_hit for test in tests]) == pytest.approx(ceiling, abs=0.1)
    assert np.mean([test.is_hit for test in prediction_tests(noisy, BareRule())]) < ceiling - 0.3


def test_a_rule_is_calibrated_so_that_its_intervals_cover_as_often_as_they_say(quarter):
    bare, right = calibrated(BareRule(), quarter), calibrated(RankCorrected(0.25), quarter)
    assert bare.otherwise > 0.2 > right.otherwise
    covered = [test.is_covered for test in prediction_tests(quarter, bare)]
    assert 0.9 <= np.mean(covered) < 1
    assert bare.name == BareRule().name
    assert [test.error for test in prediction_tests(quarter, bare)] == [
        test.error for test in prediction_tests(quarter, BareRule())
    ]


def test_kinds_of_pairs_have_a_spread_of_their_own_if_there_are_enough_of_them():
    few = calibrated(BareRule(), sweeps(sweep_rows()))
    assert set(few.spreads) == {"Init[A]", "Init[B]", "FFT, Init[B]"}
    assert few.spreads["Init[B]"] == few.otherwise
    many = sweeps([r for task in ("x", "xy", "xyz", "xyzt") for r in sweep_rows(task=task)])
    found = calibrated(BareRule(), many).spreads
    assert found["FFT, Init[B]"] > found["Init[B]"] > found["Init[A]"]


def test_without_another_task_no_interval_is_stated_and_no_sweep_is_judged_by_itself(quarter):
    assert calibrated(BareRule(), []) == Calibrated(BareRule())
    alone = leave_one_out(quarter, partial(calibrated, BareRule()))
    assert len(alone) == len(prediction_tests(quarter, BareRule()))
    assert {test.is_covered for test in alone} == {None}
    line = report.prediction_table(quarter, [BareRule()]).lines[0]
    assert (line[0], line[-1]) == ("grpo: theory", "–")
    # Spreads are the other task's: large where it needed a correction, none where it did not.
    two = sweeps(sweep_rows(task="x", exponent=0.5) + sweep_rows(task="xy", exponent=0.0))
    tests = leave_one_out(two, partial(calibrated, BareRule()))
    covered = {
        task: [t.is_covered for t in tests if t.sweep.task == task and t.kind != "within Init[A]"]
        for task in ("x", "xy")
    }
    assert all(covered["xy"])
    assert np.mean(covered["x"]) < 0.2


def test_evidence_is_what_nine_pairs_in_ten_kept_to():
    many = sweeps([r for task in ("x", "xy", "xyz", "xyzt") for r in sweep_rows(task=task)])
    found = evidence(many, BareRule())
    assert found.keys() == {"Init[A]", "Init[B]", "FFT, Init[B]"}
    full = found["FFT, Init[B]"]
    assert (full.ranks, full.alphas, found["Init[A]"].alphas) == ((4, 64), ("1",), ("1", "1/r"))
    assert 50 < full.steps <= 60  # some runs diverged after 20
    assert full.octaves == pytest.approx(0.25 * math.log2(256 / 4), abs=0.25)
    assert full.loss == pytest.approx(1 - math.exp(-((1.5 / 2.2) ** 2)), abs=0.1)
    assert found["Init[A]"].octaves < 0.3
    assert found["Init[A]"].loss < 0.02


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5])
def test_the_exponent_is_fitted_from_the_optima(exponent):
    rule = fit_exponent(sweeps(sweep_rows(schemes=SCHEMES[:1], exponent=exponent)))
    assert rule.exponent == pytest.approx(exponent, abs=0.06)


def test_the_exponent_needs_curves_that_it_changes():
    assert fit_exponent(sweeps(sweep_rows(schemes=SCHEMES[1:]))) is None


def test_each_task_is_predicted_by_a_rule_fitted_on_the_others_only():
    kept = [r for base in ("s0", "s1") for r in sweep_rows(schemes=SCHEMES[:1], exponent=0.5, task="task", base=base)]
    found = sweeps(kept + sweep_rows(schemes=SCHEMES[:1], exponent=0.0, task="other"))
    tests = leave_one_out(found)
    assert len(tests) == len(prediction_tests(found, BareRule()))
    rules = {(test.sweep.task, test.rule) for test in tests}
    assert len(rules) == 2
    for task, rule in rules:
        assert float(rule.split("^")[1]) == pytest.approx(0.0 if task == "task" else 0.5, abs=0.06)


def test_habits_apply_to_what_they_are_said_of():
    (sweep,) = sweeps(sweep_rows((8,), (("B", "1"), ("A", "1"), ("A", "2"))))
    a, twice, b = (sweep.curves[8, *scheme] for scheme in (("A", "1"), ("A", "2"), ("B", "1")))
    assert DividedByTen().predict(a, FFT, SIZES).log2_lr == pytest.approx(a.optimum.log2_lr - math.log2(10))
    assert DividedByTen().predict(b, FFT, SIZES) is None
    assert DividedByTen().predict(a, a.curve, SIZES) is None
    assert Unchanged().predict(twice, FFT, SIZES).log2_lr == twice.optimum.log2_lr
    assert Unchanged().predict(a, FFT, SIZES) is None
    assert Fixed().predict(a, FFT, SIZES).log2_lr == pytest.approx(-19.93, abs=0.01)


# Regret


def test_regret_is_the_share_of_ffts_gain_that_is_lost_at_the_transferred_rate(quarter):
    found = {regret.source.curve[0]: regret for regret in regrets(quarter, BareRule())}
    assert set(found) == {4, 16, 64}
    off = 0.25 * math.log2(256 / 4)
    assert found[4].share == pytest.approx(1 - math.exp(-((off / 2.2) ** 2)), abs=0.07)
    assert not found[4].within_noise
    assert all(regret.share < 0.02 for regret in regrets(quarter, RankCorrected(0.25)))
    assert all(regret.share >= 0 for rule in (BareRule(), DividedByTen(), Fixed()) for regret in regrets(quarter, rule))


def test_the_cost_of_tuning_is_a_share_of_ffts_sweep(quarter):
    regret = regrets(quarter, BareRule())[0]
    fft = quarter[0].fft
    assert regret.steps == pytest.approx(regret.source.steps / fft.steps)
    assert 0.2 < regret.seconds < 0.35  # a quarter of the seconds a run
    (fixed,) = regrets(quarter, Fixed())
    assert (fixed.steps, fixed.seconds, fixed.source) == (0, 0, None)


def test_sweeps_of_fewer_seeds_are_dealt_from_a_larger_one_and_cost_their_share():
    (whole,) = sweeps_of(sweep_rows(exponent=0.5, seeds=4, noise=0.02), contexts=lambda key: SIZES)
    pairs = small_sweeps(whole, 2)
    assert sorted(curve_name(small.source.curve) for small in pairs) == sorted(
        2 * ["FFT", "Init[B] α=1 r=4", "Init[B] α=1 r=16", "Init[B] α=1 r=64"]
    )  # the rule says nothing of FFT from Init[A]
    for small in pairs:
        whole_curve = whole.curves[small.source.curve]
        assert small.steps == pytest.approx(whole_curve.steps / 2 / whole.fft.steps)
        assert len(small.source.points) == len(whole_curve.points) / 2
        assert small.source.optimum.log2_lr != whole_curve.optimum.log2_lr
        assert 0 <= small.share < 0.1
    assert len(small_sweeps(whole, 1)) == 2 * len(pairs)
    assert small_sweeps(whole, 5) == []


def test_a_seed_that_has_not_run_at_every_rate_makes_no_sweep_of_its_own():
    rows = [r for r in sweep_rows(schemes=SCHEMES[:1], exponent=0.5) if r.arm.seed == 0 or r.arm.log2_lr > -12]
    (sweep,) = sweeps_of(rows, contexts=lambda key: SIZES)
    assert {seed for small in small_sweeps(sweep, 1) for _, _, seed in small.source.points} == {0}
    (lora,) = sweeps_of([r for r in rows if r.arm.rank], contexts=lambda key: SIZES)
    assert small_sweeps(lora, 1) == []


def test_a_rate_outside_ffts_grid_gives_a_bound(quarter):
    (fixed,) = regrets(quarter, Fixed())
    assert fixed.is_bound
    assert fixed.share > 0.9
    assert not regrets(quarter, BareRule())[0].is_bound


def test_where_fft_gains_nothing_there_is_no_share_to_lose():
    rows = [replace(r, outcome=replace(r.outcome, before=0.95)) if r.arm.rank is None else r for r in sweep_rows((4,))]
    assert all(math.isnan(regret.share) for regret in regrets(sweeps(rows), BareRule()))


# The report


def test_a_perfect_rule_stands_below_the_rules_of_each_algorithm_with_all_pairs_of_theirs():
    rows = [r for name in ("grpo", "ppo") for r in sweep_rows((4, 64), SCHEMES[:2], noise=0.1, algorithm=name)]
    found = sweeps(rows)
    table = report.prediction_table(found, [BareRule(), EqualMovement()])
    names = [line[0] for line in table.lines]
    assert [name for name in names if "perfect" in name] == [names[4], names[9]]
    ceiling = dict(zip(table.columns, table.lines[4], strict=True))
    tests = prediction_tests(found[:1], BareRule())
    assert ceiling["all"] == f"{np.mean([test.perfect_hit for test in tests]):.0%}"
    assert ceiling["as good as the best"] == f"{np.mean([test.perfect_as_good for test in tests]):.0%}"
    assert ceiling["within Init[A]"].endswith("%")
    assert 0 < float(ceiling["mean error"]) < 0.5
    assert ceiling["in the stated interval"] == "–"


def test_the_rule_that_ships_stands_among_the_rules_and_is_each_algorithms_own():
    rows = [r for name in ("grpo", "ppo") for r in sweep_rows((4, 64), SCHEMES[:2], algorithm=name)]
    table = report.prediction_table(sweeps(rows), [BareRule(), RankCorrected(0.5)])
    cells = {line[0]: line[1:] for line in table.lines}
    assert cells["grpo: what mua_rl does by default"] == cells["grpo: theory × (r/m)^0.5"]
    assert cells["ppo: what mua_rl does by default"] == cells["ppo: no rule, the LR unchanged"] != cells["ppo: theory"]


def test_predictions_as_good_as_the_best_are_counted_beside_the_width_that_noise_gives_them():
    def bare(noise):
        found = sweeps(sweep_rows((4, 64), SCHEMES[:1], exponent=0.5, noise=noise))
        table = report.prediction_table(found, [BareRule()])
        return found, dict(zip(table.columns, table.lines[0], strict=True))

    (exact, sharp), (noisy, blurred) = bare(0.01), bare(0.4)
    assert sharp["as good as the best"] == "0/6 (0%)"
    good = sum(test.is_as_good for test in prediction_tests(noisy, BareRule()))
    assert good > 0
    assert blurred["as good as the best"] == f"{good}/6 ({good / 6:.0%})"
    assert float(blurred["its median width"]) > 2 * float(sharp["its median width"])
    widths = [np.diff(measured.optimum.plateau).item() for measured in exact[0].curves.values()]
    assert float(sharp["its median width"]) == pytest.approx(np.median(widths), abs=0.06)


def test_the_table_of_losses_counts_how_often_full_finetuning_is_as_good_as_its_best(quarter):
    table = report.regret_summary(quarter, [BareRule(), RankCorrected(0.25)])
    shares = {line[0]: line[table.columns.index("as good as the best")] for line in table.lines}
    good = sum(regret.within_noise for regret in regrets(quarter, BareRule()))
    assert shares["grpo: theory"] == f"{good}/3 ({good / 3:.0%})"
    assert good < 3
    assert shares["grpo: theory × (r/m)^0.25"] == "3/3 (100%)"


def run_report(monkeypatch, capsys, *flags):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["report", *map(str, flags)])
    report.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def csvs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csvs")
    append(folder / "a.csv", sweep_rows((4, 64), SCHEMES[:2], base="hub/model", task="first"))
    append(folder / "b.csv", sweep_rows((4, 64), SCHEMES[:2], base="policy-w256", task="second task", algorithm="ppo"))
    return [folder / "a.csv", folder / "b.csv"]


def test_the_report_says_everything_and_says_the_same_again(csvs, tmp_path, monkeypatch, capsys):
    flags = [*csvs, "--sizes", "*=512,256", "--out"]
    printed = run_report(monkeypatch, capsys, *flags, tmp_path / "one")
    run_report(monkeypatch, capsys, *flags, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "grpo-first-hub-model-curves.png", "grpo-first-hub-model-optimum.png", "ppo-second-task-policy-w256-curves.png",
        "ppo-second-task-policy-w256-optimum.png", "report.md",
    ]  # fmt: skip
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    text = (tmp_path / "one" / "report.md").read_text()
    for name in names[:-1]:
        assert f"]({name})" in text
    for phrase in (
        "held-out accuracy",
        "held-out return",
        "Slope of",
        "within 0.5 octave",
        "always 1e-06",
        "fitted on",
    ):
        assert phrase in text
        assert phrase in printed
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") >= 4


def test_every_table_of_the_report_has_as_many_cells_in_each_line(csvs, tmp_path):
    tables = report.write_report(sweeps(read_all(csvs)), tmp_path)
    assert len(tables) == 8
    for table in tables:
        assert {len(line) for line in table.lines} == {len(table.columns)}, table.title


def test_the_report_names_curves_without_an_optimum_and_optima_at_an_edge(tmp_path, monkeypatch, capsys):
    rows = [r for r in sweep_rows((4, 16, 64), SCHEMES[:1]) if not (r.arm.rank == 64 and r.arm.log2_lr > -13)]
    lost = Outcome.of_divergence(0.1, 5, 1.0, "not finite")
    append(tmp_path / "c.csv", [replace(r, outcome=lost) if r.arm.rank == 16 else r for r in rows])
    text = run_report(monkeypatch, capsys, tmp_path / "c.csv", "--out", tmp_path)
    assert "most runs diverged at every learning rate" in text
    assert "at the right end: extend the grid" in text
    assert "Without `--sizes` of base" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "rows", [sweep_rows((4,), SCHEMES[:1], fft=False), sweep_rows(schemes=())], ids=["one rank", "FFT alone"]
)
def test_a_sweep_of_one_curve_has_a_report(tmp_path, monkeypatch, capsys, rows):
    append(tmp_path / "c.csv", rows)
    assert "optima by held-out accuracy" in run_report(monkeypatch, capsys, tmp_path / "c.csv", "--out", tmp_path)


def test_two_sweeps_whose_names_make_one_file_name_have_two_figures(tmp_path):
    rows = [r for base in ("a/b", "a b") for r in sweep_rows(schemes=(), base=base)]
    report.write_report(sweeps(rows), tmp_path)
    assert len(list(tmp_path.glob("*-curves*.png"))) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(Arm(8, "B", "1", -9.0, seed), outcome()) for seed in (0, 1)], "Init\\[B\\] α=1 r=8.*two learning rates"),
        (
            [row(Arm(8, "B", "1", -9.0, 0), outcome(math.nan)), row(Arm(8, "B", "1", -8.0, 0), outcome(math.nan))],
            "diverged",
        ),
    ],
)
def test_a_sweep_without_any_optimum_is_refused(tmp_path, monkeypatch, capsys, rows, message):
    append(tmp_path / "c.csv", rows)
    with pytest.raises(UserError, match=message):
        run_report(monkeypatch, capsys, tmp_path / "c.csv", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_csv_with_a_header_alone_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(UserError, match="no runs: run the sweep first"):
        run_report(monkeypatch, capsys, tmp_path / "c.csv", "--out", tmp_path / "out")


@pytest.mark.parametrize("sizes", ["base", "base=512", "base=0,256", "=1,2", "base=a,b"])
def test_sizes_that_are_none_are_refused(csvs, tmp_path, monkeypatch, capsys, sizes):
    with pytest.raises(UserError, match="--sizes takes"):
        run_report(monkeypatch, capsys, csvs[0], "--out", tmp_path, "--sizes", sizes)


def test_the_first_pattern_that_fits_gives_a_bases_sizes():
    contexts = report.parse_sizes(["hub/*=64,32", "*=8,4"])
    assert contexts(("grpo", "a task", "hub/model")) == Context(64, 32)
    assert contexts(("grpo", "a task", "other")) == Context(8, 4)
    assert report.parse_sizes([])(("grpo", "a task", "other")) == Context()


def test_a_folder_that_cannot_be_made_is_refused(csvs, monkeypatch, capsys):
    with pytest.raises(UserError, match="--out takes a folder"):
        run_report(monkeypatch, capsys, csvs[0], "--out", csvs[1])


def test_names_with_bars_and_brackets_do_not_break_the_tables(tmp_path, monkeypatch, capsys):
    append(tmp_path / "c.csv", sweep_rows((4, 64), SCHEMES[:1], task="a|b", base="[bold]base"))
    printed = run_report(monkeypatch, capsys, tmp_path / "c.csv", "--out", tmp_path)
    assert "grpo a|b [bold]base: optima" in printed
    assert "a|b [bold]base, Init[B] α=1" in printed
    assert "| grpo a\\|b [bold]base, Init[B] α=1 |" in (tmp_path / "report.md").read_text()


def test_a_rate_at_which_full_finetuning_diverged_loses_all_and_one_off_the_grid_is_but_a_bound():
    def hill(curve, best, lowest, highest, cliff=math.inf):
        for lr in range(lowest, highest + 1):
            for seed in (0, 1):
                metric = 0.6 - 0.02 * (lr - best) ** 2
                result = outcome(metric) if lr < cliff else Outcome.of_divergence(0.1, 20, 3.0, "not finite")
                yield row(Arm(*curve, float(lr), seed), result)

    (found,) = sweeps([*hill(FFT, -14, -17, -12, cliff=-12), *hill((8, "B", "1"), -11, -14, -8)])
    (beyond,) = regrets([found], BareRule())
    assert beyond.log2_lr == pytest.approx(-11, abs=0.3)
    assert beyond.share == pytest.approx(1.0)
    assert not beyond.is_bound
    (below,) = regrets([found], Fixed(2.0**-20))
    assert below.is_bound


def test_equal_movement_takes_a_rate_over_by_what_was_measured_whatever_the_initialisation(tmp_path):
    file = tmp_path / "movement.csv"
    lines = ["task,base,rank,init,alpha,log2_lr,seed,steps,kl,machine"]
    for curve, rate in {(8, "A", "1"): 2.0**5, FFT: 2.0**9}.items():  # √KL per step and unit of learning rate
        for steps, log2_lr in ((1, -16), (2, -15)):
            kl = (rate * steps * 2.0**log2_lr) ** 2
            lines.append(f"arithmetic,base,{curve[0] or ''},{curve[1]},{curve[2]},{log2_lr},0,{steps},{kl},cpu")
    file.write_text("\n".join(lines) + "\n")
    movements = read_movements([file])["arithmetic", "base"]
    assert movements == {(8, "A", "1"): pytest.approx(2**5), FFT: pytest.approx(2**9)}
    (found,) = sweeps(sweep_rows(ranks=(8,), schemes=(("A", "1"),)), Context(movement=movements))
    source = found.curves[8, "A", "1"]
    for exponent, octaves in ((1.0, 4), (0.5, 2)):
        prediction = EqualMovement(exponent).predict(source, FFT, found.context)
        assert prediction.log2_lr == pytest.approx(source.optimum.log2_lr - octaves)
    assert EqualMovement().predict(source, (16, "B", "1"), found.context) is None
    file.write_text("rank,kl\n8,x\n")
    with pytest.raises(UserError, match="measure_movement"):
        read_movements([file])
