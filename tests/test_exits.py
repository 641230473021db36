"""A command line that fails in a known way says so in one line and exits with a code of its own."""

import errno
import os
import re
import runpy
import sqlite3
import sys
from pathlib import Path

import pytest

from mua_rl.errors import CannotLearn, Diverged, EngineFailed, PolicyWorse, Unscored, UserError
from mua_rl.exits import ExitCode, run_command
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import Status


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such rank"), 2),
        (Diverged("at step 7"), 3),
        (EngineFailed("the engine is gone"), 4),
        (PolicyWorse("the policy got worse"), 5),
        (Unscored("no completion had a score"), 6),
        (CannotLearn("every reward is the same"), 7),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2),
        (RuntimeError("serializing: No space left on device (os error 28)"), 2),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 2),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), 2),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "tb"), 2),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 2),
        (sqlite3.OperationalError("database or disk is full"), 2),
    ],
)
def test_known_failures_are_one_line_and_an_exit_code(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert str(error) in printed
    assert len(printed.splitlines()) == 1


def test_a_failure_that_was_raised_over_a_full_disk_is_one(capsys):
    def main():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("the archive cannot be closed") from None

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2 and "make room" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full_inside_torch_save_is_one_line(capsys):
    """pytorch#76108: PyTorch speaks of positions in an archive."""
    import torch

    with pytest.raises(SystemExit) as stop:
        run_command(lambda: torch.save(torch.zeros(100_000), "/dev/full"))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "make room" in printed and len(printed.splitlines()) == 1


def test_a_working_folder_that_takes_nothing_is_named_with_the_cure(monkeypatch):
    def mkdir(self, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UserError, match=r"cannot be made in .*: Permission denied; name another with --output_dir"):
        RunFolder.create(None, "grpo")


def test_an_unknown_failure_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))


def test_an_interrupted_command_says_so_and_exits_as_shells_expect(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "mua_rl: interrupted."


def exit_code(monkeypatch, module, *flags):
    """What a shell would see of `python -m mua_rl.MODULE`."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"mua_rl.{module}", run_name="__main__")
    return stop.value.code


@pytest.mark.slow
def test_a_run_whose_policy_got_worse_exits_with_its_own_code_and_leaves_no_record(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    environment = ["--env_id", "mua_rl/CartPole-v0", "--eval_episodes", 10]
    training = ["--lr", 0.3, "--total_timesteps", 4096, "--tensorboard_log", "none", "--progress_bar", "false"]
    flags = [*environment, *training, "--output_dir", tmp_path / "run"]
    assert exit_code(monkeypatch, "ppo", *flags) == ExitCode.WORSE
    run = RunFolder(tmp_path / "run")
    assert run.result().status is Status.WORSE
    assert not (run.path / "lr_record.json").exists()


SILENT = """
from dataclasses import replace

from mua_rl.envs.tasks import get_task, register_task

def silent(completions, **columns):
    return [None] * len(completions)

@register_task("silent")
def build():
    return replace(get_task("arithmetic"), name="silent", rewards=(silent,))
"""


@pytest.mark.slow
def test_a_run_that_no_reward_scored_exits_with_its_own_code_and_leaves_no_record(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SILENT)
    batch = ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1, "--max_steps", 2]
    flags = [
        "--task",
        f"{tmp_path}/mine.py:silent",
        "--rank",
        4,
        *batch,
        "--held_out_problems",
        8,
        "--report_to",
        "none",
    ]
    assert exit_code(monkeypatch, "grpo", *flags, "--output_dir", tmp_path / "run") == ExitCode.UNSCORED
    run = RunFolder(tmp_path / "run")
    assert run.result().status is Status.UNSCORED
    assert not (run.path / "lr_record.json").exists()


def test_the_documentation_has_every_code_with_its_name():
    table = (Path(__file__).parents[1] / "docs" / "exit_codes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE))
    assert {int(code): name for code, name in rows.items()} == {code.value: code.name for code in ExitCode}
