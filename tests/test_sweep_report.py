"""The report of finished sweeps, on sweeps whose optima are known."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import make_trial
from known_sweeps import SCHEMES, outcome, row, sweep_rows, sweeps

from mua_rl.analysis import report, tables
from mua_rl.analysis.measured import Context
from mua_rl.analysis.predictions import compare
from mua_rl.analysis.regret import regrets
from mua_rl.analysis.rows import COLUMNS, append, read_all
from mua_rl.analysis.transfer_rules import THEORY, equal_movement, rank_corrected
from mua_rl.errors import UserError
from mua_rl.run.trial import TrialResult


def test_a_perfect_rule_stands_below_the_rules_of_each_algorithm_with_all_pairs_of_theirs():
    rows = [r for name in ("grpo", "ppo") for r in sweep_rows((4, 64), SCHEMES[:2], noise=0.1, algorithm=name)]
    found = sweeps(rows)
    table = tables.prediction_table(found, [THEORY, equal_movement()])
    names = [line[0] for line in table.lines]
    assert [name for name in names if "perfect" in name] == [names[4], names[9]]
    ceiling = dict(zip(table.columns, table.lines[4], strict=True))
    tests = compare(found[:1], THEORY)
    assert ceiling["all"] == f"{np.mean([test.perfect_hit for test in tests]):.0%}"
    assert ceiling["as good as the best"] == f"{np.mean([test.perfect_as_good for test in tests]):.0%}"
    assert ceiling["within Init[A]"].endswith("%")
    assert 0 < float(ceiling["mean error"]) < 0.5
    assert ceiling["in the stated interval"] == "–"


def test_the_rule_that_ships_stands_among_the_rules_and_is_each_algorithms_own():
    rows = [r for name in ("grpo", "ppo") for r in sweep_rows((4, 64), SCHEMES[:2], algorithm=name)]
    table = tables.prediction_table(sweeps(rows), [THEORY, rank_corrected(0.5)])
    cells = {line[0]: line[1:] for line in table.lines}
    assert cells["grpo: what mua_rl does by default"] == cells["grpo: theory × (r/m)^0.5"]
    assert cells["ppo: what mua_rl does by default"] == cells["ppo: no rule, the LR unchanged"] != cells["ppo: theory"]


def test_predictions_as_good_as_the_best_are_counted_beside_the_width_that_noise_gives_them():
    def bare(noise):
        found = sweeps(sweep_rows((4, 64), SCHEMES[:1], exponent=0.5, noise=noise))
        table = tables.prediction_table(found, [THEORY])
        return found, dict(zip(table.columns, table.lines[0], strict=True))

    (exact, sharp), (noisy, blurred) = bare(0.01), bare(0.4)
    assert sharp["as good as the best"] == "0/6 (0%)"
    good = sum(test.is_as_good for test in compare(noisy, THEORY))
    assert good > 0
    assert blurred["as good as the best"] == f"{good}/6 ({good / 6:.0%})"
    assert float(blurred["its median width"]) > 2 * float(sharp["its median width"])
    widths = [np.diff(measured.optimum.plateau).item() for measured in exact[0].curves.values()]
    assert float(sharp["its median width"]) == pytest.approx(np.median(widths), abs=0.06)


def test_the_table_of_losses_counts_how_often_full_finetuning_is_as_good_as_its_best(quarter):
    table = tables.regret_summary(quarter, [THEORY, rank_corrected(0.25)])
    shares = {line[0]: line[table.columns.index("as good as the best")] for line in table.lines}
    good = sum(regret.within_noise for regret in regrets(quarter, THEORY))
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
    rows = [r for r in sweep_rows((4, 16, 64), SCHEMES[:1]) if not (r.trial.spec.rank == 64 and r.trial.log2_lr > -13)]
    lost = TrialResult.of_divergence(0.1, 5, 1.0, "not finite")
    append(tmp_path / "c.csv", [replace(r, result=lost) if r.trial.spec.rank == 16 else r for r in rows])
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


def test_sweeps_whose_names_are_long_or_make_one_file_name_have_figures_of_their_own(tmp_path):
    deep = "/a-folder" * 30  # one name's length is more than file systems take
    rows = [r for base in ("a/b", "a b", f"{deep}/a", f"{deep}/b") for r in sweep_rows(schemes=(), base=base)]
    report.write_report(sweeps(rows), tmp_path)
    assert len(list(tmp_path.glob("*-curves*.png"))) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row(make_trial(8, "B", "1", -9.0, seed), outcome()) for seed in (0, 1)],
            "Init\\[B\\] α=1 r=8.*two learning rates",
        ),
        (
            [
                row(make_trial(8, "B", "1", -9.0, 0), outcome(math.nan)),
                row(make_trial(8, "B", "1", -8.0, 0), outcome(math.nan)),
            ],
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
