"""Optima and slopes from the rows of finished sweeps, on sweeps whose optima are known."""

from dataclasses import replace

import pytest
from helpers import scheme, spec
from known_sweeps import SCHEMES, optimum_of, outcome, row, sweep_rows, sweeps

from mua_rl.analysis.measured import FFT, Context, distance, slope, sweeps_of
from mua_rl.analysis.predictions import compare
from mua_rl.analysis.transfer_rules import THEORY
from mua_rl.run.trial import Trial


def test_each_curve_has_its_optimum_where_it_was_put(quarter):
    for curve, measured in quarter[0].curves.items():
        assert measured.optimum.log2_lr == pytest.approx(optimum_of(curve, 0.25), abs=0.2), curve.label
    assert list(quarter[0].curves)[-1] == FFT


def test_rows_of_fft_are_one_curve_whatever_their_init_says():
    written = {"init": "B", "alpha": "1"}
    rows = [replace(r, trial=Trial.from_dict({**r.trial.as_dict(), **written})) for r in sweep_rows(schemes=())]
    (sweep,) = sweeps(rows)
    assert list(sweep.curves) == [FFT]
    assert len(sweep.fft.points) == len(rows)


def test_two_curves_of_the_same_runs_are_not_known_to_have_the_same_optimum():
    curves = [FFT, spec(8, "B", "1"), spec(64, "B", "1")]
    rows = [row(Trial(curve, lr, 0), outcome(0.9)) for curve in curves for lr in (-12.0, -11.0, -10.0, -9.0)]
    (sweep,) = sweeps(rows)
    for curve in curves[1:]:
        octaves, low, high = distance(sweep.curves[curve], sweep.fft)
        assert octaves == 0 and low < -1 and high > 1
    _, low, high = distance(sweep.curves[spec(8, "B", "1")], sweep.curves[spec(64, "B", "1")])
    assert low < -1 and high > 1


def test_tasks_bases_and_algorithms_are_sweeps_of_their_own():
    rows = [r for task in ("x", "y") for r in sweep_rows((4,), SCHEMES[:1], task=task)]
    rows += sweep_rows((4,), SCHEMES[:1], base="other") + sweep_rows((4,), SCHEMES[:1], algorithm="ppo")
    assert [str(sweep) for sweep in sweeps(rows)] == [
        "grpo arithmetic other", "grpo x base", "grpo y base", "ppo arithmetic base",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "true", "theory"), [(("B", "1"), -0.25, 0), (("A", "1"), -0.5, -0.5), (("A", "1/r"), 0, 0)]
)
def test_slopes_are_found_with_the_theorys_beside_them(quarter, written, true, theory):
    found = slope(quarter, scheme(*written))
    assert found.low <= true <= found.high
    assert found.high - found.low < 0.3
    assert found.theory == pytest.approx(theory, abs=1e-6)
    assert found.ranks == [4, 16, 64]


def test_a_slope_over_several_sweeps_is_known_better_than_over_one(quarter):
    many = sweeps([r for task in ("x", "xy", "xyz", "xyzt") for r in sweep_rows(task=task)])
    pooled, alone = slope(many, scheme("B", "1")), slope(quarter, scheme("B", "1"))
    assert pooled.high - pooled.low < 0.7 * (alone.high - alone.low)
    assert pooled.low <= -0.25 <= pooled.high


def test_the_theorys_slope_is_left_open_where_it_depends_on_an_unknown_width():
    rows = sweep_rows((4, 64), (("B", "1/r"),))
    assert slope(sweeps(rows, Context()), scheme("B", "1/r")).theory is None
    assert slope(sweeps(rows, Context(width=2**14)), scheme("B", "1/r")).theory == pytest.approx(1)
    assert slope(sweeps(sweep_rows(), Context()), scheme("A", "1")).theory == pytest.approx(-0.5)


def test_a_rank_whose_optimum_is_at_the_edge_of_its_grid_counts_in_no_slope_and_no_prediction():
    rows = [r for r in sweep_rows() if not (r.trial.spec.rank == 64 and r.trial.log2_lr > -13)]
    assert sweeps(rows)[0].curves[spec(64, "B", "1")].optimum.edge == "right"
    assert slope(sweeps(rows), scheme("B", "1")).ranks == [4, 16]
    touched = {m.spec for test in compare(sweeps(rows), THEORY) for m in (test.source, test.target)}
    assert spec(64, "B", "1") not in touched
    assert spec(16, "B", "1") in touched


def test_a_run_that_was_stopped_early_is_never_the_best():
    best = optimum_of(spec(4, "B", "1"), 0.25)
    rows = [
        replace(r, result=outcome(5.0, stopped="hopeless")) if r.trial.log2_lr > best + 2 else r
        for r in sweep_rows((4,), SCHEMES[:1], fft=False)
    ]
    assert sweeps(rows)[0].curves[spec(4, "B", "1")].optimum.log2_lr == pytest.approx(best, abs=0.25)


def test_another_value_than_the_metric_can_be_compared():
    rows = [
        replace(r, result=replace(r.result, score=0.3, reward_mean=r.result.score))
        for r in sweep_rows((4,), SCHEMES[:1])
    ]
    (sweep,) = sweeps_of(rows, "reward_mean")
    assert sweep.curves[spec(4, "B", "1")].optimum.log2_lr == pytest.approx(
        optimum_of(spec(4, "B", "1"), 0.25), abs=0.25
    )
