"""The plan of a GPU that trainer and engine share."""

from dataclasses import replace

import pytest

from mua_rl.adapter.adapters import Full, LoRA
from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError
from mua_rl.grpo import setup as grpo_setup
from mua_rl.grpo.arguments import parse
from mua_rl.lm import models
from mua_rl.lm.text import prompt_ids
from mua_rl.rollouts.memory import GIB, PolicySize, plan
from mua_rl.rollouts.planning import plan_engine

# Llama-3.1-8B with LoRA of rank 32 on the MLP projections, base in bf16.
LLAMA = PolicySize(16 * 10**9, 8 * 10**9, 57 * 10**6, 32, 4096, 14336, 1024, 128256)
WORK = {"micro_batch": 2, "sequences": 64, "length": 1280, "longest": 2048}


def test_sizes_are_those_of_the_model_and_its_adapter():
    size = PolicySize.of(LoRA(8).attach(models.load_model("embedded")))
    plain = sum(p.numel() for p in models.load_model("embedded").parameters())
    assert (size.layers, size.hidden, size.intermediate, size.kv_width) == (4, 128, 512, 128)
    assert size.trained == 4 * 3 * 8 * (128 + 512)
    assert (size.parameters, size.frozen_bytes) == (plain, 4 * plain)
    full = PolicySize.of(Full().attach(models.load_model("embedded")))
    assert (full.parameters, full.trained, full.frozen_bytes) == (plain, plain, 0)


def test_a_roomy_gpu_gives_every_sequence_its_cache_and_something_to_spare():
    made = plan(LLAMA, total=80 * GIB, free=79 * GIB, **WORK)
    cache = 64 * 1280 * 2 * 32 * 1024 * 2  # keys and values of 32 layers in bf16
    assert cache + 2 * GIB < made.cache <= cache + 4 * GIB
    assert made.roomy
    assert made.optimizer == 3 * 4 * LLAMA.trained
    assert made.utilization == (made.engine + made.cache) / (80 * GIB)
    assert made.engine > 2 * LLAMA.parameters


def test_a_tight_gpu_gets_what_is_left_and_shares_never_exceed_what_is_free():
    roomy = plan(LLAMA, total=80 * GIB, free=79 * GIB, **WORK)
    tight = plan(LLAMA, total=80 * GIB, free=58 * GIB, **WORK)
    assert 0 < tight.cache < roomy.cache
    assert not tight.roomy
    assert tight.weights + tight.optimizer + tight.activations + tight.engine + tight.cache <= 58 * GIB


def test_what_does_not_fit_is_refused_with_its_numbers_and_cures():
    full = replace(LLAMA, frozen_bytes=0, trained=LLAMA.parameters)
    with pytest.raises(UserError, match=r"optimizer 89\.4.*GiB too little.*--gradient_checkpointing"):
        plan(full, total=80 * GIB, free=79 * GIB, **WORK)


@pytest.mark.parametrize("option", ["checkpointing", "sleeps"])
def test_each_cure_makes_room(option):
    crowded = {**WORK, "micro_batch": 8}
    with pytest.raises(UserError):
        plan(LLAMA, total=80 * GIB, free=79 * GIB, **crowded)
    assert plan(LLAMA, total=80 * GIB, free=79 * GIB, **crowded, **{option: True}).cache > 0


def test_one_longest_sequence_always_has_room():
    made = plan(LLAMA, total=80 * GIB, free=79 * GIB, **{**WORK, "sequences": 1, "longest": 8192})
    assert made.cache >= 8192 * 2 * 32 * 1024 * 2


@pytest.fixture
def gpu(monkeypatch):
    """An empty GPU of a given size, as far as planning looks at it."""

    def make(gib):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (int(gib * GIB), int(gib * GIB)))

    arguments, _, _ = parse(["--max_completion_length", "32", "--report_to", "none"])
    return make, arguments


def test_a_step_is_one_pass_where_the_gpu_has_room_and_the_same_step_either_way(gpu):
    make, arguments = gpu
    make(80)
    before = arguments.generation_batch_size
    shares = plan_engine(arguments, LoRA(8).attach(models.load_model("embedded")), 8, prompt_tokens=20)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (256, 1)
    assert arguments.per_device_train_batch_size * arguments.steps_per_generation == before == 256
    assert arguments.vllm_gpu_memory_utilization == shares.utilization < 0.2
    assert arguments.vllm_max_model_length == 20 + 32 + 32


def test_a_task_of_many_rows_is_planned_by_its_prompts_not_by_the_longest_that_the_model_takes(gpu):
    make, arguments = gpu
    make(80)
    tokenizer, rows = models.load_tokenizer("embedded"), get_task("arithmetic").train(False)
    longest = max(len(ids) for ids in prompt_ids(tokenizer, rows["prompt"]))
    assert grpo_setup.longest_prompt(tokenizer, rows, {}) == (longest, True)
    assert grpo_setup.longest_prompt(tokenizer, rows, {}, most=10) == (longest, False)
    policy = LoRA(8).attach(models.load_model("embedded"))
    policy.config.max_position_embeddings = 131072
    assert plan_engine(arguments, policy, 8, longest, is_longest=False).roomy
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (256, 1)
    assert arguments.vllm_max_model_length is None


@pytest.mark.parametrize(
    ("gib", "flags", "passes"),
    [
        (80, ["--vllm_mode", "server"], (256, 1)),
        (0.65, ["--vllm_mode", "server"], (128, 2)),
        (80, ["--vllm_gpu_memory_utilization", "0.5"], (256, 1)),
        (80, ["--vllm_gpu_memory_utilization", "0.995"], (64, 4)),
    ],
)
def test_a_step_has_the_widest_passes_that_the_trainer_has_room_for_beside_any_engine(gpu, gib, flags, passes):
    make, _ = gpu
    arguments, _, _ = parse(["--max_completion_length", "32", "--report_to", "none", *flags])
    make(gib)
    assert plan_engine(arguments, LoRA(8).attach(models.load_model("embedded")), 8, prompt_tokens=20) is None
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == passes
    assert arguments.generation_batch_size == 256


def test_passes_that_the_user_has_chosen_stay(gpu):
    make, _ = gpu
    arguments, _, _ = parse(
        ["--per_device_train_batch_size", "8", "--max_completion_length", "32", "--report_to", "none"]
    )
    make(80)
    plan_engine(arguments, LoRA(8).attach(models.load_model("embedded")), 8, prompt_tokens=20)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (8, 4)


def test_a_gpu_without_room_is_refused_before_anything_starts(gpu):
    make, arguments = gpu
    make(1)
    with pytest.raises(UserError, match="do not fit on this GPU"):
        plan_engine(arguments, LoRA(8).attach(models.load_model("embedded")), 8, prompt_tokens=20)
