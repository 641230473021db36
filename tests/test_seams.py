"""The private seams of TRL, transformers and vLLM, by value: a failure here means that an upgrade has moved one.

docs/seams.md has the table. What needs a real engine of vLLM stands in test_vllm_engine.py.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import trl
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from transformers.integrations.fsdp import is_fsdp_managed_module
from trl.generation import vllm_generation

from mua_rl.adapter.adapters import Full, LoRA
from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.lm import models
from mua_rl.lm.generation import complete
from mua_rl.rollouts.lora_engine import export_tensors
from mua_rl.rollouts.seams_vllm import Handover, leave_uncompiled
from mua_rl.rollouts.sync import AdapterRollouts, FullRollouts, MergedRollouts
from mua_rl.run.folder import RunFolder

SMALL = ["--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 1, "--report_to", "none"]
SMALL += ["--held_out_steps", 0, "--held_out_problems", 8]


class ToyEngine:
    """Takes the place of vLLM: it samples by transformers, and may give log-probs that are off by some noise."""

    noise = 0.0

    def __init__(self, model, processing_class, max_completion_length, generation_kwargs, **options):
        self.model, self.tokenizer, self.options = model, processing_class, options
        self.max_completion_length, self.generation_kwargs, self.syncs = (
            max_completion_length,
            generation_kwargs or {},
            0,
        )

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations):
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        answers = complete(self.model, self.tokenizer, prompts, self.max_completion_length, temperature=1.0)
        rows = [row.tolist() for row in answers]
        rows = [row[: row.index(end) + 1] if end in row else [t for t in row if t != pad] for row in rows]
        noise, scores = torch.Generator().manual_seed(0), []
        for ids, row in zip(prompts, rows, strict=True):
            with torch.no_grad():
                logits = self.model(torch.tensor([[*ids, *row]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            off = self.noise * torch.randn(len(row), generator=noise)
            scores.append([[p] for p in (logits[range(len(row)), row] + off).tolist()])
        return prompts, rows, scores, None


def flags(*more):
    return [str(flag) for flag in [*SMALL, "--lr", 2**-8, *more]]


def train(*more):
    return grpo.train(*parse(flags(*more)))


@pytest.fixture
def engine_run(tmp_path, monkeypatch):
    """Arguments and setup of a run with the toy engine."""
    monkeypatch.setattr("mua_rl.grpo.setup.check_vllm", lambda: None)
    monkeypatch.setattr("mua_rl.grpo.setup.plan_engine", lambda *_: None)
    monkeypatch.setattr("mua_rl.grpo.trainer.generation_class", lambda *_: ToyEngine)
    monkeypatch.setenv("MASTER_PORT", "0")
    return flags("--use_vllm", "--rank", 4, "--max_steps", 2, "--output_dir", tmp_path / "r")


@pytest.fixture
def trainer(engine_run, tmp_path):
    """A trainer with the toy engine, before its first step."""
    arguments, adapter_arguments, _ = parse(engine_run)
    setup = prepare_grpo(arguments, adapter_arguments)
    (tmp_path / "r").mkdir()
    arguments.output_dir = str(tmp_path / "r")
    return grpo.make_trainer(setup, arguments, RunFolder(tmp_path / "r"))[0]


@pytest.mark.slow
def test_trl_trains_on_the_completions_and_log_probs_of_an_engine_of_ours(engine_run):
    lines = [line for line in grpo.train(*parse(engine_run)).metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 <= line["rollout/logp_difference"] < 1e-4 for line in lines)
    assert all(line["rollout/dropped"] == 0 and line["completions/mean_length"] > 1 for line in lines)


@pytest.mark.slow
def test_the_engine_gets_trls_own_options_and_is_synced_once_a_step(trainer):
    assert trainer.use_vllm and trainer.args.use_vllm
    assert trainer.vllm_generation.options["max_num_seqs"] == 16
    trainer.train()
    assert trainer.vllm_generation.syncs == 3  # for the check, and for each of two steps


def test_prompts_are_tokenized_as_trl_does(trainer):
    prompts = [prompt for prompt in trainer.train_dataset[:4]["prompt"] for _ in range(8)]
    assert trainer.prompt_ids(prompts) == trl.GRPOTrainer._tokenize_prompts(trainer, prompts)[0]


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_loss_corrects_as_trl_does_without_its_forward_pass(trainer, mode, monkeypatch):
    """TRL's own path and ours, on one batch whose rollouts come from another policy than the trainer's."""
    monkeypatch.setattr(ToyEngine, "noise", 0.3)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_mode", mode)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_clip_max", 1.2)
    monkeypatch.setattr(trainer, "mask_truncated_completions", False)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in list(trainer.train_dataset)[:2] for _ in range(8)]
    theirs = trl.GRPOTrainer._generate_and_score_completions(trainer, rows)
    theirs["advantages"] = torch.linspace(-1, 1, 16)
    assert theirs["importance_sampling_ratio"].std() > 0.05
    ours = {k: v for k, v in theirs.items() if k not in ("importance_sampling_ratio", "old_per_token_logps")}
    expected = trl.GRPOTrainer._compute_loss(trainer, trainer.model, theirs)
    loss = trainer._compute_loss(trainer.model, ours)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    ratios = ours["importance_sampling_ratio"], theirs["importance_sampling_ratio"]
    torch.testing.assert_close(*ratios, rtol=1e-3, atol=1e-5)
    batch = trainer._generate_and_score_completions(rows)
    assert "sampling_per_token_logps" in batch and "importance_sampling_ratio" not in batch


def test_the_reference_policy_is_what_the_run_starts_from_though_no_folder_has_it(tmp_path):
    model = models.load_model("embedded")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.config._name_or_path = str(tmp_path / "nowhere")
    arguments, adapter_arguments, _ = parse(flags("--rank", "full", "--beta", 0.1, "--output_dir", tmp_path / "r"))
    setup = prepare_grpo(arguments, adapter_arguments)
    arguments.output_dir = str(tmp_path / "r")
    object.__setattr__(setup, "policy", Full().attach(model))
    trainer, _ = grpo.make_trainer(setup, arguments, RunFolder(tmp_path / "r"))
    assert torch.equal(trainer.ref_model.lm_head.weight, model.lm_head.weight)
    assert trainer.ref_model is not model


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_step_takes_no_more(tmp_path):
    run = train("--rank", 4, "--max_steps", 2, "--save_steps", 2, "--output_dir", tmp_path / "r")
    before = load_file(run.path / "adapter" / "adapter_model.safetensors")
    (run.path / "result.json").unlink()
    grpo.train(*parse(["--resume", str(run.path)]))
    assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2]
    after = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_resumed_policy_beside_a_reference_adapter_is_the_checkpoints(tmp_path):
    steps = ["--rank", 4, "--beta", 0.1, "--max_steps", 4, "--save_steps", 2]
    whole, broken = train(*steps, "--output_dir", tmp_path / "a"), train(*steps, "--output_dir", tmp_path / "b")
    (broken.path / "result.json").unlink()
    (broken.path / "checkpoint-4" / "trainer_state.json").unlink()
    grpo.train(*parse(["--resume", str(broken.path)]))
    one, two = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_tied_weight_is_saved_once(trainer, tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(trl.GRPOTrainer, "_save", lambda self, folder, weights: saved.update(weights))
    trainer.model.all_tied_weights_keys = {"lm_head.weight": "embed.weight"}
    trainer._save(str(tmp_path), {"lm_head.weight": 1, "embed.weight": 1})
    assert saved == {"embed.weight": 1}


def test_the_policy_is_written_without_a_push(trainer, tmp_path, monkeypatch):
    pushes = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **_: pushes.append(1))
    trainer.args.push_to_hub = True
    trainer.write_policy(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert pushes == []


def test_transformers_knows_the_mark_of_a_sharded_model():
    module = torch.nn.Linear(1, 1)
    assert not is_fsdp_managed_module(module)
    module._is_fsdp_managed_module = True
    assert is_fsdp_managed_module(module)


def test_an_adapter_on_a_quantised_base_stays_in_fp32(engine_run, tmp_path):
    """TRL rounds trained weights to bf16 where the base says that it is quantised."""
    arguments, adapter_arguments, _ = parse(engine_run)
    setup = prepare_grpo(arguments, adapter_arguments)
    before = {name: p.detach().clone() for name, p in setup.policy.named_parameters() if p.requires_grad}
    setup.policy.get_base_model().is_loaded_in_4bit = True
    arguments.output_dir = str(tmp_path)
    trainer, _ = grpo.make_trainer(setup, arguments, RunFolder(tmp_path))
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


class ToyLLM:
    """Writes down what it is made with and given."""

    def __init__(self, **options):
        self.options, self.weights, self.adapters, self.resets = options, {}, [], 0
        config = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype=torch.float32))
        runner = SimpleNamespace(
            model=SimpleNamespace(load_weights=self.load), lora_manager=SimpleNamespace(_lora_model_cls=None)
        )
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(vllm_config=config, model_executor=SimpleNamespace(driver_worker=worker))

    def load(self, weights):
        self.weights |= {name: weight.clone() for name, weight in weights}

    def reset_prefix_cache(self):
        self.resets += 1

    def exchange(self, *adapter):
        self.adapters.append(adapter)


def policy(adapter):
    """A policy away from its base."""
    model = adapter.attach(models.load_model("embedded"))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for matrix in lora_matrices(layer):
                matrix.normal_(std=0.1)
    return model


@pytest.fixture
def make_engine(monkeypatch):
    """Makes TRL's colocated engine around a toy."""
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", None, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets them; the test puts them back

    def make(kind, model):
        class Engine(kind):
            def _new_llm(self, **options):
                self.lora_dtype = torch.float32
                return ToyLLM(**options)

        return Engine(model, Accelerator(), models.load_tokenizer("embedded"), gpu_memory_utilization=0.3)

    return make


