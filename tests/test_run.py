"""The run folder: it belongs to one process at a time, and a run has ended when its result is there."""

import subprocess
import sys

import pytest

from mua_rl.errors import UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import CONFIG, RunFolder, open_run
from mua_rl.run.trial import TrialResult

TRY = "import sys; from mua_rl.run.folder import open_run; open_run(sys.argv[1], None, 'x', {})"


def try_to_resume(folder):
    """What another process says of it."""
    done = subprocess.run([sys.executable, "-c", TRY, str(folder)], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.mark.slow
def test_no_two_processes_work_in_one_run_folder(tmp_path):
    run, _ = open_run(None, str(tmp_path / "run"), "x", {})
    assert "another process is at work" in try_to_resume(run.path)
    open_run(str(run.path), None, "x", {})  # the same process may
    run.finish(TrialResult.of_divergence(0.4, 1, 1.0, "not finite"), {})
    assert try_to_resume(run.path) == ""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_the_folder_to_others(tmp_path):
    run = RunFolder.create(str(tmp_path / "run"), "x")
    (run.path / CONFIG).touch()
    code = f"{TRY}; import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True).returncode == -9
    assert try_to_resume(run.path) == ""


def test_a_folder_that_cannot_be_written_to_is_refused_in_one_line(tmp_path):
    (tmp_path / CONFIG).touch()
    (tmp_path / ".lock").mkdir()  # root may write anywhere else
    with pytest.raises(UserError, match="cannot be written to"):
        open_run(str(tmp_path), None, "x", {})


def test_resume_is_advised_also_where_a_run_has_no_checkpoint_yet(tmp_path):
    open_run(None, str(tmp_path / "run"), "x", {}, {"learning_rate": 0.1})
    with pytest.raises(UserError, match="--resume"):
        RunFolder.create(str(tmp_path / "run"), "x")


@pytest.mark.slow
def test_a_grpo_run_that_was_killed_before_its_record_was_written_goes_on(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    flags = ["--rank", "2", "--lr", "0.0001", "--max_steps", "1", "--save_steps", "1", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--held_out_steps", "0"]
    with monkeypatch.context() as context:
        context.setattr("mua_rl.run.life.plots.learning_curve", kill)
        with pytest.raises(Killed):
            grpo.train(*parse([*flags, "--output_dir", str(tmp_path / "run")]))
    assert grpo.train(*parse(["--resume", str(tmp_path / "run")])).result().steps == 1
    assert LRRecord.load(tmp_path / "run").learning_rate == 0.0001
