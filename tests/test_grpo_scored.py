"""Runs that could teach nothing say so, before they begin or at their end, and leave no LR record."""

import json
from dataclasses import replace

import pytest

from mua_rl.envs.tasks import get_task
from mua_rl.errors import CannotLearn, Unscored, UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import GRPOArguments, parse
from mua_rl.grpo.scored import unscored
from mua_rl.grpo.stacked.trainer import StackedTrainer
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import AdapterSpec, Status, Trial

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_steps", "0", "--held_out_problems", "8", "--rank", "4", "--lr", "1e-3", "--max_steps", "2"]


def run(folder, *flags):
    return grpo.train(*parse([*SMALL, *flags, "--output_dir", str(folder)]))


def test_fewer_training_rows_than_the_prompts_of_a_step_are_refused_with_the_cure(tmp_path):
    rows = [{"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(16)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--task", f"jsonl:{tmp_path / 'few.jsonl'}"]
    with pytest.raises(UserError, match=r"has 1\d training rows, fewer than the 32 prompts .*--completions_per_step"):
        grpo.train(*parse([*task, "--max_steps", "20", "--lr", "1e-3", "--output_dir", str(tmp_path / "r")]))
    assert not (tmp_path / "r").exists()
    setup = grpo.prepare_grpo(*parse([*SMALL, *task])[:2])  # two prompts a step
    assert len(setup.train_rows) < 16


def ends_unscored(folder, message, *flags):
    with pytest.raises(Unscored, match=message):
        run(folder, *flags)
    result = RunFolder(folder).result()
    assert result.status is Status.UNSCORED and result.reason
    assert not (folder / "lr_record.json").exists()


def test_a_run_whose_completions_were_all_cut_off_and_masked_leaves_no_record(tmp_path):
    message = r"all completions of all 2 steps were cut off at 1 tokens .*--max_completion_length"
    ends_unscored(tmp_path / "r", message, "--max_completion_length", "1")


def test_a_run_whose_rewards_never_differed_leaves_no_record(tmp_path, monkeypatch):
    task = replace(get_task("arithmetic"), rewards=(lambda completions, **columns: [0.25] * len(completions),))
    monkeypatch.setattr("mua_rl.grpo.setup.get_task", lambda *spec: task)
    ends_unscored(tmp_path / "r", r"differed in reward in any of 2 steps.* was 0.25; see what the rewards of the task")


def test_a_run_that_teaches_nothing_any_more_is_stopped_with_cause_and_cure_and_goes_on_where_that_is_asked(tmp_path):
    flags = ["--max_completion_length", "1", "--max_steps", "40", "--logging_steps", "1", "--learning_rate", "0.001"]
    with pytest.raises(CannotLearn, match=r"all completions were cut off .*--max_completion_length.*step 6 of 40"):
        run(tmp_path / "r", *flags, "--patience", "6")
    result = RunFolder(tmp_path / "r").result()
    assert (result.status, result.steps) == (Status.STOPPED, 6)
    assert "in 6 steps in a row" in result.reason
    assert not (tmp_path / "r" / "lr_record.json").exists()
    ends_unscored(tmp_path / "on", "of all 7 steps", *flags, "--max_steps", "7", "--patience", "0")


def test_trials_side_by_side_whose_completions_were_all_masked_end_so_too():
    arguments, _, _ = parse([*SMALL[:-6], "--max_steps", "1", "--max_completion_length", "1", "--lr", "1e-3"])
    trial = Trial(AdapterSpec.parse(4), -8, 0)
    with pytest.raises(Unscored, match="all completions of all 1 steps were cut off at 1 tokens"):
        StackedTrainer(arguments, [trial]).train()


DULL = {"reward": 0.5, "grad_norm": 0.0, "completions/clipped_ratio": 0.5, "frac_reward_zero_std": 1.0}
MASKED = DULL | {"completions/clipped_ratio": 1.0, "frac_reward_zero_std": 0.5}
GOOD = {"reward": 0.5, "grad_norm": 0.1, "completions/clipped_ratio": 0.5, "frac_reward_zero_std": 0.5}


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], None),
        ([GOOD], None),
        ([DULL, MASKED, GOOD], None),
        ([DULL, DULL | {"reward": None}], "differed in reward"),
        ([DULL, MASKED], "differed in reward"),
        ([MASKED, MASKED], "cut off at 32 tokens"),
        ([{"reward": None}, {"reward": float("nan")}], "had a score"),
        ([DULL | {"grad_norm": float("nan")}], None),
        ([DULL | {"grad_norm": 1e-9}], None),
        ([DULL | {"frac_reward_zero_std": 0.99}], None),
        ([{name: value for name, value in MASKED.items() if name != "grad_norm"}], "cut off"),
    ],
)
def test_only_steps_none_of_which_had_a_gradient_taught_nothing(steps, says):
    fault = unscored(get_task("arithmetic"), GRPOArguments(), len(steps), steps)
    assert fault is None if says is None else says in str(fault)


def test_truncated_completions_that_count_can_teach():
    arguments = GRPOArguments(mask_truncated_completions=False)
    assert unscored(get_task("arithmetic"), arguments, 1, [MASKED]) is None
