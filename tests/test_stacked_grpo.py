"""GRPO with several trials in one process: each does what it does alone."""

import dataclasses
import math

import pytest
import torch
from helpers import make_trial
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import RepeatSampler

from mua_rl.adapter.adapters import LoRA, adapter_for, load_adapter
from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import Unscored, UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.stacked.cache import share
from mua_rl.grpo.stacked.generation import Decoder, Sampling, choose
from mua_rl.grpo.stacked.prompts import prompt_order
from mua_rl.grpo.stacked.settings import check_base, device_of
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.grpo.stacked.trainer import StackedTrainer, train_side_by_side
from mua_rl.lm import models
from mua_rl.lm.heldout import held_out
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import Status, reward_means

MIXED = [
    make_trial(rank=4, init="B", alpha="1", log2_lr=-8, seed=1),
    make_trial(rank=2, init="A", alpha="1/r", log2_lr=-7, seed=2),
    make_trial(rank=8, init="B", alpha="0.7", log2_lr=-9, seed=1),
]


def arguments(**changes):
    """Two prompts with eight completions a step."""
    small = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 4}
    return GRPOArguments(**{**small, "report_to": "none", "held_out_problems": 24, **changes})


def side_by_side(trials, **changes):
    return StackedTrainer(arguments(**changes), trials)


def matrices(trainer, number):
    return [matrix.clone() for _, a, b in trainer.stack.matrices(number) for matrix in (a, b)]


def all_close(some, others, **tolerance):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_a_trial_starts_from_what_a_single_run_draws(number):
    trial = MIXED[number]
    stack = LoRAStack(
        models.load_model("embedded"), [adapter_for(a.spec, "mlp") for a in MIXED], [a.seed for a in MIXED]
    )
    alone = adapter_for(trial.spec, "mlp").attach(models.load_model("embedded"), trial.seed)
    found = {name: (a, b) for name, a, b in stack.matrices(number)}
    for name, layer in lora_layers(alone):
        ours = found.pop(name.removeprefix("base_model.model."))
        assert all(torch.equal(x, y) for x, y in zip(ours, lora_matrices(layer), strict=True))
    assert not found


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_a_trial_among_others_equals_the_same_trial_alone(number):
    together, alone = side_by_side(MIXED), side_by_side([MIXED[number]])
    for trainer in (together, alone):
        trainer.seen = []
        complete = trainer.decoder.complete
        trainer.decoder.complete = lambda *a, complete=complete, t=trainer: t.seen.append(complete(*a)) or t.seen[-1]
    for _ in range(3):
        ours, theirs = together.step()[number], alone.step()[0]
        assert together.seen[-1].tokens[number].tolist() == alone.seen[-1].tokens[0].tolist()
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        grads = [t.stack.gradients.norm(dim=1)[k].item() for t, k in ((together, number), (alone, 0))]
        assert grads[0] == pytest.approx(grads[1], rel=1e-4)
        all_close(matrices(together, number), matrices(alone, 0), rtol=1e-3, atol=1e-5)
    others = [together.seen[0].tokens[k].tolist() for k in range(3) if MIXED[k].seed != MIXED[number].seed]
    assert together.seen[0].tokens[number].tolist() not in others


@pytest.mark.slow
def test_ranks_are_padded_with_zeros_that_stay_zero():
    trainer = side_by_side(MIXED)
    for _ in range(3):
        trainer.step()
    for layer in trainer.stack.layers.values():
        assert layer.a[1, 2:].abs().max() == 0
        assert layer.b[1, :, 2:].abs().max() == 0
        assert layer.a[1, :2].abs().max() > 0


@pytest.mark.parametrize("fault", ["learning rate", "nan"])
@pytest.mark.slow
def test_a_trial_that_goes_wrong_changes_nothing_in_the_others(fault):
    wrong = make_trial(rank=4, init="B", alpha="1", log2_lr=math.log2(10), seed=5)
    trials = [MIXED[0], wrong, MIXED[2]]
    trainer, without = side_by_side(trials, max_steps=5), side_by_side(trials, max_steps=5)

    def poison(step, metrics):
        if fault == "nan" and step == 1:
            trainer.stack.values[1] = math.nan

    outcomes = trainer.train(poison)
    expected = without.train(keep_going=lambda trial, _: "no" if trial == wrong else None)
    assert [state.trial for state in without.states] == [MIXED[0], MIXED[2]]
    for number in (0, 2):
        assert dataclasses.replace(outcomes[number], seconds=0) == dataclasses.replace(expected[number], seconds=0)
        all_close(matrices(trainer, number), matrices(without, number), rtol=1e-4, atol=1e-6)
        assert math.isfinite(outcomes[number].score)
    assert outcomes[1].status is (Status.DIVERGED if fault == "nan" else Status.WORSE)
    assert (expected[1].reason, expected[1].steps, expected[1].status) == ("no", 1, Status.STOPPED)
    if fault == "nan":
        assert outcomes[1].steps == 4
        assert "not finite in 3 steps" in outcomes[1].reason
        assert math.isnan(outcomes[1].score)
        assert trainer.stack.active == [0, 2]


