"""Files that are written whole or not at all."""

import os

import pytest

from mua_rl.files import write_whole


def test_a_file_is_replaced_in_one_step_and_one_that_cannot_be_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        write_whole(path, text)
        assert path.read_text() == text

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "later")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]
