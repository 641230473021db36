"""What rules predict of one curve from another, on sweeps whose optima are known."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers import spec
from known_sweeps import SCHEMES, SIZES, sweep_rows, sweeps

from mua_rl.analysis import tables
from mua_rl.analysis.measured import FFT, Context
from mua_rl.analysis.movements import read_movements
from mua_rl.analysis.predictions import Comparison, calibrated, compare, evidence, fit_exponent, leave_one_out
from mua_rl.analysis.transfer_rules import (
    DIVIDED_BY_TEN,
    NO_RULE,
    THEORY,
    UNCHANGED,
    equal_movement,
    fixed,
    rank_corrected,
)
from mua_rl.errors import UserError


def pairs(tests):
    return {(test.source.spec, test.target.spec) for test in tests}


def test_the_bare_rule_predicts_within_a_scheme_and_between_init_b_and_fft_and_nothing_else(quarter):
    covered = pairs(compare(quarter, THEORY))
    assert (spec(4, "B", "1"), FFT) in covered
    assert (FFT, spec(4, "B", "1")) in covered
    assert (spec(4, "A", "1"), spec(16, "A", "1/r")) in covered
    assert (spec(4, "A", "1"), FFT) not in covered
    assert (spec(4, "A", "1"), spec(4, "B", "1")) not in covered


def test_the_rule_with_the_right_exponent_hits_where_the_bare_rule_misses(quarter):
    def errors(rule):
        tests = compare(quarter, rule)
        return {(t.source.spec.rank, t.target.spec.rank): t for t in tests if t.source.spec.init != "A"}

    bare, corrected = errors(THEORY), errors(rank_corrected(0.25))
    assert bare.keys() == corrected.keys()
    assert bare[4, None].error == pytest.approx(0.25 * math.log2(256 / 4), abs=0.25)
    assert not bare[4, None].is_hit
    assert all(test.is_hit for test in corrected.values())
    assert {test.is_covered for test in corrected.values()} == {None}
    assert {test.kind for test in corrected.values()} == {"within Init[B]", "FFT ↔ Init[B]"}


def test_init_a_is_predicted_as_the_theory_says_whatever_the_correction(quarter):
    def of_init_a(rule):
        return [t.log2_lr for t in compare(quarter, rule) if t.source.spec.init == "A"]

    assert of_init_a(rank_corrected(0.5)) == of_init_a(THEORY)
    assert all(test.is_hit for test in compare(quarter, THEORY) if test.source.spec.init == "A")


def test_without_the_layers_outputs_the_correction_predicts_ranks_but_not_fft():
    covered = pairs(compare(sweeps(sweep_rows(), Context(width=512)), rank_corrected(0.25)))
    assert (spec(4, "B", "1"), spec(64, "B", "1")) in covered
    assert not any(FFT in pair for pair in covered)


def test_an_interval_is_as_wide_as_predictions_between_the_like_were_off(quarter):
    source = quarter[0].curves[spec(4, "B", "1")]
    rule = replace(THEORY, octaves={"FFT, Init[B]": 0.5}, otherwise=1.5)
    by_target = {one.target.spec: one for one in compare(quarter, rule) if one.source is source}
    full, other = by_target[FFT], by_target[spec(16, "B", "1")]
    assert full.log2_lr == other.log2_lr == source.optimum.log2_lr
    assert (full.octaves, other.octaves) == (0.5, 1.5)
    assert {one.octaves for one in compare(quarter, THEORY)} == {None}


def test_a_measured_optimum_is_covered_if_its_own_interval_reaches_the_stated_one(quarter):
    source, target = quarter[0].curves[spec(4, "B", "1")], quarter[0].fft

    def covers(off, own):
        blurred = replace(target.optimum, low=target.optimum.log2_lr - own, high=target.optimum.log2_lr + own)
        centre = target.optimum.log2_lr + off
        return Comparison("", quarter[0], source, replace(target, optimum=blurred), centre, 0.3).is_covered

    for sign in (-1, 1):
        assert covers(0.29 * sign, 0.0)
        assert not covers(0.31 * sign, 0.0)
        assert covers(0.49 * sign, 0.4)  # 0.5 = √(0.3² + 0.4²)
        assert not covers(0.51 * sign, 0.4)


def test_a_perfect_rule_hits_but_for_what_other_seeds_would_have_changed(quarter):
    def steady(measured, scatter):
        return replace(measured, optimum=replace(measured.optimum, scatter=scatter))

    def hit(*scatters):
        source, target = map(steady, (quarter[0].curves[spec(4, "B", "1")], quarter[0].fft), scatters)
        return Comparison("", quarter[0], source, target, 9.0).perfect_hit

    assert hit(0.3, 0.4) == hit(0.4, 0.3) == pytest.approx(0.683, abs=1e-3)  # within one standard deviation
    assert hit(3.0, 4.0) < 0.1
    assert hit(0.0, 0.0) == 1


def test_a_prediction_on_the_targets_plateau_is_as_good_as_the_best_however_far_from_the_optimum(quarter):
    source, target = quarter[0].curves[spec(4, "B", "1")], quarter[0].fft
    best = target.optimum.log2_lr

    def test_at(off, scatter=0.0):
        still = replace(source, optimum=replace(source.optimum, scatter=0.0))
        flat = replace(target, optimum=replace(target.optimum, plateau=(best - 2.0, best + 1.0), scatter=scatter))
        return Comparison("", quarter[0], still, flat, best + off)

    assert [test_at(off).is_as_good for off in (-2.1, -1.9, 0.0, 0.9, 1.1)] == [False, True, True, True, False]
    assert not test_at(-1.9).is_hit
    assert test_at(9.0).perfect_as_good == 1
    assert test_at(9.0, scatter=1.0).perfect_as_good == pytest.approx(0.819, abs=1e-3)  # -2 to +1 standard deviations


def test_no_rule_leaves_the_rate_unchanged_for_just_the_pairs_that_the_theory_covers(quarter):
    unmoved = compare(quarter, NO_RULE)
    assert pairs(unmoved) == pairs(compare(quarter, THEORY))
    assert all(test.log2_lr == test.source.optimum.log2_lr for test in unmoved)


def test_a_rule_that_is_right_hits_about_as_often_as_a_perfect_rule_is_said_to():
    noisy = sweeps([r for i in range(12) for r in sweep_rows(schemes=SCHEMES[:1], task="x" * i, noise=0.25)])
    tests = compare(noisy, rank_corrected(0.25))
    ceiling = np.mean([test.perfect_hit for test in tests])
    assert 0.5 < ceiling < 0.9
    assert np.mean([test.is_hit for test in tests]) == pytest.approx(ceiling, abs=0.1)
    assert np.mean([test.is_hit for test in compare(noisy, THEORY)]) < ceiling - 0.3


def test_a_rule_is_calibrated_so_that_its_intervals_cover_as_often_as_they_say(quarter):
    bare, right = calibrated(THEORY, quarter), calibrated(rank_corrected(0.25), quarter)
    assert bare.otherwise > 1 > 0.5 > right.otherwise
    covered = [test.is_covered for test in compare(quarter, bare)]
    assert np.mean(covered) >= 0.9
    assert {kind: found.octaves for kind, found in evidence(quarter, THEORY).items()} == bare.octaves
    assert bare.name == THEORY.name
    assert [test.error for test in compare(quarter, bare)] == [test.error for test in compare(quarter, THEORY)]


def test_kinds_of_pairs_have_an_interval_of_their_own_if_there_are_enough_of_them():
    few = calibrated(THEORY, sweeps(sweep_rows()))
    assert set(few.octaves) == {"Init[A]", "Init[B]", "FFT, Init[B]"}
    assert few.octaves["Init[B]"] == few.otherwise
    many = sweeps([r for task in ("x", "xy", "xyz", "xyzt") for r in sweep_rows(task=task)])
    found = calibrated(THEORY, many).octaves
    assert found["FFT, Init[B]"] > found["Init[B]"] > found["Init[A]"]


def test_without_another_task_no_interval_is_stated_and_no_sweep_is_judged_by_itself(quarter):
    assert calibrated(THEORY, []) == THEORY
    alone = leave_one_out(quarter, partial(calibrated, THEORY))
    assert len(alone) == len(compare(quarter, THEORY))
    assert {test.is_covered for test in alone} == {None}
    line = tables.prediction_table(quarter, [THEORY]).lines[0]
    assert (line[0], line[-1]) == ("grpo: theory", "–")
    # Intervals are the other task's: large where it needed a correction, none where it did not.
    two = sweeps(sweep_rows(task="x", exponent=0.5) + sweep_rows(task="xy", exponent=0.0))
    tests = leave_one_out(two, partial(calibrated, THEORY))
    covered = {
        task: [t.is_covered for t in tests if t.sweep.task == task and t.kind != "within Init[A]"]
        for task in ("x", "xy")
    }
    assert all(covered["xy"])
    assert np.mean(covered["x"]) < 0.2


def test_evidence_is_what_nine_pairs_in_ten_kept_to():
    many = sweeps([r for task in ("x", "xy", "xyz", "xyzt") for r in sweep_rows(task=task)])
    found = evidence(many, THEORY)
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
    found = fit_exponent(sweeps(sweep_rows(schemes=SCHEMES[:1], exponent=exponent)))
    assert found == pytest.approx(exponent, abs=0.06)


def test_the_exponent_needs_curves_that_it_changes():
    assert fit_exponent(sweeps(sweep_rows(schemes=SCHEMES[1:]))) is None


def test_each_task_is_predicted_by_a_rule_fitted_on_the_others_only():
    kept = [r for base in ("s0", "s1") for r in sweep_rows(schemes=SCHEMES[:1], exponent=0.5, task="task", base=base)]
    found = sweeps(kept + sweep_rows(schemes=SCHEMES[:1], exponent=0.0, task="other"))
    tests = leave_one_out(found)
    assert len(tests) == len(compare(found, THEORY))
    rules = {(test.sweep.task, test.rule) for test in tests}
    assert len(rules) == 2
    for task, rule in rules:
        assert float(rule.split("^")[1]) == pytest.approx(0.0 if task == "task" else 0.5, abs=0.06)


def test_habits_apply_to_what_they_are_said_of():
    (sweep,) = sweeps(sweep_rows((8,), (("B", "1"), ("A", "1"), ("A", "2"))))
    a, twice, b = (sweep.curves[spec(8, *scheme)] for scheme in (("A", "1"), ("A", "2"), ("B", "1")))
    assert DIVIDED_BY_TEN.predict(a, FFT, SIZES) == pytest.approx(a.optimum.log2_lr - math.log2(10))
    assert DIVIDED_BY_TEN.predict(b, FFT, SIZES) is None
    assert DIVIDED_BY_TEN.predict(a, a.spec, SIZES) is None
    assert UNCHANGED.predict(twice, FFT, SIZES) == twice.optimum.log2_lr
    assert UNCHANGED.predict(a, FFT, SIZES) is None
    assert fixed(1e-6).predict(a, FFT, SIZES) == pytest.approx(-19.93, abs=0.01)


def test_equal_movement_takes_a_rate_over_by_what_was_measured_whatever_the_initialisation(tmp_path):
    file = tmp_path / "movement.csv"
    lines = ["task,base,rank,init,alpha,log2_lr,seed,steps,kl,machine"]
    for curve, rate in {spec(8, "A", "1"): 2.0**5, FFT: 2.0**9}.items():  # √KL per step and unit of learning rate
        for steps, log2_lr in ((1, -16), (2, -15)):
            kl = (rate * steps * 2.0**log2_lr) ** 2
            lines.append(f"arithmetic,base,{curve.rank or ''},{curve.init},{curve.alpha},{log2_lr},0,{steps},{kl},cpu")
    file.write_text("\n".join(lines) + "\n")
    movements = read_movements([file])["arithmetic", "base"]
    assert movements == {spec(8, "A", "1"): pytest.approx(2**5), FFT: pytest.approx(2**9)}
    (found,) = sweeps(sweep_rows(ranks=(8,), schemes=(("A", "1"),)), Context(movement=movements))
    source = found.curves[spec(8, "A", "1")]
    for exponent, octaves in ((1.0, 4), (0.5, 2)):
        prediction = equal_movement(exponent).predict(source, FFT, found.context)
        assert prediction == pytest.approx(source.optimum.log2_lr - octaves)
    assert equal_movement().predict(source, spec(16, "B", "1"), found.context) is None
    file.write_text("rank,kl\n8,x\n")
    with pytest.raises(UserError, match="measure_movement"):
        read_movements([file])
