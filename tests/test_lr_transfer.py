"""How far off a transferred learning rate may be: what docs/results say, and a warning where they say nothing."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import make_record

from mua_rl.adapter.targets import MLP_PROJECTIONS
from mua_rl.analysis.measured import FFT, sweeps_of
from mua_rl.analysis.predictions import calibrated, compare, evidence, leave_one_out
from mua_rl.analysis.report import parse_sizes
from mua_rl.analysis.rows import read_all
from mua_rl.analysis.transfer_rules import THEORY, rank_corrected, shipped
from mua_rl.lr.evidence import (
    DOMAINS,
    EVIDENCE,
    FROM_RANK,
    LEFT_OUT_COVERAGE,
    MEASURED_MODULES,
    RANK_EXPONENT,
    RANK_EXPONENTS,
    default_exponent,
    pair_kind,
)
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import AdapterSpec, AlphaRule, Scheme
from mua_rl.lr.transfer import LearningRate, transfer
from mua_rl.run.folder import RunFolder
from mua_rl.run.life import announce

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SIZES = [
    *["smollm2=1536,576", "*-w256-*=256,256"],
    *["embedded=512,128", "unet*=1152,64", "captions*=256,128", "bert*=512,128", "vit*=512,128"],
]
"""As docs/results/README.md gives them to the report."""


@pytest.fixture(scope="module")
def measured():
    """The sweeps in docs/results, by the exponent of their algorithm, which share a rule."""
    csvs = [*sorted(RESULTS.glob("reproduce_*.csv")), *sorted(RESULTS.glob("fields/*.csv"))]
    found = sweeps_of(read_all(csvs), contexts=parse_sizes(SIZES))
    assert {sweep.algorithm for sweep in found} == RANK_EXPONENTS.keys()
    alike = {c: [s for s in found if default_exponent(s.algorithm) == c] for c in EVIDENCE}
    assert all(len({shipped(sweep.algorithm) for sweep in sweeps}) == 1 for sweeps in alike.values())
    return alike


def lora(rank, scheme=Scheme.INIT_B, alpha="1", width=512):
    return Configuration(AdapterSpec(rank, scheme, AlphaRule.parse(alpha)), width, "adamw_torch", outputs=512)


FULL = Configuration(FFT, 512, optimizer="adamw_torch", outputs=512)


def test_the_evidence_is_what_docs_results_say_today(measured):
    for exponent, sweeps in measured.items():
        found = evidence(sweeps, shipped(sweeps[0].algorithm))
        stale = f"EVIDENCE is stale, {exponent} has {found}"
        assert found.keys() == EVIDENCE[exponent].keys(), stale
        for kind, now in found.items():
            stated = EVIDENCE[exponent][kind]
            assert (stated.ranks, stated.alphas, stated.steps) == (now.ranks, now.alphas, now.steps), stale
            assert stated.octaves == pytest.approx(now.octaves, abs=0.05), stale
            assert stated.loss == pytest.approx(now.loss, abs=0.01), stale


def test_intervals_calibrated_on_other_tasks_cover_as_often_as_they_say(measured):
    for exponent, sweeps in measured.items():
        rule = shipped(sweeps[0].algorithm)
        tests = leave_one_out(sweeps, lambda others, rule=rule: calibrated(rule, others))
        covered = [test.is_covered for test in tests]
        assert 0.85 <= np.mean(covered) <= 1, exponent


def test_on_sweeps_that_had_no_part_in_choosing_it_the_rule_is_right_four_times_in_five_twice_as_often_as_theory(
    measured,
):
    unseen = [sweep for sweep in measured[RANK_EXPONENT] if (sweep.algorithm, sweep.base) != ("grpo", "smollm2")]
    hits, bare = (np.mean([t.is_hit for t in compare(unseen, rank_corrected(c))]) for c in (RANK_EXPONENT, 0))
    assert hits >= 0.8 > 2 * bare


@pytest.mark.parametrize("algorithm", RANK_EXPONENTS)
@pytest.mark.parametrize("target", [lora(16), FULL], ids=str)
def test_a_transfer_says_how_far_off_it_may_be(algorithm, target):
    found = transfer(make_record(algorithm=algorithm, rank=32), target)
    evidence = EVIDENCE[default_exponent(algorithm)][pair_kind(Scheme.INIT_B, target.scheme)]
    assert found.evidence == evidence
    assert f"nine times in ten within a factor of {2**evidence.octaves:.2g} of the best, at a loss" in found.reason
    assert not found.warning


def test_ppo_transfers_between_a_lora_and_full_finetuning_are_further_off_than_between_ranks():
    ranks, full = (transfer(make_record(algorithm="ppo"), target) for target in (lora(16), FULL))
    assert full.evidence.octaves > 1.5 * ranks.evidence.octaves


def test_the_records_own_rate_and_a_given_one_are_no_predictions():
    record = make_record(rank=1, algorithm="dpo")
    for found in (transfer(record, record.configuration()), LearningRate(1e-3, "given by --lr")):
        assert found.evidence is None
        assert found.warning == ""
        assert found.reason == found.why


@pytest.mark.parametrize(
    ("record", "target", "exponent", "why"),
    [
        ({"algorithm": "dpo"}, lora(16), None, "no transfer was measured with dpo: tune nearer to the target."),
        ({"rank": 2}, FULL, None, "r = 2 is outside the ranks .* 4 to 256.*--algo grpo --ranks full"),
        ({}, lora(2), None, "r = 2 is outside.*--ranks 2\\)"),
        ({}, lora(512), None, "r = 512 is outside"),
        ({"algorithm": "ppo"}, lora(64), None, "r = 64 .* 2 to 32.*--algo ppo --ranks 64"),
        ({"scheme": "FFT", "rank": None}, lora(1), None, "r = 1 is outside"),
        ({"scheme": "Init[A]"}, lora(512, Scheme.INIT_A), None, "r = 512 is outside"),
        ({"alpha": "16/r"}, lora(16, alpha="16/r"), None, "α = 16/r was not measured with Init\\[B\\]"),
        ({}, lora(16), 0.25, "measured with --rank_exponent 0.5"),
        ({}, lora(16, width=1024), None, "between widths"),
        ({"scheme": "FFT", "rank": None}, Configuration(FFT, 64, optimizer="adamw_torch"), None, "FFT to FFT"),
        ({"schedule": {"steps": 5000}}, FULL, None, "took 5,000 steps, and those .* 120"),
        ({"schedule": {"env_steps": 10**6}, "algorithm": "ppo"}, FULL, None, "took 1,000,000 steps"),
    ],
)
def test_where_nothing_was_measured_a_warning_says_so_in_one_line_with_a_cure(record, target, exponent, why):
    found = transfer(make_record(**{"outputs": 512, **record}), target, rank_exponent=exponent)
    assert found.evidence is None
    assert "within a factor" not in found.reason
    assert len(found.warning.splitlines()) == 1
    assert re.search(why, found.warning), found.warning


def test_full_finetuning_is_tuned_at_a_rank_from_which_it_was_measured_to_lose_little(measured):
    least = FROM_RANK[RANK_EXPONENT]
    losses = [
        (test.source.spec.rank, test.loss)
        for test in compare(measured[RANK_EXPONENT], rank_corrected(RANK_EXPONENT))
        if test.target.spec == FFT
    ]
    assert max(loss for rank, loss in losses if rank >= least) < 0.033
    small = [loss for rank, loss in losses if rank < least]
    assert (len(small), sum(loss > 0.1 for loss in small)) == (8, 2)

    doubtful = transfer(make_record(rank=8, outputs=512), FULL)
    assert doubtful.warning.startswith(
        "r = 8 is small: from r = 4, FFT lost more than a tenth of its gain in two sweeps"
    )
    assert doubtful.warning.endswith("(python -m mua_rl.sweep --algo grpo --ranks 16).")
    assert doubtful.evidence is None
    for record, target in (({"rank": 16}, FULL), ({"rank": 8}, lora(64)), ({"rank": 8, "algorithm": "ppo"}, FULL)):
        assert not transfer(make_record(outputs=512, **record), target).warning


def test_a_rule_that_was_measured_to_lose_much_says_how_far_off_it_may_be_and_warns():
    found = transfer(make_record(algorithm="ppo", scheme="Init[A]"), lora(16, Scheme.INIT_A))
    assert found.evidence == EVIDENCE[0.0]["Init[A]"]
    assert "one such transfer in ten lost more than 11% of the gain" in found.warning


def test_in_ppo_init_a_keeps_its_rate_over_ranks_and_multipliers_unless_the_theory_is_asked_for():
    record = make_record(algorithm="ppo", scheme="Init[A]", rank=4)
    wider = lora(16, Scheme.INIT_A, width=1024)
    for target in (lora(16, Scheme.INIT_A), lora(16, Scheme.INIT_A, alpha="1/r")):
        found = transfer(record, target)
        assert found.value == record.learning_rate
        assert "in ppo Init[A]'s best LR was measured to stay" in found.why
    assert transfer(record, lora(16, Scheme.INIT_A), rank_exponent=0).value < record.learning_rate
    of_width = transfer(record, lora(4, Scheme.INIT_A, width=1024), rank_exponent=0).value
    assert transfer(record, wider).value == of_width < record.learning_rate
    grpo = make_record(scheme="Init[A]", rank=4)
    assert (
        transfer(grpo, lora(16, Scheme.INIT_A)).value == transfer(grpo, lora(16, Scheme.INIT_A), rank_exponent=0).value
    )


def test_the_default_of_ppo_was_nearer_than_the_theory_in_every_sweep_of_init_a(measured):
    for sweep in measured[0.0]:
        by_default, theory = (
            np.mean([abs(t.error) for t in compare([sweep], rule) if t.kind == "within Init[A]"])
            for rule in (shipped("ppo"), THEORY)
        )
        assert by_default < theory, sweep.base


@pytest.mark.parametrize("schedule", [{}, {"steps": None}, {"steps": -1}, {"name": "constant", "env_steps": "many"}])
def test_a_record_that_does_not_say_how_long_its_runs_took_is_taken_as_it_is(schedule):
    assert not transfer(make_record(schedule=schedule), lora(16)).warning


def test_a_grpo_run_shows_the_warning_before_its_first_step(tmp_path, capsys):
    for rank, warns in ((2, True), (16, False)):
        rate = transfer(make_record(), lora(rank))
        announce(RunFolder(tmp_path), "arithmetic with embedded", rate)
        assert ("r = 2 is outside the ranks" in capsys.readouterr().out) is warns


@pytest.mark.parametrize("evidence", ["run", "guess"])
def test_only_a_sweeps_record_claims_to_be_near_the_best(evidence):
    assert "nine times in ten" in transfer(make_record(), lora(16)).reason
    found = transfer(make_record(evidence=evidence), lora(16))
    assert found.value == transfer(make_record(), lora(16)).value
    assert "nine times in ten" not in found.reason
    assert found.warning.startswith(f"the record is of a {evidence} and not of a sweep")


def test_a_guess_stays_a_guess_through_runs():
    found = transfer(make_record(evidence="guess"), lora(16))
    assert found.is_guess
    assert found.reason.startswith("a guess that was run")
    assert LearningRate.from_dict(found.as_dict()) == replace(found, why=found.reason)
    assert not transfer(make_record(evidence="run"), lora(16)).is_guess


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"widths": [4096, 14336], "outputs": 4096}, "the layers' width n is 14,336, and .* 256 to 1,536"),
        ({"outputs": 2048}, "fan-out m is 2,048, and .* 64 to 576"),
        ({"schedule": {"steps": 5}}, "took 5 steps, and those that were measured 40 to 120"),
        ({"batch": {"prompts": 512, "completions_per_prompt": 16}}, "the batch is 8,192, and .* 32 to 256"),
        ({"optimizer": {"name": "adamw_8bit"}}, "no transfer was measured with adamw_8bit"),
        ({"target_modules": "all-linear"}, "the MLP's projections, not with all-linear"),
        ({"target_modules": ["q_proj", "up_proj"]}, "the MLP's projections, not with q_proj:"),
        ({"algorithm": "ppo", "batch": {"minibatch": 4096}}, "the batch is 4,096"),
        ({"algorithm": "ppo", "schedule": {"env_steps": 2_000_000}}, "took 2,000,000 steps"),
    ],
)
def test_a_record_far_from_the_runs_that_were_measured_states_no_interval_and_warns(record, why):
    source = make_record(**{"rank": 16, **record})
    found = transfer(source, replace(source.configuration(), spec=AdapterSpec(32)))
    assert found.evidence is None
    assert re.search(why, found.warning), found.warning


def test_an_8_b_record_at_r_16_warns_for_full_finetuning():
    record = make_record(rank=16, widths=[4096, 14336], outputs=4096)
    assert "width n is 14,336" in transfer(record, replace(record.configuration(), spec=FFT)).warning


@pytest.mark.parametrize("modules", ["mlp", ["gate_proj", "up_proj", "down_proj"], ["model.layers.0.mlp.up_proj"]])
def test_the_mlps_projections_were_measured_however_they_are_named(modules):
    assert not transfer(make_record(target_modules=modules), lora(16)).warning


def test_the_measured_modules_are_those_that_mlp_stands_for():
    assert set(MEASURED_MODULES) == {"mlp", *(name for family in MLP_PROJECTIONS for name in family)}


def test_the_measured_sizes_and_steps_are_those_of_docs_results(measured):
    for exponent, sweeps in measured.items():
        domain = DOMAINS[exponent]
        sizes = [(sweep.context.width, sweep.context.outputs) for sweep in sweeps]
        for (low, high), numbers in zip((domain.widths, domain.outputs), zip(*sizes, strict=True), strict=True):
            assert low <= min(numbers) <= max(numbers) == high
        assert domain.steps[1] == max(known.steps for known in EVIDENCE[exponent].values())


def test_the_stated_interval_covers_a_sweep_that_it_was_not_read_off_as_often_as_is_said(measured):
    for exponent, sweeps in measured.items():
        rule, covered = shipped(sweeps[0].algorithm), []
        for sweep in sweeps:
            others = evidence([other for other in sweeps if other is not sweep], rule)
            tests = compare([sweep], rule)
            covered += [abs(test.error) <= others[test.pair].octaves for test in tests if test.pair in others]
        assert np.mean(covered) == pytest.approx(LEFT_OUT_COVERAGE[exponent], abs=0.02)
        assert np.mean(covered) >= 0.75, "mua_rl.lr.transfer.SEEN says too much"
