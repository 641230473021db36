"""What the scripts of the fields ask of a data set: one way to read it, one line for each thing that it lacks."""

import json
from pathlib import Path

import data_sets
import pytest
from datasets import Dataset

from mua_rl.errors import UserError

ROWS = [{"prompt": f"{i}-1=", "completion": str(i - 1)} for i in range(5)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of a data set, `rows/train.jsonl`, with room for what `datasets` keeps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.mark.parametrize("name", ["rows", "rows/train.jsonl", "~/rows", "~/rows/train.jsonl"])
def test_a_folder_and_a_file_are_read_alike(name):
    assert data_sets.read(name).to_list() == ROWS
    assert data_sets.read(name, "train[1:3]").to_list() == ROWS[1:3]


@pytest.mark.parametrize(
    ("name", "split", "reason"),
    [
        ("nobody/nothing", "train", "nobody/nothing"),
        ("./nowhere", "train", "nowhere"),
        ("rows", "test", "test"),
        ("rows", "train[:0]", "no data"),
        ("bad.jsonl", "train", "JSON parse error"),
        ("broken.jsonl", "train", "in row 1"),
        ("none.jsonl", "train", "StopIteration"),
        ("empty", "train", "empty"),
        ("no-rows", "train", "no data"),
        ("x" * 300, "train", "xxx"),
        ("", "train", "Error"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_reason(name, split, reason):
    Path("bad.jsonl").write_bytes(b"\x00\xff no rows")
    Path("broken.jsonl").write_text('{"text": "a"}\n{no json}\n')
    Path("none.jsonl").write_text("")
    Path("empty").mkdir()
    Path("no-rows").mkdir()
    Dataset.from_dict({"text": []}).to_parquet("no-rows/train.parquet")
    with pytest.raises(UserError, match=rf"the data set {name} cannot be read \(.*{reason}.*\): --dataset") as fault:
        data_sets.read(name, split)
    assert "\n" not in str(fault.value)


def test_too_few_examples_are_refused():
    with pytest.raises(UserError, match=r"rows has too few examples in train\[:1\]: 1, not 2 or more"):
        data_sets.read("rows", "train[:1]", least=2)


def test_the_first_choice_whose_columns_are_all_there_is_taken():
    rows = data_sets.read("rows")
    assert data_sets.find_columns(rows, "rows", ["messages"], ["prompt", "completion"], ["prompt"]) == [
        "prompt",
        "completion",
    ]
    with pytest.raises(UserError, match="no columns messages, or prompt and answer, but prompt, completion: rename"):
        data_sets.find_columns(rows, "rows", ["messages"], ["prompt", "answer"])
    with pytest.raises(UserError, match="no columns text, but prompt, completion: say which to take by --text_column"):
        data_sets.find_columns(rows, "rows", ["text"], flags="--text_column")


def test_some_examples_must_be_left_to_learn_from():
    data_sets.check_held_out(4, 5)
    with pytest.raises(UserError, match="fewer than all 5 examples, not 5"):
        data_sets.check_held_out(5, 5)


def test_a_column_of_words_is_none_of_images():
    with pytest.raises(UserError, match="column prompt holds no images"):
        data_sets.check_images(data_sets.read("rows"), "prompt")
