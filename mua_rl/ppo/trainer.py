"""PPO with LoRA or full finetuning: stable-baselines3's `PPO`, with what is trained kept apart from what acts.

`policy` stays an ordinary SB3 policy with merged weights. It acts in rollouts, predicts, and is what `save` writes:
rollouts cost what they cost in SB3, and plain SB3 loads the zip. `learner` is a copy of it with the adapter attached
and an optimiser of its own. SB3's `train` runs on it; afterwards `policy` takes over `W* + α B A`, from the stored W*,
so nothing drifts however often that happens. Full finetuning takes the same path with a plain copy.

What is trained: LoRA on the hidden layers, and fully the output heads (`action_net`, `value_net`, `log_std`), which
are too small for a rank and which the LR rules do not cover: their learning rate stays when the rank changes. The
layers that read the observation, and all biases but the heads', stay frozen under LoRA.
"""

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import stable_baselines3
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from mua_rl.adapter.adapters import Adapter, Full, LoRA, adapter_for
from mua_rl.adapter.groups import learning_rates, param_groups, scale_learning_rates
from mua_rl.adapter.targets import fan_in, lora_layers
from mua_rl.errors import Diverged, UserError
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import AdapterSpec
from mua_rl.ppo.base import BasePolicy
from mua_rl.ppo.layers import CRITIC, HEAD, fit, head_role_of, hidden_layers, is_critics, resolve_layers

