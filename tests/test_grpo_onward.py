"""What comes after a run, or before it: more steps, its best or any checkpoint, somebody's adapter, somebody's YAML."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from mua_rl.errors import UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import LIKES, parse
from mua_rl.grpo.base import load_base
from mua_rl.lm import models
from mua_rl.lr.record import LRRecord

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_problems", "16", "--lr", "1e-5", "--rank", "4"]
IDS = torch.arange(8)[None]


def train(*flags):
    return grpo.train(*parse([*SMALL, *map(str, flags)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of four steps with two checkpoints, the best policy kept."""
    folder = tmp_path_factory.mktemp("onward") / "run"
    return train(
        *("--max_steps", 4, "--save_steps", 2, "--held_out_steps", 1, "--save_best", "true", "--output_dir", folder)
    )


def merged(folder):
    return PeftModel.from_pretrained(models.load_model("embedded"), str(folder)).merge_and_unload()


@pytest.mark.slow
def test_an_ended_run_goes_on_to_more_steps_and_keeps_what_it_had_come_to(tmp_path):
    run = train("--max_steps", 2, "--held_out_steps", 0, "--output_dir", tmp_path / "r")
    for flags, message in ([], "larger --max_steps"), (["--max_steps", "2"], "has taken 2 steps: give a larger"):
        with pytest.raises(UserError, match=message):
            parse(["--resume", str(run.path), *flags])
    with pytest.raises(UserError, match="drop rank"):
        parse(["--resume", str(run.path), "--max_steps", "5", "--rank", "8"])
    longer = grpo.train(*parse(["--resume", str(run.path), "--max_steps", "5"]))
    assert [line["step"] for line in longer.metrics() if "loss" in line] == [1, 2, 3, 4, 5]
    assert (longer.result().steps, longer.settings()["max_steps"]) == (5, 5)
    assert json.loads((run.path / "result-at-2.json").read_text())["steps"] == 2
    assert (run.path / "lr_record-at-2.json").exists() and LRRecord.load(run.path).schedule["steps"] == 5


@pytest.mark.slow
def test_the_best_policy_on_the_way_is_kept_with_its_step(run):
    measured = {line["step"]: line["held_out/accuracy"] for line in run.metrics() if "held_out/accuracy" in line}
    on_the_way = {step: measured[step] for step in (1, 2, 3)}
    best = max(on_the_way, key=lambda step: (on_the_way[step], -step))
    assert run.best() == {"step": best, "accuracy": on_the_way[best]}
    if best == 2:
        one, two = (load_file(run.path / f / "adapter_model.safetensors") for f in ("best", "checkpoint-2"))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["checkpoint-2", "checkpoint-4", "best"])
def test_a_run_starts_from_a_checkpoint_of_another(run, folder, tmp_path):
    start = run.path / folder
    model, base = load_base(parse(["--start-from", str(start)])[0], str(start))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, merged(start)(IDS).logits)
    assert base.record.task == "arithmetic" and base.name == f"embedded after {start}"
    on = train("--start-from", start, "--max_steps", 1, "--held_out_steps", 0, "--output_dir", tmp_path / "on")
    assert on.settings()["start_from"] == str(start)


@pytest.mark.slow
def test_a_checkpoint_of_a_run_that_left_no_record_will_do_and_so_will_one_of_full_finetuning(tmp_path):
    full = train("--rank", "full", "--max_steps", 2, "--save_steps", 1, "--output_dir", tmp_path / "r")
    (full.path / "lr_record.json").unlink()
    start = full.path / "checkpoint-1"
    model, base = load_base(parse(["--start-from", str(start)])[0], str(start))
    written = load_file(start / "model.safetensors")
    assert base.record is None
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in written.items())
    with pytest.raises(UserError, match="no run folder"):
        parse(["--start-from", str(full.path / "checkpoint-9")])


@pytest.fixture
def adapter(tmp_path):
    """Somebody's adapter, made by PEFT alone."""
    model = get_peft_model(models.load_model("embedded"), LoraConfig(r=3, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(tmp_path / "somebody")
    return tmp_path / "somebody"


def test_a_run_starts_from_somebodys_adapter_and_its_base_is_known(adapter):
    arguments, adapter_arguments, given = parse(["--start-from", str(adapter), "--rank", "4"])
    assert given["model"] == arguments.model == models.model_path("embedded")
    model, base = load_base(arguments, adapter_arguments.start_from)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, merged(adapter)(IDS).logits)
    assert base.record is None and str(adapter) in base.name
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say what its base is: give --model"):
        parse(["--start-from", str(adapter)])
    assert parse(["--start-from", str(adapter), "--model", "embedded"])[0].model == "embedded"


@pytest.mark.slow
def test_a_run_trains_on_from_somebodys_adapter(adapter, tmp_path):
    run = train("--start-from", adapter, "--max_steps", 1, "--held_out_steps", 0, "--output_dir", tmp_path / "r")
    assert run.result().steps == 1 and "a guess" not in run.learning_rate()["reason"]


def test_rows_with_longer_prompts_are_left_out_and_counted(capsys):
    few = ["--rank", "4", "--lr", "1e-5", "--report_to", "none"]
    setup = grpo.prepare_grpo(*parse([*few, "--max_prompt_length", "6"])[:2])
    rows = grpo.prepare_grpo(*parse(few)[:2]).train_rows
    lengths = [len(setup.tokenizer(prompt)["input_ids"]) for prompt in rows["prompt"]]
    assert len(setup.train_rows) == sum(length <= 6 for length in lengths) < len(rows)
    dropped = f"{len(rows) - len(setup.train_rows)} of {len(rows)} training rows have longer prompts and are left out"
    assert dropped in capsys.readouterr().out
    with pytest.raises(UserError, match=r"every training prompt is longer than --max_prompt_length 1: the shortest"):
        grpo.prepare_grpo(*parse([*few, "--max_prompt_length", "1"])[:2])


@pytest.mark.parametrize("name", ["model_name_or_path", "lora_r", "use_peft", "reward_funcs", "load_in_8bit"])
def test_settings_of_trls_scripts_are_named_with_their_like_here(name, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{name}: 1\nmax_steps: 2\n")
    with pytest.raises(UserError) as error:
        parse(["--config", str(tmp_path / "c.yaml")])
    assert f"{name} ({LIKES[name]})" in str(error.value)
    for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
        with pytest.raises(UserError) as error:
            parse([spelling, "1"])
        assert LIKES[name] in str(error.value)