def test_a_trial_that_cannot_learn_any_more_is_stopped_with_cause_and_cure_and_the_others_go_on():
    ruined = make_trial(rank=4, init="B", alpha="1", log2_lr=math.log2(10), seed=5)
    trainer = side_by_side([MIXED[0], ruined], max_steps=9, patience=4)
    ours, theirs = trainer.train()
    assert (ours.status, ours.steps) == (Status.OK, 9)
    assert (theirs.status, math.isnan(theirs.score)) == (Status.STOPPED, True)
    assert 4 < theirs.steps < 9
    assert "try a quarter" in theirs.reason
    assert side_by_side([ruined], max_steps=9, patience=0).train()[0].status is Status.WORSE


def test_a_group_of_which_no_trial_could_ever_learn_ends_at_once_and_says_why():
    trainer, steps = side_by_side(MIXED, max_steps=30, patience=3, max_completion_length=1), []
    with pytest.raises(Unscored, match="cut off at 1 tokens"):
        trainer.train(lambda step, metrics: steps.append(step))
    assert steps == [1, 2, 3]


def test_every_trial_has_its_own_learning_rate_and_the_schedule_of_a_single_run():
    trainer = side_by_side(MIXED, max_steps=8)
    used = [[metrics["learning_rate"] for metrics in trainer.step().values()] for _ in range(8)]
    factors = [0.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(7))]
    for number, trial in enumerate(MIXED):
        assert [rates[number] for rates in used] == pytest.approx([trial.learning_rate * factor for factor in factors])


def test_gradients_are_clipped_trial_by_trial():
    trainer = side_by_side(MIXED)
    norms = [metrics["grad_norm"] for metrics in trainer.step().values()]
    bound = sorted(norms)[1] * 0.999
    clipped = side_by_side(MIXED, max_grad_norm=bound)
    assert [metrics["grad_norm"] for metrics in clipped.step().values()] == pytest.approx(norms)
    kept = clipped.stack.gradients.norm(dim=1).tolist()
    assert kept == pytest.approx([min(norm, bound) for norm in norms], rel=1e-4)


def test_accuracy_is_that_of_a_single_run_and_a_saved_adapter_is_the_trial(tmp_path):
    trainer = side_by_side([dataclasses.replace(MIXED[2], log2_lr=-5), MIXED[1]])
    before = trainer.measure(shared=True)[0]
    for _ in range(4):
        trainer.step()
    after = trainer.measure()
    answered = held_out(models.load_model("embedded"), trainer.tokenizer, trainer.task, trainer.held_out_rows, 32)
    assert answered == before
    ids = torch.randint(3, 100, (2 * 3, 7), generator=torch.Generator().manual_seed(0))
    ours = trainer.gradient.log_probs(ids[:, :-1], ids[:, 1:]).detach()
    for number, trial in enumerate(trainer.trials):
        trainer.stack.save_adapter(number, tmp_path / str(number))
        loaded = load_adapter(models.load_model("embedded"), tmp_path / str(number), trainable=False)
        assert loaded.peft_config["default"].r == trial.spec.rank
        with torch.no_grad():
            theirs = loaded(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        rows = slice(3 * number, 3 * number + 3)
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-4, atol=1e-5)
        assert held_out(loaded, trainer.tokenizer, trainer.task, trainer.held_out_rows, 32) == after[number]
    assert after[0].completions != before.completions


@pytest.mark.slow
def test_trials_learn_and_a_hopeless_one_is_ended_by_name(tmp_path):
    trials = [make_trial(8, "B", "1", -7, 1), make_trial(8, "B", "1", -30, 1)]
    seen = []
    outcomes = train_side_by_side(
        arguments(max_steps=40, held_out_problems=200, per_device_train_batch_size=64),
        trials,
        on_step=lambda step, metrics: seen.append((step, sorted(metrics))),
        keep_going=lambda trial, history: "hopeless" if trial.log2_lr < -20 and len(history) == 5 else None,
        adapters=tmp_path,
    )
    assert outcomes[0].score > outcomes[0].before + 0.1
    assert outcomes[0].reward_last > outcomes[0].reward_mean
    assert (outcomes[1].reason, outcomes[1].steps, outcomes[1].status) == ("hopeless", 5, Status.STOPPED)
    assert math.isnan(outcomes[1].score)
    assert seen == [(k, [0, 1] if k <= 5 else [0]) for k in range(1, 41)]
    assert [path.name for path in tmp_path.iterdir()] == ["trial-0"]


