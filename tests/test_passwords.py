"""Passwords in URLs are neither shown nor kept."""

import sys

import pytest

from mua_rl.errors import UserError, without_password
from mua_rl.exits import ExitCode, leave
from mua_rl.run.folder import RunFolder
from mua_rl.sweep.study import Study


def test_a_database_password_is_neither_shown_nor_kept(tmp_path, monkeypatch, capsys):
    url = "postgresql://me:s3cr3t@db.example:5432/trials"
    monkeypatch.setattr(sys, "argv", ["sweep", "--study", url])
    run = RunFolder.create(str(tmp_path / "r"), "")
    run.start({"study": url, "task": "arithmetic"})
    assert run.settings() == {"study": "postgresql://me:***@db.example:5432/trials", "task": "arithmetic"}
    assert all("s3cr3t" not in path.read_text() for path in run.path.iterdir())
    with pytest.raises(UserError, match=r"the study postgresql://me:\*\*\*@db") as error:
        Study.open(url, "name", {})
    assert "s3cr3t" not in str(error.value)
    with pytest.raises(UserError, match="its password is not kept: give --study again"):
        Study.open(run.settings()["study"], "name", {})
    with pytest.raises(SystemExit):
        leave(f"mua_rl: error: {url} is out of reach", ExitCode.UNUSABLE)
    assert "me:***@db.example" in capsys.readouterr().err
    assert without_password("https://host/a:b@c and user@host") == "https://host/a:b@c and user@host"
