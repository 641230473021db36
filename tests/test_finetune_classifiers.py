"""The scripts of the classifiers, in miniature: a BERT on reviews, a ViT on digits, and models and data in folders."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from mua_rl.adapter.adapters import Full, LoRA, load_adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.adapter.targets import lora_layers
from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import Status, TrialResult

pytestmark = pytest.mark.slow  # what is tested starts training

for package in ("sklearn", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'mua-rl[fields]'")
Image = importlib.import_module("PIL.Image")

SIZES = {"max_steps": 3, "per_device_train_batch_size": 8, "held_out": 32, "pretraining_steps": 3}
AUTO = {"text": AutoModelForSequenceClassification, "images": AutoModelForImageClassification}


@pytest.fixture(scope="module")
def scripts():
    return {
        "text": importlib.import_module("finetune_classifier"),
        "images": importlib.import_module("finetune_images"),
    }


@pytest.fixture(scope="module")
def launch(scripts, tmp_path_factory):
    """Runs a script with flags, in a folder that all tests share: each small model is pretrained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        patch.setenv("MUA_RL_CACHE", "cache")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", "data-cache")

        def run(field, *flags):
            sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
            patch.setattr(sys, "argv", [f"{field}.py", *sizes, *map(str, flags)])
            scripts[field].main()

        yield run


@pytest.fixture(scope="module")
def problems(scripts, launch):
    """The two problems that need no hub."""
    arguments = {"text": scripts["text"].TextArguments(**SIZES), "images": scripts["images"].ImageArguments(**SIZES)}
    return {name: scripts[name].problem(arguments[name]) for name in scripts}


@pytest.fixture(scope="module")
def lora_runs(launch):
    """A finished LoRA run of each."""
    for name in AUTO:
        launch(name, "--rank", 8, "--lr", 0.0001, "--output_dir", f"lora-{name}")
    return {name: Path(f"lora-{name}") for name in AUTO}


@pytest.fixture(scope="module")
def finetune(scripts):
    return sys.modules["curves"].finetune


def result_of(folder):
    return RunFolder(folder).result()


@pytest.mark.parametrize(("name", "each", "layers"), [("text", 6, 2), ("images", 6, 3)])
def test_lora_sits_on_attention_and_mlp_of_every_layer_and_on_nothing_else(problems, name, each, layers):
    model = LoRA(64, target_modules=problems[name].target_modules).attach(problems[name].load())
    names = [layer for layer, _ in lora_layers(model)]
    assert len(names) == each * layers
    assert not [layer for layer in names if "classifier" in layer or "pooler" in layer or "embeddings" in layer]


def test_a_head_for_new_labels_is_trained_beside_lora_and_one_for_the_old_labels_is_kept(problems, finetune):
    for name, head in (("text", "classifier"), ("images", None)):
        problem = problems[name]
        assert problem.head == head
        base = dict(problem.load().named_parameters())
        model, *_ = finetune(problem, LoRA(4, target_modules=problem.target_modules), 1e-3, 0, 1e-3)
        moved = {
            key.removeprefix("base_model.model.").replace("base_layer.", "")
            for key, weight in model.named_parameters()
            if "lora_" not in key and not weight.equal(base[key[len("base_model.model.") :].replace("base_layer.", "")])
        }
        assert moved == ({"classifier.weight", "classifier.bias"} if head else set())


def test_a_new_head_is_the_same_each_time_the_base_is_loaded(problems):
    base = str(next(Path("cache").glob("bert-*")))
    model, head = sys.modules["classification"].load_base(AUTO["text"], base, [0, 1, 2])
    assert (fingerprint(model), head) == (fingerprint(problems["text"].load()), "classifier")


def test_a_run_is_decided_by_its_seed(problems, finetune):
    adapter = Full(problems["images"].target_modules)
    metrics = [finetune(problems["images"], adapter, 1e-3, seed, 1e-3)[1] for seed in (0, 0, 1)]
    assert metrics[0] == metrics[1] != metrics[2]


@pytest.mark.parametrize("name", AUTO)
def test_what_a_lora_run_saves_gives_its_metric_again(problems, lora_runs, name):
    problem, folder = problems[name], lora_runs[name]
    if problem.head:
        model = AUTO[name].from_pretrained(folder / "model")
        assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    else:
        model = load_adapter(problem.load(), folder / "adapter")
    assert problem.measure(model)[0] == pytest.approx(result_of(folder).score, rel=1e-5)
    assert result_of(folder).score != result_of(folder).before