def test_trl_makes_our_engine_with_its_options_and_ours(make_engine):
    model = policy(LoRA(4))
    options = make_engine(AdapterRollouts, model).llm.options
    ours = {"model": model.name_or_path, "dtype": "float32", "enforce_eager": True, "enable_lora": True}
    assert ours.items() <= options.items()
    trls = {"logprobs_mode": "processed_logprobs", "gpu_memory_utilization": 0.3, "quantization": None}
    assert trls.items() <= options.items()
    assert (options["max_lora_rank"], options["lora_target_modules"]) == (8, ["down_proj", "gate_proj", "up_proj"])


def test_all_weights_reach_the_engine_by_their_names(make_engine):
    model = policy(Full())
    engine = make_engine(FullRollouts, model)
    engine.sync_weights()
    weights = dict(model.named_parameters())
    assert engine.llm.weights.keys() == weights.keys()
    assert all(torch.equal(engine.llm.weights[name], weight) for name, weight in weights.items())
    assert engine.llm.resets == 1


def test_trls_own_way_merges_pushes_and_takes_the_adapter_out_again(make_engine):
    model = policy(LoRA(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = make_engine(MergedRollouts, model)
    engine.sync_weights()
    assert all(torch.allclose(p, before[name], atol=1e-5) for name, p in model.named_parameters())
    merged = model.merge_and_unload().state_dict()
    pushed = {name.removeprefix("base_model.model."): weight for name, weight in engine.llm.weights.items()}
    assert all(torch.allclose(weight, merged[name], atol=1e-5) for name, weight in pushed.items())
    assert any("mlp.up_proj.weight" in name for name in pushed)


def test_a_lora_engine_gets_a_and_b_under_a_new_name_each_time(make_engine):
    model = policy(LoRA(4))
    engine = make_engine(AdapterRollouts, model)
    engine.sync_weights()
    engine.sync_weights()
    (one, first, tensors), (two, second, _) = engine.llm.adapters
    assert one != two and first != second
    exported = export_tensors(model, torch.float32)
    assert all(torch.equal(tensors[name], exported[name]) for name in exported)
    assert engine.llm.weights == {}


def test_an_engine_is_handed_matrices_by_the_name_of_their_folder(monkeypatch):
    class LoRAModel:
        @classmethod
        def from_lora_tensors(cls, **options):
            return options

    module = ModuleType("vllm.lora.lora_model")
    module.LoRAModel = LoRAModel
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.lora_model", module)
    llm, tensors = ToyLLM(), {"x.lora_A.weight": torch.ones(2)}
    handover = Handover(llm)
    handover.tensors["v1"] = tensors
    called = llm.llm_engine.model_executor.driver_worker.model_runner.lora_manager._lora_model_cls
    options = {"lora_model_id": 1, "dtype": torch.float32, "weights_mapper": None, "skip_prefixes": [], "more": 1}
    loaded = called.from_local_checkpoint("/dev/shm/mua_rl/v1", set(), "helper", **options)
    assert loaded["tensors"] is tensors and loaded["peft_helper"] == "helper" and "more" not in loaded


def test_a_class_that_vllm_has_made_compile_is_called_as_it_is():
    class Compiled(torch.nn.Linear):
        def __call__(self, *args):
            return super().__call__(*args) if self.do_not_compile else None

    Compiled.__call__.__module__ = "vllm.compilation"
    model = torch.nn.Sequential(Compiled(2, 3))
    leave_uncompiled(model)
    assert model(torch.ones(1, 2)).shape == (1, 3)


@pytest.mark.slow
def test_a_saved_policy_with_a_reference_adapter_holds_the_policy_alone(tmp_path):
    run = train("--rank", 4, "--beta", 0.1, "--max_steps", 1, "--output_dir", tmp_path / "r")
    loaded = PeftModel.from_pretrained(models.load_model("embedded"), str(run.path / "adapter"))
    assert list(loaded.peft_config) == ["default"]
