"""PPO side by side: a trial does what its single run does, whatever the other trials do."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import make_trial, spec

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.logger import Logger  # noqa: E402
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402

from mua_rl.adapter.adapters import adapter_for  # noqa: E402
from mua_rl.errors import UserError  # noqa: E402
from mua_rl.ppo.arguments import PPOArguments  # noqa: E402
from mua_rl.ppo.base import read_base_policy  # noqa: E402
from mua_rl.ppo.stacked.policy import StackedPolicy, build_policy  # noqa: E402
from mua_rl.ppo.stacked.rollouts import generalized_advantages  # noqa: E402
from mua_rl.ppo.stacked.trainer import StackedPPO, ppo_options, train_side_by_side  # noqa: E402
from mua_rl.ppo.stacked.update import (  # noqa: E402
    StackedAdam,
    Transitions,
    clipped,
    gradient_and_kl,
    loss_and_kl,
    update,
)
from mua_rl.ppo.trainer import PPO  # noqa: E402
from mua_rl.run.trial import Status  # noqa: E402

CARTPOLE, PENDULUM = "mua_rl/CartPole-LongPole-v0", "mua_rl/Pendulum-HighGravity-v0"
FFT = make_trial(None, "B", "1", -8.0, 3)
LORA = make_trial(4, "B", "1", -8.0, 3)


def make_base(folder, env_id, activation=torch.nn.Tanh, normalize=False):
    """A small policy with random weights, as a base."""
    envs = make_vec_env(env_id, n_envs=2, seed=0)
    options = dict(n_steps=32, batch_size=16, n_epochs=2, seed=1, device="cpu")
    kwargs = {"net_arch": [16, 16], "activation_fn": activation}
    envs = VecNormalize(envs) if normalize else envs
    model = stable_baselines3.PPO("MlpPolicy", envs, policy_kwargs=kwargs, **options)
    model.learn(64)
    model.save(folder / "policy.zip")
    if normalize:
        envs.save(str(folder / "vecnormalize.pkl"))
    return read_base_policy(folder / "policy.zip")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {env_id: make_base(tmp_path_factory.mktemp("base"), env_id) for env_id in (CARTPOLE, PENDULUM)}


def arguments(env_id=CARTPOLE, **changes):
    return PPOArguments(env_id=env_id, **{"total_timesteps": 192, "eval_episodes": 4, **changes})


def single_run(base, trial, options=None, env_id=CARTPOLE):
    """The trainer that trains one trial, after a rollout of its own."""
    given = arguments(env_id, seed=trial.seed, **(options or {}))
    envs = make_vec_env(env_id, n_envs=2, seed=trial.seed)
    model = PPO.from_base(
        base, envs, adapter=adapter_for(trial.spec, "hidden"), device="cpu",
        learning_rate=given.schedule(trial.learning_rate),
        **given.sb3_options(),
    )  # fmt: skip
    model.set_logger(Logger(None, []))
    callback = model._setup_learn(given.total_timesteps)[1]
    model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, model.n_steps)
    model._update_current_progress_remaining(model.num_timesteps, given.total_timesteps)
    return model


def stacked(model, base, trials):
    env = model.get_env()
    return StackedPolicy(build_policy(base, env.observation_space, env.action_space), trials)


def buffer_as_rollout(model, trials=1):
    """SB3's rollout buffer, in its own flattened order, the same for every trial."""
    list(model.rollout_buffer.get(None))  # flattens it
    buffer = model.rollout_buffer
    fields = (buffer.observations, buffer.actions, buffer.log_probs, buffer.values, buffer.advantages, buffer.returns)
    tensors = [torch.as_tensor(field) for field in fields]
    discrete = isinstance(model.action_space, stable_baselines3.common.policies.spaces.Discrete)
    tensors = [t.flatten() if i >= 2 or (i == 1 and discrete) else t for i, t in enumerate(tensors)]
    if discrete:
        tensors[1] = tensors[1].long()
    return Transitions(*(t.expand(trials, *t.shape).clone() for t in tensors))


def named_gradients(policy, gradient, trial=0):
    return {name: value[trial] for name, value in policy.weights(gradient).items()}


def sb3_name(name):
    layer, _, kind = name.rpartition(".")
    return f"{layer}.{kind}.default.weight" if kind.startswith("lora") else name


def assert_same_weights(policy, model, rank, trial=0, **tolerance):
    """What the trial trains equals what the single run's learner trains."""
    theirs = dict(model.learner.named_parameters())
    for name, value in named_gradients(policy, policy.trained, trial).items():
        if name.endswith("lora_A"):
            value = value[:rank]
        if name.endswith("lora_B"):
            value = value[:, :rank]
        torch.testing.assert_close(value, theirs[sb3_name(name)].detach(), **tolerance)
    trained = {name for name, parameter in theirs.items() if parameter.requires_grad}
    assert {sb3_name(name) for name in policy.shapes} == trained


