"""What `python -m mua_rl.ppo` can be asked: SB3's PPO options, the environment, the base policy, the run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.utils import LinearSchedule

from mua_rl.errors import UserError
from mua_rl.ppo.envs import import_from
from mua_rl.ppo.evaluation import TRAINING_SEEDS
from mua_rl.ppo.zoo import find_environment, find_policy, newest_version
from mua_rl.run.arguments import AdapterArguments, parse_run
from mua_rl.run.folder import RunFolder

DEFAULT_ENV = "mua_rl/CartPole-LongPole-v0"
ENVIRONMENT = ("env_id", "env_kwargs", "wrapper", "frame_stack")
FINETUNING: dict[str, Any] = {"target_kl": 0.03}
"""Defaults that differ from SB3's: an update stops at this KL (SB3: never), and the LR decays (SB3: constant)."""
INHERIT = "Default: what the base policy was trained with, else SB3's."


@dataclass
class PPOArguments:
    """PPO on a Gymnasium environment, from a pretrained policy. Every field is a flag and a YAML key."""

    env_id: str = field(  # None until `__post_init__`: a default that is given is more than a default to --start_from
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Gymnasium id (see mua_rl.envs.control for ours), or a class of yours as module:Class or "
            "file.py:Class. Default: a CartPole with a long pole, with --start_from that run's own."
        },
    )
    base: str = field(
        default="auto",
        metadata={
            "help": "SB3 PPO zip to start from (ours, stable-baselines3's, rl-zoo3's; it holds pickles, so one you "
            "trust), or rl-zoo3's folder of an agent, which says the environment as well; auto: the shipped one for "
            "the task, if any; none: random weights."
        },
    )
    vec_normalize: str = field(
        default="auto",
        metadata={"help": "Statistics (.pkl) of the base; auto: those beside its zip; new: from nothing; none."},
    )
    env_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keywords of the environment, as JSON or YAML, e.g. '{\"gravity\": 12}'."}
    )
    wrapper: dict | str | None = field(
        default=None,
        metadata={
            "help": "Wrapper of each environment, as module:Class, or several, the innermost first, with keywords, as "
            'JSON or YAML, e.g. \'["pkg:One", {"pkg:Two": {"size": 3}}]\'.'
        },
    )
    frame_stack: int = field(default=1, metadata={"help": "Observations stacked into one."})
    n_envs: int | None = field(
        default=None, metadata={"help": "Environments side by side. Default: the base policy's, else 8."}
    )
    subprocesses: bool = field(default=False, metadata={"help": "One process per environment."})
    total_timesteps: int = field(default=51_200, metadata={"help": "Environment steps to train for."})
    policy: str = field(default="MlpPolicy", metadata={"help": "MlpPolicy, CnnPolicy or MultiInputPolicy (no base)."})
    policy_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keywords of the policy (no base), as JSON or YAML."}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "The same as --lr."})
    head_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the heads, which are trained fully. Default: the record's, else that of the rest."
        },
    )
    critic_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of all that the critic trains. Default: as the actor's parts."}
    )
    critic_warmup: int = field(
        default=0, metadata={"help": "Rollouts at the start on which the critic alone is trained."}
    )
    clip_apart: bool = field(
        default=False, metadata={"help": "Clip the gradients of actor and critic to --max_grad_norm each for itself."}
    )
    base_kl: float = field(
        default=0.0,
        metadata={
            "help": "Price, in rewards as the policy sees them, of the KL divergence from the policy that training "
            "begins with, at every step."
        },
    )
    lr_schedule: str = field(
        default="linear", metadata={"help": "linear (to a tenth) or constant.", "choices": ["linear", "constant"]}
    )
    n_steps: int | None = field(default=None, metadata={"help": f"Steps of each environment per rollout. {INHERIT}"})
    batch_size: int | None = field(default=None, metadata={"help": f"Transitions of one optimizer step. {INHERIT}"})
    n_epochs: int | None = field(default=None, metadata={"help": f"Passes over a rollout. {INHERIT}"})
    gamma: float | None = field(default=None, metadata={"help": f"Discount. {INHERIT}"})
    gae_lambda: float | None = field(default=None, metadata={"help": f"GAE's λ. {INHERIT}"})
    clip_range: float | None = field(default=None, metadata={"help": f"Clipping of the probability ratio. {INHERIT}"})
    clip_range_vf: float | None = field(default=None, metadata={"help": "Clipping of the value. Default: none."})
    normalize_advantage: bool | None = field(default=None, metadata={"help": INHERIT})
    ent_coef: float | None = field(default=None, metadata={"help": f"Weight of the entropy bonus. {INHERIT}"})
    vf_coef: float | None = field(default=None, metadata={"help": f"Weight of the value loss. {INHERIT}"})
    max_grad_norm: float | None = field(default=None, metadata={"help": f"Gradient clipping. {INHERIT}"})
    use_sde: bool | None = field(default=None, metadata={"help": f"State-dependent exploration (no base). {INHERIT}"})
    sde_sample_freq: int | None = field(default=None, metadata={"help": INHERIT})
    rollout_buffer_class: str | None = field(default=None, metadata={"help": "As module:Class. Default: SB3's."})
    rollout_buffer_kwargs: dict | str | None = field(default=None, metadata={"help": "As JSON or YAML."})
    target_kl: float | None = field(
        default=FINETUNING["target_kl"], metadata={"help": "An update stops at 1.5 times this KL; 0: never."}
    )
    stats_window_size: int = field(default=100, metadata={"help": "Episodes in the mean return that is shown."})
    tensorboard_log: str | None = field(
        default=None, metadata={"help": "Folder for TensorBoard, or none. Default: tensorboard/ in the run folder."}
    )
    wandb: bool = field(default=False, metadata={"help": "Report to Weights & Biases too (pip install wandb)."})
    verbose: int = field(default=0, metadata={"help": "SB3's verbosity."})
    progress_bar: bool = field(default=True, metadata={"help": "Show progress."})
    seed: int = field(default=0, metadata={"help": "Of environments, adapter, actions and minibatches."})
    device: str = field(
        default="auto", metadata={"help": "auto: the CPU for an MlpPolicy, else a GPU if there is one."}
    )
    eval_episodes: int = field(default=40, metadata={"help": "Held-out episodes before and after training."})
    eval_steps: int | None = field(
        default=None,
        metadata={
            "help": "Environment steps between held-out measurements on the way, the best policy of which is kept as "
            "best_policy.zip. Default: none."
        },
    )
    checkpoint_steps: int | None = field(
        default=None, metadata={"help": "Environment steps between checkpoints. Default: a fifth of the run."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Run folder. Default: a new one under runs/."})

    def __post_init__(self) -> None:
        self.env_id = self.env_id or DEFAULT_ENV
        for name in ("env_kwargs", "policy_kwargs", "rollout_buffer_kwargs"):
            setattr(self, name, _mapping(getattr(self, name), name))
        if isinstance(self.wrapper, str) and self.wrapper.lstrip()[:1] in ("[", "{"):
            self.wrapper = _json(self.wrapper)
            if self.wrapper is None:
                raise UserError('--wrapper is no JSON: write \'["pkg:One", {"pkg:Two": {"size": 3}}]\'.')
        if not 0 <= self.seed < TRAINING_SEEDS:
            raise UserError(f"--seed must lie between 0 and {TRAINING_SEEDS - 1}, not at {self.seed}.")
        for name in (
            "total_timesteps",
            "eval_episodes",
            "frame_stack",
            "n_envs",
            "checkpoint_steps",
            "n_epochs",
            "eval_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}.")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name} must lie between 0 and 1, not at {value}.")
        for name in (
            "clip_range", "clip_range_vf", "max_grad_norm", "vf_coef", "target_kl", "critic_warmup", "base_kl",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"--{name} must not be negative, as {value} is.")

    def sb3_options(self) -> dict[str, Any]:
        """The PPO options that were given; the base policy and SB3 fill in the others."""
        names = (
            "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf",
            "normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "use_sde", "sde_sample_freq",
            "rollout_buffer_kwargs", "stats_window_size", "verbose", "seed",
        )  # fmt: skip
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.rollout_buffer_class:
            options["rollout_buffer_class"] = import_from(self.rollout_buffer_class)
        return {**options, "target_kl": self.target_kl or None}

    def own_options(self) -> dict[str, Any]:
        """The options of `mua_rl.ppo.trainer.PPO` that SB3's has not."""
        return {name: getattr(self, name) for name in ("critic_warmup", "clip_apart", "base_kl")}

    def schedule(self, peak: float) -> float | LinearSchedule:
        """What SB3 takes as `learning_rate`."""
        return linear_decay(peak) if self.lr_schedule == "linear" else peak


@dataclass
class PPOAdapterArguments(AdapterArguments):
    """What is trained, and at which learning rate, with the defaults of a control policy."""

    rank: str | None = field(
        default=None,
        metadata={"help": "LoRA rank; 0 or full: full finetuning. Default: 8, with --start_from full."},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers that carry LoRA: hidden (all but the heads and those that read the observation; default), "
            "actor (those of them that are not the critic's, which is trained fully), all-linear, a regular "
            "expression, or a list of names."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None and self.start_from is None:
            self.rank = "8"


def complete(arguments: PPOArguments, adapter_arguments: AdapterArguments, given: dict[str, Any]) -> None:
    """Fill in, and note among what was given, the environment of the run or the agent that a policy is taken from.

    That is `--start_from`, or a `--base` of rl-zoo3. Another environment may be given; it comes without the first one's
    keywords and wrappers.

    Raises:
        UserError: `--start_from` names no run, or contradicts `--base`; or the agent's folder cannot be used.
    """
    file, colon, name = arguments.env_id.rpartition(":")
    if file.endswith(".py"):  # so that the run can be resumed from any folder
        arguments.env_id = given["env_id"] = f"{Path(file).resolve()}{colon}{name}"
    if adapter_arguments.start_from is not None:
        settings = RunFolder.open(adapter_arguments.start_from).settings()
        if "base" in given:
            raise UserError(f"--start_from {adapter_arguments.start_from} brings its own policy: drop --base.")
        same = {"env_id": DEFAULT_ENV, **{name: settings[name] for name in ENVIRONMENT if name in settings}}
    elif arguments.base not in ("auto", "none") and (policy := find_policy(Path(arguments.base))).is_file():
        if not (same := find_environment(policy)):
            return
        if given.get("env_id", same["env_id"]) == same["env_id"]:
            same["env_id"] = given["env_id"] = arguments.env_id = newest_version(same["env_id"])
    else:
        return
    if given.get("env_id", same["env_id"]) != same["env_id"]:
        return
    for name in same.keys() - given.keys():
        given[name] = same[name]
        setattr(arguments, name, _mapping(same[name], name) if name == "env_kwargs" else same[name])


def linear_decay(peak: float) -> LinearSchedule:
    """From the peak to a tenth of it over the run."""
    return LinearSchedule(peak, peak / 10, 1.0)


def limit_threads() -> None:
    """One thread: with networks of this size, more of them only wait for each other."""
    torch.set_num_threads(1)


def _mapping(value: dict | str | None, name: str) -> dict[str, Any] | None:
    if value is None or isinstance(value, dict):
        return value
    parsed = _json(value)
    if not isinstance(parsed, dict):
        raise UserError(f"--{name} takes a mapping in JSON, such as '{{\"key\": 1}}', not {value!r}.")
    return parsed


def _json(text: str) -> Any:
    """What a text in JSON says; None where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def parse(argv: list[str] | None = None) -> tuple[PPOArguments, AdapterArguments, dict]:
    """Command line to arguments.

    Raises:
        UserError: As `parse_run`; or `--start_from` contradicts `--base`.
    """
    adapter_arguments, arguments, given = parse_run(PPOAdapterArguments, PPOArguments, argv)
    complete(arguments, adapter_arguments, given)
    return arguments, adapter_arguments, given
