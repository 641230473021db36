"""How far a few steps move a policy, on the embedded model."""

import pytest
import torch

from mua_rl.adapter.adapters import Full, LoRA
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError
from mua_rl.lm import models
from mua_rl.probes.movement import divergence, movement, probe_batch


@pytest.fixture(scope="module")
def model():
    return models.load_model("embedded")


@pytest.fixture(scope="module")
def batch(model):
    return probe_batch(model, models.load_tokenizer("embedded"), get_task("arithmetic"), prompts=4, group=8, seed=1)


def test_a_probe_batch_has_whole_groups_with_gradient_and_marks_what_was_written(batch):
    assert len(batch.ids) == 32
    groups = batch.advantages.view(4, 8)
    assert groups.mean(1).abs().max() < 1e-5
    assert groups.std(1).min() > 0.9
    assert batch.written.shape == (32, batch.ids.shape[1] - 1)
    assert (batch.written <= batch.mask[:, 1:]).all()
    assert (batch.written.sum(1) >= 1).all()


def test_the_movement_grows_with_the_square_of_the_rate_and_leaves_the_model_alone(model, batch):
    before = fingerprint(model)
    (slow,), (fast,) = (movement(model, LoRA(8), rate, batch) for rate in (2**-13, 2**-12))
    assert fingerprint(model) == before
    assert 0 < slow < fast
    assert fast / slow == pytest.approx(4, rel=0.2)


def test_at_one_rate_a_larger_rank_moves_further_and_full_finetuning_furthest(model, batch):
    moved = [movement(model, adapter, 2**-12, batch)[0] for adapter in (LoRA(2), LoRA(32), Full())]
    assert moved[0] < moved[1] < moved[2]


def test_more_steps_move_further_and_the_divergence_of_a_policy_from_itself_is_zero(model, batch):
    first, second = movement(model, LoRA(8), 2**-12, batch, steps=2)
    assert first < second
    assert divergence(model, model, batch) == 0.0


def test_a_task_whose_answers_are_all_wrong_has_no_gradient_to_probe_with(model):
    from dataclasses import replace

    task = replace(get_task("arithmetic"), rewards=(lambda completions, **_: [0.0] * len(completions),))
    with pytest.raises(UserError, match="no gradient"):
        probe_batch(model, models.load_tokenizer("embedded"), task, prompts=2, group=2)


def test_probing_with_one_seed_gives_one_batch(model, batch):
    again = probe_batch(model, models.load_tokenizer("embedded"), get_task("arithmetic"), prompts=4, group=8, seed=1)
    assert torch.equal(again.ids, batch.ids)