# The same numbers as the single run


@pytest.mark.parametrize("init", ["A", "B"])
def test_trials_start_where_their_single_runs_start(bases, init):
    trials = [make_trial(rank, init, "1/r", -8.0, seed) for rank, seed in ((2, 0), (4, 0), (4, 7))]
    base = bases[PENDULUM]
    for k, trial in enumerate(trials):
        model = single_run(base, trial, env_id=PENDULUM)
        policy = stacked(model, base, trials)
        assert_same_weights(policy, model, trial.spec.rank, k, rtol=0, atol=0)
        for name, value in model.policy.state_dict().items():
            assert torch.equal(policy.state_dict(k)[name], value), name
    assert policy.multipliers.tolist() == [0.5, 0.25, 0.25]


def test_full_finetuning_starts_from_the_base_and_trains_everything(bases):
    model = single_run(bases[CARTPOLE], FFT)
    assert_same_weights(stacked(model, bases[CARTPOLE], [FFT]), model, None, rtol=0, atol=0)


@pytest.mark.parametrize("env_id", [CARTPOLE, PENDULUM])
def test_advantages_and_returns_are_sb3s(bases, env_id):
    model = single_run(bases[env_id], LORA, env_id=env_id)
    buffer = model.rollout_buffer
    ended = np.concatenate([buffer.episode_starts[1:], model._last_episode_starts[None]])
    last = model.policy.predict_values(torch.as_tensor(model._last_obs)).detach().numpy().T
    values = torch.as_tensor(np.concatenate([buffer.values, last]))[None]
    ours = generalized_advantages(
        torch.as_tensor(buffer.rewards)[None], values, torch.as_tensor(ended)[None] > 0, model.gamma, model.gae_lambda
    )
    torch.testing.assert_close(ours[0], torch.as_tensor(buffer.advantages), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trial", [LORA, replace(LORA, spec=spec(4, "A", "1/r")), FFT], ids=["B", "A", "FFT"])
@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        (CARTPOLE, {}),
        (PENDULUM, {}),
        (CARTPOLE, {"ent_coef": 0.02, "clip_range_vf": 0.1, "normalize_advantage": False, "max_grad_norm": 0.05}),
        (PENDULUM, {"target_kl": 1e-4, "n_epochs": 4}),
        (PENDULUM, {"batch_size": 24, "head_lr": 0.01}),
    ],
    ids=["discrete", "box", "options", "stops-early", "partial-batch"],
)
def test_an_update_on_sb3s_own_rollout_gives_sb3s_weights(bases, trial, env_id, options, monkeypatch):
    base = bases[env_id]
    model = single_run(base, trial, {k: v for k, v in options.items() if k != "head_lr"}, env_id)
    model.attach(head_learning_rate=options.get("head_lr"))
    policy, settings = stacked(model, base, [trial]), ppo_options(arguments(env_id, **options), base)
    rollout, count = buffer_as_rollout(model), model.n_steps * model.n_envs
    order = torch.stack([torch.randperm(count) for _ in range(settings.n_epochs)])
    orders = iter(order.numpy())
    monkeypatch.setattr(np.random, "permutation", lambda size: next(orders))
    model.train()
    factor = 1 - 0.9 * model.num_timesteps / 192
    rates = factor * torch.tensor([[trial.learning_rate, options.get("head_lr", trial.learning_rate)]])
    before, adam = policy.trained.clone(), StackedAdam(policy, (0.9, 0.999), 1e-5)
    update(policy, adam, rollout, order[None], rates, torch.tensor([True]), settings)
    assert not torch.equal(before, policy.trained)
    assert_same_weights(policy, model, trial.spec.rank, rtol=1e-4, atol=2e-5)
    if "target_kl" in options:
        assert 0 < int(adam.steps) < settings.n_epochs * math.ceil(count / settings.batch_size)


