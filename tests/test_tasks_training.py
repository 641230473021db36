"""The rewards inside a GRPO run: the reward-hacking watch is in the run's metrics."""

import json

import pytest

from mua_rl.errors import Unscored
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.run.folder import RunFolder

FLAGS = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--num_generations", "4"]
FLAGS += ["--report_to", "none", "--held_out_steps", "0", "--rank", "2", "--lr", "0.001", "--max_steps", "2"]
FLAGS += ["--max_completion_length", "8"]


def run(path, *flags):
    with pytest.raises(Unscored, match="cut off at 8 tokens"):  # which these tasks' answers do not fit in
        grpo.train(*parse([*FLAGS, *map(str, flags), "--output_dir", str(path)]))
    folder = RunFolder(path)
    steps = [line for line in folder.metrics() if "loss" in line]
    assert len(steps) == 2
    return folder, steps


@pytest.mark.slow
def test_a_math_run_logs_the_watch_and_the_strict_check(tmp_path):
    rows = [{"question": f"{a}+{b}=", "answer": f"#### {a + b}"} for a in range(5) for b in range(5)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, steps = run(tmp_path / "run", "--task", f"gsm8k:{tmp_path}")
    watched = {"math/timeout", "math/error", "math/no_answer", "math/unreadable", "format_only"}
    assert all(watched <= set(step) for step in steps)
    assert all(0.0 <= step[name] <= 1.0 for step in steps for name in watched)
    assert any("held_out/strict_accuracy" in line for line in folder.metrics())


@pytest.mark.slow
def test_a_code_run_logs_why_programs_failed(tmp_path):
    _, steps = run(tmp_path / "run", "--task", "one-liners")
    reasons = {"code/passed", "code/wrong", "code/error", "code/timeout", "code/no_code", "code/grader_fault"}
    for step in steps:
        assert reasons <= set(step)
        assert sum(value for name, value in step.items() if name.startswith("code/")) == pytest.approx(1.0)
