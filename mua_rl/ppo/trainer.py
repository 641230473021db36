"""PPO with LoRA or full finetuning: stable-baselines3's `PPO`, with what is trained kept apart from what acts.

`policy` stays an ordinary SB3 policy with merged weights. It acts in rollouts, predicts, and is what `save` writes:
rollouts cost what they cost in SB3, and plain SB3 loads the zip. `learner` is a copy of it with the adapter attached
and an optimiser of its own. SB3's `train` runs on it; afterwards `policy` takes over `W* + α B A`, from the stored W*,
so nothing drifts however often that happens. Full finetuning takes the same path with a plain copy.

What is trained: LoRA on the hidden layers, and fully the output heads (`action_net`, `value_net`, `log_std`), which
are too small for a rank and which the LR rules do not cover: their learning rate stays when the rank changes. The
layers that read the observation, and all biases but the heads', stay frozen under LoRA.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import stable_baselines3
import torch
from peft import PeftModel
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from mua_rl.adapter.adapters import Adapter, Full
from mua_rl.adapter.groups import FULL, learning_rates, param_groups, role_of, scale_learning_rates
from mua_rl.adapter.targets import TargetModules, fan_in, lora_layers
from mua_rl.errors import Diverged, UserError
from mua_rl.lr.rules import Configuration
from mua_rl.ppo.base import BasePolicy

HEAD = "head"
HEADS = ("action_net", "value_net", "log_std")
OWN_STATE = ("adapter", "attached", "wrapped", "learner", "target_layers", "widths", "head_learning_rate")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        adapter: `LoRA(...)` or `Full()`; None is `Full()`. A LoRA's target modules may be `"hidden"` (see
            `hidden_layers`), `"all-linear"` or names of layers; see `resolve_layers`.
        head_learning_rate: LR of the heads, which are trained fully; None is η.

    Attributes:
        policy: The merged policy that acts.
        learner: What is trained; `learner.optimizer` has the parameter groups.
        target_layers, widths: Names of the layers that the adapter's LR rules speak of, and their fan-ins.
    """

    def __init__(
        self,
        *args: Any,
        adapter: Adapter | None = None,
        head_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        self.adapter = adapter
        self.head_learning_rate = head_learning_rate
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
        self.attach()

    def attach(
        self,
        adapter: Adapter | None = None,
        learning_rate: float | Schedule | None = None,
        head_learning_rate: float | None = None,
    ) -> None:
        """(Re)build the learner from the weights of `policy`: a new adapter, a new optimiser, no memory of the old.

        Arguments as in the constructor; None keeps what was given before.

        Raises:
            UserError: The adapter does not fit the network, or the schedule starts at 0.
        """
        self.adapter = adapter or self.adapter
        self.head_learning_rate = head_learning_rate or self.head_learning_rate
        if learning_rate is not None:
            self.learning_rate = learning_rate
            self._setup_lr_schedule()
        peak = self.lr_schedule(1.0)
        if not peak > 0:
            raise UserError(
                f"the learning rate must start above 0, not at {peak}: its schedule is a factor on its start."
            )
        with torch.random.fork_rng():  # attaching draws nothing from the run's own random numbers
            self.learner: ActorCriticPolicy = self.policy_class(  # type: ignore[assignment]
                self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
            ).to(self.device)
            self.learner.load_state_dict(self.policy.state_dict())
            chosen: Any = self.adapter or Full("hidden")
            if chosen.rank is None and not hidden_layers(self.policy):
                chosen = replace(chosen, target_modules="all-linear")  # whose width the LR rules then speak of
            self.target_layers = resolve_layers(self.policy, chosen.target_modules)
            self.attached = replace(chosen, target_modules=exactly(self.target_layers))
            self.widths = sorted({fan_in(self.policy.get_submodule(name).weight) for name in self.target_layers})  # type: ignore[arg-type]
            self.wrapped = self.attached.attach(self.learner, seed=self.seed or 0)
        for name, parameter in self.learner.named_parameters():
            if head_role_of(name) == HEAD:
                parameter.requires_grad_(True)
        rates = {**self.attached.learning_rates(peak), HEAD: self.head_learning_rate or peak}
        groups = param_groups(self.learner, rates, role_of=head_role_of)
        self.learner.optimizer = self.policy.optimizer_class(groups, **self.policy.optimizer_kwargs)
        self.merge()

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
        try:
            super().train()
        except ValueError:  # torch's distributions refuse NaN
            self._check_finite()
            raise
        finally:
            self.policy = policy
        self._check_finite()
        self.merge()

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
        """Write the adapter in PEFT's format, with the policy it belongs to as `base_policy.zip`.

        `PeftModel.from_pretrained(stable_baselines3.PPO.load(folder / "base_policy.zip").policy, folder)` is the
        trained policy again: that zip holds the frozen base weights and the trained heads. Nothing is written for full
        finetuning.
        """
        if not isinstance(self.wrapped, PeftModel):
            return
        folder = Path(folder)
        self.wrapped.save_pretrained(str(folder))
        try:
            with torch.no_grad():
                frozen = self.learner.state_dict()
                acting = self.policy.state_dict()
                for name, _ in lora_layers(self.learner):
                    acting[f"{name}.weight"].copy_(frozen[f"{name}.base_layer.weight"])
            self.save(folder / "base_policy.zip")
        finally:
            self.merge()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *OWN_STATE]


