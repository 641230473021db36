"""`python -m mua_rl.lr` says what a record gives, and why."""

import os
import subprocess
import sys

import pytest
from helpers import make_record

from mua_rl.exits import run_command
from mua_rl.lr import __main__ as lr


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mua_rl.lr", *map(str, arguments)])
    run_command(lr.main)
    return capsys.readouterr().out


def test_one_rank_prints_the_rate_and_the_reason(tmp_path, monkeypatch, capsys):
    make_record(scheme="Init[A]").save(tmp_path)
    out = run(monkeypatch, capsys, tmp_path, "--rank", 128)
    assert out.startswith("0.000244141 ")
    assert "r 8 → 128" in out
    assert len(out.splitlines()) == 2


def test_one_rank_has_its_warning_beside_the_figures(tmp_path, monkeypatch, capsys):
    make_record(rank=8).save(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mua_rl.lr", str(tmp_path), "--rank", "2"])
    run_command(lr.main)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert printed.err.startswith("warning: r = 2 is outside the ranks")
    assert len(printed.err.splitlines()) == 1


def test_the_table_says_how_far_off_each_rate_may_be_but_the_records_own(tmp_path, monkeypatch, capsys):
    make_record(rank=8, algorithm="ppo", outputs=128).save(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    lines = [line.split("│") for line in run(monkeypatch, capsys, tmp_path).splitlines() if line.startswith("│")]
    said = {cells[1].strip(): cells[4].strip() for cells in lines}
    assert said["8"] == ""
    assert said["1"] == said["128"] == "not measured"
    assert said["16"].startswith("within a factor of")
    assert said["full"].startswith("within a factor of")
    assert said["full"] != said["16"]


def test_below_the_table_is_why_full_finetuning_should_not_rely_on_it(tmp_path, monkeypatch, capsys):
    for rank, warns in (4, True), (16, False):
        make_record(rank=rank, outputs=128).save(tmp_path)
        out = run(monkeypatch, capsys, tmp_path)
        assert ("see below" in out) == ("full: r = 4 is small" in out) == warns


def test_the_table_has_every_rank_and_full_finetuning(tmp_path, monkeypatch, capsys):
    make_record(rank=24).save(tmp_path)
    out = run(monkeypatch, capsys, tmp_path)
    for label in ("1", "24", "128", "full"):
        assert any(line.split("│")[1].strip() == label for line in out.splitlines() if line.startswith("│"))


def test_a_refused_transfer_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    make_record(scheme="Init[A]").save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, tmp_path, "--rank", "full")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "tune with Init[B]" in error


@pytest.mark.parametrize("rank", ["-1", "x", "1.5", "513"])
def test_a_rank_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys, rank):
    make_record().save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, tmp_path, f"--rank={rank}")
    assert stop.value.code == 2
    assert "rank" in capsys.readouterr().err


@pytest.mark.parametrize("exponent", ["nan", "1e9", "-0.5"])
@pytest.mark.parametrize("rank", [[], ["--rank", "4"]], ids=["table", "one rank"])
def test_an_exponent_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys, exponent, rank):
    make_record().save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, tmp_path, f"--rank_exponent={exponent}", *rank)
    assert stop.value.code == 2
    assert "from 0 (the theory alone) to 1" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--lora_alpha", "--lora-alpha"])
def test_pefts_lora_alpha_is_taken_and_alpha_of_its_size_is_refused(tmp_path, monkeypatch, capsys, flag):
    make_record(scheme="Init[A]", alpha="2/r").save(tmp_path)
    in_pefts_words = run(monkeypatch, capsys, tmp_path, "--rank", 32, flag, 64)
    assert "α = 64/r, r = 32" in in_pefts_words
    assert in_pefts_words == run(monkeypatch, capsys, tmp_path, "--rank", 32, "--alpha", "64/r")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, tmp_path, "--rank", 32, "--alpha", 64)
    assert stop.value.code == 2
    assert "give lora_alpha (64)" in capsys.readouterr().err


def test_help_takes_less_than_a_second_of_cpu_time():
    before = os.times()
    subprocess.run([sys.executable, "-m", "mua_rl.lr", "--help"], check=True, capture_output=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