def test_a_step_without_a_score_counts_in_no_mean_as_in_a_single_run(tmp_path):
    trainer, calls = side_by_side([make_trial(4, "B", "1", -8, 1)], max_steps=12), []
    (reward,) = trainer.scoring.rewards

    def scores_but_for_two_steps(completions, **columns):
        calls.append(len(completions))
        return [None] * len(completions) if len(calls) in (3, 12) else reward(completions=completions, **columns)

    trainer.scoring.rewards = [scores_but_for_two_steps]
    history = trainer.states[0].history
    (outcome,) = trainer.train()
    assert [step for step, metrics in enumerate(history, 1) if math.isnan(metrics["reward"])] == [3, 12]
    run = RunFolder.create(str(tmp_path / "run"), "x")
    for step, metrics in enumerate(history, 1):  # TRL logs None where there is no score
        run.log(step, {"loss": 0.0, "reward": None if math.isnan(metrics["reward"]) else metrics["reward"]})
    assert math.isfinite(outcome.reward_mean)
    assert math.isfinite(outcome.reward_last)
    assert (outcome.reward_mean, outcome.reward_last) == reward_means(run.rewards("reward"))


def test_prompts_come_in_the_order_of_trls_sampler_epoch_after_epoch():
    rows = range(10)
    theirs = RepeatSampler(rows, mini_repeat_count=8, batch_size=4, repeat_count=4, seed=3)
    expected = [epoch[start : start + 32 : 8] for epoch in (list(theirs), list(theirs)) for start in (0, 128)]
    assert list(prompt_order(rows, 4, 4, seed=3)) == expected


@pytest.mark.parametrize(
    "changes, trials, message",
    [
        ({"beta": 0.1}, MIXED, "--beta 0.1.*singly"),
        ({"loss_type": "bnpo"}, MIXED, "--loss_type bnpo.*singly"),
        ({"top_p": 0.9}, MIXED, "--top_p 0.9.*singly"),
        ({"optim": "sgd"}, MIXED, "--optim sgd.*singly"),
        ({"num_iterations": 2}, MIXED, "--num_iterations 2.*singly"),
        ({"steps_per_generation": 2}, MIXED, "--steps_per_generation"),
        ({"max_steps": -1}, MIXED, "--max_steps"),
        ({}, [make_trial(None, log2_lr=-10, seed=1)], "full finetuning.*singly"),
        ({}, [make_trial(4096, "B", "1", -10, 1)], "rank 4096 exceeds"),
        ({}, [], "no trial"),
        ({"reward_weights": [1.0, 2.0]}, MIXED, "--reward_weights"),
        ({"per_device_train_batch_size": 8 * 8193}, MIXED, "8192 training rows"),
    ],
)
def test_what_trials_do_not_know_is_refused_in_a_line(changes, trials, message):
    with pytest.raises(UserError, match=message):
        side_by_side(trials, **changes)


