"""What a GRPO run says at its end, and when it shall go on."""

import json
import shutil

import pytest

from mua_rl.errors import UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_problems", "8", "--max_completion_length", "6", "--rank", "4", "--lr", "1e-9"]


@pytest.mark.slow
def test_the_time_of_a_step_counts_all_steps_since_training_began_logged_or_not(tmp_path, capsys):
    flags = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "2", "--output_dir", str(tmp_path / "run")]
    run = grpo.train(*parse([*SMALL, *flags]))
    first = json.loads((run.path / "result.json").read_text())
    assert first["seconds_per_step"] == pytest.approx(first["seconds"] / 4)
    assert f"{first['seconds_per_step']:.3g} s each" in capsys.readouterr().out
    (run.path / "result.json").unlink()
    shutil.rmtree(run.path / "checkpoint-4")
    grpo.train(*parse(["--resume", str(run.path)]))
    resumed = json.loads((run.path / "result.json").read_text())
    assert resumed["steps"] == 4
    assert resumed["seconds_per_step"] == pytest.approx(resumed["seconds"] / 2)


@pytest.mark.slow
def test_a_run_that_was_cut_off_after_its_last_step_takes_no_other_when_it_is_resumed(tmp_path):
    flags = ["--max_steps", "2", "--save_steps", "2", "--output_dir", str(tmp_path / "run")]
    run = grpo.train(*parse([*SMALL, *flags]))
    weights = (run.path / "adapter" / "adapter_model.safetensors").read_bytes()
    (run.path / "result.json").unlink()
    assert grpo.train(*parse(["--resume", str(run.path)])).result().steps == 2
    assert (run.path / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2]


@pytest.mark.slow
def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(tmp_path):
    """transformers would begin with a new optimizer and the schedule's warm-up."""
    flags = ["--max_steps", "2", "--save_steps", "1", "--save_only_model", "--output_dir", str(tmp_path / "run")]
    run = grpo.train(*parse([*SMALL, *flags]))
    (run.path / "result.json").unlink()
    metrics = run.metrics()
    with pytest.raises(UserError, match="checkpoint-2 holds weights and no optimizer"):
        grpo.train(*parse(["--resume", str(run.path)]))
    assert run.metrics() == metrics
