"""Evaluations: recorded by problem, resumable, comparable; by the API and by the scripts."""

import json
import random
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import make_record

from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.envs.tasks import Task
from mua_rl.errors import UserError
from mua_rl.evaluation.engines import TransformersEngine, check_adapter
from mua_rl.evaluation.evaluation import (
    PROBLEMS_AT_ONCE,
    Settings,
    compare,
    default_ks,
    evaluate,
    load_evaluation,
)
from mua_rl.lm import models

ROOT = Path(__file__).parent.parent
PROBLEMS = 3 * PROBLEMS_AT_ONCE + 5
SETTINGS = Settings("model", None, "toy", samples=4, temperature=1.0, max_tokens=8, engine="toy", seed=3)


def contains_answer(prompts, completions, answer, **columns):
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]


def is_answer(prompts, completions, answer, **columns):
    return [float(right == completion) for completion, right in zip(completions, answer, strict=True)]


def toy_task(problems=PROBLEMS):
    rows = Dataset.from_dict(
        {"prompt": [f"say {i}" for i in range(problems)], "answer": [str(i) for i in range(problems)]}
    )
    return Task("toy", lambda c: rows, lambda c: rows, (contains_answer,), contains_answer, strict=is_answer)


class ToyEngine:
    """Right half of the time, in the strict form half of that; stops after some chunks."""

    conversational = False

    def __init__(self, chunks=None):
        self.chunks = chunks
        self.asked = []

    def answer(self, prompts, samples, seed):
        if self.chunks is not None and len(self.asked) >= self.chunks:
            raise KeyboardInterrupt
        self.asked.append(prompts[0])
        rng = random.Random(seed)
        return [
            [rng.choice(["no", "none", number, f"it is {number}"]) for _ in range(samples)]
            for number in (prompt.split()[1] for prompt in prompts)
        ]


