"""The plan of a run: its arithmetic against what autograd keeps, its choices, and its command."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from mua_rl import plan
from mua_rl.adapter.adapters import Full, LoRA
from mua_rl.exits import run_command
from mua_rl.grpo.arguments import parse
from mua_rl.lm import models
from mua_rl.rollouts.memory import GIB, PolicySize, trainer_memory

TOKENS = (6, 80)  # sequences, tokens of each


def model(layers, dtype):
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        tie_word_embeddings=False,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=dtype)
    add_fused_lm_head(made)
    return made


def kept(policy, mixed):
    """Bytes of the tensors that autograd saves in one forward pass of TRL's, weights left out."""
    ids = torch.randint(3, 250, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address comes twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        policy(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), fused_lm_head=True)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize(
    ("adapter", "dtype", "mixed"),
    [
        (LoRA(4), torch.bfloat16, True),
        (LoRA(4), torch.float32, True),
        (LoRA(4), torch.float32, False),
        (Full(), torch.float32, True),
        (Full(), torch.float32, False),
    ],
    ids=["LoRA, bf16 base", "LoRA, fp32 base", "LoRA, fp32", "FFT, autocast", "FFT, fp32"],
)
def test_activations_are_what_autograd_keeps(adapter, dtype, mixed):
    # The difference of two depths: one layer, without what is there once.
    thin, deep = (adapter.attach(model(layers, dtype)) for layers in (1, 3))
    measured = kept(deep, mixed) - kept(thin, mixed)
    planned = []
    for policy in (thin, deep):
        memory = trainer_memory(
            PolicySize.of(policy), micro_batch=TOKENS[0], length=TOKENS[1], compute_bytes=2 if mixed else 4
        )
        planned.append(memory.activations + memory.casts)
    assert planned[1] - planned[0] == pytest.approx(measured, rel=0.05)


def test_sizes_on_the_meta_device_are_those_of_the_model():
    config = plan.load_config("embedded", None)
    loaded = LoRA(8).attach(models.load_model("embedded", "bfloat16"))
    assert plan.policy_size(config, "8") == PolicySize.of(loaded)
    assert plan.policy_size(config, "full") == PolicySize.of(Full().attach(models.load_model("embedded")))


def test_shapes_have_the_weights_that_their_names_say():
    counts = {name: plan.policy_size(plan.load_config(None, name), "1").parameters for name in plan.SHAPES}
    assert counts == pytest.approx({"135m": 134.5e6, "1.5b": 1.54e9, "8b": 8.03e9, "70b": 70.55e9}, rel=0.005)


def test_sharding_divides_what_ddp_copies():
    size = plan.policy_size(plan.load_config(None, "1.5b"), "full")
    one, ddp, fsdp = (
        trainer_memory(size, micro_batch=1, length=64, processes=processes, sharded=sharded)
        for processes, sharded in ((1, False), (4, False), (4, True))
    )
    assert ddp.weights == one.weights == 4 * size.parameters
    assert ddp.gradients == 2 * one.gradients  # its own and DDP's buckets
    assert 4 * fsdp.weights == pytest.approx(one.weights)
    assert 4 * fsdp.moments == pytest.approx(one.moments)


WORK = plan.Work(256, 128, 512)


def outcomes(params, rank, gpus, work=WORK, gpu=plan.GPUS["h100"]):
    size = plan.policy_size(plan.load_config(None, params), rank)
    return [plan.outcome(size, layout, work, gpu) for layout in plan.layouts(gpus, work.completions, size, gpu)]


def test_no_gpu_is_given_more_than_it_has():
    for params, rank, gpus in [("135m", "32", 1), ("1.5b", "full", 2), ("8b", "32", 4), ("8b", "full", 8)]:
        for outcome in outcomes(params, rank, gpus):
            if outcome.passes:
                assert outcome.needed <= 80 * GIB
                shared = outcome.passes.micro_batch * outcome.passes.number * outcome.layout.trainers
                assert shared == WORK.completions
                assert outcome.layout.engines * outcome.layout.tensor_parallel <= gpus


def test_ddp_is_advised_where_the_policy_fits_and_fsdp2_where_it_does_not():
    small, large = outcomes("1.5b", "32", 4), outcomes("8b", "full", 8)
    assert plan.best(small).layout.name == "ddp"
    by_name = {outcome.layout.name: outcome for outcome in large}
    assert by_name["ddp"].passes is None
    assert plan.best(large).layout.sharded


def test_two_gpus_train_nearly_twice_as_fast_as_one():
    (one,), (ddp, *_) = outcomes("1.5b", "32", 1), outcomes("1.5b", "32", 2)
    assert 1.9 < one.estimate.training / ddp.estimate.training < 2.1
    assert one.estimate.seconds > ddp.estimate.seconds


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mua_rl.plan", *arguments])
    monkeypatch.setenv("COLUMNS", "150")
    run_command(plan.main)
    return capsys.readouterr().out


def test_the_command_says_what_to_type(monkeypatch, capsys):
    printed = run(monkeypatch, capsys, "embedded", "--gpus", "2", "--completion_length", "32")
    assert "tokens/s (estimate)" in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("accelerate launch --config_file $(python -m mua_rl.accelerate_configs ddp)")
    flags = last.partition("mua_rl.grpo ")[2].split()
    arguments, _, _ = parse([*flags, "--report_to", "none"])
    assert arguments.completions_per_step == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a model"),
        (["embedded", "--params", "8b"], "give a model"),
        (["8b"], "--params 8b"),
        (["--params", "9b"], "--params takes 135m"),
        (["./nowhere"], "no model folder"),
        (["embedded", "--rank", "-1"], "--rank takes"),
        (["embedded", "--gpus", "0"], "--gpus takes a positive number"),
        (["embedded", "--gpus", "3"], "cannot be shared by 3 GPUs"),
        (["embedded", "--gpu_memory", "nan"], "--gpu_memory takes a positive number"),
        (["--params", "70b", "--rank", "full"], "no layout fits"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["mua_rl.plan", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(plan.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
