"""Which trials of a sweep go side by side, and which singly, where that depends on the model."""

import math
from dataclasses import asdict

import pytest
from helpers import make_trial
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel, LlamaConfig

from mua_rl.grpo.stacked import trainer as grpo
from mua_rl.lm import models
from mua_rl.run.trial import Trial
from mua_rl.sweep.arguments import parse
from mua_rl.sweep.backend import why_single
from mua_rl.sweep.facts import Facts, find_facts
from mua_rl.sweep.stacked_runs import StackedRuns


@pytest.fixture
def conv1d_model(tmp_path):
    """The folder of a model whose layers are linear by meaning, and not by class."""
    tokenizer = models.load_tokenizer("embedded")
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_trials_on_layers_that_cannot_be_stacked_go_singly_without_being_asked(conv1d_model):
    request = parse(["--model", conv1d_model, "--ranks", "2", "--target_modules", "c_fc"])
    facts = find_facts(request)
    assert "take linear layers" in why_single(request, Trial(request.specs[0], -10.0, 0), facts.obstacle)


def test_trials_on_linear_layers_go_side_by_side():
    request = parse(["--ranks", "2"])
    facts = find_facts(request)
    assert why_single(request, Trial(request.specs[0], -10.0, 0), facts.obstacle) == ""
    begun_earlier = {**asdict(facts), "linear": True}
    del begun_earlier["obstacle"]
    assert Facts.from_dict(begun_earlier) == facts


def test_trials_of_a_model_with_sliding_attention_or_dropout_go_singly_without_being_asked(tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = models.load_tokenizer("embedded")
    sliding = Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **size)
    dropping = LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.3, **size)
    for config, reason in [(sliding, "full attention"), (dropping, "dropout")]:
        folder = tmp_path / config.model_type
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        request = parse(["--model", str(folder), "--ranks", "2"])
        assert reason in why_single(request, Trial(request.specs[0], -10.0, 0), find_facts(request).obstacle)


def test_a_hopeless_trial_is_seen_through_steps_without_a_score(tmp_path, monkeypatch):
    trials, asked = [make_trial(2, "B", "1", -8.0, 1), make_trial(2, "B", "1", -9.0, 1)], {}

    def train(arguments, trials, targets, keep_going, **options):
        never, falling = [{"reward": math.nan}] * 12, [{"reward": 0.5 - 0.02 * step} for step in range(12)]
        falling[0] = {"reward": math.nan}
        asked.update(
            {trial: keep_going(trial, history) for trial, history in zip(trials, (never, falling), strict=True)}
        )
        return []

    monkeypatch.setattr(grpo, "train_side_by_side", train)
    StackedRuns(parse(["--ranks", "2", "--max_steps", "20"]), tmp_path).run(trials)
    assert asked[trials[0]] is None
    assert asked[trials[1]].startswith("the reward fell")
