"""What a GRPO run starts from: models, tokenizers and earlier runs are loaded as was asked, or refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, dynamic_module_utils

from mua_rl.errors import UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import GRPOArguments, parse
from mua_rl.grpo.base import load_base, load_tokenizer
from mua_rl.lm import models
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_steps", "0", "--held_out_problems", "8", "--max_completion_length", "6", "--warmup_steps", "0"]
EAGER = '{"attn_implementation": "eager"}'


def parsed(*flags):
    return parse([*SMALL, *map(str, flags)])


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    models.load_model("embedded").save_pretrained(folder)
    models.load_tokenizer("embedded").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora_run(base_folder, tmp_path_factory):
    """A LoRA run of two steps, on a base that is loaded in a way of its own."""
    flags = ["--model", base_folder, "--model_init_kwargs", EAGER, "--rank", 4, "--lr", 2**-8, "--max_steps", 2]
    return grpo.train(*parsed(*flags, "--output_dir", tmp_path_factory.mktemp("lora") / "run")).path


@pytest.mark.slow
def test_full_finetuning_after_a_lora_is_held_to_the_policy_that_it_starts_from(lora_run, tmp_path):
    flags = ["--start_from", lora_run, "--beta", 0.1, "--max_steps", 1, "--output_dir", tmp_path / "r"]
    (kl,) = [line["kl"] for line in grpo.train(*parsed(*flags)).metrics() if "kl" in line]
    assert kl == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_a_lora_held_to_a_reference_policy_resumes_where_it_was(tmp_path):
    """The reference is an adapter beside the policy's own, and transformers loads the former alone."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--rank", 4, "--lr", 2**-8, "--beta", 0.1, "--max_steps", 4, "--save_steps", 2, "--output_dir", whole]
    grpo.train(*parsed(*flags))
    shutil.copytree(whole, broken)
    (broken / "result.json").unlink()
    shutil.rmtree(broken / "checkpoint-4")
    grpo.train(*parse(["--resume", str(broken)]))
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_sweep_is_no_policy_to_start_from(lora_run, tmp_path):
    sweep = RunFolder.create(str(tmp_path / "sweep"), "")
    sweep.start({"algo": "grpo"})
    LRRecord.load(lora_run).save(sweep.path)
    with pytest.raises(UserError, match="is a sweep, which holds no policy: name a run"):
        load_base(GRPOArguments(), str(sweep.path))


def test_a_lora_is_not_merged_into_other_weights_than_it_was_trained_on(lora_run, base_folder):
    weights = base_folder / "model.safetensors"
    before = weights.read_bytes()
    model = models.load_model(str(base_folder))
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    model.save_pretrained(base_folder)
    with pytest.raises(UserError, match=f"{lora_run} holds a LoRA for other weights than {base_folder} has now"):
        load_base(GRPOArguments(), str(lora_run))
    weights.write_bytes(before)
    load_base(GRPOArguments(), str(lora_run))


def test_a_tokenizer_may_have_a_folder_to_itself(tmp_path):
    models.load_tokenizer("embedded").save_pretrained(tmp_path)
    loaded = load_tokenizer(parsed("--tokenizer_name", tmp_path)[0])
    assert loaded.get_vocab() == models.load_tokenizer("embedded").get_vocab()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json or tokenizer_config\.json"):
        load_tokenizer(parsed("--tokenizer_name", tmp_path)[0])


def test_a_tokenizer_without_an_end_token_is_refused_before_anything_is_written(base_folder, tmp_path):
    tokenizer = models.load_tokenizer("embedded")
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    flags = ["--model", base_folder, "--tokenizer_name", tmp_path / "endless", "--lr", 1e-4]
    with pytest.raises(UserError, match="has no end token"):
        grpo.train(*parsed(*flags, "--output_dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_starts_from_another_loads_its_base_as_that_one_did(lora_run):
    arguments, _, given = parsed("--start_from", lora_run)
    assert arguments.model_init_kwargs == given["model_init_kwargs"] == json.loads(EAGER)
    assert load_base(arguments, str(lora_run))[0].config._attn_implementation == "eager"
    parsed("--start_from", lora_run, "--model_init_kwargs", EAGER)
    with pytest.raises(UserError, match=r"brings its own --model_init_kwargs, .*'eager'}: drop"):
        parsed("--start_from", lora_run, "--model_init_kwargs", '{"attn_implementation": "sdpa"}')


def test_the_precision_that_is_asked_for_is_that_of_a_merged_base_too(lora_run):
    model, base = load_base(parsed("--start_from", lora_run, "--dtype", "bfloat16")[0], str(lora_run))
    exact, same = load_base(parsed("--start_from", lora_run)[0], str(lora_run))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in exact.parameters()} == {torch.float32}
    assert base.fingerprint == same.fingerprint
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), exact.buffers(), strict=True))  # the frequencies


def test_a_runs_tokenizer_goes_on_unless_another_is_given(base_folder, tmp_path):
    tokenizer = models.load_tokenizer("embedded")
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "chat" / "config.json").write_text((base_folder / "config.json").read_text())
    earlier = RunFolder.create(str(tmp_path / "sft"), "")
    earlier.start({"model": "embedded", "task": "differences", "tokenizer_name": str(tmp_path / "chat")})
    arguments, _, given = parsed("--start_from", earlier.path)
    assert load_tokenizer(arguments).chat_template == tokenizer.chat_template
    assert given["tokenizer_name"] == str(tmp_path / "chat")
    arguments, _, _ = parsed("--start_from", earlier.path, "--tokenizer_name", base_folder)
    assert load_tokenizer(arguments).chat_template is None


def test_code_of_a_models_own_runs_where_it_is_trusted(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    models.load_model(str(base_folder)).save_pretrained(folder)
    models.load_tokenizer(str(base_folder)).save_pretrained(folder)
    (folder / "own.py").write_text("from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM): pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    for trusted in (True, False):
        arguments, _, _ = parsed("--model", folder, "--trust_remote_code", trusted)
        assert (type(load_base(arguments, None)[0]).__name__ == "Own") == trusted


def test_the_tokenizer_is_of_the_models_revision(base_folder, monkeypatch):
    asked, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(k) or load(*a, **k))
    options = '{"revision": "v1", "attn_implementation": "eager"}'
    load_tokenizer(parsed("--model", base_folder, "--model_init_kwargs", options, "--trust_remote_code", "true")[0])
    assert (asked[0]["revision"], asked[0]["trust_remote_code"]) == ("v1", True)
    assert "attn_implementation" not in asked[0]


def test_an_engine_is_not_sent_to_a_name_that_stands_for_another_revision(base_folder):
    named = load_base(parsed("--model", base_folder)[0], None)[0]
    revised = load_base(parsed("--model", base_folder, "--model_init_kwargs", '{"revision": "v1"}')[0], None)[0]
    assert (named.name_or_path, revised.name_or_path) == (str(base_folder), "")  # "": it gets the weights themselves


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_precision_has_a_flag_of_its_own(name):
    with pytest.raises(UserError, match=f"--model_init_kwargs takes no {name}: give --dtype"):
        parsed("--model_init_kwargs", f'{{"{name}": "bfloat16"}}')


@pytest.mark.slow
def test_the_record_of_a_run_by_epochs_says_how_many_steps_it_took(base_folder, tmp_path):
    flags = ["--model", base_folder, "--rank", 4, "--lr", 2**-8, "--num_train_epochs", 0.0005]  # of 8192 / 2 steps
    record = LRRecord.load(grpo.train(*parsed(*flags, "--output_dir", tmp_path / "r")).path)
    assert record.schedule["steps"] == 3