def test_an_evaluation_is_recorded_problem_by_problem(tmp_path):
    evaluation = evaluate(toy_task(), ToyEngine(), SETTINGS, tmp_path / "run")
    lines = (tmp_path / "run" / "problems.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == PROBLEMS and first["prompt"] == "say 0" and len(first["completions"]) == 4
    assert first["scores"] == [float("0" in completion) for completion in first["completions"]]
    assert first["strict_scores"] == [float(completion == "0") for completion in first["completions"]]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["problems"] == PROBLEMS and set(summary["pass"]) == {"1", "2", "4"}
    assert summary["pass"]["1"]["value"] == pytest.approx(sum(evaluation.shares) / PROBLEMS)
    assert summary["strict"]["value"] < summary["pass"]["1"]["value"] < summary["pass"]["4"]["value"]
    assert load_evaluation(tmp_path / "run") == evaluation


@pytest.mark.parametrize("tear", [False, True])
def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one(tmp_path, tear):
    whole = evaluate(toy_task(), ToyEngine(), SETTINGS, tmp_path / "whole")
    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        evaluate(toy_task(), ToyEngine(chunks=2), SETTINGS, folder)
    if tear:  # killed in the middle of a write
        text = (folder / "problems.jsonl").read_text()
        (folder / "problems.jsonl").write_text(text[:-30])
    with pytest.raises(UserError, match="unfinished"):
        load_evaluation(folder)
    engine = ToyEngine()
    assert evaluate(toy_task(), engine, SETTINGS, folder) == whole
    assert len(engine.asked) == (3 if tear else 2)
    again = ToyEngine(chunks=0)
    assert evaluate(toy_task(), again, SETTINGS, folder) == whole


def test_going_on_with_other_settings_is_refused(tmp_path):
    evaluate(toy_task(), ToyEngine(), SETTINGS, tmp_path)
    with pytest.raises(UserError, match=r"temperature was 1.0, is 0.5"):
        evaluate(toy_task(), ToyEngine(), replace(SETTINGS, temperature=0.5), tmp_path)


def test_going_on_with_other_problems_is_refused(tmp_path):
    evaluate(toy_task(), ToyEngine(), SETTINGS, tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(UserError, match="other problems"):
        evaluate(toy_task(3), ToyEngine(), SETTINGS, tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        evaluate(toy_task(), ToyEngine(), SETTINGS, tmp_path)
    with pytest.raises(UserError, match=r"thesis\.txt cannot be made: File exists"):
        evaluate(toy_task(), ToyEngine(), SETTINGS, tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    "change", [{"samples": 0}, {"max_tokens": 0}, {"limit": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_settings_are_checked(change):
    with pytest.raises(UserError):
        replace(SETTINGS, **change)


def test_greedy_samples_are_all_the_same_and_refused():
    with pytest.raises(UserError, match="all samples are the same"):
        replace(SETTINGS, temperature=0.0)


def test_default_ks():
    assert [default_ks(n) for n in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


def test_comparison_pairs_the_same_problems_only(tmp_path):
    first = evaluate(toy_task(), ToyEngine(), SETTINGS, tmp_path / "a")
    second = evaluate(toy_task(), ToyEngine(), replace(SETTINGS, seed=50), tmp_path / "b")
    result = compare(first, second)
    assert result.difference.value == pytest.approx((sum(second.shares) - sum(first.shares)) / PROBLEMS)
    assert compare(first, replace(second, problems=second.problems[::-1])) == result
    with pytest.raises(UserError, match="not of the same problems"):
        compare(first, replace(second, problems=second.problems[:-1]))


def test_an_adapters_rank_is_the_largest_of_its_layers(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "rank_pattern": {"x": 24}}))
    assert check_adapter(str(tmp_path)) == 24
    with pytest.raises(UserError, match="holds no LoRA adapter"):
        check_adapter(str(tmp_path / "none"))


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A random Llama with a chat template and an adapter for it."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"])).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def of_a_run(tiny_llama, tmp_path):
    """The adapter in a run folder, and another model of the same shapes."""
    model = models.load_model(str(tiny_llama / "model"))
    make_record(base_model="tiny", base_fingerprint=fingerprint(model)).save(tmp_path / "run")
    shutil.copytree(tiny_llama / "adapter", tmp_path / "run" / "adapter")
    shutil.copytree(tiny_llama / "model", tmp_path / "other")
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    model.save_pretrained(tmp_path / "other")
    return tmp_path


def run(monkeypatch, script, *arguments):
    """Run a script as a program would, in this process: torch is imported already."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


def test_the_scripts_evaluate_and_compare_a_model_and_its_adapter(tiny_llama, tmp_path, monkeypatch, capsys):
    common = ["--model", tiny_llama / "model", "--task", "arithmetic", "--limit", 6, "--max_tokens", 4]
    run(monkeypatch, "evaluate.py", *common, "--samples", 2, "--temperature", 1.0, "--output", tmp_path / "base")
    shown = capsys.readouterr().out
    assert "pass@1" in shown and "pass@2" in shown and "6 problems" in shown
    run(monkeypatch, "evaluate.py", *common, "--adapter", tiny_llama / "adapter", "--output", tmp_path / "adapted")
    run(monkeypatch, "compare_evaluations.py", tmp_path / "base", tmp_path / "adapted")
    shown = capsys.readouterr().out
    assert "difference" in shown and "p =" in shown


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_adapter_of_a_run_goes_on_no_other_weights(engine, tiny_llama, of_a_run, tmp_path, monkeypatch, capsys):
    def start(model, **options):
        raise UserError(f"vLLM starts with {model}")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lambda *given: given))
    common = ["evaluate.py", "--task", "arithmetic", "--limit", 2, "--max_tokens", 2, "--engine", engine]
    common += ["--adapter", of_a_run / "run" / "adapter", "--output", tmp_path / "evaluation", "--model"]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *common, of_a_run / "other")
    assert "was trained on other weights (tiny" in capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    right = tiny_llama / "model"
    if engine == "transformers":
        run(monkeypatch, *common, right)
        assert "pass@1" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit):
            run(monkeypatch, *common, right)
        assert f"vLLM starts with {right}" in capsys.readouterr().err
    (of_a_run / "run" / "lr_record.json").unlink()
    TransformersEngine(str(of_a_run / "other"), str(of_a_run / "run" / "adapter"), 2, 0.0)  # nothing says of what it is


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nope"], "there is no task"),
        (["--task", "arithmetic", "--adapter", "/no/such"], "holds no LoRA adapter"),
        (["--task", "arithmetic", "--temperature", "-1"], "temperature is 0 or more"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(tiny_llama, tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "evaluate.py", "--model", tiny_llama / "model", "--output", tmp_path, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
