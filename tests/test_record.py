"""The LR record survives the disk exactly, and a bad one is refused with a reason."""

import json
import math
import re

import pytest
from helpers import make_record

from mua_rl.errors import UserError
from mua_rl.lr.record import FILE_NAME, LRRecord
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import FFT, AdapterSpec, AlphaRule, Scheme
from mua_rl.lr.transfer import LearningRate, transfer
from mua_rl.run.machine import machine


def test_a_record_comes_back_from_disk_as_it_was(tmp_path):
    record = make_record(
        learning_rate=0.1 + 0.2 - 0.29999, target_modules=["q_proj"], other_learning_rates={"head": 1e-3}
    )
    assert LRRecord.load(record.save(tmp_path)) == record
    assert LRRecord.load(tmp_path) == record  # a run folder
    assert LRRecord.load(record.save(tmp_path / "elsewhere.json")) == record


@pytest.mark.parametrize(
    ("note", "evidence"),
    [
        ("a sweep: optimum of a fit to 16 runs", "sweep"),
        ("a guess, since no record fits x", "guess"),
        ("given by --lr", "run"),
    ],
)
def test_a_record_of_an_earlier_version_says_in_its_note_how_its_rate_was_found(tmp_path, note, evidence):
    assert LRRecord.load(edited(tmp_path, evidence=None, note=note)).evidence == evidence


def test_saving_leaves_no_scratch_file(tmp_path):
    make_record().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def edited(tmp_path, **changes):
    path = make_record().save(tmp_path)
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "upgrade"),
        ({"format_version": "1"}, "its format_version is '1'"),
        ({"format_version": 0}, "its format_version is 0"),
        ({"outputs": 0}, "at least one output"),
        ({"format": "something"}, "no LR record"),
        ({"learning_rate": None, "task": None}, "lacks: learning_rate, task"),
        ({"colour": "red"}, "unknown entries: colour"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"learning_rate": 0}, "between 0 and 1"),
        ({"learning_rate": math.nan}, "between 0 and 1"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"rank": 1024}, "contradicts"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"scheme": "FFT"}, "contradicts"),
        ({"scheme": "PiSSA"}, "contradicts"),
        ({"alpha": "two"}, "contradicts"),
        ({"widths": []}, "contradicts"),
        ({"optimizer": {"betas": []}}, "optimizer"),
        ({"other_learning_rates": {"head": -1}}, "head"),
        ({"other_learning_rates": {"head": "fast"}}, "head"),
        ({"evidence": "hearsay"}, "evidence is one of sweep, run, guess"),
    ],
)
def test_a_bad_record_is_refused_with_its_fault(tmp_path, changes, message):
    path = edited(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        LRRecord.load(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"format": "mua_rl LR record"', "\x00\x01"])
def test_text_that_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError):
        LRRecord.load(path)


def test_a_missing_record_and_an_unfinished_run_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no LR record at"):
        LRRecord.load(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="--resume"):
        LRRecord.load(tmp_path)


@pytest.mark.parametrize("value", [0, -1e-3, 1, 10, math.nan, math.inf])
def test_an_unusable_learning_rate_is_refused(value):
    with pytest.raises(UserError, match="between 0 and 1"):
        LearningRate(value, "given by --lr")


def test_at_the_records_own_configuration_the_policy_returns_its_rate_exactly():
    for rate in (1e-3, 0.1 + 0.2 - 0.299, 3e-7):
        record = make_record(learning_rate=rate, scheme="Init[A]", alpha="3*r^-0.3", rank=7)
        assert transfer(record, record.configuration()).value == rate


def test_without_correction_rank_to_rank_and_lora_to_full_follow_the_rules():
    record, rank_128 = make_record(), Configuration(AdapterSpec(128, Scheme.INIT_B), 512, optimizer="adamw_torch")
    assert transfer(record, rank_128, rank_exponent=0).value == 2**-10
    assert transfer(record, Configuration(FFT, 512, optimizer="adamw_torch"), rank_exponent=0).value == 2**-10
    init_a = make_record(scheme="Init[A]")
    assert (
        transfer(init_a, Configuration(AdapterSpec(128, Scheme.INIT_A), 512, optimizer="adamw_torch")).value == 2**-12
    )


def test_a_larger_rank_wants_less_in_grpo_by_the_root_of_the_ranks_and_as_much_in_ppo():
    rank_128 = Configuration(AdapterSpec(128, Scheme.INIT_B), 512, optimizer="adamw_torch")
    full = Configuration(FFT, 512, optimizer="adamw_torch", outputs=128)
    for target in (rank_128, full):  # a full update has as many ranks as its layer has outputs
        found = transfer(make_record(rank=8), target)
        assert found.value == 2**-10 * (8 / 128) ** 0.5
        assert "times 0.25" in found.reason
        assert transfer(make_record(rank=8, algorithm="ppo"), target).value == 2**-10
    assert transfer(make_record(rank=8, outputs=128), full, rank_exponent=0.25).value == 2**-11
    back = make_record(scheme="FFT", rank=None, outputs=128)
    assert transfer(back, Configuration(AdapterSpec(8, Scheme.INIT_B), 512, optimizer="adamw_torch")).value == 2**-8


def test_full_finetuning_from_a_record_without_the_layers_outputs_is_refused_with_the_way_out():
    with pytest.raises(UserError, match="--rank_exponent 0"):
        transfer(make_record(), Configuration(FFT, 512, optimizer="adamw_torch"))


def test_what_the_theory_does_not_cover_is_a_user_error_with_a_cure():
    fft = Configuration(FFT, 512, optimizer="adamw_torch")
    for record in (
        make_record(scheme="Init[A]"),
        make_record(alpha="1/r"),
        make_record(optimizer={"name": "sgd"}),
        make_record(lora_plus_ratio=16.0),
        make_record(weight_precision="bfloat16"),
    ):
        with pytest.raises(UserError, match="tun"):
            transfer(record, fft)


def test_multiplier_rules_move_the_rate_with_the_rank():
    record = make_record(scheme="Init[A]", alpha="1/sqrt(r)")
    target = Configuration(AdapterSpec(128, Scheme.INIT_A, AlphaRule(1, 0.5)), 512, "adamw_torch")
    assert transfer(record, target).value == pytest.approx(2**-10 * (128 / 8) ** -0.25)


def test_what_a_run_runs_on_is_the_gpu_that_it_asks_for_or_else_the_processor(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: f"GPU {device}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine() == machine("cpu")
    assert re.fullmatch(r"\w+, \d+ cores", machine())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert (machine(), machine("cuda:1")) == ("GPU None", "GPU cuda:1")
    assert re.fullmatch(r"\w+, \d+ cores", machine("cpu"))
