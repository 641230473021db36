"""What a vLLM engine is given of a LoRA, and how its mismatch is measured; no engine is needed here."""

import importlib
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import trl
from safetensors.torch import load_file

from mua_rl.adapter.adapters import LoRA
from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.grpo.arguments import parse
from mua_rl.lm import models
from mua_rl.lr.spec import AlphaRule
from mua_rl.rollouts import lora_engine as vllm_lora
from mua_rl.rollouts import sync as rollouts
from mua_rl.rollouts.correction import CorrectedGRPOTrainer, Mismatch, importance_ratio
from mua_rl.rollouts.lora_engine import AdapterFolders, engine_rank, export_tensors
from mua_rl.rollouts.planning import plan_engine


@pytest.fixture
def policy():
    """The embedded model with LoRA of rank 5 and a multiplier of 0.7, A and B away from zero."""
    model = LoRA(5, alpha=AlphaRule.parse("0.7")).attach(models.load_model("embedded"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for matrix in lora_matrices(layer):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) / 10)
    return model


@pytest.mark.parametrize(("rank", "offered"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)])
def test_the_engine_is_sized_to_the_smallest_rank_that_vllm_offers(rank, offered):
    assert engine_rank(rank) == offered


def test_a_rank_beyond_vllms_is_refused_with_the_ways_out_of_training_and_of_evaluation():
    with pytest.raises(UserError, match=r"rank 512, not 513: .*--vllm_sync merged.*--engine transformers"):
        engine_rank(513)


@pytest.mark.parametrize("flags", [["--rank", "full"], ["--rank", "8", "--vllm_sync", "merged"]])
def test_what_a_cpu_engine_cannot_take_is_refused_at_once(flags, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    arguments, adapter_arguments, _ = parse([*flags, "--report_to", "none"])
    policy = adapter_arguments.adapter("mlp").attach(models.load_model("embedded"))
    rank = adapter_arguments.adapter("mlp").rank
    with pytest.raises(UserError, match="vLLM on a CPU"):
        plan_engine(arguments, policy, rank, prompt_tokens=20)


def test_what_is_exported_times_one_is_the_policys_own_weight_change(policy):
    exported = export_tensors(policy, torch.float32)
    for name, layer in lora_layers(policy):
        a, b = exported[f"{name}.lora_A.weight"], exported[f"{name}.lora_B.weight"]
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)
    assert len(exported) == 2 * len(list(lora_layers(policy)))


def test_export_rounds_once_and_leaves_the_masters_as_they_were(policy):
    before = {name: [m.clone() for m in lora_matrices(layer)] for name, layer in lora_layers(policy)}
    exported = export_tensors(policy, torch.bfloat16)
    for name, layer in lora_layers(policy):
        a, b = lora_matrices(layer)
        assert torch.equal(exported[f"{name}.lora_B.weight"], (b * 0.7).to(torch.bfloat16))
        assert torch.equal(exported[f"{name}.lora_A.weight"], a.to(torch.bfloat16))
        assert all(torch.equal(x, y) for x, y in zip(before[name], (a, b), strict=True))
        assert a.dtype == b.dtype == torch.float32


def test_a_published_version_is_a_whole_adapter_whose_own_multiplier_is_one(policy, tmp_path):
    folders = AdapterFolders(tmp_path)
    folder = folders.publish("v1", export_tensors(policy, torch.float32))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert load_file(folder / "adapter_model.safetensors").keys() == export_tensors(policy, torch.float32).keys()
    assert [path.name for path in folders.root.iterdir()] == ["v1"]
    folders.drop(folder)
    assert list(folders.root.iterdir()) == []
    folders.close()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_killed_runs_go_and_those_of_living_ones_stay(tmp_path):
    dead, living = tmp_path / "mua_rl-adapter-999999999-x", tmp_path / f"mua_rl-adapter-{os.getppid()}-x"
    dead.mkdir()
    living.mkdir()
    folders = AdapterFolders(tmp_path)
    assert not dead.exists()
    assert living.exists()
    folders.close()


def test_layers_that_vllm_has_no_lora_for_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    wrapped = LoRA(2, target_modules=["0"]).attach(model)
    with pytest.raises(UserError, match="no LoRA for the layer"):
        vllm_lora.check_layers(wrapped)