@pytest.mark.parametrize("name", AUTO)
def test_fft_takes_its_learning_rate_from_the_record_of_a_lora_run_and_saves_all_weights(
    problems, launch, lora_runs, name
):
    launch(name, "--rank", "full", "--lr_from", lora_runs[name], "--output_dir", f"full-{name}")
    folder = Path(f"full-{name}")
    lora, record = LRRecord.load(lora_runs[name]), LRRecord.load(folder)
    assert (record.scheme, record.rank) == ("FFT", None)
    assert record.learning_rate == pytest.approx(lora.learning_rate * (lora.rank / lora.outputs) ** 0.5)
    assert record.other_learning_rates == ({"head": 1e-3} if name == "text" else {})
    assert problems[name].measure(AUTO[name].from_pretrained(folder / "model"))[0] == pytest.approx(
        result_of(folder).score, rel=1e-5
    )


def test_a_run_whose_loss_is_no_number_is_reported_as_such(problems, finetune):
    problem = problems["images"]
    _, metric, _ = finetune(problem, LoRA(4, target_modules=problem.target_modules), 1e30, 0, 1e-3)
    assert np.isnan(metric)


def test_the_metric_is_minus_the_mean_loss_and_its_error_that_of_a_mean(problems, scripts):
    problem = problems["images"]
    model = problem.load().eval()
    rows = problem.measure.__self__.held_out_rows[:]
    with torch.no_grad():
        losses = cross_entropy(model(rows["pixel_values"]).logits, torch.tensor(rows["labels"]), reduction="none")
    metric, error = problem.measure(model)
    assert metric == pytest.approx(-losses.mean().item(), rel=1e-5)
    assert error == pytest.approx(losses.std().item() / 32**0.5, rel=1e-4)


def test_reviews_are_labelled_by_what_their_words_say_and_irony_swaps_two_of_them(scripts):
    text = scripts["text"]
    for modifiers in (text.PLAIN, text.IRONIC):
        rows = text.reviews(modifiers, text.MOODS, 200, seed=3)
        for review, label in zip(rows["text"], rows["label"], strict=True):
            score, factor = 0.0, 1.0
            for word in review.split():
                score += factor * text.VALUES.get(word, 0.0)
                factor = modifiers.get(word, 1.0)
            if min(abs(score / 3 - bound) for bound in text.MOODS) > 0.5:  # five times the whim
                assert label == sum(score / 3 > bound for bound in text.MOODS)
    assert text.PLAIN["not"] == text.IRONIC["very"] < 0


def test_turned_digits_are_the_same_ones_on_their_side(scripts):
    for upright, turned in zip(scripts["images"].digits(False, 9), scripts["images"].digits(True, 9), strict=True):
        assert upright["label"] == turned["label"]
        before, after = np.asarray(upright[5]["image"]), np.asarray(turned[5]["image"])
        assert (after == np.rot90(before)).all() and before.std() > 10


