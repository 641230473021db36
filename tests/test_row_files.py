"""Rows from tables, saved datasets and compressed files, and rows with several gold answers."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from mua_rl.envs.row_files import read_split
from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError

ROWS = [{"prompt": f"{i} + {i}, in words?", "answer": str(2 * i)} for i in range(40)]


def both_splits(spec):
    task = get_task(spec, bad_rows="refuse")
    return sorted([*task.train(False)["prompt"], *task.held_out(False)["prompt"]])


def write_table(path, rows, delimiter=","):
    quoted = [['"' + str(cell).replace('"', '""') + '"' for cell in row.values()] for row in rows]
    path.write_text("\r\n".join(delimiter.join(line) for line in [list(rows[0]), *quoted]) + "\r\n")
    return path


@pytest.mark.parametrize("form", ["csv", "tsv", "csv.gz", "arrow", "parquet", "saved", "json"])
def test_rows_of_a_lone_table_are_all_there_in_two_parts(tmp_path, form):
    path = tmp_path / f"rows.{form}"
    if form in ("csv", "tsv"):
        write_table(path, ROWS, "," if form == "csv" else "\t")
    elif form == "csv.gz":
        path.write_bytes(gzip.compress(write_table(tmp_path / "plain.csv", ROWS).read_bytes()))
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        Dataset.from_list(ROWS).save_to_disk(path)
        if form == "arrow":
            path = path / "data-00000-of-00001.arrow"
    assert both_splits(f"jsonl:{path}") == sorted(row["prompt"] for row in ROWS)


@pytest.mark.parametrize("form", ["saved", "csv"])
def test_splits_of_a_folder_are_read_by_their_names(tmp_path, form):
    if form == "saved":
        DatasetDict({"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:5])}).save_to_disk(tmp_path)
    else:
        write_table(tmp_path / "train.csv", ROWS[:3])
        write_table(tmp_path / "test.csv", ROWS[3:5])
    task = get_task(f"jsonl:{tmp_path}", bad_rows="refuse")
    assert task.train(False)["answer"] == ["0", "2", "4"]
    assert task.held_out(False)["answer"] == ["6", "8"]


@pytest.mark.parametrize("form", ["saved", "arrow"])
def test_a_split_may_be_a_folder_of_its_own(tmp_path, form):
    Dataset.from_list(ROWS[:3]).save_to_disk(tmp_path / "train")
    if form == "arrow":
        (tmp_path / "train" / "state.json").unlink()
        (tmp_path / "train" / "dataset_info.json").unlink()
    assert get_task(f"jsonl:{tmp_path}").train(False)["answer"] == ["0", "2", "4"]


def test_a_saved_dataset_of_published_rows_is_a_task_too(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"So #### {i}"} for i in range(3)]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path)
    assert get_task(f"gsm8k:{tmp_path}").train(False)["answer"] == ["0", "1", "2"]
    with pytest.raises(UserError, match="has no split test or validation, only train"):
        get_task(f"gsm8k:{tmp_path}").held_out(False)


def test_cells_of_csv_hold_commas_lines_and_lists(tmp_path):
    row = {
        "text": 'Say "a, b",\nin two lines.',
        "code": "def f():\n    return 'a, b'",
        "test_list": ["assert f() == 'a, b'", "assert len(f()) == 4"],
    }
    write_table(tmp_path / "test.csv", [row, row | {"test_list": json.dumps(row["test_list"])}])
    split = get_task(f"mbpp:{tmp_path}", bad_rows="refuse").held_out(False)
    assert split["tests"] == [json.dumps(row["test_list"])] * 2
    assert row["text"] in split["prompt"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,prompt\na,b\n", "does not begin with a line of column names"),
        ("prompt,\na,b\n", "does not begin with a line of column names"),
        ('prompt,answer\n"a,1\n', r"is not CSV \(line 2\)"),
    ],
)
def test_what_is_no_table_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_split(str(tmp_path / "rows.csv"), ())


def test_bad_rows_of_csv_are_reported_with_the_line_that_they_begin_in(tmp_path, caplog):
    (tmp_path / "train.csv").write_text('prompt,answer\n"a\nb",1\n\nc,\nd,2,3\ne,"4"\n')
    assert get_task(f"jsonl:{tmp_path}").train(False)["answer"] == ["1", "4"]
    assert "train.csv:5: no column 'answer'" in caplog.text
    assert "train.csv:6: 3 cells for 2 columns" in caplog.text


def test_a_damaged_saved_dataset_is_one_clear_line(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a saved dataset"):
        read_split(str(tmp_path), ())


def test_any_of_several_gold_answers_is_right(tmp_path, caplog):
    rows = [
        {"prompt": "x?", "answer": [r"\frac{1}{2}", "x=3", 7]},
        {"prompt": "y?", "answer": ["5"]},
        {"prompt": "z?", "answer": []},
        {"prompt": "u?", "answer": ["5", ""]},
        {"prompt": "v?", "answer": ["5", None]},
        {"prompt": "w?", "answer": [["5"]]},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task(f"jsonl:{tmp_path}")
    split = task.train(False)
    assert split["answer"] == [[r"\frac{1}{2}", "x=3", "7"], ["5"]]
    for line, fault in [(3, "is empty"), (4, "is empty"), (5, "no column 'answer'"), (6, "has the wrong type: list")]:
        assert any(f":{line}: " in shown and fault in shown for shown in caplog.text.splitlines()), line
    answers = [r"So \boxed{0.5}", "#### 7", r"\boxed{3}", r"\boxed{4}", "none"]
    golds = [split["answer"][0]] * 5
    assert task.correct(completions=answers, answer=golds) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert task.strict(completions=answers, answer=golds)[:2] == [1.0, 1.0]
    assert task.correct(completions=answers[:2], answer=[["1/2"], ["8", "9"]]) == [1.0, 0.0]
    assert task.correct(completions=["#### 1"] * 2, answer=[[], ["1", ""]]) == [None, 1.0]


def test_rows_of_one_gold_answer_each_stay_texts(tmp_path):
    rows = [{"prompt": "x?", "answer": ["1"]}, {"prompt": "y?", "answer": 2}, {"prompt": "z?", "answer": "3"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert get_task(f"jsonl:{tmp_path}").train(False)["answer"] == ["1", "2", "3"]
