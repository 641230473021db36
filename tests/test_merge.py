"""`python -m mua_rl.merge`: what a run ended with, and what an adapter was trained on, as one model."""

import sys

import pytest
import torch
from helpers import make_record
from peft import PeftModel

from mua_rl import merge
from mua_rl.errors import UserError
from mua_rl.evaluation.engines import check_base
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.base import load_base
from mua_rl.lm import models
from mua_rl.run.folder import RunFolder

pytestmark = pytest.mark.slow  # what is tested starts training

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_steps", "0", "--held_out_problems", "8", "--max_completion_length", "6", "--warmup_steps", "0"]
SMALL += ["--rank", "4", "--lr", "0.01", "--max_steps", "2"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A LoRA run, and another that started from it."""
    folder = tmp_path_factory.mktemp("chain")
    grpo.train(*parse([*SMALL, "--output_dir", str(folder / "first")]))
    grpo.train(*parse([*SMALL, "--start_from", str(folder / "first"), "--output_dir", str(folder / "second")]))
    return folder


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, words)])
    merge.main()


def same(one, other):
    weights = dict(other.named_parameters())
    return all(torch.equal(weight, weights[name]) for name, weight in one.named_parameters())


def test_the_merged_policy_of_a_chain_is_the_one_that_a_next_run_would_start_from(chain, tmp_path, monkeypatch):
    command(monkeypatch, chain / "second", tmp_path / "out")
    after = ["--start_from", str(chain / "second")]
    expected, _ = load_base(parse(after)[0], str(chain / "second"))
    assert same(models.load_model(str(tmp_path / "out")), expected)
    assert not same(models.load_model("embedded"), expected)
    assert models.load_tokenizer(str(tmp_path / "out")).get_vocab() == models.load_tokenizer("embedded").get_vocab()
    command(monkeypatch, chain / "second", tmp_path / "half", "--dtype", "bfloat16")
    assert same(models.load_model(str(tmp_path / "half")), expected.to(torch.bfloat16).float())


def test_the_adapter_of_a_run_after_a_lora_run_names_the_command_that_makes_its_base(chain, tmp_path, monkeypatch):
    adapter = str(chain / "second" / "adapter")
    with pytest.raises(UserError, match=f"python -m mua_rl.merge {chain / 'first'} FOLDER makes"):
        check_base(adapter, "embedded", lambda: models.load_model("embedded"))
    command(monkeypatch, chain / "first", tmp_path / "base")
    base = models.load_model(str(tmp_path / "base"))
    check_base(adapter, str(tmp_path / "base"), lambda: base)
    after = ["--start_from", str(chain / "second")]
    expected, _ = load_base(parse(after)[0], str(chain / "second"))
    assert same(PeftModel.from_pretrained(base, adapter).merge_and_unload(), expected)


def test_what_cannot_be_merged_is_refused_before_anything_is_written(chain, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(UserError, match="full is not empty"):
        merge.merge(str(chain / "first"), tmp_path / "full")
    with pytest.raises(UserError, match="no run folder"):
        merge.merge(str(tmp_path), tmp_path / "out")
    control = RunFolder.create(str(tmp_path / "control"), "")
    control.start({})
    with pytest.raises(UserError, match="holds no lr_record"):
        merge.merge(str(control.path), tmp_path / "out")
    make_record(algorithm="ppo").save(control.path)
    with pytest.raises(UserError, match="a run of ppo, not of a language model"):
        merge.merge(str(control.path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
