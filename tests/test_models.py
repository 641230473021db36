"""A model's folder that is made once: by whoever is first, whole, for all processes."""

import multiprocessing
import os

import pytest
from peft import AutoPeftModelForCausalLM

from mua_rl.adapter.adapters import LoRA
from mua_rl.errors import UserError
from mua_rl.lm import models


def make_beside_another(folder, name, barrier, made):
    """Make a model's folder when another process is as far, and tell whose model is in it."""

    def make(own):
        own.mkdir()
        for file in ("config.json", "model.safetensors"):
            (own / file).write_text(name)
        barrier.wait(60)  # both have found no folder, and have one to put there

    folder = models.made_once(folder, make)
    made.put((name, {path.name: path.read_text() for path in folder.iterdir()}))


def test_of_two_processes_that_make_a_model_the_slower_takes_the_others(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(2), context.Queue()
    makers = [
        context.Process(target=make_beside_another, args=(tmp_path / "cache" / "model", name, barrier, made))
        for name in ("first", "second")
    ]
    for maker in makers:
        maker.start()
    found = dict(made.get(timeout=60) for _ in makers)
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert found["first"] == found["second"]  # one model, and no mixture of two
    assert set(found["first"]) == {"config.json", "model.safetensors"}
    assert len(set(found["first"].values())) == 1
    assert os.listdir(tmp_path / "cache") == ["model"]  # nothing is left of the other


def test_a_folder_with_something_else_is_refused_before_a_model_is_made(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no model .* delete it or empty it"):
        models.made_once(tmp_path, lambda own: pytest.fail("made in vain"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_takes_the_model(tmp_path):
    (tmp_path / "model").mkdir()
    models.made_once(tmp_path / "model", lambda own: (own.mkdir(), (own / "config.json").write_text("{}")))
    assert os.listdir(tmp_path / "model") == ["config.json"]


def test_an_adapter_names_a_base_that_was_given_by_a_relative_path_so_that_peft_finds_it_from_anywhere(
    tmp_path, monkeypatch
):
    models.load_model("embedded").save_pretrained(tmp_path / "base")
    models.load_tokenizer("embedded").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    LoRA(4).attach(models.load_model("base")).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir("/")
    assert AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).peft_config["default"].r == 4
    assert models.model_path("nobody/nothing") == "nobody/nothing"
