"""Prompts as a policy is asked them and its answers as rewards get them: templates, begun answers, tags."""

import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AddedToken

from mua_rl.envs.tasks import RESERVED_COLUMNS, Task, load_split, register_task
from mua_rl.errors import UserError
from mua_rl.evaluation.engines import VLLMEngine
from mua_rl.evaluation.evaluation import Settings, evaluate
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.lm import models
from mua_rl.lm.text import check_template, completion_texts, prompt_ids
from mua_rl.run.folder import RunFolder

USER, SYSTEM = {"role": "user", "content": "1+2"}, {"role": "system", "content": "3"}
BEGUN = {"role": "assistant", "content": "4"}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '*' if m['role'] == 'user' else '=' }}{{ m['content'] }}{{ '-' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = models.load_tokenizer("embedded")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rendered(tokenizer, prompts):
    return [tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") for ids in prompt_ids(tokenizer, prompts)]


def test_an_answer_that_a_row_has_begun_is_gone_on_with(tokenizer):
    prompts = [[USER, BEGUN], [USER], [USER, BEGUN, USER], [USER, BEGUN, USER, BEGUN]]
    assert rendered(tokenizer, prompts) == ["*1+2-=4", "*1+2-=", "*1+2-=4-*1+2-=", "*1+2-=4-*1+2-=4"]
    assert rendered(tokenizer, prompts[::-1]) == rendered(tokenizer, prompts)[::-1]


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (TEMPLATE, [SYSTEM, USER], r"template refuses .*\(system, user\): System role not supported. Give"),
        (TEMPLATE.replace("system", "tool"), [{"role": "tool", "content": ""}], r"\(tool\): System role"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", [USER], r"\(user\): .*concat"),
        ("{% for m in messages %}{{ m.content", [USER], r"\(user\): unexpected"),
        ("{{ messages[0].content }}", [USER, BEGUN], r"\(user, assistant\): .*final message"),
    ],
)
def test_a_template_that_refuses_the_rows_is_one_line_with_the_cure(tokenizer, template, prompt, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        check_template(tokenizer, ["text", [USER], prompt])
    assert "\n" not in str(error.value)


TAGS = ["<think>", "</think>", "[THINK]", "[/THINK]", "<|begin_of_box|>", "<|end_of_box|>"]
NO_TAGS = ["<|im_end|>", "<lonely>", "<end_of_turn>", "</other>"]


@pytest.fixture
def with_tags(tokenizer):
    tokenizer.add_tokens([AddedToken(token, special=True) for token in TAGS + NO_TAGS])
    return tokenizer


@pytest.mark.parametrize("token", TAGS)
def test_tags_that_are_special_tokens_are_part_of_the_text(with_tags, token):
    ids = with_tags(f"1+2{token}3")["input_ids"]
    assert with_tags.convert_tokens_to_ids(token) in ids
    assert completion_texts(with_tags, [[*ids, with_tags.eos_token_id, with_tags.pad_token_id]]) == [f"1+2{token}3"]


@pytest.mark.parametrize("token", [*NO_TAGS, "<bos>", "<eos>", "<pad>"])
def test_other_special_tokens_are_not(with_tags, token):
    ids = with_tags(f"1+2{token}3")["input_ids"]
    assert completion_texts(with_tags, torch.tensor([ids])) == ["1+23"]


def test_without_tags_texts_are_those_of_the_tokenizer(tokenizer):
    rows = tokenizer(["1+2=", "34"])["input_ids"]
    assert completion_texts(tokenizer, rows) == tokenizer.batch_decode(rows, skip_special_tokens=True)


def test_the_beginning_and_end_of_texts_are_no_tags(tokenizer):
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.eos_token = "</s>"
    assert completion_texts(tokenizer, [tokenizer("1<s>2</s>")["input_ids"]]) == ["12"]


def seen(prompts, completions, **columns):
    SEEN.append((prompts[0], completions[0][0]["content"]))
    return [0.0] * len(completions)


SEEN: list = []


@register_task("begun")
def begun():
    rows = Dataset.from_dict({"prompt": [[USER, BEGUN]] * 32})
    return Task("begun", lambda c: rows, lambda c: rows, (seen,), seen, max_completion_length=4)


def test_a_run_asks_begun_answers_and_rewards_tags_as_an_evaluation_does(with_tags, tmp_path, monkeypatch):
    model = models.load_model("embedded")
    model.resize_token_embeddings(len(with_tags))
    model.save_pretrained(tmp_path / "m"), with_tags.save_pretrained(tmp_path / "m")
    flags = ["--model", str(tmp_path / "m"), "--task", "begun", "--lr", "1e-3", "--report_to", "none"]
    flags += ["--output_dir", str(tmp_path / "r"), "--per_device_train_batch_size", "16", "--max_steps", "1"]
    arguments, adapter_arguments, _ = parse(flags)
    setup = grpo.prepare_grpo(arguments, adapter_arguments)
    trainer, _ = grpo.make_trainer(setup, arguments, RunFolder(tmp_path))
    prompts = [setup.train_rows[0]["prompt"]] * 16
    answer = with_tags("<think>5</think>6")["input_ids"][1:]
    asked = []

    def single_turn(ids, *_):
        asked.extend(ids)
        return [answer] * len(ids), None

    monkeypatch.setattr(trainer, "_generate_single_turn", single_turn)
    completions = trainer._generate(prompts)[3]
    assert asked == prompt_ids(setup.tokenizer, prompts)
    assert completions == [[{"role": "assistant", "content": "<think>5</think>6"}]] * 16


class _Engine:
    """Stands in for vLLM's `LLM`: notes what it was asked, and gives token ids."""

    def __init__(self, model, **options):
        self.asked = []

    def get_tokenizer(self):
        return _Engine.tokenizer

    def chat(self, prompts, parameters, **options):
        self.asked.append(("chat", prompts))
        ids = self.get_tokenizer()("<think>5</think>6<eos>")["input_ids"]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, text="56")]) for _ in prompts]

    def generate(self, prompts, parameters, **options):
        answers = self.chat(prompts, parameters)
        self.asked[-1] = ("generate", prompts)
        return answers


