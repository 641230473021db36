"""What full finetuning loses at a transferred learning rate, and what finding it cost."""

import math
from dataclasses import replace

import pytest
from helpers import spec
from known_sweeps import SCHEMES, SIZES, outcome, row, sweep_rows, sweeps

from mua_rl.analysis.measured import FFT, sweeps_of
from mua_rl.analysis.regret import regrets, small_sweeps
from mua_rl.analysis.transfer_rules import DIVIDED_BY_TEN, THEORY, fixed, rank_corrected
from mua_rl.errors import UserError
from mua_rl.run.trial import Trial, TrialResult


def test_regret_is_the_share_of_ffts_gain_that_is_lost_at_the_transferred_rate(quarter):
    found = {regret.source.spec.rank: regret for regret in regrets(quarter, THEORY)}
    assert set(found) == {4, 16, 64}
    off = 0.25 * math.log2(256 / 4)
    assert found[4].share == pytest.approx(1 - math.exp(-((off / 2.2) ** 2)), abs=0.07)
    assert not found[4].within_noise
    assert all(regret.share < 0.02 for regret in regrets(quarter, rank_corrected(0.25)))
    assert all(regret.share >= 0 for rule in (THEORY, DIVIDED_BY_TEN, fixed(1e-6)) for regret in regrets(quarter, rule))


def test_the_cost_of_tuning_is_a_share_of_ffts_sweep(quarter):
    regret = regrets(quarter, THEORY)[0]
    fft = quarter[0].fft
    assert regret.steps == pytest.approx(regret.source.steps / fft.steps)
    assert 0.2 < regret.seconds < 0.35  # a quarter of the seconds a run
    (always,) = regrets(quarter, fixed(1e-6))
    assert (always.steps, always.seconds, always.source) == (0, 0, None)


def test_sweeps_of_fewer_seeds_are_dealt_from_a_larger_one_and_cost_their_share():
    (whole,) = sweeps_of(sweep_rows(exponent=0.5, seeds=4, noise=0.02), contexts=lambda key: SIZES)
    pairs = small_sweeps(whole, 2)
    assert sorted(small.source.spec.label for small in pairs) == sorted(
        2 * ["FFT", "Init[B] α=1 r=4", "Init[B] α=1 r=16", "Init[B] α=1 r=64"]
    )  # the rule says nothing of FFT from Init[A]
    for small in pairs:
        whole_curve = whole.curves[small.source.spec]
        assert small.steps == pytest.approx(whole_curve.steps / 2 / whole.fft.steps)
        assert small.seconds == pytest.approx(whole_curve.seconds / 2 / whole.fft.seconds)
        assert len(small.source.points) == len(whole_curve.points) / 2
        assert small.source.optimum.log2_lr != whole_curve.optimum.log2_lr
        assert 0 <= small.share < 0.1
    assert len(small_sweeps(whole, 1)) == 2 * len(pairs)
    assert small_sweeps(whole, 5) == []


def test_a_sweep_of_whole_octaves_is_made_of_the_rates_of_the_scan():
    rows = sweep_rows(schemes=SCHEMES[:1], exponent=0.5, seeds=2)  # in half octaves
    (sweep,) = sweeps_of([r for r in rows if r.trial.log2_lr % 2], contexts=lambda key: SIZES)
    found = small_sweeps(sweep, 1, step=1.0)
    assert {lr % 1 for small in found for lr, _, _ in small.source.points} == {0.5}
    assert len(found) == 2 * len(sweep.curves)
    for small in found:
        assert len(small.source.points) == 9
        assert 0.3 < small.steps < 0.35


def test_a_seed_that_has_not_run_at_every_rate_makes_no_sweep_of_its_own():
    rows = [r for r in sweep_rows(schemes=SCHEMES[:1], exponent=0.5) if r.trial.seed == 0 or r.trial.log2_lr > -12]
    (sweep,) = sweeps_of(rows, contexts=lambda key: SIZES)
    assert {seed for small in small_sweeps(sweep, 1) for _, _, seed in small.source.points} == {0}
    (lora,) = sweeps_of([r for r in rows if r.trial.spec.rank], contexts=lambda key: SIZES)
    assert small_sweeps(lora, 1) == []


def test_a_rate_outside_ffts_grid_gives_a_bound(quarter):
    (always,) = regrets(quarter, fixed(1e-6))
    assert always.is_bound
    assert always.share > 0.9
    assert not regrets(quarter, THEORY)[0].is_bound


def test_where_fft_gains_nothing_it_has_no_optimum_and_no_share_to_lose():
    rows = [
        replace(r, result=replace(r.result, before=0.95)) if r.trial.spec.rank is None else r for r in sweep_rows((4,))
    ]
    (found,) = sweeps(rows)
    assert "no run got better than the base" in found.without[FFT]
    assert regrets([found], THEORY) == regrets([found], fixed(1e-6)) == []


def test_where_fft_gains_no_more_than_noise_it_has_no_optimum_either():
    rows = [row for row in sweep_rows((4,)) if row.trial.spec.rank]
    noise = [replace(row, result=replace(row.result, score=0.115, before=0.1)) for row in sweep_rows((), seeds=1)]
    (found,) = sweeps(rows + noise)
    assert "no run got better than the base" in found.without[FFT]
    with pytest.raises(UserError, match="no run got better than the base by more than its noise"):
        sweeps(noise)


def test_runs_whose_cost_is_not_known_have_losses_all_the_same():
    rows = [replace(row, result=replace(row.result, steps=0, seconds=0.0)) for row in sweep_rows(exponent=0.5)]
    found = sweeps(rows)
    assert {(regret.steps, regret.seconds) for regret in regrets(found, THEORY)} == {(0.0, 0.0)}
    assert {(small.steps, small.seconds) for small in small_sweeps(found[0], 1)} == {(0.0, 0.0)}


def test_a_rate_at_which_full_finetuning_diverged_loses_all_and_one_off_the_grid_is_but_a_bound():
    def hill(curve, best, lowest, highest, cliff=math.inf):
        for lr in range(lowest, highest + 1):
            for seed in (0, 1):
                metric = 0.6 - 0.02 * (lr - best) ** 2
                result = outcome(metric) if lr < cliff else TrialResult.of_divergence(0.1, 20, 3.0, "not finite")
                yield row(Trial(curve, float(lr), seed), result)

    (found,) = sweeps([*hill(FFT, -14, -17, -12, cliff=-12), *hill(spec(8, "B", "1"), -11, -14, -8)])
    (beyond,) = regrets([found], THEORY)
    assert beyond.log2_lr == pytest.approx(-11, abs=0.3)
    assert beyond.share == pytest.approx(1.0)
    assert not beyond.is_bound
    (below,) = regrets([found], fixed(2.0**-20))
    assert below.is_bound
