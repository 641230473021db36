"""The table of outcomes of docs/predictions.md, from rows whose answers are known and from the committed CSVs."""

import math
import re
import subprocess
import sys
from pathlib import Path

import law_outcomes
import numpy as np
import pytest
from known_sweeps import outcome, row

from mua_rl.analysis.rows import read
from mua_rl.errors import UserError
from mua_rl.lr.spec import AdapterSpec
from mua_rl.run.trial import Trial

ROOT = Path(__file__).parents[1]


def tent(rank, top, lrs, seeds=(1,), noise=0.0):
    """Rows of a curve that falls by 0.1 an octave on both sides of its top of 0.513."""
    rng = np.random.default_rng(rank)
    return [
        row(
            Trial(AdapterSpec.parse(rank), float(lr), seed),
            outcome(0.513 - 0.1 * abs(lr - top) + float(rng.normal(0, noise))),
        )
        for lr in lrs
        for seed in seeds
    ]


def curve(*args, **more):
    (result,) = law_outcomes.curves_of(tent(*args, **more)).values()
    return result


def test_edges_lie_at_eight_tenths_of_the_gain():
    edges = [curve(4, -10, range(-14, -6)).edge(upper) for upper in (False, True)]
    assert [edge.value for edge in edges] == pytest.approx([-10.8, -9.2])  # 0.08 below the top's gain of 0.4


def test_an_edge_beyond_the_grid_is_undecided():
    edge = curve(4, -10, range(-10, -6)).edge(upper=False)
    assert math.isnan(edge.value)
    assert law_outcomes.Claim("E2", "lower edge", (0.6, 1.4), edge).verdict == "undecided"


def test_a_slope_is_that_of_the_optima_and_its_interval_holds_it():
    curves = [curve(r, -10 - 0.5 * math.log2(r), range(-18, -5), (1, 2), 0.01) for r in (4, 64)]
    slope = law_outcomes.slope((4, 64), [c.best for c in curves])
    low, high = law_outcomes.interval(slope.draws)
    assert slope.value == pytest.approx(-0.5, abs=0.1)
    assert low <= -0.5 <= high


def test_algorithms_that_share_a_task_and_a_base_have_curves_of_their_own():
    rows = tent(4, -10, range(-14, -6))
    others = [row(r.trial, r.result, algorithm="sft") for r in rows]
    assert len(law_outcomes.curves_of([*rows, *others])) == 2


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (1.0, "held"),
        (0.5, "undecided"),
        (0.3, "**refuted**"),
    ],
)
def test_a_verdict_is_that_of_the_registered_intervals(value, verdict):
    estimate = law_outcomes.Estimate(value, np.full(10, value))
    assert law_outcomes.Claim("E2", "", (0.7, 1.3), estimate, lambda v: v <= 0.4).verdict == verdict


def test_what_misses_a_prediction_that_names_no_refutation_has_failed():
    assert law_outcomes.Claim("E3b", "", (-0.5, 0.5), law_outcomes.Estimate(0.8, np.ones(3))).verdict == "**failed**"


def test_what_held_says_that_its_interval_reaches_a_refutation():
    estimate = law_outcomes.Estimate(1.0, np.linspace(0, 2, 100))
    claim = law_outcomes.Claim("E2", "", (0.7, 1.3), estimate, lambda v: v <= 0.4)
    assert claim.verdict == "held, the interval reaches what refutes"


def test_what_was_refuted_says_that_its_interval_reaches_the_prediction():
    estimate = law_outcomes.Estimate(0.3, np.linspace(-0.4, 1, 100))
    claim = law_outcomes.Claim("E2", "", (0.7, 1.3), estimate, lambda v: v <= 0.4)
    assert claim.verdict == "**refuted**, the interval reaches what was predicted"


def test_the_committed_table_is_that_of_the_committed_runs():
    text = (ROOT / "docs/results/law/README.md").read_text(encoding="utf-8")
    for claim in law_outcomes.claims(ROOT / "docs/results/law"):
        assert f"| {' | '.join(claim.cells())} |" in text
    assert len(re.findall(r"^\| E\d", text, re.MULTILINE)) >= 27


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no runs of docs/predictions\.md"):
        law_outcomes.claims(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("curve", ["B,4,1:-4:-4:1:1", "peft,4,8/r:-4:-4:1:1", "full:-4:-4:1:1", "full-bf16:-4:-4:1:1"])
def test_every_kind_of_trial_trains(curve, tmp_path):
    output = tmp_path / "e.csv"
    command = [sys.executable, ROOT / "scripts/law_grpo.py", "--model", "embedded", "--steps", "3", "--output", output]
    done = subprocess.run([*command, "--curve", curve], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (trained,) = read(output)
    assert trained.result.score != trained.result.before


@pytest.mark.slow
def test_sgd_trains(tmp_path):
    output = tmp_path / "e.csv"
    command = [sys.executable, ROOT / "scripts/law_sft.py", "--model", "embedded", "--steps", "3", "--output", output]
    done = subprocess.run(
        [*command, "--optimizer", "sgd", "--curve", "B,4,1:-6:-6:1:1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (trained,) = read(output)
    assert trained.result.score != trained.result.before
