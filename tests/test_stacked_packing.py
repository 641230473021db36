"""Completions of a prompt in one row have the log-probs and the gradient that they have in rows of their own."""

import math

import pytest
import torch
from helpers import make_trial

from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.packing import UNLABELLED, WeightedCompletion, attention_bias, batches, completion_sums, pack
from mua_rl.grpo.stacked.trainer import StackedTrainer

COMPLETIONS = [
    WeightedCompletion((30, 31), 0.5),
    WeightedCompletion((40,), -1.0),
    WeightedCompletion((50, 33, 34, 35), 0.25),
]
PROMPTS = [[5, 9, 20, 7], [8]]  # of two trials


@pytest.fixture(scope="module")
def trainer():
    trials = [make_trial(4, "B", "1", -8, 1), make_trial(2, "A", "1/r", -7, 2)]
    small = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    made = StackedTrainer(GRPOArguments(**small, report_to="none", held_out_problems=8), trials)
    made.stack.values.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return made


def losses_and_log_probs(trainer, rows):
    """Losses of the trials, their gradients, and the log-prob of each label of each trial."""
    trainer.stack.gradients.zero_()
    losses, found = torch.zeros(2), [{}, {}]
    for batch in batches(rows, 10**6, 0):
        losses += trainer.gradient.backward(batch)
        logps = trainer.gradient.log_probs(batch.ids, batch.labels, batch.positions, batch.segments)
        for trial in range(2):
            pairs = zip(batch.labels.view(2, -1)[trial].tolist(), logps.view(2, -1)[trial].tolist(), strict=True)
            found[trial] |= {label: logp for label, logp in pairs if label != UNLABELLED}
    return losses, trainer.stack.gradients.clone(), found


@pytest.mark.parametrize("longest, rows", [(100, [1, 1]), (6, [2, 2])])
def test_log_probs_and_gradients_are_those_of_rows_of_their_own(trainer, longest, rows):
    packed = [pack(prompt, COMPLETIONS, longest) for prompt in PROMPTS]
    alone = [[row for completion in COMPLETIONS for row in pack(prompt, [completion])] for prompt in PROMPTS]
    assert [len(trial) for trial in packed] == rows
    losses, gradients, logps = losses_and_log_probs(trainer, packed)
    expected, their_gradients, their_logps = losses_and_log_probs(trainer, alone)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, their_gradients, rtol=1e-4, atol=1e-5)  # the largest is 2
    assert gradients.norm(dim=1).min() > 1e-3
    for trial in range(2):
        assert logps[trial] == pytest.approx(their_logps[trial], abs=1e-5)
        assert sorted(logps[trial]) == [30, 31, 33, 34, 35, 40, 50]


def test_rows_have_a_prompt_once_and_places_for_all_that_is_scored():
    (row,) = pack([5, 9, 7], [WeightedCompletion((30, 31), 0.5, (-1.5, -2.0)), WeightedCompletion((40,), -1.0)])
    assert row["ids"].tolist() == [5, 9, 7, 30, 7]
    assert row["labels"].tolist() == [UNLABELLED, UNLABELLED, 30, 31, 40]
    assert row["positions"].tolist() == [0, 1, 2, 3, 2]
    assert row["segments"].tolist() == [0, 0, 1, 1, 2]
    assert row["weights"].tolist() == [0, 0, 0.5, 0.5, -1.0]
    assert row["logps"].tolist() == pytest.approx([math.nan, math.nan, -1.5, -2.0, math.nan], nan_ok=True)
    assert pack([5], []) == []


def test_a_row_is_no_longer_than_asked_unless_one_completion_is():
    rows = pack([1, 2, 3], [WeightedCompletion((9,) * size, 1.0) for size in (4, 2, 2, 20, 1)], longest=8)
    assert [max(row["segments"]) for row in rows] == [2, 1, 1, 1]
    assert [len(row) for row in rows] == [8, 4, 22, 3]


def test_a_completion_sees_the_prompt_and_itself_up_to_each_token():
    bias = attention_bias(torch.tensor([[0, 1, 1, 2, -1]]), torch.bfloat16)
    assert bias.shape == (1, 1, 5, 5)
    assert bias.dtype == torch.bfloat16
    seen = [[place for place in range(5) if bias[0, 0, token, place] == 0] for token in range(5)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 4]]


def test_sums_of_completions_are_at_each_of_their_tokens():
    values, segments = torch.tensor([[0.0, 1.0, 2.0, 4.0, 0.0]]), torch.tensor([[0, 1, 1, 2, -1]])
    assert completion_sums(values, segments).tolist() == [[0.0, 3.0, 3.0, 4.0, 0.0]]
    assert completion_sums(values, None).tolist() == [[7.0] * 5]


def test_batches_have_every_row_once_and_no_more_tokens_than_asked():
    trials = [
        [row for i in range(7) for row in pack([1] * (3 + 5 * i), [WeightedCompletion((2, 3), 1.0)])],
        pack([1], [WeightedCompletion((4,), 1.0)]),
        [],
    ]
    made = list(batches(trials, 200, 0))
    assert sum(int((batch.labels != UNLABELLED).sum()) for batch in made) == 7 * 2 + 1
    assert all(batch.ids.numel() <= 200 or len(batch.ids) == 3 for batch in made)
    assert all(batch.segments is None for batch in made)
    assert len(made) > 2
    assert [batch.ids.shape[1] % 16 for batch in batches(trials, 200, 0, aligned=16)].count(0) > 2
    assert list(batches([[], []], 200, 0)) == []