@pytest.mark.parametrize("trial", [LORA, FFT], ids=["LoRA", "FFT"])
def test_loss_and_gradients_are_sb3s_to_rounding(bases, trial):
    """Against autograd through SB3's policy, on the first minibatch."""
    model = single_run(bases[PENDULUM], trial, env_id=PENDULUM)
    policy, settings = stacked(model, bases[PENDULUM], [trial]), ppo_options(arguments(PENDULUM), bases[PENDULUM])
    batch = next(buffer_as_rollout(model).minibatches(16))
    loss, _ = loss_and_kl(policy, policy.trained, batch, settings)
    values, log_prob, _ = model.learner.evaluate_actions(batch.observations[0], batch.actions[0])
    advantages = (batch.advantages[0] - batch.advantages[0].mean()) / (batch.advantages[0].std() + 1e-8)
    ratio = (log_prob - batch.log_probs[0]).exp()
    surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)).mean()
    expected = -surrogate + 0.5 * torch.nn.functional.mse_loss(batch.returns[0], values.flatten())
    torch.testing.assert_close(loss[0], expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    theirs = dict(model.learner.named_parameters())
    for name, gradient in named_gradients(policy, gradient_and_kl(policy, batch, settings)[0]).items():
        torch.testing.assert_close(gradient, theirs[sb3_name(name)].grad, rtol=1e-4, atol=1e-5)


def test_adam_is_torchs_with_a_rate_and_a_count_of_steps_for_each_trial(bases):
    trials = [make_trial(None, "B", "1", rate, 0) for rate in (-8.0, -6.0, -7.0)]
    model = single_run(bases[CARTPOLE], FFT)
    policy, generator = stacked(model, bases[CARTPOLE], trials), torch.Generator().manual_seed(0)
    ours = StackedAdam(policy, (0.9, 0.999), 1e-5)
    single = [torch.nn.Parameter(row.clone()) for row in policy.trained]
    theirs = [
        torch.optim.Adam(
            [{"params": [parameter], "lr": trial.learning_rate}],
            eps=1e-5,
        )
        for parameter, trial in zip(single, trials, strict=True)
    ]
    rates = torch.tensor([[trial.learning_rate] * 2 for trial in trials])
    for step in range(12):
        gradient = torch.randn(policy.trained.shape, generator=generator)
        on = torch.tensor([True, step % 3 != 0, step < 5])
        ours.step(policy.trained, clipped(gradient, 0.5, on), rates, on, policy.body)
        for k in on.nonzero().flatten():
            single[k].grad = gradient[k].clone()
            torch.nn.utils.clip_grad_norm_([single[k]], 0.5)
            theirs[k].step()
    torch.testing.assert_close(policy.trained, torch.stack([p.detach() for p in single]), rtol=1e-5, atol=1e-6)


# Trials are independent


def trained(trials, base, given):
    trainer = StackedPPO(given, trials, base)
    return trainer, trainer.learn()


@pytest.mark.parametrize("env_id", [CARTPOLE, PENDULUM])
@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "FFT"])
def test_an_trial_among_others_equals_the_trial_alone(bases, env_id, full):
    trials = [
        make_trial(None if full else rank, "B", "1", lr, seed)
        for rank, lr, seed in ((2, -7, 0), (4, -8, 1), (3, -6, 2))
    ]
    given = arguments(env_id, total_timesteps=448)  # 224 steps of each environment: Pendulum's episodes end at 200
    together, outcomes = trained(trials, bases[env_id], given)
    for k, trial in enumerate(trials):
        alone, (outcome,) = trained([trial], bases[env_id], given)
        for name, value in alone.policy.state_dict(0).items():
            torch.testing.assert_close(together.policy.state_dict(k)[name], value, rtol=1e-4, atol=1e-5)
        for field in ("score", "reward_mean", "reward_last", "before", "steps"):
            assert getattr(outcomes[k], field) == pytest.approx(getattr(outcome, field), rel=1e-3)


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "FFT"])
def test_an_trial_at_a_rate_of_ten_changes_nothing_in_the_others(bases, full):
    trials = [make_trial(None if full else 4, "B", "1", lr, seed) for lr, seed in ((-8, 0), (-7, 1), (-6, 2))]
    wild = [trials[0], replace(trials[1], log2_lr=math.log2(10)), trials[2]]
    given = arguments(target_kl=0.0)
    calm, disturbed = (trained(group, bases[CARTPOLE], given)[0].policy.trained for group in (trials, wild))
    assert torch.equal(calm[[0, 2]], disturbed[[0, 2]])
    assert not torch.equal(calm[1], disturbed[1])


def test_an_trial_that_leaves_the_finite_numbers_is_dropped_and_the_others_go_on(bases):
    trials = [replace(LORA, log2_lr=lr) for lr in (-8.0, 100.0, -7.0)]
    trainer, outcomes = trained(trials, bases[CARTPOLE], arguments(target_kl=0.0))
    assert trainer.alive.tolist() == [True, False, True]
    assert outcomes[1].status is Status.DIVERGED and "environment step 64" in outcomes[1].reason
    assert math.isnan(outcomes[1].score)
    assert not math.isnan(outcomes[0].score) and outcomes[0].steps == 192
    _, calm = trained([trials[0], trials[2]], bases[CARTPOLE], arguments(target_kl=0.0))
    assert [outcomes[k].score for k in (0, 2)] == pytest.approx([outcome.score for outcome in calm])


