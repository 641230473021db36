"""What a PPO run is made of, built and checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.policies import ActorCriticCnnPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from mua_rl.adapter.adapters import Adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.errors import UserError, one_line
from mua_rl.lr.record import FILE_NAME, LRRecord, check_learning_rate
from mua_rl.lr.rules import Configuration
from mua_rl.lr.transfer import LearningRate
from mua_rl.ppo.arguments import PPOArguments
from mua_rl.ppo.base import SHIPPED, BasePolicy, read_base_policy, shipped_policy
from mua_rl.ppo.envs import build_envs, new_statistics, with_statistics
from mua_rl.ppo.trainer import PPO
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.folder import RunFolder
from mua_rl.run.learning_rate import Base, resolve_learning_rate

POLICY = "policy.zip"


@dataclass
class PPOSetup:
    """A model that is ready to train, with what it starts from and how it is trained."""

    model: PPO
    pretrained: BasePolicy | None
    base: Base
    configuration: Configuration
    rate: LearningRate


def find_base(arguments: PPOArguments, start_from: str | None) -> tuple[BasePolicy | None, str, LRRecord | None]:
    """The policy to start from (None: random weights), its name for the reader, and the record that belongs to it.

    Raises:
        UserError: A policy or a run that cannot be used.
    """
    statistics = arguments.vec_normalize
    if start_from is not None:
        run = RunFolder.open_policy(start_from)
        result = run.result()
        if result is not None and result.is_good and not (run.path / FILE_NAME).exists():  # it learnt nothing
            return read_base_policy(run.path / POLICY, statistics), f"the policy of {start_from}", None
        record = LRRecord.load(run.path)
        return read_base_policy(run.path / POLICY, statistics), f"{record.base_model} after {start_from}", record
    path = shipped_policy(arguments.env_id) if arguments.base == "auto" else Path(arguments.base)
    if path is None or arguments.base == "none":
        return None, f"a new {arguments.policy}", None
    shipped = path.is_relative_to(SHIPPED)
    return read_base_policy(path, statistics), f"the shipped {path.parent.name} policy" if shipped else str(path), None


def set_up(arguments: PPOArguments, adapter_arguments: AdapterArguments) -> PPOSetup:
    """Build environments and policy, attach the adapter, find the learning rate.

    Raises:
        UserError: Something that was given cannot be used.
    """
    adapter: Adapter = adapter_arguments.adapter("hidden")
    pretrained, name, record = find_base(arguments, adapter_arguments.start_from)
    envs = training_envs(arguments, pretrained)
    options = {**arguments.sb3_options(), **arguments.own_options(), "adapter": adapter}
    try:
        if pretrained is None:
            device = "cpu" if (arguments.device, arguments.policy) == ("auto", "MlpPolicy") else arguments.device
            model = PPO(arguments.policy, envs, policy_kwargs=arguments.policy_kwargs, device=device, **options)
        else:
            if arguments.policy_kwargs is not None or arguments.use_sde is not None:
                raise UserError("--policy_kwargs and --use_sde shape a new network: drop them, or give --base none.")
            images = issubclass(pretrained.policy_class, (ActorCriticCnnPolicy, MultiInputActorCriticPolicy))
            device = "cpu" if arguments.device == "auto" and not images else arguments.device
            model = PPO.from_base(pretrained, envs, device=device, **options)
    except UserError:
        raise
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"PPO cannot be built: {one_line(error)}") from None
    if pretrained is not None and "clip_range" not in options.keys() | pretrained.options.keys():
        clip = model.clip_range(1.0)  # type: ignore[operator]  # a schedule, once SB3 has set the model up
        print(
            f"mua_rl: the clip_range of {pretrained.path} changes on the way or is of an older SB3, and is not read: "
            f"{clip:g}, SB3's default, is taken; --clip_range gives another."
        )
    conditions = {**batch(model), "schedule": arguments.lr_schedule, "task": arguments.env_id}
    if adapter.rank is not None:
        conditions["layers"] = model.target_layers
    base = Base(name, fingerprint(model.policy), record, arguments.env_id, conditions)
    configuration = model.configuration()
    rate = resolve_learning_rate(adapter_arguments, configuration, base, "ppo")
    head_rate = rate.others.get("head") if arguments.head_lr is None else arguments.head_lr
    critic_rate = rate.others.get("critic") if arguments.critic_lr is None else arguments.critic_lr
    for flag, value in (("--head_lr", head_rate), ("--critic_lr", critic_rate)):
        if value is not None:
            check_learning_rate(value, flag)
    model.attach(
        learning_rate=arguments.schedule(rate.value), head_learning_rate=head_rate, critic_learning_rate=critic_rate
    )
    return PPOSetup(model, pretrained, base, configuration, rate)


def batch(model: PPO) -> dict[str, Any]:
    """What a record says of the data of an update, and of what is made of it."""
    return {
        "environments": model.n_envs,
        "steps_per_rollout": model.n_steps,
        "minibatch": model.batch_size,
        "epochs": model.n_epochs,
        "target_kl": model.target_kl,
        "gamma": model.gamma,
    }


def training_envs(arguments: PPOArguments, pretrained: BasePolicy | None) -> VecEnv:
    """Environments to train in, normalised where the base policy or the arguments say so.

    Raises:
        UserError: The base policy's statistics are missing, or something that was given cannot be used.
    """
    automatic = arguments.vec_normalize == "auto"
    if automatic and pretrained is not None and pretrained.normalized and pretrained.vec_normalize is None:
        raise UserError(
            f"{pretrained.path} was trained on normalised observations, as the config.yml beside it says, and its "
            "statistics are not there: give --vec_normalize their .pkl, or none to do without."
        )
    n_envs = arguments.n_envs or (pretrained.n_envs if pretrained else 8)
    envs = bare_envs(arguments, n_envs, arguments.seed)
    if arguments.vec_normalize == "new":
        return new_statistics(envs, arguments.gamma or (pretrained.options["gamma"] if pretrained else 0.99))
    if pretrained is None or pretrained.vec_normalize is None or arguments.vec_normalize == "none":
        return envs
    return with_statistics(envs, pretrained.vec_normalize)


def bare_envs(arguments: PPOArguments, n_envs: int, seed: int) -> VecEnv:
    """Environments as the arguments describe them, without statistics."""
    return build_envs(
        arguments.env_id,
        n_envs,
        seed,
        arguments.env_kwargs,  # type: ignore[arg-type]  # a mapping since __post_init__
        arguments.wrapper,
        arguments.frame_stack,
        arguments.subprocesses,
    )
