"""A run that gets SIGTERM saves, says how to go on, and goes on by the same command."""

import importlib
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from mua_rl.errors import Terminated, UserError
from mua_rl.exits import ExitCode, run_command
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.trainer import GRPOTrainer
from mua_rl.run.folder import RunFolder

pytestmark = pytest.mark.slow

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_steps", "0", "--held_out_problems", "8", "--lr", "1e-5", "--rank", "4", "--max_steps", "4"]


@pytest.fixture
def at_step(monkeypatch):
    """Sends SIGTERM to this process in a step, counted from 0, once."""
    step = GRPOTrainer.training_step

    def send(number):
        steps = iter([number])
        waiting = [next(steps)]

        def training_step(self, *args):
            if waiting and self.state.global_step == waiting[0]:
                waiting.clear()
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args)

        monkeypatch.setattr(GRPOTrainer, "training_step", training_step)

    return send


def weights(run):
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("flags", [[], ["--enable_jit_checkpoint", "true"], ["--save_strategy", "no"]])
def test_the_same_command_goes_on_to_the_same_policy_from_where_sigterm_ended_it(flags, at_step, tmp_path):
    command = [*SMALL, *flags, "--output_dir", str(tmp_path / "r")]
    at_step(1)
    with pytest.raises(Terminated, match=r"saved after step 2: the same command goes on with it, or --resume .*/r"):
        grpo.train(*parse(command))
    broken = RunFolder(tmp_path / "r")
    assert broken.result() is None and not (broken.path / "lr_record.json").exists()
    assert broken.last_checkpoint().name == "checkpoint-2"
    run = grpo.train(*parse(command))
    assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2, 3, 4]
    whole = grpo.train(*parse([*SMALL, *flags, "--output_dir", str(tmp_path / "whole")]))
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(run).items())
    with pytest.raises(UserError, match="is not empty"):
        grpo.train(*parse(command))


def test_a_run_without_a_folder_of_its_own_is_found_again_and_one_that_was_asked_something_else_is_not(
    at_step, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    at_step(0)
    with pytest.raises(Terminated):
        grpo.train(*parse(SMALL))
    other = grpo.train(*parse([*SMALL, "--seed", "3"]))
    run = grpo.train(*parse(SMALL))
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert other.path != run.path and run.result().steps == 4


def test_a_batch_that_several_steps_use_is_used_up_before_the_end(at_step, tmp_path):
    at_step(0)
    with pytest.raises(Terminated, match="saved after step 2"):
        grpo.train(*parse([*SMALL, "--num_iterations", "2", "--output_dir", str(tmp_path / "r")]))


def test_before_the_first_step_nothing_is_saved_and_the_same_command_begins(tmp_path, monkeypatch):
    measure = grpo.GRPOLearner.measure
    command = [*SMALL, "--output_dir", str(tmp_path / "r")]
    with monkeypatch.context() as patch:
        patch.setattr(grpo.GRPOLearner, "measure", lambda self: os.kill(os.getpid(), signal.SIGTERM) or measure(self))
        with pytest.raises(Terminated, match="before its first step"):
            grpo.train(*parse(command))
    assert grpo.train(*parse(command)).result().steps == 4


def test_the_command_ends_with_a_code_of_its_own_and_one_line(at_step, tmp_path, monkeypatch, capsys):
    at_step(0)
    monkeypatch.setattr(sys, "argv", ["mua_rl.grpo", *SMALL, "--output_dir", str(tmp_path / "r")])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_command(importlib.import_module("mua_rl.grpo.__main__").main)
    assert stop.value.code == ExitCode.TERMINATED == 143
    assert "saved after step 1: the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    assert signal.getsignal(signal.SIGTERM) == before