@pytest.fixture(scope="module")
def small():
    """A random model in which four heads share a key head by two, with two trials that differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_key_value_heads = 2
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    stack = LoRAStack(model, [LoRA(4), LoRA(4)], [0, 1])
    stack.values.normal_(std=0.3)
    return model, stack


def padded_prompts():
    prompts = torch.randint(5, 60, (2, 3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    mask[:, 0, :4] = 0
    mask[1, 2, :2] = 0
    return prompts * mask, mask


def decoder(model, fixed, ends=(4,), at_once=None):
    return Decoder(model, Sampling(list(ends), 0, 9), at_once, fixed=fixed)


@pytest.mark.parametrize("fixed", [False, True])
def test_greedy_answers_are_those_of_transformers(small, fixed):
    model, _ = small
    prompts, mask = padded_prompts()
    answers = decoder(model, fixed, ends=()).answer(prompts, mask)
    flat = {"input_ids": prompts.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
    expected = model.generate(**flat, max_new_tokens=9, do_sample=False, pad_token_id=0)[:, 6:]
    assert answers.tokens.flatten(0, 1).tolist() == expected.tolist()
    assert answers.lengths.unique().tolist() == [9]


def test_a_fixed_cache_gives_what_a_growing_one_gives_and_rows_that_end_leave_it(small):
    model, _ = small
    ends = range(4, 16)  # likely enough that rows end at different steps
    draws = torch.rand(2, 12, 9, generator=torch.Generator().manual_seed(2))
    growing = decoder(model, False, ends).answer(*padded_prompts(), 4, draws)
    fixed = decoder(model, True, ends)
    for _ in range(2):  # the cache is used again
        again = fixed.answer(*padded_prompts(), 4, draws)
        assert torch.equal(growing.tokens, again.tokens)
        assert torch.equal(growing.lengths, again.lengths)
    lengths = growing.lengths.flatten().tolist()
    assert len(set(lengths)) > 3
    for row, length in zip(growing.tokens.flatten(0, 1).tolist(), lengths, strict=True):
        assert not any(token in ends for token in row[: length - 1])
        assert length == 9 or row[length - 1] in ends
        assert set(row[length:]) <= {0}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("[1.0]", "gives 1 scores for 16 answers"),
        ("[None] * len(completions)", "no completion had a score in any of 1 "),
    ],
)
def test_a_reward_that_gives_no_scores_is_one_line_as_in_a_single_run(scores, message, tmp_path):
    (tmp_path / "own.py").write_text(
        "from dataclasses import replace\n"
        "from mua_rl.envs.tasks import get_task, register_task\n"
        "@register_task('short')\n"
        "def short():\n"
        f"    return replace(get_task('arithmetic'), rewards=(lambda completions, **columns: {scores},))\n"
    )
    with pytest.raises(UserError, match=message):
        side_by_side([MIXED[0]], task=f"{tmp_path}/own.py:short", max_steps=1).train()


def test_completions_that_go_on_alike_share_a_place_and_every_trial_has_as_many():
    places, tokens = torch.tensor([0, 0, 0, 1, 1, 2, 3]), torch.tensor([7, 8, 7, 7, 7, 5, 5])  # of two trials, two each
    origins, written, new = share(places, tokens, (2, 2))
    assert origins.tolist() == [0, 0, 1, 2, 3, 2]
    assert written.tolist() == [7, 8, 7, 5, 5, 0]
    assert new.tolist() == [0, 1, 0, 2, 2, 3, 4]
    origins, written, new = share(torch.tensor([1]), torch.tensor([6]), (3, 2))  # two trials have ended
    assert (origins.tolist(), written.tolist(), new.tolist()) == ([1, 2, 4], [6, 0, 0], [0])


def test_a_batch_stays_as_it_is_until_a_quarter_of_its_places_are_free_or_one_divides():
    places, tokens = (
        torch.tensor([0, 1, 2, 4, 5, 5, 6]),
        torch.tensor([3, 4, 5, 6, 7, 7, 8]),
    )  # of two trials, five each
    origins, written, new = share(places, tokens, (2, 5))
    assert origins is None
    assert written.tolist() == [3, 4, 5, 0, 6, 7, 8, 0, 0, 0]
    assert torch.equal(new, places)
    origins, _, _ = share(torch.cat([places, places[:1]]), torch.cat([tokens, tokens[:1] + 1]), (2, 5))
    assert origins.tolist() == [0, 0, 1, 2, 4, 5, 6, 5, 5, 5]


@pytest.mark.parametrize("copies", [1, 4])
def test_equal_beginnings_of_a_prompts_completions_are_computed_once(small, copies, monkeypatch):
    model, _ = small
    rows, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: rows.append(len(k["input_ids"])) or forward(*a, **k))
    answers = decoder(model, False, ends=()).answer(*padded_prompts(), copies)  # greedy, so that all copies are equal
    assert rows == [6] * 9
    assert torch.equal(answers.tokens[:, ::copies].repeat_interleave(copies, 1), answers.tokens)


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([2.0, 0.0, -math.inf, 1.0]).expand(100_000, 4)
    draws = (torch.arange(100_000) + 0.5) / 100_000
    shares = choose(logits, draws, temperature=2.0, pieces=3).bincount(minlength=4) / 100_000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(-1), atol=1e-4, rtol=0)
    assert choose(logits[:4], None, 1.0).tolist() == [0] * 4
    assert choose(torch.full((2, 4), math.nan), torch.tensor([0.3, 0.9999]), 1.0).max() <= 3


@pytest.mark.parametrize("where", ["layer", "settings"])
def test_a_base_with_dropout_is_refused_unless_it_can_be_turned_off(where, tmp_path):
    if where == "layer":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=100, bos_token_id=1, eos_token_id=2, **small))
    else:
        model = models.load_model("embedded")
        model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path)
    models.load_tokenizer("embedded").save_pretrained(tmp_path)
    for disabled in (False, True):
        loaded = models.load_model(str(tmp_path))
        if disabled and where == "layer":
            check_base(loaded, disabled)
        else:
            with pytest.raises(UserError, match="dropout, which .* has: " + ("run" if disabled else "set")):
                check_base(loaded, disabled)
    with pytest.raises(UserError, match=r"dropout, which .* has: set --disable_dropout true, or run the trials singly"):
        side_by_side(MIXED, model=str(tmp_path))


def test_trials_stay_on_the_cpu_where_that_is_asked_for(monkeypatch):
    given = arguments(use_cpu=True), arguments()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(asked).type for asked in given] == ["cpu", "cuda"]
