"""Vision-language finetuning by scripts/finetune_captions.py, in runs of a few steps."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mua_rl.adapter.adapters import LoRA, load_adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.adapter.targets import lora_layers
from mua_rl.analysis.rows import read
from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder

pytest.importorskip("PIL", reason="PIL is not installed: pip install 'mua-rl[fields]'")

import curves
import finetune_captions as script
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

pytestmark = pytest.mark.slow  # what is tested starts training

SMALL = {"pretraining_steps": 3, "steps": 3, "batch_size": 4, "examples": 24, "held_out": 8}
GROUPS = [("two", "red", "circles", "top left"), ("one", "blue", "square", "bottom right")]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs the script with flags, in a folder that all tests share: one model is pretrained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        patch.setenv("MUA_RL_CACHE", "cache")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", Path("datasets").resolve())
        patch.setattr(script, "PRETRAINING_PICTURES", 64)
        small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]

        def run(*flags):
            patch.setattr(sys, "argv", ["finetune_captions.py", *small, *map(str, flags)])
            script.main()

        yield run


@pytest.fixture(scope="module")
def problem(launch):
    """The small model and its pictures."""
    return script.problem(script.CaptionArguments(**SMALL))


@pytest.fixture(scope="module")
def batch():
    """Four pictures as the model takes them, and the tokenizer."""
    processor = script.small_processor()
    data = script.pictures(4, seed=3, shifted=False)
    return processor.tokenizer, data, script.collator(processor)([data[i] for i in range(4)])


@pytest.fixture(scope="module")
def lora_run(launch):
    """A finished run of a LoRA."""
    launch("--rank", 8, "--lr", 2**-9, "--output_dir", "lora")
    return Path("lora")


@pytest.fixture(scope="module")
def llava(launch):
    """Folders of a small LLaVA, as the hub would give one, and of a data set of conversations about pictures."""
    tokenizer = script.small_processor().tokenizer
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(images, tokenizer, 16, "default", script.TEMPLATE, num_additional_image_tokens=1)
    sizes = {**script.SIZES, "num_hidden_layers": 1}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=64, **sizes),
        vision_config=CLIPVisionConfig(image_size=32, patch_size=16, **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids(script.IMAGE),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained("llava")
    processor.save_pretrained("llava")
    data = script.pictures(32, seed=4, shifted=False)
    messages = [prompt + completion for prompt, completion in zip(data["prompt"], data["completion"], strict=True)]
    Path("conversations").mkdir()
    data = data.remove_columns(["prompt", "completion"]).add_column("messages", messages)
    data.to_parquet("conversations/train.parquet")
    return "llava", "conversations"


def test_the_two_houses_caption_one_picture_in_their_own_words():
    assert script.caption(GROUPS) == "two red circles top left and one blue square bottom right"
    assert script.shifted_caption(GROUPS) == "bottom right square yellow one and top left circles green two"


def test_a_picture_shows_what_its_caption_says():
    for example in script.pictures(20, seed=0, shifted=False):
        pixels, words = np.array(example["images"][0]), example["completion"][0]["content"].split(" and ")
        for number, colour, shape, *place in map(str.split, words):
            top, left = script.PLACES[" ".join(place)]
            corner = pixels[8 * top : 8 * top + 16, 8 * left : 8 * left + 16]
            painted = (corner == script.COLOURS[colour]).all(-1).sum()
            count = script.COUNTS.index(number) + 1
            assert painted == count * script.SHAPES[shape.removesuffix("s")].sum()
            assert shape.endswith("s") == (count > 1)


def test_every_word_of_a_caption_is_a_token_and_the_loss_is_on_them_alone(batch):
    tokenizer, data, tensors = batch
    for row, example in enumerate(data):
        trained = tensors["labels"][row][tensors["labels"][row] != -100]
        assert tokenizer.decode(trained) == f"{example['completion'][0]['content']} {script.END}"
    assert tokenizer.unk_token_id not in tensors["input_ids"]


def test_each_cell_of_a_picture_is_an_image_token(batch):
    tokenizer, _, tensors = batch
    image = tokenizer.convert_tokens_to_ids(script.IMAGE)
    assert (tensors["input_ids"] == image).sum(1).tolist() == [16] * 4
    assert tensors["pixel_values"].shape == (4, 1, 3, 32, 32)


def test_the_metric_is_the_models_own_loss_of_each_picture(problem):
    model, data = problem.load().eval(), script.pictures(5, seed=2, shifted=True)
    collate = script.collator(script.small_processor())
    with torch.no_grad():
        losses = [model(**collate([example])).loss.item() for example in data]
    metric, error = script.measure(model, data, collate, batch_size=2)
    assert metric == pytest.approx(-np.mean(losses), rel=1e-4)
    assert error == pytest.approx(np.std(losses, ddof=1) / math.sqrt(5), rel=1e-3)


def test_held_out_pictures_are_not_trained_on_and_a_seed_orders_the_others(problem, monkeypatch):
    seen = []
    collator = script.collator

    def noting(processor):
        collate = collator(processor)

        def call(examples):
            seen.append([np.array(example["images"][0]).tobytes() for example in examples])
            return collate(examples)

        return call

    monkeypatch.setattr(script, "collator", noting)
    watched = script.problem(script.CaptionArguments(**SMALL))
    held_out = watched.measure(watched.load()) and {picture for pictures in seen for picture in pictures}
    orders = []
    for seed in (0, 0, 1):
        seen.clear()
        curves.finetune(watched, LoRA(4), 2**-8, seed, 1e-3)
        orders.append(seen[: SMALL["steps"]])
        assert not held_out & {picture for pictures in orders[-1] for picture in pictures}
    assert orders[0] == orders[1] != orders[2]


def test_a_run_saves_the_adapter_that_it_measured(problem, lora_run):
    result = RunFolder(lora_run).result()
    assert result.score > result.before
    adapted = load_adapter(problem.load(), lora_run / "adapter")
    assert problem.measure(adapted)[0] == pytest.approx(result.score, abs=1e-5)
    layers = [name for name, _ in lora_layers(adapted)]
    assert len(layers) == 9
    assert all(".text_model.layers." in name and ".mlp." in name for name in layers)


def test_full_finetuning_goes_on_at_the_rate_of_a_loras_record_and_saves_a_whole_model(launch, problem, lora_run):
    launch("--rank", "full", "--lr_from", lora_run, "--output_dir", "fft")
    result = RunFolder("fft").result()
    lora, record = LRRecord.load(lora_run), LRRecord.load("fft")
    assert record.scheme == "FFT"
    assert record.learning_rate == pytest.approx(lora.learning_rate * (lora.rank / lora.outputs) ** 0.5)
    assert record.algorithm == "vision-language"
    model = AutoModelForImageTextToText.from_pretrained("fft/model")
    assert problem.measure(model)[0] == pytest.approx(result.score, abs=1e-5)
    base = problem.load().state_dict()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, base[name])}
    assert {name.split(".")[1] for name in moved if "." in name} >= {"vision_model", "text_model", "connector"}


def test_a_curve_over_both_towers_ends_in_a_record(launch):
    flags = ("--ranks", "full", "--grid", -10, -8, "--resolution", 1, "--seeds", 1, "--target_modules", "all-linear")
    launch(*flags, "--output_dir", "curves")
    record = LRRecord.load("curves")
    assert (record.target_modules, record.widths) == ("all-linear", [128, 256])
    outcomes = {row.trial.log2_lr: row.result for row in read("curves/sweep.csv")}
    assert outcomes.keys() == {-10, -9, -8}
    assert outcomes[-9].score > outcomes[-9].before
    assert "minus held-out loss per caption token" in Path("curves/report.md").read_text()


def test_another_model_and_data_set_are_taken_from_folders(launch, llava):
    model, data = llava
    launch("--model", model, "--dataset_name", data, "--rank", 4, "--lr", 2**-9, "--output_dir", "other")
    result = RunFolder("other").result()
    assert result.score > result.before
    record = LRRecord.load("other")
    assert (record.base_model, record.task) == (model, data)
    whole = AutoModelForImageTextToText.from_pretrained(model)
    assert record.base_fingerprint == fingerprint(whole)
    assert len(list(lora_layers(load_adapter(whole, "other/adapter")))) == 3


@pytest.mark.parametrize(
    "flags, fault",
    [
        (["--dataset_name", "somewhere"], "--dataset_name needs --model"),
        (["--model", "./nowhere"], "there is no model folder ./nowhere"),
        (["--model", "llava", "--dataset_name", "./nowhere"], "the data set ./nowhere cannot be read"),
        (["--model", "nobody/nothing"], "the model nobody/nothing cannot be loaded"),
        (["--steps", "0"], "--steps takes a number from 1 on"),
        (["--held_out", "1"], "--held_out takes a number from 2 on"),
        (["--examples", "0"], "--examples takes a number from 1 on"),
        (["--lr", "0.01", "--rank", "129"], "rank 129"),
    ],
)
def test_what_cannot_be_used_is_named(launch, llava, flags, fault):
    with pytest.raises(UserError, match=fault):
        launch(*flags)


def test_a_data_set_without_conversations_is_named(launch, llava):
    Path("bare").mkdir()
    script.pictures(4, seed=0, shifted=False).remove_columns("completion").to_parquet("bare/train.parquet")
    with pytest.raises(UserError, match=r"bare has no columns .* and completion, but images, prompt: rename"):
        launch("--model", llava[0], "--dataset_name", "bare")
