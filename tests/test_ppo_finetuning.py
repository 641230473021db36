"""Finetuning's own options: what is trained beside the hidden layers, critics apart, distance to the base, adapters."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from peft import PeftModel

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402

from mua_rl.adapter.adapters import Full, LoRA  # noqa: E402
from mua_rl.adapter.targets import lora_layers  # noqa: E402
from mua_rl.lr.spec import AlphaRule  # noqa: E402
from mua_rl.ppo.base import read_base_policy  # noqa: E402
from mua_rl.ppo.layers import is_critics  # noqa: E402
from mua_rl.ppo.trainer import PPO  # noqa: E402

SMALL = dict(n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu", policy_kwargs={"net_arch": [16, 16]})
EVERYTHING = LoRA(8, target_modules="all-linear")


def ppo(env="CartPole-v1", adapter=None, **options):
    return PPO("MlpPolicy", env, adapter=adapter, **{**SMALL, "learning_rate": 0.01, **options})


def lora(rank=4, targets="hidden", **options):
    return LoRA(rank, target_modules=targets, **options)


def weights(policy):
    return {name: value.detach().clone() for name, value in policy.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def groups(model):
    return {group["name"]: group for group in model.learner.optimizer.param_groups}


def actions(policy, model, count=16):
    model.observation_space.seed(0)
    batch = np.stack([model.observation_space.sample() for _ in range(count)]).clip(-2, 2)
    return policy.predict(batch, deterministic=True)[0]


# What is asked for is done


@pytest.mark.parametrize("adapter", [lora(), Full("hidden")], ids=["LoRA", "FFT"])
def test_the_optimizers_keywords_reach_every_group(adapter):
    kwargs = {**SMALL["policy_kwargs"], "optimizer_kwargs": {"weight_decay": 0.3, "eps": 1e-4}}
    for group in groups(ppo(adapter=adapter, policy_kwargs=kwargs)).values():
        assert (group["weight_decay"], group["eps"]) == (0.3, 1e-4)


def test_an_optimizers_own_weight_decay_stays_as_in_sb3():
    kwargs = {**SMALL["policy_kwargs"], "optimizer_class": torch.optim.AdamW}
    plain = stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", **{**SMALL, "policy_kwargs": kwargs}, learning_rate=0.01)
    ours = ppo("Pendulum-v1", Full("hidden"), policy_kwargs=kwargs)
    assert groups(ours)["full"]["weight_decay"] == plain.policy.optimizer.param_groups[0]["weight_decay"] > 0


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1"])
def test_lora_on_every_layer_learns_at_ranks_that_the_outputs_allow(env):
    model = ppo(env, EVERYTHING)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(model.learner)}
    outputs = model.policy.action_net.out_features
    inputs = model.policy.mlp_extractor.policy_net[0].in_features
    assert (ranks["value_net"], ranks["action_net"]) == (1, outputs)
    assert ranks["mlp_extractor.policy_net.0"] == inputs and ranks["mlp_extractor.policy_net.2"] == 8
    before = weights(model.policy)
    model.learn(64)
    assert changed(before, weights(model.policy)) >= {name for name in before if name.endswith("weight")}


def test_a_layer_of_a_smaller_rank_keeps_the_multiplier():
    model = ppo(adapter=LoRA(8, alpha=AlphaRule(1, 0.5), target_modules="all-linear"))
    for _, layer in lora_layers(model.learner):
        assert layer.scaling["default"] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize(
    "adapter", [Full("hidden"), LoRA(1, target_modules="all-linear"), LoRA(1, target_modules=["action_net"])]
)
def test_a_network_of_heads_alone_is_trained(env, adapter, tmp_path):
    model = ppo(env, adapter, policy_kwargs={"net_arch": []})
    before = weights(model.policy)
    model.learn(32)
    assert "action_net.weight" in changed(before, weights(model.policy))
    model.save(tmp_path / "policy.zip")
    plain = stable_baselines3.PPO.load(tmp_path / "policy.zip", env=make_vec_env(env), device="cpu")
    np.testing.assert_array_equal(actions(plain, model), actions(model, model))


# The critic


def test_the_critic_has_a_rate_of_its_own_with_heads_and_lora():
    model = ppo(adapter=lora(), critic_learning_rate=0.03, head_learning_rate=0.002)
    assert {name: group["lr"] for name, group in groups(model).items()} == {
        "lora_A": 0.01, "lora_B": 0.01, "head": 0.002, "critic": 0.03,
    }  # fmt: skip
    names = {id(p): name for name, p in model.learner.named_parameters()}
    assert all(is_critics(names[id(p)]) for p in groups(model)["critic"]["params"])
    assert not any(is_critics(names[id(p)]) for p in groups(model)["lora_A"]["params"])


@pytest.mark.parametrize("adapter", [lora(), Full("hidden")], ids=["LoRA", "FFT"])
def test_on_the_first_rollouts_the_critic_alone_is_trained(adapter):
    model = ppo("Pendulum-v1", adapter, critic_warmup=2)
    before = weights(model.learner)
    model.learn(32)
    warm = weights(model.learner)
    assert changed(before, warm) and all(map(is_critics, changed(before, warm)))
    model.learn(16, reset_num_timesteps=False)
    assert "action_net.weight" in changed(warm, weights(model.learner))


def test_clipped_apart_a_large_gradient_of_the_critic_leaves_the_actors_alone(monkeypatch):
    """Adam hides the size of a gradient, so that SGD tells."""
    kwargs = {**SMALL["policy_kwargs"], "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}}
    options = dict(policy_kwargs=kwargs, n_epochs=1, learning_rate=0.001, vf_coef=1e4, max_grad_norm=0.5)
    moved = {}
    for apart in (False, True):
        model = ppo("Pendulum-v1", Full("hidden"), clip_apart=apart, **options)
        before = weights(model.policy)
        model.learn(16)
        after = weights(model.policy)
        moved[apart] = [
            sum((after[n] - before[n]).square().sum().item() for n in before if is_critics(n) is critics) ** 0.5
            for critics in (False, True)
        ]
        assert model.max_grad_norm == 0.5
    assert moved[True][1] == pytest.approx(0.001 * 0.5, rel=1e-2)  # each part moves by η times its clipped norm
    assert moved[False][0] < 1e-3 * moved[True][0] and moved[True][0] <= 0.001 * 0.5 * 1.01


def test_clipping_apart_clips_nothing_that_is_small():
    options = dict(learning_rate=1e-4, max_grad_norm=1e9)
    one, two = (ppo("Pendulum-v1", lora(), clip_apart=apart, **options).learn(48) for apart in (False, True))
    assert not changed(weights(one.policy), weights(two.policy))


# Distance to the base


def test_the_reward_pays_for_the_distance_to_the_base_by_hand(monkeypatch):
    model = ppo("Pendulum-v1", lora(), base_kl=0.5)
    with torch.no_grad():
        model.policy.action_net.bias += 0.3
    collected = {}
    original = stable_baselines3.PPO.collect_rollouts

    def collect(self, env, callback, buffer, steps):
        going = original(self, env, callback, buffer, steps)
        collected["rewards"], collected["advantages"] = buffer.rewards.copy(), buffer.advantages.copy()
        return going

    monkeypatch.setattr(stable_baselines3.PPO, "collect_rollouts", collect)
    monkeypatch.setattr(PPO, "train", lambda self: None)
    model.learn(16)
    buffer = model.rollout_buffer
    deviation = model.policy.log_std.exp().item()
    with torch.no_grad():
        means = [
            p(torch.as_tensor(buffer.observations[:, 0]))
            for p in (
                lambda x: model.policy.get_distribution(x).distribution.mean,
                lambda x: model.base_policy.get_distribution(x).distribution.mean,
            )
        ]
    acted = torch.as_tensor(buffer.actions[:, 0])
    ours, bases = (torch.distributions.Normal(mean, deviation).log_prob(acted) for mean in means)
    paid = torch.as_tensor(collected["rewards"] - buffer.rewards)
    torch.testing.assert_close(paid, 0.5 * (ours - bases), rtol=1e-3, atol=1e-4)
    assert not np.allclose(collected["advantages"], buffer.advantages)


def test_a_large_price_of_distance_keeps_the_policy_near_its_base():
    def distance(base_kl):
        model = ppo("Pendulum-v1", Full("hidden"), base_kl=base_kl, n_steps=256, batch_size=64, learning_rate=0.003)
        before = actions(model, model)
        model.learn(2048)
        return np.abs(actions(model, model) - before).mean()

    assert distance(100.0) < 0.5 * distance(1e-9)


def test_no_price_changes_nothing():
    plain, free = (ppo("Pendulum-v1", lora(), **options).learn(48) for options in ({}, {"base_kl": 0.0}))
    assert not changed(weights(plain.policy), weights(free.policy))


# Adapters that are the policy


def test_lora_on_the_actor_alone_trains_the_critic_fully():
    model = ppo("Pendulum-v1", lora(targets="actor"))
    assert [name for name, _ in lora_layers(model.learner)] == ["mlp_extractor.policy_net.2"]
    before = weights(model.learner)
    model.learn(64)
    moved = changed(before, weights(model.learner))
    assert {name for name in before if is_critics(name)} <= moved
    assert {name for name in moved if not is_critics(name)} == {
        "mlp_extractor.policy_net.2.lora_A.default.weight", "mlp_extractor.policy_net.2.lora_B.default.weight",
        "action_net.weight", "action_net.bias", "log_std",
    }  # fmt: skip


@pytest.mark.parametrize(
    "adapter", [lora(), lora(init="A"), lora(targets="actor"), EVERYTHING, LoRA(1, target_modules=["action_net"])]
)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_adapters_folder_on_the_original_base_is_the_trained_policy(adapter, env, tmp_path):
    """Heads were left out of it once, and PEFT gave another policy without a word."""
    stable_baselines3.PPO("MlpPolicy", env, **SMALL).save(tmp_path / "base.zip")
    model = PPO.from_base(
        read_base_policy(tmp_path / "base.zip"), make_vec_env(env), adapter=adapter, learning_rate=0.02, device="cpu"
    )
    model.learn(128)
    model.save_adapter(tmp_path / "adapter")
    for path in (tmp_path / "base.zip", tmp_path / "adapter" / "base_policy.zip"):
        policy = stable_baselines3.PPO.load(path, device="cpu").policy
        PeftModel.from_pretrained(policy, str(tmp_path / "adapter"))
        batch = torch.as_tensor(np.stack([model.observation_space.sample() for _ in range(9)])).clip(-2, 2)
        acted = torch.as_tensor(np.stack([model.action_space.sample() for _ in range(9)]))
        for theirs, ours in zip(
            policy.evaluate_actions(batch, acted), model.policy.evaluate_actions(batch, acted), strict=True
        ):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_one_base_carries_the_adapters_of_three_shifts_and_switches_between_them(tmp_path):
    stable_baselines3.PPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "base.zip")
    base = read_base_policy(tmp_path / "base.zip")
    trained = {}
    for shift in ("LongPole", "LongerPole", "ReversedForce"):
        envs = make_vec_env(lambda shift=shift: gymnasium.make(f"mua_rl/CartPole-{shift}-v0"))
        trained[shift] = PPO.from_base(base, envs, adapter=lora(), learning_rate=0.02, device="cpu", seed=len(trained))
        trained[shift].learn(256)
        trained[shift].save_adapter(tmp_path / shift)
    policy = stable_baselines3.PPO.load(tmp_path / "base.zip", device="cpu").policy
    carrier = PeftModel.from_pretrained(policy, str(tmp_path / "LongPole"), adapter_name="LongPole")
    for shift in ("LongerPole", "ReversedForce"):
        carrier.load_adapter(str(tmp_path / shift), adapter_name=shift)
    batch = torch.as_tensor(np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32))
    logits = {}
    for shift in (*trained, *reversed(trained)):  # and back again
        carrier.set_adapter(shift)
        logits[shift] = policy.get_distribution(batch).distribution.logits
        theirs = trained[shift].policy.get_distribution(batch).distribution.logits
        torch.testing.assert_close(logits[shift], theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits["LongPole"], logits["ReversedForce"], atol=1e-3)


def test_a_zip_that_was_saved_with_lora_goes_on_with_lora_and_says_so(tmp_path, capsys):
    """It trained all weights once, without a word (SB3#1277)."""
    model = ppo("Pendulum-v1", lora(3, init="A", alpha=AlphaRule(1, 1)), head_learning_rate=0.002)
    model.learn(32)
    model.save(tmp_path / "policy.zip")
    loaded = PPO.load(tmp_path / "policy.zip", env=make_vec_env("Pendulum-v1"), device="cpu")
    assert "a new LoRA Init[A], α = 1/r, r = 3 on the merged weights" in capsys.readouterr().out
    assert loaded.attached.spec == model.attached.spec and loaded.target_layers == model.target_layers
    assert groups(loaded)["head"]["lr"] == 0.002
    before = weights(loaded.policy)
    assert not changed(before, weights(model.policy))
    loaded.learn(32)
    assert not any(name.startswith("mlp_extractor.policy_net.0") for name in changed(before, weights(loaded.policy)))
    full = PPO.load(tmp_path / "policy.zip", env=make_vec_env("Pendulum-v1"), adapter=Full("hidden"), device="cpu")
    assert not list(lora_layers(full.learner)) and not capsys.readouterr().out
    assert type(stable_baselines3.PPO.load(tmp_path / "policy.zip", device="cpu")) is stable_baselines3.PPO


@pytest.mark.slow
def test_the_trainer_is_there_without_transformers_and_trl():
    """They take seconds to import, and full finetuning of a small policy has no use for them."""
    code = (
        "import sys; from mua_rl.ppo.trainer import PPO;"
        "PPO('MlpPolicy', 'CartPole-v1', n_steps=16, batch_size=16, device='cpu').learn(16);"
        "assert not {'transformers', 'trl', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
