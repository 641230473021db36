"""Supervised finetuning by scripts/finetune_text.py, in runs of a few steps."""

import contextlib
import json
import math
import sys
from pathlib import Path

import curves
import finetune_text as script
import pytest
import torch
from helpers import make_trial
from torch.nn.functional import log_softmax

from mua_rl.adapter.adapters import LoRA
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.analysis.rows import SweepRow, append
from mua_rl.errors import Unscored, UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.lm.models import load_model, load_tokenizer
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import Status, TrialResult

pytestmark = pytest.mark.slow  # what is tested starts training

SMALL = ["--max_steps", "4", "--per_device_train_batch_size", "8", "--held_out", "16"]


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    """Tokenizing 8192 problems takes longer than a run."""
    monkeypatch.setattr("mua_rl.envs.arithmetic.TRAIN_PROBLEMS", 64)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["finetune_text.py", *SMALL, *map(str, flags)])
    script.main()


def problem(**changes):
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "held_out": 16}
    return script.problem_of(script.TextArguments(**{**settings, **changes}))


def trained(seed, problem_):
    model, *_ = curves.finetune(problem_, LoRA(4), 2**-8, seed, 1e-3)
    return fingerprint(model)


def messages_file(folder):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}-1="}, {"role": "assistant", "content": str(i - 1)}]}
        for i in range(40)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_grpo_goes_on_from_a_finetuned_policy_at_the_rate_of_its_own_record(tmp_path, monkeypatch, capsys):
    sft = tmp_path / "sft"
    run(monkeypatch, "--model", "embedded", "--rank", 8, "--lr", 2**-7, "--output_dir", sft)
    result = RunFolder.open(str(sft)).result()
    assert result.score > result.before + 1
    assert LRRecord.load(sft).algorithm == "sft"
    flags = ["--start_from", str(sft), "--rank", "32", "--max_steps", "1", "--per_device_train_batch_size", "16"]
    flags += ["--gradient_accumulation_steps", "1", "--held_out_problems", "16", "--held_out_steps", "0"]
    flags += ["--report_to", "none", "--max_completion_length", "6", "--output_dir", str(tmp_path / "grpo")]
    with contextlib.suppress(Unscored):  # so short a run of so weak a policy may never be right
        grpo.train(*parse(flags))
    after = RunFolder(tmp_path / "grpo")
    record = LRRecord.load(Path(script.__file__).parent.parent / "mua_rl" / "assets" / "records" / "arithmetic-1m.json")
    assert after.settings()["task"] == "differences"
    assert after.learning_rate()["learning_rate"] == record.learning_rate
    assert after.learning_rate()["reason"].startswith(f"the shipped record arithmetic-1m (that of {sft} is of sft)")


