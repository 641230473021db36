"""PPO through the adapter: what is trained, at which learning rate, and what SB3 and PEFT make of what is saved."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from peft import PeftModel

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.utils import LinearSchedule  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

from mua_rl.adapter.adapters import Full, LoRA  # noqa: E402
from mua_rl.adapter.targets import lora_layers  # noqa: E402
from mua_rl.errors import Diverged, UserError  # noqa: E402
from mua_rl.lr.rules import Scheme  # noqa: E402
from mua_rl.ppo.layers import HEADS, hidden_layers, resolve_layers  # noqa: E402
from mua_rl.ppo.trainer import PPO  # noqa: E402

SMALL = dict(n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu", policy_kwargs={"net_arch": [16, 16]})
HIDDEN = ["mlp_extractor.policy_net.2", "mlp_extractor.value_net.2"]


class Toy(gymnasium.Env):
    """Random observations, reward 1; any spaces."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space, self.steps = observation_space, action_space, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(1000)))
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps >= 7, False, {}


def vector(low=-1.0, high=1.0, shape=(5,)):
    return spaces.Box(low, high, shape, np.float32)


def ppo(env="CartPole-v1", adapter=None, policy="MlpPolicy", **options):
    return PPO(policy, env, adapter=adapter, **{**SMALL, "learning_rate": 0.01, **options})


def lora(rank=4, **options):
    return LoRA(rank, target_modules="hidden", **options)


def weights(policy):
    return {name: value.clone() for name, value in policy.state_dict().items()}


