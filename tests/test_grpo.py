"""GRPO end to end on the embedded model, in runs of a few steps."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import trl
from peft import PeftModel
from safetensors.torch import load_file

from mua_rl.adapter.targets import lora_layers
from mua_rl.envs.tasks import get_task
from mua_rl.errors import Diverged, UserError
from mua_rl.grpo import arguments as grpo_arguments
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.grpo.trainer import GRPOTrainer
from mua_rl.lm import models
from mua_rl.lm.heldout import held_out
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import Status

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_steps", "0"]


def run(*flags):
    return grpo.train(*parse([*SMALL, *map(str, flags)]))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A finished LoRA run of eight steps that has learnt something."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return run("--rank", 8, "--lr", 2**-8, "--max_steps", 8, "--save_steps", 4, "--output_dir", folder)


def greedy_answers(model):
    task, tokenizer = get_task("arithmetic"), models.load_tokenizer("embedded")
    return held_out(model, tokenizer, task, task.held_out(False), task.max_completion_length).completions


@pytest.mark.slow
def test_a_run_folder_holds_what_is_needed_to_judge_and_repeat_it(lora_run):
    names = {path.name for path in lora_run.path.iterdir()}
    assert lora_run.learning_rate() == {"learning_rate": 2**-8, "reason": "given by --lr", "warning": ""}
    assert {"config.yaml", "versions.json", "metrics.jsonl", "result.json", "lr_record.json", "curve.png"} <= names
    assert lora_run.settings()["rank"] == "8"
    versions = json.loads((lora_run.path / "versions.json").read_text())
    assert versions["trl"] == trl.__version__
    assert {"torch", "peft", "command", "host"} <= versions.keys()
    result = lora_run.result()
    assert result.steps == 8
    assert result.status is Status.OK
    assert result.score != result.before


def test_metrics_have_every_step_and_the_rate_that_the_optimizer_used(lora_run):
    lines = [line for line in lora_run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    rates = [line["lr/lora_A"] for line in lines]
    assert rates == [line["lr/lora_B"] for line in lines]
    # 5 % of 8 steps is one step of warm-up from zero; then a cosine from the peak down to a tenth of it.
    peak = 2**-8
    cosine = [peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 7))) for k in range(7)]
    assert rates == pytest.approx([0.0, *cosine])


def test_the_record_of_a_run_gives_its_rate_back(lora_run):
    record = LRRecord.load(lora_run.path)
    assert record.learning_rate == 2**-8
    assert (record.scheme, record.rank, record.widths, record.target_modules) == ("Init[B]", 8, [128, 512], "mlp")
    assert record.batch == {"prompts": 2, "completions_per_prompt": 8, "optimizer_steps_per_batch": 1}


@pytest.mark.slow
def test_the_saved_adapter_is_plain_peft_with_the_trained_policys_answers(lora_run):
    base = models.load_model("embedded")
    unmerged = PeftModel.from_pretrained(base, str(lora_run.path / "adapter"))
    answers = greedy_answers(unmerged)
    task = get_task("arithmetic")
    scores = task.correct(completions=answers, answer=task.held_out(False)["answer"])
    assert sum(scores) / len(scores) == lora_run.result().score
    assert greedy_answers(unmerged.merge_and_unload()) == answers


@pytest.mark.slow
def test_full_finetuning_takes_the_lora_tuned_rate_and_saves_all_weights(lora_run, tmp_path):
    full = run("--rank", "full", "--lr_from", lora_run.path, "--max_steps", 2, "--output_dir", tmp_path / "full")
    assert full.learning_rate()["learning_rate"] == 2**-8 * (8 / 128) ** 0.5  # r = 8 of m = 128 outputs
    assert LRRecord.load(full.path).scheme == "FFT"
    weights = load_file(full.path / "model" / "model.safetensors")
    base = models.load_model("embedded").state_dict()
    assert all(not torch.equal(weights[name], base[name]) for name in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_starting_from_a_lora_run_begins_at_its_accuracy_with_full_finetuning(lora_run, tmp_path):
    run_ = run("--start_from", lora_run.path, "--max_steps", 1, "--output_dir", tmp_path / "on")
    assert run_.result().before == lora_run.result().score
    assert run_.learning_rate()["learning_rate"] == 2**-8 * (8 / 128) ** 0.5
    assert LRRecord.load(run_.path).rank is None
    further = run("--start_from", run_.path, "--rank", 4, "--max_steps", 1, "--output_dir", tmp_path / "further")
    assert further.result().before == run_.result().score


def test_a_run_that_starts_from_another_has_its_task_unless_one_is_given(tmp_path):
    earlier = RunFolder.create(str(tmp_path / "earlier"), "")
    earlier.start({"task": "differences"})
    for flags, task in ([], "differences"), (["--task", "arithmetic"], "arithmetic"):
        arguments, _, given = parse(["--start_from", str(earlier.path), *flags])
        assert (arguments.task, given["task"]) == (task, task)
    assert parse([])[0].task == "arithmetic"


@pytest.mark.parametrize("config", [False, True])
def test_a_run_that_starts_from_another_model_refuses_model_also_where_it_is_the_default(config, tmp_path):
    earlier = RunFolder.create(str(tmp_path / "earlier"), "")
    earlier.start({"model": "smollm2"})
    (tmp_path / "c.yaml").write_text("model: embedded\n")
    model = ["--config", str(tmp_path / "c.yaml")] if config else ["--model", "embedded"]
    with pytest.raises(UserError, match="earlier brings its own model, smollm2: drop --model"):
        parse(["--start_from", str(earlier.path), *model])
    assert parse(["--start_from", str(earlier.path)])[0].model == "smollm2"
    arguments, _, given = parse(["--model", "embedded", "--task", "arithmetic"])
    assert (arguments.model, given) == ("embedded", {})


def test_of_two_runs_that_find_the_same_folder_empty_one_has_it(tmp_path):
    first, second = (RunFolder.create(str(tmp_path / "r"), "") for _ in range(2))
    first.start({"rank": 4})
    with pytest.raises(UserError, match="another run has just begun in"):
        second.start({"rank": 8})
    assert first.settings() == {"rank": 4}


def test_a_damaged_checkpoint_is_refused_by_file_before_anything_changes(lora_run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(lora_run.path, broken)
    (broken / "result.json").unlink()
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        path = broken / "checkpoint-8" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])
        with pytest.raises(UserError, match=f"{name} is damaged: delete .*checkpoint-8"):
            grpo.train(*parse(["--resume", str(broken)]))
        path.write_bytes(whole)


@pytest.mark.slow
def test_the_record_of_another_base_model_is_refused(lora_run, tmp_path):
    on = run("--start_from", lora_run.path, "--max_steps", 1, "--output_dir", tmp_path / "on")
    with pytest.raises(UserError, match="record of another base model"):
        run("--lr_from", on.path, "--output_dir", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_config_file_says_the_same_as_flags_and_flags_win(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(
        "rank: 16\nlr: 1e-3\nmax_steps: 7\nnum_generations: 4\ntarget_modules: [up_proj]\n"
    )
    arguments, adapter_arguments, given = parse(["--config", str(tmp_path / "c.yaml"), "--max_steps", "3"])
    assert (arguments.max_steps, arguments.num_generations) == (3, 4)
    assert adapter_arguments.adapter("mlp").rank == 16
    assert adapter_arguments.adapter("mlp").target_modules == ["up_proj"]
    assert adapter_arguments.lr == 1e-3
    assert given == {"rank": "16", "lr": 1e-3, "max_steps": 3, "num_generations": 4, "target_modules": ["up_proj"]}


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["q_proj"], ["q_proj"]),
        (["all-linear"], "all-linear"),
        (["mlp"], "mlp"),
        ([r".*layers\.\d{1,2}\.mlp.*"], r".*layers\.\d{1,2}\.mlp.*"),
    ],
)
def test_target_modules_are_names_with_spaces_or_commas_or_an_expression(flags, targets):
    _, adapter_arguments, _ = parse(["--target_modules", *flags])
    assert adapter_arguments.adapter("mlp").target_modules == targets


def test_every_grpo_config_field_is_a_flag():
    from dataclasses import fields

    ours = {f.name for f in fields(grpo_arguments.GRPOArguments)}
    assert {f.name for f in fields(trl.GRPOConfig)} <= ours
    assert ours - {f.name for f in fields(trl.GRPOConfig)} == {
        "model",
        "task",
        "tokenizer_name",
        "dtype",
        "bad_rows",
        "isolation",
        "held_out_steps",
        "held_out_problems",
        "patience",
        "vllm_sync",
        "completions_per_step",
        "load_in_4bit",
        "max_prompt_length",
        "save_best",
    }


def test_the_words_that_options_take_are_those_of_trls_trainer():
    import inspect
    import re

    source = inspect.getsource(trl.GRPOTrainer)
    for name, words in grpo_arguments._CHOICES.items():
        compared = re.findall(rf"{name} (?:==|!=|in|not in) (\[.*?\]|\".*?\")", source)
        known = {word for text in compared for word in re.findall(r'"(\w+)"', text)}
        assert known == {word for word in words if isinstance(word, str)}, name


def test_defaults_are_the_papers_recipe():
    arguments, adapter_arguments, _ = parse([])
    assert adapter_arguments.adapter("mlp").rank == 32
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.beta) == (0.0, 1.0, 0.0)
    assert (arguments.loss_type, arguments.temperature, arguments.top_p) == ("dapo", 1.0, 1.0)
    assert (arguments.num_generations, arguments.mask_truncated_completions) == (8, True)
    assert (arguments.warmup_steps, arguments.lr_scheduler_kwargs) == (0.05, {"min_lr_rate": 0.1})
    assert str(arguments.optim.value).startswith("adamw_torch")


@pytest.mark.slow
def test_without_a_rate_the_shipped_record_gives_it_and_the_run_says_so(tmp_path):
    run_ = run("--rank", 4, "--max_steps", 1, "--output_dir", tmp_path / "r")
    assert "shipped record" in run_.learning_rate()["reason"]


@pytest.mark.slow
def test_a_reference_policy_sees_the_adapter_we_attached(tmp_path):
    """TRL copies a pre-attached adapter into "ref" where beta != 0; the copy starts as the policy, and stays."""
    run_ = run("--rank", 4, "--lr", 1e-3, "--beta", 0.1, "--max_steps", 2, "--output_dir", tmp_path / "r")
    kl = [line["kl"] for line in run_.metrics() if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    config = PeftModel.from_pretrained(models.load_model("embedded"), str(run_.path / "adapter"))
    assert list(config.peft_config) == ["default"]


def poison(monkeypatch, steps):
    """Make the gradient of the given steps (counted from 0) not a number."""
    step = GRPOTrainer.training_step

    def poisoned(self, model, *args):
        loss = step(self, model, *args)
        if self.state.global_step in steps:
            next(p for p in model.parameters() if p.requires_grad).grad[0] = float("nan")
        return loss

    monkeypatch.setattr(GRPOTrainer, "training_step", poisoned)


@pytest.mark.slow
def test_a_step_for_which_no_reward_has_a_score_does_not_end_the_run(tmp_path, monkeypatch):
    scores = iter([[None] * 16, [0.0, 1.0] * 8])

    def late(prompts, completions, **columns):
        return next(scores)

    task = replace(get_task("arithmetic"), rewards=(late,))
    monkeypatch.setattr("mua_rl.grpo.setup.get_task", lambda *spec: task)
    run_ = run("--rank", 4, "--lr", 1e-3, "--max_steps", 2, "--output_dir", tmp_path / "r")
    assert [line["reward"] for line in run_.metrics() if "reward" in line] == [None, 0.5]
    assert LRRecord.load(run_.path).learning_rate == 1e-3


@pytest.mark.slow
def test_a_run_whose_rewards_never_gave_a_score_says_so_and_leaves_no_record(tmp_path, monkeypatch):
    def silent(prompts, completions, **columns):
        return [None] * len(completions)

    task = replace(get_task("arithmetic"), rewards=(silent,))
    monkeypatch.setattr("mua_rl.grpo.setup.get_task", lambda *spec: task)
    with pytest.raises(UserError, match=r"no completion had a score in any of 2 steps.*\(silent\) give None"):
        run("--rank", 4, "--lr", 1e-3, "--max_steps", 2, "--output_dir", tmp_path / "r")
    assert RunFolder(tmp_path / "r").result().status is Status.UNSCORED
    assert not (tmp_path / "r" / "lr_record.json").exists()


@pytest.mark.slow
def test_a_reward_that_fails_is_named_with_its_line_below_the_progress_bar(tmp_path, monkeypatch, capsys):
    def broken(prompts, completions, **columns):
        raise KeyError("gold")

    task = replace(get_task("arithmetic"), rewards=(broken,))
    monkeypatch.setattr("mua_rl.grpo.setup.get_task", lambda *spec: task)
    with pytest.raises(
        UserError, match=r"the reward broken of the task arithmetic failed: KeyError: 'gold' \(.*:\d+\)"
    ):
        run("--rank", 4, "--lr", 1e-3, "--max_steps", 1, "--output_dir", tmp_path / "r")
    drawn = capsys.readouterr().err
    assert "| 0/1 [" in drawn and drawn.endswith("\n")


@pytest.mark.slow
def test_the_closing_lines_name_no_command_that_would_be_refused(tmp_path, capsys):
    run("--rank", 4, "--init", "A", "--lr", 1e-6, "--max_steps", 1, "--output_dir", tmp_path / "a")
    assert "--rank full" not in capsys.readouterr().out
    targets = ["--target_modules", "all-linear"]
    run("--rank", 4, "--lr", 1e-6, "--max_steps", 1, *targets, "--output_dir", tmp_path / "b")
    assert "--target_modules all-linear --rank full" in capsys.readouterr().out


@pytest.mark.slow
def test_a_diverged_run_says_so_and_leaves_no_record(tmp_path, monkeypatch):
    poison(monkeypatch, range(9))
    with pytest.raises(Diverged, match="3 steps in a row, up to step 3"):
        run("--rank", 4, "--lr", 1e-3, "--max_steps", 9, "--output_dir", tmp_path / "r")
    assert RunFolder(tmp_path / "r").result().status is Status.DIVERGED
    with pytest.raises(UserError):
        LRRecord.load(tmp_path / "r")


@pytest.mark.slow
def test_one_bad_gradient_is_left_out_and_marked(tmp_path, monkeypatch):
    poison(monkeypatch, [1, 2])
    run_ = run("--rank", 4, "--lr", 1e-3, "--max_steps", 5, "--output_dir", tmp_path / "r")
    marked = [line["step"] for line in run_.metrics() if "gradient_not_finite" in line]
    assert marked == [2, 3]
    weights = load_file(run_.path / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "129"], "rank 129 exceeds the size of the layer"),
        (["--rank", "-4"], "--rank takes"),
        (["--rank", "some"], "--rank takes"),
        (["--task", "cooking"], "no task 'cooking'"),
        (["--model", "./nowhere"], "no model folder ./nowhere"),
        (["--model", "/tmp"], "no config.json"),
        (["--model", "nobody/nothing"], "cannot be loaded"),
        (["--lr", "0"], "between 0 and 1"),
        (["--lr", "nan"], "between 0 and 1"),
        (["--lr", "10"], "between 0 and 1"),
        (["--lr", "1e-3", "--learning_rate", "1e-4"], "same thing"),
        (["--lr", "1e-3", "--lr_from", "x"], "exclude each other"),
        (["--lr_from", "nowhere.json"], "no LR record"),
        (["--start_from", "nowhere"], "no run folder"),
        (["--resume", "nowhere"], "no run folder"),
        (["--alpha", "two"], "multiplier"),
        (["--init", "A", "--rank", "4"], "Init"),
        (["--target_modules", "nothing"], "nothing"),
        (["--config", "nowhere.yaml"], "--config"),
        (["--num_generations", "7"], "divisible"),
        (["--use_vllm"], "vLLM"),
        (["--optim", "sgd"], "AdamW"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--colour", "red"], "--colour"),
        (["--config=nowhere.yaml"], "--config"),
        (["--config"], "--config takes a YAML file"),
        (["--max_steps", "0"], "--max_steps takes a positive number, or -1"),
        (["--max_steps", "-5"], "--max_steps takes a positive number, or -1"),
        (["--num_train_epochs", "0"], "--num_train_epochs takes a positive number"),
        (["--seed", "-1"], "--seed must lie between 0 and"),
        (["--num_generations", "0"], "--num_generations must be at least 2"),
        (["--num_iterations", "0"], "--num_iterations must be at least 1"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1"),
        (["--max_completion_length", "0"], "--max_completion_length must be at least 1"),
        (["--temperature", "0"], "--temperature takes a number above 0"),
        (["--weight_decay", "nan"], "--weight_decay must be at least 0"),
        (["--model_init_kwargs", '{"no_such": 1}'], "cannot be loaded"),
        (["--use_liger_kernel"], "pip install liger-kernel"),
        (["--loss_type", "foo"], "dapo, grpo, dr_grpo, bnpo, cispo, sapo, luspo, vespo, not 'foo'"),
        (["--scale_rewards", "foo"], "--scale_rewards takes one of group, batch, none, not 'foo'"),
        (["--importance_sampling_level", "foo"], "token, sequence, not 'foo'"),
        (["--multi_objective_aggregation", "foo"], "sum_then_normalize, normalize_then_sum, not 'foo'"),
        (["--vllm_importance_sampling_mode", "foo"], "token_truncate, token_mask, sequence_truncate, sequence_mask"),
        (["--top_k", "-1"], "--top_k must be at least 0"),
        (["--top_p", "2"], "--top_p must lie between 0 and 1"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where vLLM is not installed
    monkeypatch.setattr(sys, "argv", ["mua_rl.grpo", *SMALL, *flags])
    from mua_rl.exits import run_command

    with pytest.raises(SystemExit) as stop:
        run_command(importlib.import_module("mua_rl.grpo.__main__").main)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "galore_adamw", "--optim_target_modules", "all-linear"], "galore_torch"),
        (["--report_to", "nobody"], "nobody is not supported"),
        (["--reward_weights", "1", "2"], "Number of reward weights \\(2\\)"),
        (["--lr_scheduler_kwargs", '{"warm": 1}'], "unexpected keyword argument 'warm'"),
    ],
)
def test_what_trl_cannot_set_up_is_refused_and_leaves_no_folder(flags, message, tmp_path):
    with pytest.raises(UserError, match=f"GRPO cannot be set up: .*{message}"):
        run("--lr", 1e-3, *flags, "--output_dir", tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
def test_weights_that_are_no_numbers_are_refused_by_name_before_anything_is_written(value, kind, tmp_path):
    model = models.load_model("embedded")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        model.model.norm.weight[0] = value
    model.save_pretrained(tmp_path / "m")
    models.load_tokenizer("embedded").save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=rf"has {kind} in model.layers.1.mlp.up_proj.weight \(and 1 more"):
        run("--model", tmp_path / "m", "--lr", 1e-3, "--output_dir", tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused_where_the_task_needs_them(tmp_path):
    models.load_model("embedded").save_pretrained(tmp_path / "m")
    tokenizer = models.load_tokenizer("embedded")
    flags = ["--model", tmp_path / "m", "--lr", 1e-3, "--max_steps", 1, "--output_dir", tmp_path / "r"]
    tokenizer.add_tokens([f"<image {k}>" for k in range(models.load_model("embedded").config.vocab_size)])
    tokenizer.save_pretrained(tmp_path / "m")
    prepare_grpo(*parse([*SMALL, *map(str, flags)])[:2])
    tokenizer.add_tokens(["<more>"])
    tokenizer.pad_token = "<more>"
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, the model .*, and '<more>' has none"):
        run(*flags)
    assert not (tmp_path / "r").exists()


def test_a_folder_with_something_in_it_is_never_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"is not empty: choose another --output_dir\.$"):
        run("--output_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_resume_is_advised_where_it_would_go_on_alone(lora_run, tmp_path):
    broken_off, finetuned = tmp_path / "broken", RunFolder.create(str(tmp_path / "sft"), "")
    shutil.copytree(lora_run.path, broken_off)
    (broken_off / "result.json").unlink()
    finetuned.start({"rank": "4"})  # as scripts/finetune_text.py, which has no --resume
    for folder, advised in (broken_off, True), (finetuned.path, False), (lora_run.path, False):
        with pytest.raises(UserError, match="choose another --output_dir") as error:
            RunFolder.create(str(folder), "")
        assert ("--resume" in str(error.value)) == advised


def test_two_runs_started_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({RunFolder.create(None, "grpo").path for _ in range(3)}) == 3


@pytest.mark.slow
def test_a_killed_run_resumes_to_bitwise_the_same_policy(tmp_path):
    flags = [*SMALL, "--rank", "8", "--lr", "0.002", "--max_steps", "12", "--save_steps", "3", "--held_out_steps", "5"]
    command = [sys.executable, "-m", "mua_rl.grpo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, *flags, "--output_dir", str(whole)], check=True, **options)
    process = subprocess.Popen([*command, *flags, "--output_dir", str(broken)], **options)
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint-6" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RunFolder(broken).result() is None
    subprocess.run([*command, "--resume", str(broken)], check=True, **options)
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)
    results = [RunFolder(folder).result() for folder in (whole, broken)]
    assert results[0].score == results[1].score
    steps = [line["step"] for line in RunFolder(broken).metrics() if "loss" in line]
    assert steps == list(range(1, 13))
    with pytest.raises(UserError, match="has ended"):
        parse(["--resume", str(broken)])


def test_the_optimizer_is_made_where_the_trainer_asks_for_it_and_has_our_groups(lora_run):
    """`Trainer.create_optimizer` is public; the rates in the metrics were read from the groups that it made."""
    assert {"lr/lora_A", "lr/lora_B"} <= lora_run.metrics()[-2].keys()


def test_lora_layers_of_the_trained_policy_carry_the_asked_rank(lora_run):
    model = PeftModel.from_pretrained(models.load_model("embedded"), str(lora_run.path / "adapter"))
    assert {layer.r["default"] for _, layer in lora_layers(model)} == {8}
