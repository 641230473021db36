"""The CSV that sweeps write and reports read."""

import math
import multiprocessing

import pytest
from helpers import make_trial
from known_sweeps import outcome, row

from mua_rl.analysis.rows import COLUMNS, append, read, read_all
from mua_rl.errors import UserError
from mua_rl.run.trial import Status, TrialResult


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(make_trial(8, "B", "1/sqrt(r)", -11.5, 3), outcome(1 / 3), task='odd, "task"', base="hub/base"),
        row(make_trial(None, "", "", -14.0, 0), outcome(0.1, stopped="hopeless:\nit fell")),
    ]
    append(tmp_path / "deep" / "sweep.csv", rows)
    append(tmp_path / "deep" / "sweep.csv", [])
    assert read(tmp_path / "deep" / "sweep.csv") == rows


def test_a_diverged_run_comes_back_with_its_nan(tmp_path):
    append(
        tmp_path / "sweep.csv",
        [row(make_trial(8, "B", "1", -3.0, 0), TrialResult.of_divergence(0.1, 7, 1.5, "not finite"))],
    )
    (found,) = read(tmp_path / "sweep.csv")
    assert math.isnan(found.result.score)
    assert found.result.status is Status.DIVERGED
    assert found.result.steps == 7


def _append_many(path, rank):
    for seed in range(50):
        append(path, [row(make_trial(rank, "B", "1", -10.0, seed), outcome(0.5))] * 3)


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
        row(make_trial(8, "B", "1", -9.0, 0), outcome()),
        row(make_trial(8, "B", "1", -8.0, 0), outcome()),
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
        ("rank", "-8", "at least 1, not -8"),
        ("init", "C", "initialisation 'C'"),
        ("alpha", "two", "cannot read the multiplier 'two'"),
        ("log2_lr", "nan", "log2_lr is nan"),
        ("score", "", "score is ''"),
        ("status", "maybe", "status is 'maybe'"),
        ("machine", "one,more", "too many"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_line(tmp_path, column, value, fault):
    path = tmp_path / "sweep.csv"
    append(path, [row(make_trial(8, "B", "1", -9.0, seed), outcome()) for seed in (0, 1)])
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
        append(path, [row(make_trial(8, "B", "1", -9.0, 0), outcome())])
    assert path.read_text() == "task,rank\narithmetic,8\n"
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.csv")


def test_a_run_in_two_files_counts_once_as_the_last_has_it(tmp_path):
    old, new = row(make_trial(8, "B", "1", -9.0, 0), outcome(0.2)), row(make_trial(8, "B", "1", -9.0, 0), outcome(0.3))
    other = row(make_trial(8, "B", "1", -9.0, 0), outcome(0.4), base="another base")
    append(tmp_path / "a.csv", [old])
    append(tmp_path / "b.csv", [new, other])
    assert read_all([tmp_path / "a.csv", tmp_path / "b.csv"]) == [new, other]