def learner_weights(model):
    return {name: value.detach().clone() for name, value in model.learner.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def observations(model, count=12):
    return np.stack([model.observation_space.sample() for _ in range(count)])


# What is trained


def test_lora_trains_adapters_and_heads_and_nothing_else():
    model = ppo("Pendulum-v1", lora())
    before = learner_weights(model)
    model.learn(64)
    moved = changed(before, learner_weights(model))
    adapters = {f"{name}.lora_{matrix}.default.weight" for name in HIDDEN for matrix in "AB"}
    heads = {"action_net.weight", "action_net.bias", "value_net.weight", "value_net.bias", "log_std"}
    assert moved == adapters | heads
    assert moved == {name for name, parameter in model.learner.named_parameters() if parameter.requires_grad}


def test_full_finetuning_trains_every_weight():
    model = ppo("Pendulum-v1", Full("hidden"))
    before = weights(model.policy)
    model.learn(64)
    assert changed(before, weights(model.policy)) == set(before)


@pytest.mark.parametrize("adapter", [lora(), lora(init="A"), Full("hidden")])
def test_every_trained_tensor_is_in_exactly_one_group_of_the_learners_optimizer(adapter):
    model = ppo("Pendulum-v1", adapter)
    grouped = [id(parameter) for group in model.learner.optimizer.param_groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.learner.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)


def test_roles_have_the_learning_rates_that_were_given():
    model = ppo("Pendulum-v1", lora(), learning_rate=0.02, head_learning_rate=0.005)
    names = {id(parameter): name for name, parameter in model.learner.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in model.learner.optimizer.param_groups for p in group["params"]}
    assert {name: rate for name, rate in rates.items() if "lora_" not in name} == {
        name: 0.005 for name in rates if name.split(".")[0] in HEADS
    }
    assert {rate for name, rate in rates.items() if "lora_" in name} == {0.02}


def test_starting_with_an_adapter_changes_no_action():
    plain = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", **SMALL)
    model = ppo("CartPole-v1", lora())
    assert not changed(weights(plain.policy), weights(model.policy))


# SB3's traps


def test_the_schedule_multiplies_each_groups_own_rate():
    model = ppo("Pendulum-v1", lora(), learning_rate=LinearSchedule(0.02, 0.0, 1.0), head_learning_rate=0.005)
    model.learn(48)  # three rollouts of 16 steps: the third update is at progress 0, the second at 1/3
    model._current_progress_remaining = 1 / 3
    model._update_learning_rate(model.learner.optimizer)
    rates = {group["name"]: group["lr"] for group in model.learner.optimizer.param_groups}
    assert rates == pytest.approx({"lora_A": 0.02 / 3, "lora_B": 0.02 / 3, "head": 0.005 / 3})
    assert model.logger.name_to_value["lr/head"] == pytest.approx(0.005 / 3)


def test_sb3_itself_would_overwrite_the_groups():
    """If this fails, SB3 has changed and our override may go."""
    model = ppo("Pendulum-v1", lora(), head_learning_rate=0.005)
    model.learn(16)
    super(PPO, model)._update_learning_rate(model.learner.optimizer)
    assert {group["lr"] for group in model.learner.optimizer.param_groups} == {0.01}


def test_full_finetuning_is_bitwise_sb3():
    # one after the other: both draw from torch's global generator, seeded where they are built
    plain = stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", learning_rate=0.003, **SMALL).learn(96)
    ours = ppo("Pendulum-v1", Full("hidden"), learning_rate=0.003).learn(96)
    assert not changed(weights(plain.policy), weights(ours.policy))


def test_the_acting_policy_has_the_merged_weights_after_each_update_without_drift():
    model = ppo("Pendulum-v1", lora())
    model.learn(160)
    batch = torch.as_tensor(observations(model))
    actions = torch.as_tensor(np.stack([model.action_space.sample() for _ in range(len(batch))]))
    for mine, learnt in zip(
        model.policy.evaluate_actions(batch, actions), model.learner.evaluate_actions(batch, actions), strict=True
    ):
        torch.testing.assert_close(mine, learnt, rtol=1e-5, atol=1e-5)
    before = weights(model.policy)
    for _ in range(200):
        model.merge()
    assert not changed(before, weights(model.policy))


def test_a_schedule_that_starts_at_zero_is_refused():
    with pytest.raises(UserError, match="start above 0"):
        ppo(adapter=lora(), learning_rate=LinearSchedule(0.0, 0.01, 1.0))


def test_weights_that_become_non_finite_stop_the_run():
    model = ppo("Pendulum-v1", lora())
    model.learn(16)
    with torch.no_grad():
        model.learner.action_net.weight[0, 0] = float("nan")
    with pytest.raises(Diverged, match="step 16"):
        model.train()


# Which layers


def test_hidden_layers_are_those_between_observation_and_heads():
    mlp = ppo(policy_kwargs={"net_arch": {"pi": [8, 8, 8], "vf": [8, 8]}})
    assert hidden_layers(mlp.policy) == [
        "mlp_extractor.policy_net.2", "mlp_extractor.policy_net.4", "mlp_extractor.value_net.2",
    ]  # fmt: skip
    image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    cnn = ppo(DummyVecEnv([lambda: Toy(image, spaces.Discrete(2))]), policy="CnnPolicy", policy_kwargs={})
    assert hidden_layers(cnn.policy) == [
        "features_extractor.cnn.2", "features_extractor.cnn.4", "features_extractor.linear.0",
    ]  # fmt: skip


@pytest.mark.parametrize("share", [True, False])
def test_separate_feature_extractors_carry_their_own_adapters(share):
    image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    envs = DummyVecEnv([lambda: Toy(image, spaces.Discrete(2))])
    options = {"share_features_extractor": share, "net_arch": [8]}
    model = ppo(envs, lora(2), policy="CnnPolicy", policy_kwargs=options)
    layers = len(list(lora_layers(model.learner)))
    assert layers == (5 if share else 8)  # three of each extractor; the first MLP layers follow the extractor
    before = learner_weights(model)
    model.learn(32)
    assert sum("lora_" in name for name in changed(before, learner_weights(model))) == 2 * layers
    assert not changed(weights(model.policy), weights(stable_baselines3_copy(model)))


def stable_baselines3_copy(model):
    """The acting policy as plain SB3 gets it from the zip."""
    import io

    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return stable_baselines3.PPO.load(file, device="cpu").policy


def test_names_of_layers_are_matched_exactly():
    policy = ppo().policy
    assert resolve_layers(policy, ["value_net"]) == ["value_net"]  # PEFT would take the critic's body too
    assert resolve_layers(policy, ["policy_net.2"]) == ["mlp_extractor.policy_net.2"]
    assert resolve_layers(policy, r"mlp_extractor\..*") == [n for n in resolve_layers(policy, "all-linear")[:4]]
    assert len(resolve_layers(policy, "all-linear")) == 6
    with pytest.raises(UserError, match="several layers"):
        resolve_layers(policy, ["2"])
    with pytest.raises(UserError, match="no linear or convolutional layer"):
        resolve_layers(policy, ["mlp_extractor"])


def test_a_head_may_carry_lora_and_is_then_not_trained_fully():
    model = ppo("Pendulum-v1", LoRA(1, target_modules=["action_net"]))
    trained = {name for name, parameter in model.learner.named_parameters() if parameter.requires_grad}
    assert "action_net.lora_A.default.weight" in trained and "action_net.base_layer.weight" not in trained
    assert {"value_net.weight", "log_std"} <= trained


def test_a_rank_above_every_layers_size_and_a_network_without_hidden_layers_are_refused():
    with pytest.raises(UserError, match="rank 17 exceeds"):
        ppo(adapter=lora(17))
    with pytest.raises(UserError, match="no layer of the policy matches"):
        ppo(adapter=lora(2), policy_kwargs={"net_arch": [16]})


def test_the_configuration_for_the_rules():
    source = ppo(adapter=lora(4)).configuration()
    assert (source.scheme, source.width, source.rank, source.optimizer) == (Scheme.INIT_B, 16, 4, "adam")
    assert ppo(adapter=Full("hidden")).configuration().scheme is Scheme.FFT


# Save and load


@pytest.mark.parametrize("adapter", [lora(), Full("hidden")])
def test_plain_sb3_loads_runs_and_trains_what_is_saved(adapter, tmp_path):
    model = ppo("Pendulum-v1", adapter)
    model.learn(64)
    model.save(tmp_path / "policy.zip")
    plain = stable_baselines3.PPO.load(tmp_path / "policy.zip", env=make_vec_env("Pendulum-v1"), device="cpu")
    assert type(plain) is stable_baselines3.PPO and not hasattr(plain, "learner")
    batch = observations(model)
    np.testing.assert_array_equal(
        plain.predict(batch, deterministic=True)[0], model.predict(batch, deterministic=True)[0]
    )
    before = weights(plain.policy)
    plain.learn(32, reset_num_timesteps=False)
    assert changed(before, weights(plain.policy))


def test_our_own_load_keeps_the_weights_and_attaches_a_new_adapter(tmp_path):
    model = ppo("Pendulum-v1", lora())
    model.learn(64)
    model.save(tmp_path / "policy.zip")
    loaded = PPO.load(tmp_path / "policy.zip", env=make_vec_env("Pendulum-v1"), adapter=lora(2), device="cpu")
    assert not changed(weights(model.policy), weights(loaded.policy))
    assert {layer.r["default"] for _, layer in lora_layers(loaded.learner)} == {2}
    loaded.learn(32)
    assert changed(weights(model.policy), weights(loaded.policy))


def test_set_parameters_restarts_the_learner_from_the_new_weights():
    trained, fresh = ppo("Pendulum-v1", lora()), ppo("Pendulum-v1", lora(), seed=1)
    trained.learn(64)
    fresh.set_parameters(trained.get_parameters())
    assert not changed(weights(trained.policy), weights(fresh.policy))
    before = weights(fresh.policy)
    fresh.learn(16)
    assert changed(before, weights(fresh.policy)) == {f"{name}.weight" for name in HIDDEN} | {
        "action_net.weight", "action_net.bias", "value_net.weight", "value_net.bias", "log_std",
    }  # fmt: skip


def test_plain_peft_puts_the_saved_adapter_onto_the_saved_base(tmp_path):
    model = ppo("Pendulum-v1", lora(init="A"))
    model.learn(64)
    model.save_adapter(tmp_path / "adapter")
    merged = weights(model.policy)
    base = stable_baselines3.PPO.load(tmp_path / "adapter" / "base_policy.zip", device="cpu")
    heads = {"action_net.weight", "action_net.bias", "value_net.weight", "value_net.bias", "log_std"}
    assert changed(merged, weights(base.policy)) == {f"{name}.weight" for name in HIDDEN} | heads
    PeftModel.from_pretrained(base.policy, str(tmp_path / "adapter"))
    batch = observations(model)
    np.testing.assert_allclose(
        base.predict(batch, deterministic=True)[0], model.predict(batch, deterministic=True)[0], atol=1e-5
    )
    assert not changed(merged, weights(model.policy))  # saving changes nothing


# The cases of SB3's own tests


@pytest.mark.parametrize("adapter", [lora(2), Full("hidden")], ids=["lora", "full"])
@pytest.mark.parametrize(
    "action_space",
    [spaces.Discrete(3), vector(shape=(2,)), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)],
    ids=["Discrete", "Box", "MultiDiscrete", "MultiBinary"],
)
def test_every_action_space_of_sb3_is_learnt_and_predicted(action_space, adapter):
    model = ppo(DummyVecEnv([lambda: Toy(vector(), action_space)] * 2), adapter)
    model.learn(64)
    one, many = model.observation_space.sample(), observations(model, 3)
    first, second = (model.predict(one, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert action_space.contains(first)
    assert len(model.predict(many)[0]) == 3


@pytest.mark.parametrize(
    ("observation_space", "policy"),
    [
        (spaces.Discrete(4), "MlpPolicy"),
        (spaces.MultiBinary(4), "MlpPolicy"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), "CnnPolicy"),
        (spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 3), np.uint8), "x": vector()}), "MultiInputPolicy"),
    ],
    ids=["Discrete", "MultiBinary", "image", "Dict"],
)
def test_observation_spaces_of_sb3(observation_space, policy):
    model = ppo(DummyVecEnv([lambda: Toy(observation_space, spaces.Discrete(2))]), lora(2), policy)
    before = weights(model.policy)
    model.learn(32)
    assert changed(before, weights(model.policy))