def test_vllm_goes_on_with_begun_answers_and_keeps_tags(with_tags, monkeypatch):
    fake = {"vllm": {"LLM": _Engine, "SamplingParams": dict}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": 0}}
    for name, contents in fake.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    _Engine.tokenizer = with_tags
    engine = VLLMEngine("embedded", None, max_tokens=4, temperature=0.0)
    assert engine.answer([[USER], [USER, BEGUN, USER]], 1, 0) == [["<think>5</think>6"]] * 2
    assert engine.answer([[USER, BEGUN], [USER]], 1, 0) == [["<think>5</think>6"]] * 2
    ids = prompt_ids(with_tags, [[USER, BEGUN], [USER]])
    expected = [("chat", [[USER], [USER, BEGUN, USER]]), ("generate", [{"prompt_token_ids": one} for one in ids])]
    assert engine._llm.asked == expected
    with pytest.raises(UserError, match=r"refuses .*\(system, user\)"):
        engine.answer([[SYSTEM, USER]], 1, 0)


def test_a_template_that_refuses_the_task_writes_nothing(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATE.replace("'system'", "'assistant'")
    models.load_model("embedded").save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    flags = ["--model", str(tmp_path / "m"), "--task", "begun", "--lr", "1e-3", "--output_dir", str(tmp_path / "r")]
    with pytest.raises(UserError, match="chat template refuses"):
        grpo.train(*parse(flags))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_a_column_by_whose_name_rewards_get_something_else_is_refused_before_anything_runs(name, tmp_path):
    rows = Dataset.from_dict({"prompt": ["1+2="], name: ["x"]})
    task = Task("own", lambda c: rows, lambda c: rows, (seen,), seen)
    for held_out in (False, True):
        with pytest.raises(UserError, match=rf"split of the task own has a column '{name}'.*rename_column\('{name}'"):
            load_split(task, held_out, False)
    engine = type("Engine", (), {"conversational": False})()
    settings = Settings("model", None, "own", samples=1, temperature=0.0, max_tokens=8, engine="toy", seed=0)
    with pytest.raises(UserError, match="rewards get something else by that name"):
        evaluate(task, engine, settings, tmp_path / "e")
    assert not (tmp_path / "e").exists()