def head_role_of(name: str) -> str:
    """`mua_rl.adapter.groups.role_of`, and "head" for what a policy's output heads have beside a LoRA of their own."""
    segments = name.split(".")
    if segments[0] in HEADS and "base_layer" not in segments and role_of(name) == FULL:
        return HEAD
    return role_of(name)


def exactly(names: Sequence[str]) -> str:
    """A regular expression for these full names and no others (PEFT takes a list of names as endings)."""
    return "|".join(map(re.escape, names))


def hidden_layers(policy: ActorCriticPolicy) -> list[str]:
    """Full names of the linear and convolutional layers that neither read the observation nor are heads."""
    names = [name for name, module in policy.named_modules() if isinstance(module, LAYERS)]
    branches = [f"mlp_extractor.{net}" for net in ("policy_net", "value_net", "shared_net")]
    extractors = {
        name: module
        for name, module in policy.named_children()
        if name in ("features_extractor", "pi_features_extractor", "vf_features_extractor")
    }
    if any(name.split(".")[0] in extractors for name in names):
        branches = [
            f"{name}.extractors.{key}" if isinstance(module, CombinedExtractor) else name
            for name, module in extractors.items()
            for key in (module.extractors if isinstance(module, CombinedExtractor) else [""])
        ]
    first = [next((name for name in names if name.startswith(f"{branch}.")), None) for branch in branches]
    return [name for name in names if name not in first and name.split(".")[0] not in HEADS]


def resolve_layers(policy: ActorCriticPolicy, targets: TargetModules) -> list[str]:
    """Full names of the layers that `targets` names.

    Args:
        policy: A plain SB3 policy.
        targets: "hidden" (or "mlp", the default of `LoRA`), "all-linear", a regular expression for full names, or a
            list of full names or unambiguous endings. A full name wins over an ending (`value_net` is the head, not
            the critic's body, where PEFT's own matching takes both).

    Raises:
        UserError: A name fits no layer, or several, or there is no hidden layer.
    """
    layers = [name for name, module in policy.named_modules() if isinstance(module, LAYERS)]
    if isinstance(targets, list) and len(targets) == 1 and targets[0] in ("hidden", "all-linear"):
        targets = targets[0]
    if targets in ("hidden", "mlp"):
        found = hidden_layers(policy)
    elif targets == "all-linear":
        found = layers
    elif isinstance(targets, str):
        found = [name for name in layers if re.fullmatch(targets, name)]
    else:
        found = [_one_layer(layers, target) for target in targets]
    if not found:
        raise UserError(
            f"no layer of the policy matches the target modules {targets!r}: name some of {', '.join(layers)} with "
            "--target_modules, or train it fully (--rank full)."
        )
    return found


def _one_layer(layers: Sequence[str], target: str) -> str:
    found = [name for name in layers if name == target] or [name for name in layers if name.endswith(f".{target}")]
    if len(found) != 1:
        kind = f"several layers ({', '.join(found)})" if found else "no linear or convolutional layer"
        raise UserError(f"the target module {target!r} names {kind} of the policy; its layers: {', '.join(layers)}.")
    return found[0]