@pytest.mark.parametrize(
    "options",
    [
        {"use_sde": True, "sde_sample_freq": 4},
        {"clip_range_vf": 0.2, "ent_coef": 0.01},
        {"target_kl": 1e-4, "normalize_advantage": False},
        {"policy_kwargs": {"net_arch": [16, 16], "activation_fn": torch.nn.ReLU, "ortho_init": False}},
        {"policy_kwargs": {"net_arch": [16, 16], "optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {}}},
    ],
    ids=["sde", "clip_vf", "target_kl", "relu", "adamw"],
)
def test_options_of_sb3_run_with_lora(options):
    model = ppo("Pendulum-v1", lora(), **options)
    before = weights(model.policy)
    model.learn(64)
    assert changed(before, weights(model.policy))
    if "log_std" in before:
        assert not torch.equal(before["log_std"], model.policy.log_std)


def test_vec_normalize_is_used_and_found_again():
    envs = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
    model = ppo(envs, lora())
    model.learn(64)
    assert model.get_vec_normalize_env() is envs and envs.obs_rms.count > 60


def test_same_seed_same_weights_and_another_seed_another():
    first, second, third = (ppo("Pendulum-v1", lora(), seed=seed).learn(48) for seed in (3, 3, 4))
    assert not changed(weights(first.policy), weights(second.policy))
    assert changed(weights(first.policy), weights(third.policy))