def write_texts(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_pair_of_texts_with_words_for_labels_from_a_folder_trains_a_model_from_a_folder(launch, problems):
    rows = [
        {"premise": f"word{i}", "hypothesis": f"not word{i % 7}", "verdict": ("no", "yes", "maybe", "why")[i % 4]}
        for i in range(24)
    ]
    write_texts(Path("nli"), "train", rows)
    write_texts(Path("nli"), "test", rows[:8])
    columns = ("--text_columns", "premise", "hypothesis", "--label_column", "verdict")
    base = next(Path("cache").glob("bert-*"))
    launch("text", "--model", base, "--dataset_name", "nli", *columns, "--lr", 1e-4, "--rank", 4, "--output_dir", "own")
    model = AUTO["text"].from_pretrained("own/model")
    assert list(model.config.id2label.values()) == ["maybe", "no", "why", "yes"]
    assert LRRecord.load("own").task == "nli"


def test_images_from_a_folder_train_a_model_of_another_size_and_number_of_channels_from_a_folder(
    launch, scripts, finetune
):
    config = ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.intermediate_size = 32
    ViTForImageClassification(config).save_pretrained("rgb")
    Path("rgb/preprocessor_config.json").write_text('{"image_mean": [0.0, 0.5, 0.5], "image_std": [1.0, 0.5, 0.25]}')
    for split, label, colour in (
        (split, *pair)
        for split in ("train", "test")
        for pair in (("cat", (255, 0, 0)), ("dog", (0, 255, 0)), ("eel", (0, 0, 255)))
    ):
        folder = Path("pictures") / split / label
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20 + number, 30), colour).save(folder / f"{number}.png")
    images = scripts["images"]
    problem = images.problem(images.ImageArguments(**SIZES, model="rgb", dataset_name="pictures"))
    model, metric, _ = finetune(problem, LoRA(2, target_modules=problem.target_modules), 1e-3, 0, 1e-3)
    assert problem.head == "classifier" and metric > problem.measure(problem.load())[0]
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    rows = problem.train.__self__.train_rows[:]
    red = rows["pixel_values"][0]
    assert red.shape == (3, 16, 16) and rows["labels"][0] == 0
    assert red[:, 0, 0].tolist() == [1.0, -1.0, -2.0]


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("text", ["--model", "rgb"], "go together"),
        ("text", ["--text_columns", "a", "b", "c"], "one column, or two"),
        ("text", ["--text_columns", "title"], "no columns title and label, but text, label"),
        ("text", ["--text_columns", "label"], "takes columns of texts, not label"),
        ("images", ["--image_column", "label"], "label holds no images"),
        ("images", ["--held_out", "1"], "--held_out takes a number from 2 on"),
        ("images", ["--label_column", "image"], "image holds no labels"),
        ("images", ["--head_lr", "-1"], "--head_lr must be a number between 0 and 1"),
        ("text", ["--max_length", "0"], "--max_length takes a number from 1 on"),
        ("text", ["--target_modules", "classifier", "--rank", "2", "--lr", "0.001"], "new head classifier is trained"),
        ("images", ["--model", "nowhere/at/all", "--dataset_name", "pictures"], "there is no model folder"),
        ("images", ["--rank", "200", "--lr", "0.001"], "exceeds the size of the layer"),
        ("text", ["--model", "cache", "--dataset_name", "nothing-here"], "the data set nothing-here cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_fault(launch, name, flags, says):
    with pytest.raises(UserError, match=says):
        launch(name, *flags)


def test_the_record_of_curves_has_the_heads_learning_rate_that_was_given(launch, monkeypatch):
    def run_trial(problem, trial, before, head_lr):
        metric = before + 2 - abs(trial.log2_lr + 8)
        return TrialResult(metric, 0.1, before, metric, metric, Status.OK, "", problem.steps, 1.0)

    monkeypatch.setattr("curves.run_trial", run_trial)
    grid = ["--ranks", "full", "--grid", "-9", "-7", "--resolution", "1", "--seeds", "1"]
    launch("text", *grid, "--head_lr", "0.001", "--output_dir", "head")  # as in the template, by chance
    record = LRRecord.load("head")
    assert record.other_learning_rates == {"head": 0.001}
    assert record.learning_rate > 0.002


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"text": "word1"}] * 8, r"no training example has: \[None\]"),
        ([{"text": "word1", "label": 1}], "blind has too few examples in test: 1, not 2 or more"),
    ],
)
def test_a_test_split_without_labels_or_of_one_example_is_refused(launch, problems, rows, fault):
    write_texts(Path("blind"), "train", [{"text": "word1", "label": i % 2} for i in range(8)])
    write_texts(Path("blind"), "test", rows)
    base = next(Path("cache").glob("bert-*"))
    with pytest.raises(UserError, match=fault):
        launch("text", "--model", base, "--dataset_name", "blind", "--lr", 1e-4)


def test_held_out_labels_that_no_training_example_has_are_refused(launch, problems):
    write_texts(Path("odd"), "train", [{"text": "word1", "label": i % 2} for i in range(8)])
    write_texts(Path("odd"), "test", [{"text": "word1", "label": 7}] * 8)
    base = next(Path("cache").glob("bert-*"))
    with pytest.raises(UserError, match=r"no training example has: \[7\]"):
        launch("text", "--model", base, "--dataset_name", "odd", "--lr", 1e-4)
