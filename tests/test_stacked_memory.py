"""What stacked GRPO trials take, and how much they do at once so as to take no more."""

from dataclasses import replace

import pytest
import torch
from helpers import make_trial

from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.generation import Completions
from mua_rl.grpo.stacked.memory import CACHE_ALIGNED, BatchLimits, StackedMemory, StepShape, memory_limit, plan_limits
from mua_rl.grpo.stacked.scoring import ScoredCompletions
from mua_rl.grpo.stacked.trainer import StackedTrainer
from mua_rl.rollouts.memory import GIB, PolicySize

# SmolLM2-135M with eight LoRAs of rank 32 on the MLP projections; linear layers in bf16, the embedding in fp32.
EMBEDDING, LINEAR = 49152 * 576, 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536)
LORA = 30 * 3 * 32 * (576 + 1536)
SMOLLM2 = PolicySize(4 * EMBEDDING + 2 * LINEAR, EMBEDDING + LINEAR, 8 * LORA, 30, 576, 1536, 192, 49152, 576)
SHAPE = StepShape(trials=8, prompts=32, group=8, length=40 + 32, micro_batch=64)
ONE = SHAPE.one_run(replace(SMOLLM2, frozen_bytes=4 * SMOLLM2.parameters, trained=LORA)).total

ARMS = [make_trial(4, "B", "1", -8, 1), make_trial(2, "A", "1/r", -7, 2)]


def side_by_side(limits=None, fixed=False, **changes):
    """Four prompts with four completions a step."""
    small = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_generations": 4}
    given = GRPOArguments(**{**small, "max_steps": 4, "report_to": "none", "held_out_problems": 24, **changes})
    trainer = StackedTrainer(given, ARMS, limits=limits)
    trainer.decoder.fixed = fixed
    return trainer


def test_eight_trials_on_smollm2_take_what_was_measured_and_less_in_smaller_batches():
    at_once = StackedMemory.of(SMOLLM2, SHAPE, BatchLimits(256, 128 * 71))  # 10.5 GiB on an H100, one run 4.06
    assert at_once.cache == 8 * 256 * 72 * 30 * 2 * 192 * 2
    assert at_once.logits == 8 * 256 * 49152 * 2
    assert at_once.moments == 2 * at_once.gradients == 2 * 4 * 8 * LORA
    assert at_once.total / GIB == pytest.approx(10.5, rel=0.05)
    assert pytest.approx(4.06, rel=0.05) == ONE / GIB
    planned = plan_limits(SMOLLM2, SHAPE, 1.4 * ONE)
    assert planned.completions % SHAPE.group == 0
    assert 1.2 * ONE < StackedMemory.of(SMOLLM2, SHAPE, planned).total <= 1.4 * ONE


@pytest.mark.parametrize("times", [1.1, 1.4, 2.0, 3.0])
@pytest.mark.parametrize("trials", [1, 3, 8])
@pytest.mark.parametrize("length", [40, 456, 2048])
def test_a_plan_keeps_within_its_limit_with_batches_of_equal_size(times, trials, length):
    shape = replace(SHAPE, trials=trials, length=length)
    limit = times * shape.one_run(replace(SMOLLM2, frozen_bytes=4 * SMOLLM2.parameters, trained=LORA)).total
    size = replace(SMOLLM2, trained=trials * LORA)
    limits = plan_limits(size, shape, limit)
    assert StackedMemory.of(size, shape, limits).total <= limit
    assert limits.tokens <= shape.one_pass
    prompts = limits.completions // shape.group
    number = -(-shape.prompts // prompts)
    assert number * prompts - shape.prompts < number  # no batch has two prompts that are only padding


def test_no_room_at_all_gives_the_smallest_batches_and_plenty_gives_one():
    assert plan_limits(SMOLLM2, SHAPE, 0) == BatchLimits(SHAPE.group, 1)
    assert plan_limits(SMOLLM2, SHAPE, 100 * ONE) == BatchLimits(256, SHAPE.one_pass)


@pytest.mark.parametrize("trials", [8, 15])
@pytest.mark.parametrize("rank", [32, 256])
def test_many_trials_of_a_large_rank_have_batches_as_wide_as_those_of_a_small_one(trials, rank):
    lora = LORA * rank // 32
    size, shape = replace(SMOLLM2, trained=trials * lora), replace(SHAPE, trials=trials)
    one = shape.one_run(replace(SMOLLM2, frozen_bytes=4 * SMOLLM2.parameters, trained=lora))
    limit = memory_limit(size, shape, one, 1.4)
    limits = plan_limits(size, shape, limit)
    assert limits.tokens > 0.5 * shape.one_pass
    assert limits.completions >= 4 * shape.group
    assert StackedMemory.of(size, shape, limits).total <= limit
    assert (limit == 1.4 * one.total) == (rank == 32)


def test_a_fixed_cache_and_its_logits_have_the_planned_bytes_whatever_is_asked():
    trainer = side_by_side(BatchLimits(8, 200), fixed=True)
    expected = trainer.expected_memory
    trainer.measure()  # 24 problems, one completion each, in batches of 8
    cache = trainer.decoder._batch
    trainer.step()  # 4 prompts with 4 completions each, in batches of the same size
    assert trainer.decoder._batch is cache
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in tensors) == expected.cache
    assert cache.logits.nbytes == expected.logits
    assert cache.shape[0] == 2 * 8
    assert tensors[0].shape[2] - CACHE_ALIGNED < trainer.shape.length <= tensors[0].shape[2]