def test_smaller_ranks_stay_zero_beyond_their_rank(bases):
    trainer, _ = trained([replace(LORA, spec=spec(2)), LORA], bases[CARTPOLE], arguments())
    for name, value in trainer.policy.weights().items():
        if "lora_A" in name:
            assert not value[0, 2:].any() and value[0, :2].any() and value[1, 2:].any()
        if "lora_B" in name:
            assert not value[0, :, 2:].any() and value[0, :, :2].any()


# Environments, files, refusals


def test_environments_that_are_no_tensors_train_too_with_statistics_of_each_trials_own(tmp_path):
    env_id = "MountainCarContinuous-v0"
    base = make_base(tmp_path, env_id, activation=torch.nn.ReLU, normalize=True)
    trials = [replace(LORA, seed=seed) for seed in (0, 1)]
    given = arguments(env_id, eval_episodes=2)
    together, outcomes = trained(trials, base, given)
    assert all(math.isfinite(outcome.score) for outcome in outcomes)
    alone, _ = trained([trials[1]], base, given)
    for name, value in alone.policy.state_dict(0).items():
        torch.testing.assert_close(together.policy.state_dict(1)[name], value, rtol=1e-4, atol=1e-5)
    means = [envs.obs_rms.mean for envs in together.vec_envs]
    np.testing.assert_allclose(means[1], alone.vec_envs[0].obs_rms.mean, rtol=1e-5)
    assert not np.allclose(means[0], means[1])


def test_the_same_task_as_tensors_and_under_gymnasium_gives_the_same_kind_of_run(bases):
    """A wrapper that does nothing takes the tensors away."""
    wrapped = arguments(wrapper="gymnasium.wrappers:OrderEnforcing")
    for given, vec_envs in ((arguments(), 0), (wrapped, 1)):
        trainer, (outcome,) = trained([LORA], bases[CARTPOLE], given)
        assert len(trainer.vec_envs) == vec_envs
        assert outcome.steps == 192 and 5 < outcome.reward_mean < 60 and outcome.before > 5


@pytest.mark.parametrize("trial", [LORA, FFT], ids=["LoRA", "FFT"])
@pytest.mark.parametrize("env_id", [CARTPOLE, PENDULUM])
def test_plain_sb3_loads_what_is_saved_and_acts_alike(bases, env_id, trial, tmp_path):
    trainer, _ = trained([replace(trial, seed=0), trial], bases[env_id], arguments(env_id))
    trainer.save(1, tmp_path / "policy.zip")
    plain = stable_baselines3.PPO.load(tmp_path / "policy.zip", device="cpu")
    observations = np.stack([plain.observation_space.sample() for _ in range(50)]).clip(-2, 2)
    distribution = trainer.policy.distribution(
        trainer.policy.weights(), torch.as_tensor(observations).expand(2, -1, -1)
    )
    mode = distribution.mode[1]
    if env_id == PENDULUM:
        mode = mode.clamp(-2, 2)
    np.testing.assert_allclose(plain.predict(observations, deterministic=True)[0], mode.detach(), atol=1e-5)


def test_what_has_no_stacked_form_is_refused_and_the_message_says_to_run_singly(bases):
    base = bases[CARTPOLE]
    with pytest.raises(UserError, match="two groups"):
        train_side_by_side(arguments(), [LORA, FFT], base)
    with pytest.raises(UserError, match="one by one"):
        train_side_by_side(
            arguments(rollout_buffer_class="stable_baselines3.common.buffers:RolloutBuffer"), [LORA], base
        )
    with pytest.raises(UserError, match="no trials"):
        train_side_by_side(arguments(), [], base)
    with pytest.raises(UserError, match="rank 17 exceeds"):
        train_side_by_side(arguments(), [replace(LORA, spec=spec(17))], base)
    with pytest.raises(UserError, match="no environment"):
        train_side_by_side(arguments("NoSuchTask-v0"), [LORA], base)
    with pytest.raises(UserError, match="trained with observations"):
        train_side_by_side(arguments(PENDULUM), [LORA], base)


def test_workers_share_out_the_trials_and_change_no_result(bases):
    trials = [replace(LORA, seed=seed) for seed in range(3)]
    one, two = (train_side_by_side(arguments(), trials, bases[CARTPOLE], workers=workers) for workers in (1, 2))
    assert [outcome.score for outcome in two] == pytest.approx([outcome.score for outcome in one])
    assert [outcome.reward_mean for outcome in two] == pytest.approx([outcome.reward_mean for outcome in one])
