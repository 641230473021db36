"""The loss and the gradient of trials side by side against TRL's own, on one batch of completions."""

import pytest
import torch
from helpers import make_trial

from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.grpo.stacked.generation import Completions
from mua_rl.grpo.stacked.scoring import completion_weights, group_advantages
from mua_rl.grpo.stacked.trainer import StackedTrainer
from mua_rl.run.folder import RunFolder

ARM = make_trial(rank=4, init="B", alpha="1", log2_lr=-10, seed=1)
FLAGS = ["--rank", "4", "--seed", "1", "--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "1"]
FLAGS += ["--report_to", "none", "--max_completion_length", "6", "--max_steps", "3", "--lr", "1e-3"]


def trl_batch(folder, *flags):
    """A trainer of a single run, a batch that TRL has generated and scored, and its texts' rewards."""
    arguments, adapter_arguments, _ = parse([*FLAGS, *flags])
    setup = prepare_grpo(arguments, adapter_arguments)
    arguments.output_dir = str(folder)
    trainer, _ = grpo.make_trainer(setup, arguments, RunFolder(folder))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in lora_layers(trainer.model):
            for matrix in lora_matrices(layer):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) / 8)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in list(trainer.train_dataset)[:4] for _ in range(8)]
    return trainer, trainer._generate_and_score_completions(rows), rows


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--loss_type", "grpo"],
        ["--loss_type", "dr_grpo"],
        ["--scale_rewards", "none"],
        ["--scale_rewards", "batch"],
        ["--mask_truncated_completions", "false", "--max_completion_length", "3"],
        ["--temperature", "0.7"],
    ],
    ids=lambda flags: " ".join(flags) or "default",
)
def test_loss_and_gradient_are_trls_on_the_same_batch(flags, tmp_path, monkeypatch):
    trainer, batch, rows = trl_batch(tmp_path, *flags)
    assert batch["advantages"].abs().sum() > 0
    expected = trainer._compute_loss(trainer.model, batch)
    expected.backward()

    arguments, _, _ = parse([*FLAGS, *flags])
    ours = StackedTrainer(arguments, [ARM])
    with torch.no_grad():
        matrices = [lora_matrices(layer) for _, layer in lora_layers(trainer.model)]
        for (_, a, b), (their_a, their_b) in zip(ours.stack.matrices(0), matrices, strict=True):
            a.copy_(their_a)
            b.copy_(their_b)
    mask = batch["completion_ids"] != trainer._tokenizer.pad_token_id  # also where TRL has masked a whole completion
    tokens, lengths = batch["completion_ids"][None], mask.sum(-1)[None]
    completions = Completions(tokens, lengths, torch.ones(1, dtype=torch.bool))
    monkeypatch.setattr(ours.decoder, "complete", lambda *args: completions)
    position = {row["prompt"]: i for i, row in enumerate(ours.train_rows)}
    numbers = [position[row["prompt"]] for row in rows[::8]]
    ours.scoring.rows, ours.prompts = ours._read(ours.train_rows, numbers)

    losses = sum(map(ours.gradient.backward, ours.gradient.passes(ours._roll_out([numbers]))))
    torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-5, atol=1e-6)
    for layer, (a, b) in zip(ours.stack.layers.values(), matrices, strict=True):
        torch.testing.assert_close(layer.a.grad[0], a.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.b.grad[0], b.grad, rtol=1e-4, atol=1e-6)
    assert ours.stack.gradients.norm() > 1e-3


def test_a_completion_without_a_score_has_no_advantage_and_moves_no_other():
    rewards = torch.tensor([[1.0, 0.0, float("nan"), 1.0, 0.5, 0.5, 0.5, 0.5]])
    advantages = group_advantages(rewards, 4)
    assert advantages[0, 2] == 0
    torch.testing.assert_close(advantages[0, [0, 1, 3]], group_advantages(torch.tensor([[1.0, 0.0, 1.0]]), 3)[0])
    assert advantages[0, 4:].abs().sum() == 0


def test_weights_of_masked_completions_are_zero_and_no_completion_at_all_divides_nothing_by_zero():
    lengths = torch.tensor([[2, 4], [3, 3]])
    counted = torch.tensor([[True, False], [False, False]])
    assert completion_weights(lengths, counted, "dapo", 4).tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert completion_weights(lengths, counted, "grpo", 4).tolist() == [[0.25, 0.0], [0.0, 0.0]]
    assert completion_weights(lengths, counted, "dr_grpo", 4).tolist() == [[0.125, 0.0], [0.0, 0.0]]