def test_weights_gradients_and_moments_have_the_planned_bytes():
    trainer = side_by_side()
    trainer.step()
    expected = trainer.expected_memory
    frozen = sum(w.nbytes for w in trainer.model.parameters() if not w.requires_grad)
    assert frozen + trainer.stack.values.nbytes == expected.weights
    assert trainer.stack.gradients.nbytes == expected.gradients
    states = [tensor for state in trainer.states for tensor in state.optimizer.state[state.parameter].values()]
    assert sum(tensor.nbytes for tensor in states if tensor.numel() > 1) == expected.moments


def test_a_pass_keeps_the_planned_activations():
    trainer = side_by_side(BatchLimits(16, 400), bf16=True, use_cpu=True)
    tokens = torch.arange(3, 3 + 2 * 16 * 32).view(2, 16, 32) % 90 + 3
    completions = Completions(tokens, torch.full((2, 16), 32), torch.ones(2, dtype=torch.bool))
    prompts = [[trainer.prompts[number] for number in state.order[0]] for state in trainer.states]
    scored = ScoredCompletions(prompts, completions, torch.ones(2, 16), [{}, {}])
    kept = {}
    known = {w.untyped_storage().data_ptr() for w in trainer.model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = next(trainer.gradient.passes(scored))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = trainer.gradient.log_probs(batch.ids, batch.labels, batch.positions, batch.segments)
    expected = StackedMemory.of(trainer.size, trainer.shape, BatchLimits(16, batch.ids.numel()))
    assert 200 < batch.ids.numel() <= 400
    assert sum(kept.values()) == pytest.approx(expected.activations + expected.casts, rel=0.1)
    assert logps.shape == batch.ids.shape


@pytest.mark.parametrize("fixed", [False, True])
def test_results_do_not_depend_on_the_batches(fixed):
    whole, divided = (
        side_by_side(fixed=fixed),
        side_by_side(BatchLimits(12, 60), fixed=fixed),
    )  # three prompts, then one
    seen = {}
    for trainer in (whole, divided):
        complete, seen[trainer] = trainer.decoder.complete, []
        trainer.decoder.complete = lambda *a, complete=complete, t=trainer: seen[t].append(complete(*a)) or seen[t][-1]
    assert whole.measure(shared=True) == divided.measure(shared=True)
    for _ in range(3):
        ours, theirs = divided.step(), whole.step()
        assert torch.equal(seen[divided][-1].tokens, seen[whole][-1].tokens)
        assert torch.equal(seen[divided][-1].lengths, seen[whole][-1].lengths)
        for number in ours:
            assert ours[number] == pytest.approx(theirs[number], rel=1e-4, abs=1e-6)
        torch.testing.assert_close(divided.stack.gradients, whole.stack.gradients, rtol=1e-3, atol=1e-6)
    assert whole.stack.gradients.norm() > 0
    assert divided.measure() == whole.measure()


@pytest.mark.parametrize("memory", [0, -1.0, float("nan"), float("inf")])
def test_a_memory_that_is_none_is_refused(memory):
    with pytest.raises(UserError, match="above 0"):
        StackedTrainer(GRPOArguments(report_to="none"), ARMS, memory=memory)