def test_grpo_goes_on_with_the_tokenizer_of_the_finetuned_policy(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    load_model("embedded").config.save_pretrained(tmp_path / "chat")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--tokenizer_name", "./chat", "--rank", 4, "--lr", 2**-7, "--output_dir", tmp_path / "sft")
    monkeypatch.chdir("/")
    setup = prepare_grpo(*parse(["--start_from", str(tmp_path / "sft"), "--rank", "4"])[:2])
    assert setup.tokenizer.chat_template == tokenizer.chat_template
    assert setup.held_out_rows["prompt"][0][0]["role"] == "user"


def test_grpo_wants_a_task_after_a_data_set(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}-1=", "completion": str(i - 1)} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    run(monkeypatch, "--dataset_name", path, "--rank", 4, "--lr", 2**-7, "--output_dir", tmp_path / "sft")
    assert LRRecord.load(tmp_path / "sft").task == str(path)
    with pytest.raises(UserError, match="has no reward: give a --task"):
        parse(["--start_from", str(tmp_path / "sft")])
    parse(["--start_from", str(tmp_path / "sft"), "--task", "differences"])


def test_the_curves_end_with_a_record_that_serves_full_finetuning(tmp_path, monkeypatch, capsys):
    grid = ["--ranks", "4", "full", "--grid", "-9", "-7", "--resolution", "1", "--seeds", "1"]
    run(monkeypatch, *grid, "--only", "rank=4", "--output_dir", tmp_path / "curves")
    record = LRRecord.load(tmp_path / "curves")
    assert (record.rank, record.algorithm, record.task) == (4, "sft", "differences")
    assert "loss per token" in (tmp_path / "curves" / "report.md").read_text()
    run(monkeypatch, "--lr_from", tmp_path / "curves", "--rank", "full", "--output_dir", tmp_path / "full")
    given = record.learning_rate * (record.rank / record.outputs) ** 0.5
    assert LRRecord.load(tmp_path / "full").learning_rate == pytest.approx(given)
    assert (tmp_path / "full" / "model").is_dir()


def test_the_metric_is_the_loss_of_completion_tokens_alone():
    text = problem()
    metric, error = text.measure(text.load())
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    held_out = script.get_task("differences").held_out(False)[:16]
    losses, tokens = [], []
    for prompt, answer in zip(held_out["prompt"], held_out["answer"], strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = torch.tensor(tokenizer(f"{prompt}{answer}<eos>")["input_ids"])
        with torch.no_grad():
            scores = log_softmax(model(ids[None]).logits[0, :-1], -1)
        found = -scores.gather(1, ids[1:, None])[len(prompt_ids) - 1 :]
        losses.append(found.sum().item())
        tokens.append(len(found))
    mean = sum(losses) / sum(tokens)
    assert metric == pytest.approx(-mean, rel=1e-4)
    residuals = [loss - mean * count for loss, count in zip(losses, tokens, strict=True)]
    assert error == pytest.approx(math.hypot(*residuals) / sum(tokens), rel=1e-3)


def test_a_seed_decides_a_run():
    problem_ = problem()
    assert trained(0, problem_) == trained(0, problem_) != trained(1, problem_)


def test_of_chat_messages_the_turns_of_the_assistant_are_learnt(tmp_path):
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}<eos>{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    arguments = script.TextArguments(dataset_name=str(messages_file(tmp_path)), held_out=8, max_steps=1)
    rows = script.find_examples(arguments, True)
    text = script.Text(arguments, tokenizer, *rows).tokenized(load_model("embedded"))
    assert (len(text.train_rows), len(text.held_out_rows)) == (32, 8)
    for row in text.train_rows:
        prompt = tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0])
        learnt = tokenizer.decode([label for label in row["labels"] if label >= 0])
        number = int(prompt.removeprefix("<bos>").removesuffix("-1="))
        assert learnt == f"{number - 1}<eos>"


def test_what_follows_a_prompt_is_written_as_asked():
    rows, _ = script.find_examples(script.TextArguments(completion="<answer>{answer}</answer>"), True)
    (message,) = rows[0]["completion"]
    first, _, second = rows[0]["prompt"][0]["content"].removeprefix("What is ").rstrip("?").split()
    assert message == {"role": "assistant", "content": f"<answer>{int(first) - int(second)}</answer>"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "one-liners"], "has no answers to learn from"),
        (["--task", "cooking"], "no task 'cooking'"),
        (["--dataset_name", "nobody/nothing"], "cannot be read"),
        (["--dataset_name", "x.jsonl", "--task", "arithmetic"], "exclude each other"),
        (["--completion", "yes"], "where the {answer} stands"),
        (["--target_modules", "("], "LoRA cannot be attached"),
        (["--max_steps", "0"], "--max_steps takes a number from 1 on"),
        (["--max_length", "2"], "within --max_length"),
        (["--held_out", "1"], "--held_out takes a number from 2 on, not 1"),
        (["--tokenizer_name", "./nowhere"], "no model folder"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--lr", "0.001", "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_task_whose_every_answer_is_none_has_nothing_to_learn_from():
    rows = script.Dataset.from_dict({"prompt": ["a", "b"], "answer": [None, None]})
    with pytest.raises(UserError, match="has no answers to learn from"):
        script._answered(rows, "riddles", "{answer}")


@pytest.mark.parametrize("row", [{"question": "a"}, {"prompt": "a", "completion": None}])
def test_rows_that_say_nothing_are_refused(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 12))
    with pytest.raises(UserError, match=r"has no columns|cannot read"):
        problem(dataset_name=str(path), held_out=4)