OWN_STATE = ("adapter", "attached", "learner", "target_layers", "widths", "base_state", "base_policy")
"""What a zip leaves out: it is made anew from the zip's weights."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # as PEFT calls it


class PPO(stable_baselines3.PPO):
    """Proximal Policy Optimization (Schulman et al. 2017) that trains an adapter or all weights.

        base = read_base_policy("policy.zip")
        model = PPO.from_base(base, envs, adapter=LoRA(rank=8), learning_rate=1e-3)
        model.learn(50_000)
        model.save("adapted.zip")  # for plain SB3
        model.save_adapter("adapter")  # for plain PEFT

    Takes what `stable_baselines3.PPO` takes, and these keywords. `learning_rate` is the peak η of the trained hidden
    weights; if it is a schedule, every parameter group follows its shape, so the groups' ratios never change.

    Args:
        adapter: `LoRA(...)` or `Full()`; None is what a zip that is loaded was trained with, else `Full()`. A LoRA's
            target modules may be `"hidden"` (see `hidden_layers`), `"actor"` (of these the actor's alone; the critic,
            which is never deployed, is trained fully), `"all-linear"` or names of layers; see `resolve_layers`.
        head_learning_rate: LR of the heads, which are trained fully; None is η.
        critic_learning_rate: LR of whatever the critic trains; None is that of the same parts of the actor.
        critic_warmup: Rollouts at the start of a run on which the critic alone is trained.
        clip_apart: Whether the gradients of actor and critic are clipped to `max_grad_norm` each for itself.
        base_kl: β of a penalty `β (log π(a|s) - log π_base(a|s))` on the reward of every step, whose mean is the KL
            divergence from the policy that the run began with (Ziegler et al. 2019).

    Attributes:
        policy: The merged policy that acts.
        learner: What is trained; `learner.optimizer` has the parameter groups.
        target_layers, widths: Names of the layers that the adapter's LR rules speak of, and their fan-ins.
        base_state: The weights that the adapter was attached to.
    """

    def __init__(
        self,
        *args: Any,
        adapter: Adapter | None = None,
        head_learning_rate: float | None = None,
        critic_learning_rate: float | None = None,
        critic_warmup: int = 0,
        clip_apart: bool = False,
        base_kl: float = 0.0,
        **kwargs: Any,
    ):
        self.adapter = adapter
        self.saved_adapter: dict[str, Any] | None = None
        self.head_learning_rate, self.critic_learning_rate = head_learning_rate, critic_learning_rate
        self.critic_warmup, self.clip_apart, self.base_kl = critic_warmup, clip_apart, base_kl
        super().__init__(*args, **kwargs)

    @classmethod
    def from_base(cls, base: BasePolicy, env: VecEnv, **kwargs: Any) -> Self:
        """Start from a pretrained policy; PPO options that are not given are those it was trained with.

        Raises:
            UserError: The environment has other spaces than the policy, or the weights do not fit.
        """
        env = cls._wrap_env(env, monitor_wrapper=False)
        base.check_spaces(env.observation_space, env.action_space)
        options = {**base.options, "policy_kwargs": base.policy_kwargs, **kwargs}
        model = cls(base.policy_class, env, **options)
        base.load_into(model.policy)
        model.attach()
        return model

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.adapter is None and self.saved_adapter is not None:  # of the zip that is being loaded
            saved = self.saved_adapter
            spec = AdapterSpec.parse(saved["rank"], saved["init"], saved["alpha"])
            self.adapter = adapter_for(spec, saved["target_modules"])
            print(
                f"mua_rl: a new {spec} on the merged weights of the zip; load it with adapter=Full() to train them all."
            )
        self.attach()

    def attach(
        self,
        adapter: Adapter | None = None,
        learning_rate: float | Schedule | None = None,
        head_learning_rate: float | None = None,
        critic_learning_rate: float | None = None,
    ) -> None:
        """(Re)build the learner from the weights of `policy`: a new adapter, a new optimiser, no memory of the old.

        Arguments as in the constructor; None keeps what was given before.

        Raises:
            UserError: The adapter does not fit the network, or the schedule starts at 0.
        """
        self.adapter = adapter or self.adapter
        self.head_learning_rate = head_learning_rate or self.head_learning_rate
        self.critic_learning_rate = critic_learning_rate or self.critic_learning_rate
        if learning_rate is not None:
            self.learning_rate = learning_rate
            self._setup_lr_schedule()
        peak = self.lr_schedule(1.0)
        if not peak > 0:
            raise UserError(
                f"the learning rate must start above 0, not at {peak}: its schedule is a factor on its start."
            )
        self.base_state = {name: value.clone() for name, value in self.policy.state_dict().items()}
        chosen: Any = self.adapter or Full("hidden")
        if chosen.rank is None and not hidden_layers(self.policy):
            chosen = replace(chosen, target_modules="all-linear")  # whose width the LR rules then speak of
        self.target_layers = resolve_layers(self.policy, chosen.target_modules)
        self.attached: Any = fit(chosen, self.policy, self.target_layers)
        self.widths = sorted({fan_in(self.policy.get_submodule(name).weight) for name in self.target_layers})  # type: ignore[arg-type]
        self.saved_adapter = None
        if chosen.rank is not None:
            self.saved_adapter = {**chosen.spec.as_dict(), "target_modules": chosen.target_modules}
        with torch.random.fork_rng():  # attaching draws nothing from the run's own random numbers
            self.learner = self._new_policy(self.base_state)
            self.attached.attach(self.learner, seed=self.seed or 0)
            self.base_policy = self._new_policy(self.base_state) if self.base_kl else None
        actor_alone = chosen.rank is not None and chosen.target_modules in ("actor", ["actor"])
        for name, parameter in self.learner.named_parameters():
            if head_role_of(name) == HEAD or (actor_alone and is_critics(name)):
                parameter.requires_grad_(True)
        self._set_optimizer(peak, critic_apart=actor_alone or self.critic_learning_rate is not None)
        self.merge()

    def _new_policy(self, state: dict[str, torch.Tensor]) -> ActorCriticPolicy:
        """A plain policy with these weights; one that has acted with gSDE cannot be copied."""
        policy: Any = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        )
        policy.load_state_dict(state)
        return policy.to(self.device)

    def _set_optimizer(self, peak: float, critic_apart: bool) -> None:
        """Give the learner an optimiser of its own, with a parameter group for each role that is trained."""

        def role(name: str) -> str:
            return CRITIC if critic_apart and is_critics(name) else head_role_of(name)

        heads = self.head_learning_rate or peak
        rates = {**self.attached.learning_rates(peak), HEAD: heads, CRITIC: self.critic_learning_rate or heads}
        trained = {role(name) for name, parameter in self.learner.named_parameters() if parameter.requires_grad}
        groups = param_groups(self.learner, {r: rate for r, rate in rates.items() if r in trained}, role_of=role)
        for group in groups:
            del group["weight_decay"]  # the optimiser's own, or that of `optimizer_kwargs`
        self.learner.optimizer = self.policy.optimizer_class(groups, **self.policy.optimizer_kwargs)
        if self.clip_apart:
            self.learner.optimizer.register_step_pre_hook(lambda *_: self._clip_apart())

    def _clip_apart(self) -> None:
        for critics in (False, True):
            part = [p for name, p in self.learner.named_parameters() if is_critics(name) is critics]
            nn.utils.clip_grad_norm_(part, self._own_max_grad_norm)

    @torch.no_grad()
    def merge(self) -> None:
        """Give the acting policy the learner's weights, `W* + α B A` where it carries LoRA."""
        learnt: dict[str, torch.Tensor] = dict(chain(self.learner.named_parameters(), self.learner.named_buffers()))
        for name, layer in lora_layers(self.learner):
            delta = layer.get_delta_weight("default")  # type: ignore[attr-defined]  # every subclass has it
            learnt[f"{name}.weight"] = learnt[f"{name}.base_layer.weight"] + delta
            if f"{name}.base_layer.bias" in learnt:
                learnt[f"{name}.bias"] = learnt[f"{name}.base_layer.bias"]
        # Not the state dict: it has an extractor that actor and critic share under three names.
        for name, value in chain(self.policy.named_parameters(), self.policy.named_buffers()):
            value.copy_(learnt[name])

    def train(self) -> None:
        """SB3's update, on the learner.

        Raises:
            Diverged: A trained weight is no longer finite.
        """
        policy, self.policy = self.policy, self.learner
        self._own_max_grad_norm = self.max_grad_norm
        if self.clip_apart:  # by the hook before the optimiser's step; SB3 then clips nothing
            self.max_grad_norm = math.inf
        waiting = []
        if self.num_timesteps <= self.critic_warmup * self.n_steps * self.n_envs:
            waiting = [p for name, p in self.learner.named_parameters() if p.requires_grad and not is_critics(name)]
        for parameter in waiting:
            parameter.requires_grad_(False)
        try:
            super().train()
        except ValueError:  # torch's distributions refuse NaN
            self._check_finite()
            raise
        finally:
            self.policy, self.max_grad_norm = policy, self._own_max_grad_norm
            for parameter in waiting:
                parameter.requires_grad_(True)
        self._check_finite()
        self.merge()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """As in SB3; with `base_kl` the rewards then pay for going away from the base policy."""
        goes_on = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        if goes_on and self.base_policy is not None:
            self._pay_for_distance(rollout_buffer, self.base_policy)
        return goes_on

    @torch.no_grad()
    def _pay_for_distance(self, buffer: RolloutBuffer, base: ActorCriticPolicy) -> None:
        def flat(values: Any) -> torch.Tensor:
            return torch.as_tensor(values.reshape(-1, *values.shape[2:]), device=self.device)

        seen: Any = buffer.observations
        if isinstance(buffer, DictRolloutBuffer):
            seen = {key: flat(value) for key, value in seen.items()}
        else:
            seen = flat(seen)
        actions = flat(buffer.actions)
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        _, log_probs, _ = base.evaluate_actions(seen, actions)
        distance = buffer.log_probs - log_probs.reshape(buffer.log_probs.shape).cpu().numpy()
        buffer.rewards -= self.base_kl * distance
        last = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        buffer.compute_returns_and_advantage(last_values=last, dones=self._last_episode_starts)  # type: ignore[arg-type]
        self.logger.record("train/base_kl", float(distance.mean()))

    def _check_finite(self) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in self.learner.parameters()):
            raise Diverged(f"a weight is no longer finite in the update after environment step {self.num_timesteps}")

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        """Scale every group's own LR by the schedule, where SB3 sets one LR for all."""
        factor = self.lr_schedule(self._current_progress_remaining) / self.lr_schedule(1.0)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            scale_learning_rates(optimizer, factor)
            for role, rate in learning_rates(optimizer).items():
                self.logger.record(f"lr/{role}", rate)

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        """As in SB3, on the acting policy; then training starts over from these weights, with a new adapter."""
        super().set_parameters(*args, **kwargs)
        self.attach()

    def configuration(self) -> Configuration:
        """What the LR rules need to know."""
        layers = nn.ModuleList([self.policy.get_submodule(name) for name in self.target_layers])
        adapter: Any = replace(self.attached, target_modules=r"\d+")
        return adapter.configuration(layers, self.policy.optimizer_class.__name__.lower())

    def save_adapter(self, folder: Path | str) -> None:
        """Write all that was trained in PEFT's format, and `base_policy.zip`, the policy that it was trained from.

        `PeftModel.from_pretrained(stable_baselines3.PPO.load(base).policy, folder)` is the trained policy again, of
        that zip or of the original one. The actor's head is among PEFT's `modules_to_save`, so that one base can carry
        many such adapters and switch between them (`load_adapter`, `set_adapter`). The critic's head, and the critic
        where it is trained fully, and `log_std` lie beside it; PEFT loads them into the base, where those of the last
        adapter stay: no deterministic action depends on them. Nothing is written for full finetuning.
        """
        if not isinstance(self.attached, LoRA):
            return
        from peft import get_peft_model  # here, since it imports transformers, which takes seconds

        folder = Path(folder)
        trained = {name: value.detach() for name, value in self.learner.named_parameters() if value.requires_grad}
        with torch.random.fork_rng():
            base = self._new_policy(self.base_state)
        config = self.attached.peft_config(base)
        switched = "action_net." if "action_net.weight" in trained else "-"
        config.modules_to_save = ["action_net"] if "action_net.weight" in trained else None
        peft_model = get_peft_model(base, config)
        with torch.no_grad():
            for name, value in base.named_parameters():  # with the adapter in it
                source = name.replace(".modules_to_save.default", "")
                if source in trained and ".original_module." not in name:
                    value.copy_(trained[source])
        peft_model.save_pretrained(str(folder))
        beside = {n: v.cpu() for n, v in trained.items() if "lora_" not in n and not n.startswith(switched)}
        weights = load_file(folder / ADAPTER_WEIGHTS)
        weights |= {f"base_model.model.{name}": value.contiguous() for name, value in beside.items()}
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self.policy.load_state_dict(self.base_state)
        try:
            self.save(folder / "base_policy.zip")
        finally:
            self.merge()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *OWN_STATE]
