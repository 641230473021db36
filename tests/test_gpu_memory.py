"""The plan of a GPU that trainer and engine share."""

from dataclasses import replace

import pytest

from mua_rl import models
from mua_rl.adapter import Full, LoRA
from mua_rl.errors import UserError
from mua_rl.gpu_memory import GIB, PolicySize, plan

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


def test_a_roomy_gpu_gives_every_sequence_its_cache_and_no_more():
    made = plan(LLAMA, total=80 * GIB, free=79 * GIB, **WORK)
    assert made.cache == 64 * 1280 * 2 * 32 * 1024 * 2  # keys and values of 32 layers in bf16
    assert made.optimizer == 3 * 4 * LLAMA.trained
    assert made.utilization == (made.engine + made.cache) / (80 * GIB)
    assert made.engine > 2 * LLAMA.parameters


def test_a_tight_gpu_gets_what_is_left_and_shares_never_exceed_what_is_free():
    roomy = plan(LLAMA, total=80 * GIB, free=79 * GIB, **WORK)
    tight = plan(LLAMA, total=80 * GIB, free=58 * GIB, **WORK)
    assert 0 < tight.cache < roomy.cache
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
    assert made.cache == 8192 * 2 * 32 * 1024 * 2