def test_more_held_out_examples_than_there_are_are_refused(tmp_path):
    with pytest.raises(UserError, match="--held_out takes fewer than all 40 examples, not 40"):
        problem(dataset_name=str(messages_file(tmp_path)), held_out=40)


GRID = ["--ranks", "4", "0", "full", "4", "--grid", "-9", "-7", "--resolution", "1", "--seeds", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "rank=16"], "--only rank=16 leaves none of --ranks 4"),
        (["--only", "init=A"], "--only takes rank"),
        (["--grid", "-8", "-9"], "the smaller first"),
        (["--grid", "nan", "-8"], "the smaller first"),
        (["--grid", "3", "9"], "between -24 and -1"),
        (["--seeds", "0"], "--seeds one from 1 on"),
        (["--ranks", "4", "-1"], "positive number|expected"),
    ],
)
def test_curves_that_cannot_be_measured_are_refused_before_there_is_a_folder(flags, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *GRID, "--output_dir", tmp_path / "curves", *flags)
    assert not (tmp_path / "curves").exists()


def test_curves_are_not_measured_into_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made .*: choose another --output_dir"):
        run(monkeypatch, *GRID, "--output_dir", tmp_path / "file")


def instant_run(problem_, trial, before, head_lr):
    """A run of no time, best at 2^-8."""
    metric = before + 2 - abs(trial.log2_lr + 8)
    return TrialResult(metric, 0.1, before, metric, metric, Status.OK, "", problem_.steps, 1.0)


def test_the_same_command_after_a_stop_repeats_no_run_and_a_run_of_two_processes_counts_once(
    tmp_path, monkeypatch, capsys
):
    ran = []

    def run_trial(problem_, trial, before, head_lr):
        if len(ran) == 2:
            ran.append(None)
            raise KeyboardInterrupt
        ran.append(trial)
        return instant_run(problem_, trial, before, head_lr)

    monkeypatch.setattr(curves, "run_trial", run_trial)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *GRID, "--output_dir", tmp_path)
    run(monkeypatch, *GRID, "--output_dir", tmp_path)
    finished = [trial for trial in ran if trial]
    assert len(finished) == len({*finished}) == 6
    assert {trial.spec.rank for trial in finished} == {4, None}
    csv = tmp_path / "sweep.csv"
    csv.write_text(csv.read_text() + csv.read_text().splitlines()[1] + "\n")
    assert len(curves.study_of(problem(), tmp_path).rows()) == 6


def test_the_record_is_of_a_search_that_has_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "run_trial", instant_run)
    trials = [make_trial(4, "B", "1", log2_lr, 0) for log2_lr in (-9.0, -8.0)]
    outcomes = [instant_run(problem(), trial, -5.0, 0) for trial in trials]
    rows = [
        SweepRow("sft", "differences", "embedded", *pair, "elsewhere") for pair in zip(trials, outcomes, strict=True)
    ]
    append(tmp_path / "sweep.csv", rows)
    run(monkeypatch, *GRID, "--only", "rank=full", "--output_dir", tmp_path)
    assert LRRecord.load(tmp_path).rank is None


def test_runs_of_another_length_are_not_taken_for_these(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "run_trial", instant_run)
    run(monkeypatch, *GRID, "--only", "rank=4", "--output_dir", tmp_path)
    with pytest.raises(UserError, match="has runs of 4 steps, not 5: choose another --output_dir"):
        run(monkeypatch, *GRID, "--only", "rank=4", "--output_dir", tmp_path, "--max_steps", "5")


def test_chat_messages_want_a_chat_template(tmp_path):
    with pytest.raises(UserError, match="TRL cannot read these examples"):
        problem(dataset_name=str(messages_file(tmp_path)), held_out=8)