def test_a_model_that_is_on_no_disk_is_written_out_without_its_adapter(policy, tmp_path):
    class Generation:
        model = policy
        processing_class = models.load_tokenizer("embedded")

    policy.get_base_model().name_or_path = ""
    with rollouts._base_folder(Generation()) as folder:
        written = models.load_model(folder)
        assert models.load_tokenizer(folder).vocab_size == Generation.processing_class.vocab_size
    assert not Path(folder).exists()
    base = models.load_model("embedded").state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in written.state_dict().items())


def test_the_mismatch_is_zero_for_one_policy_and_kl_for_two():
    logps, mask = torch.log(torch.tensor([[0.5, 0.25, 0.1]])), torch.tensor([[1, 1, 0]])
    assert Mismatch.of(logps, logps, mask) == Mismatch(0.0, 0.0, 0.0)
    engine = torch.log(torch.tensor([[0.4, 0.2, float("nan")]]))
    found = Mismatch.of(logps, engine, torch.ones(1, 3))
    d = torch.log(torch.tensor([1.25])).item()
    assert found.logp_difference == pytest.approx(d)
    assert found.largest == pytest.approx(d)
    assert found.kl == pytest.approx(1.25 - 1 - d, abs=1e-6)


def test_the_kl_estimate_is_unbiased():
    torch.manual_seed(0)
    engine, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(engine, 200_000, replacement=True)
    found = Mismatch.of(trainer.log()[tokens], engine.log()[tokens], torch.ones(len(tokens)))
    assert found.kl == pytest.approx((engine * (engine / trainer).log()).sum().item(), rel=0.02)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 1.0], [1.0, 1.0, 1.0]]),
        ("token_mask", [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]]),
        ("sequence_truncate", [[2.0], [1.0]]),
        ("sequence_mask", [[2.0], [1.0]]),
    ],
)
def test_the_ratio_is_cut_or_masked_by_token_or_by_sequence(mode, expected):
    engine = torch.zeros(2, 3)
    trainer = torch.log(torch.tensor([[4.0, 0.5, 8.0], [1.0, 1.0, 5.0]]))
    engine[1, 0] = float("nan")
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    torch.testing.assert_close(importance_ratio(trainer, engine, mask, mode, None, 2.0), torch.tensor(expected))


def test_the_bounds_of_the_ratio_mask_on_either_side():
    trainer, zeros, ones = torch.log(torch.tensor([[0.1], [1.0], [9.0]])), torch.zeros(3, 1), torch.ones(3, 1)
    ratio = importance_ratio(trainer, zeros, ones, "sequence_mask", 0.5, 3.0)
    torch.testing.assert_close(ratio, torch.tensor([[0.0], [1.0], [0.0]]))


@pytest.mark.parametrize(("mode", "share"), [("token_mask", 1 / 3), ("sequence_mask", 1 / 3), ("token_truncate", 0.0)])
def test_the_dropped_share_is_of_the_tokens_that_count(mode, share, monkeypatch):
    """One token of three; the padding behind it had made it one of eight."""
    trainer = object.__new__(CorrectedGRPOTrainer)
    trainer.model, trainer._metrics, trainer._warned = torch.nn.Linear(1, 1), {"train": defaultdict(list)}, True
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, 2.0
    logps = torch.zeros(2, 4)
    logps[0, 0] = 1.0
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])
    trainer._corrected = {"sampling_per_token_logps": torch.zeros(2, 4), "completion_mask": mask}
    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_: (logps, None))
    trainer._get_per_token_logps_and_entropies(trainer.model)
    assert trainer._metrics["train"]["rollout/dropped"] == [pytest.approx(share)]


def test_the_command_says_how_to_go_on_when_the_engine_has_failed(monkeypatch, capsys):
    def train(*_):
        raise rollouts.EngineFailed("the vLLM engine failed while it generated (it is gone)")

    command = importlib.import_module("mua_rl.grpo.__main__")
    monkeypatch.setattr("mua_rl.grpo.run.train", train)
    monkeypatch.setattr("sys.argv", ["mua_rl.grpo", "--report_to", "none"])
    with pytest.raises(SystemExit) as stop:
        run_command(command.main)
    assert stop.value.code == 4
    assert "it is gone" in (error := capsys.readouterr().err)
    assert "--resume" in error
