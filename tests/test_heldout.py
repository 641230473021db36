"""Held-out answers: the policy's own, asked and scored as in training."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import make_trial

from mua_rl.coordinate_check import sample_group
from mua_rl.envs.tasks import Task, get_task
from mua_rl.evaluation.evaluation import Settings, evaluate
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.grpo.stacked.trainer import StackedTrainer
from mua_rl.lm import models
from mua_rl.lm.generation import complete, end_ids, generate
from mua_rl.lm.heldout import HeldOutResult, held_out, score
from mua_rl.lm.text import prompt_ids
from mua_rl.probes.movement import probe_batch
from mua_rl.run.folder import RunFolder

TEMPLATE = "{{ messages[0]['content'] }}{% if hint %}{{ hint }}{% endif %}="


@pytest.fixture
def model():
    return models.load_model("embedded")


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer("embedded")


def with_settings_of_its_own(model):
    """A model whose folder says how to generate, as those of Qwen2.5 do."""
    own = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "top_k": 1, "top_p": 0.1, "min_p": 0.9}
    model.generation_config.update(**own)
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_answers_by_its_own_softmax_whatever_its_folder_says_of_generation(temperature, model, tokenizer):
    prompts = get_task("arithmetic").held_out(False)["prompt"][:16]
    plain = generate(model, tokenizer, prompts, 8, temperature)
    assert generate(with_settings_of_its_own(model), tokenizer, prompts, 8, temperature) == plain


def test_probes_and_checks_sample_from_that_softmax_too(model, tokenizer):
    def sampled():
        batch = probe_batch(model, tokenizer, get_task("arithmetic"), prompts=2, group=4)
        return batch.ids.tolist(), sample_group(model, tokenizer, "1+2=", 4, 6, seed=0).tokens.tolist()

    plain = sampled()
    with_settings_of_its_own(model)
    assert sampled() == plain


def test_the_models_end_tokens_end_an_answer_beside_the_tokenizers(model, tokenizer):
    (ids,) = prompt_ids(tokenizer, ["1+2="])
    first = int(complete(model, tokenizer, [ids], 4)[0, 0])
    model.generation_config.eos_token_id = [first]
    assert end_ids(model, tokenizer) == sorted({tokenizer.eos_token_id, first})
    assert complete(model, tokenizer, [ids], 4).tolist() == [[first]]


def test_an_evaluation_in_mid_training_leaves_every_generator_as_it_was(model, tokenizer):
    draws = []
    for evaluated in (False, True):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        if evaluated:
            generate(model, tokenizer, ["1+2="], 4, temperature=1.0, seed=5)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_options_of_the_chat_template_are_part_of_a_held_out_prompt(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    task = get_task("arithmetic")
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+2"}]], "answer": [12]})
    asked = []
    monkeypatch.setattr("mua_rl.lm.generation.complete", lambda m, t, ids, *_: asked.append(t.decode(ids[0])) or ids)
    held_out(model, tokenizer, task, rows, 4)
    held_out(model, tokenizer, task, rows, 4, template={"hint": "*3"})
    assert [text.replace(" ", "") for text in asked] == ["1+2=", "1+2*3="]


def says_three(completions, **columns):
    """Reads messages, as TRL's examples of rewards do."""
    return [float(completion[0]["content"] == "3") for completion in completions]


def test_a_reward_gets_messages_for_chat_prompts_held_out_as_in_training(tmp_path):
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+2"}]] * 2})
    task = Task("three", lambda c: rows, lambda c: rows, (says_three,), says_three, strict=says_three)
    result = score(["3", "4"], task, rows)
    assert (result.completions, result.scores, result.strict_scores) == (["3", "4"], [1.0, 0.0], [1.0, 0.0])
    engine = SimpleNamespace(conversational=True, answer=lambda prompts, samples, seed: [["3", "4"]] * len(prompts))
    settings = Settings("model", None, "three", samples=2, temperature=1.0, max_tokens=8, engine="toy", seed=0)
    assert evaluate(task, engine, settings, tmp_path / "e").shares == [0.5, 0.5]


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        ([1.0, 0.0, 0.0, 0.0], (3 / 8 * 5 / 8 / 8) ** 0.5),
        ([0.0] * 512, (2 / 516 * 514 / 516 / 516) ** 0.5),
        ([1.0, -1.0], (1 / 6) ** 0.5),
    ],
)
def test_the_standard_error_is_that_of_two_more_right_and_two_more_wrong(scores, error):
    """Scores of -1 and 1 made it a complex number, at the end of a run, whose result was lost."""
    assert HeldOutResult([""] * len(scores), scores).standard_error == pytest.approx(error, rel=1e-3)


def test_few_problems_do_not_prove_that_a_policy_got_worse_but_many_do():
    for count, is_proof in [(16, False), (512, True)]:
        after = HeldOutResult([""] * count, [0.0] * count)
        assert (after.accuracy + 2 * after.standard_error < 1 / 16) == is_proof


def test_a_single_run_asks_its_held_out_problems_as_a_sweep_does(tmp_path, monkeypatch):
    model, tokenizer = models.load_model("embedded"), models.load_tokenizer("embedded")
    tokenizer.chat_template = TEMPLATE.replace("messages[0]['content']", "'1+2'")
    model.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    flags = ["--model", str(tmp_path / "m"), "--chat_template_kwargs", '{"hint": "*3"}', "--held_out_problems", "4"]
    flags += ["--lr", "1e-3", "--output_dir", str(tmp_path / "r"), "--report_to", "none", "--max_steps", "1"]
    arguments, adapter_arguments, _ = parse([*flags, "--per_device_train_batch_size", "16"])
    setup = prepare_grpo(arguments, adapter_arguments)
    asked = []
    monkeypatch.setattr("mua_rl.lm.generation.complete", lambda m, t, ids, *_: asked.extend(ids) or torch.tensor(ids))
    grpo.make_trainer(setup, arguments, RunFolder(tmp_path))[1]()
    assert asked == list(StackedTrainer(arguments, [make_trial(4, "B", "1", -8, 0)]).problems.values())
    assert tokenizer.decode(asked[0]).replace(" ", "") == "1+2*3="
