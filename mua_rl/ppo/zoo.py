"""An agent in a folder, as rl-zoo3 leaves it: which zip is the policy, and what it was trained in.

    ppo/Hopper-v3_1/best_model.zip, Hopper-v3.zip, rl_model_10000_steps.zip, rl_model_vecnormalize_10000_steps.pkl
    ppo/Hopper-v3_1/Hopper-v3/args.yml, config.yml, vecnormalize.pkl

A snapshot of a hub repository (`sb3/ppo-Hopper-v3`) has the same files in one folder, and env_kwargs.yml.
"""

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import yaml
from gymnasium.envs.registration import find_highest_version, parse_env_id

from mua_rl.errors import UserError, one_line

STATISTICS = ("vecnormalize.pkl", "vec_normalize.pkl")
NOT_POLICIES = ("train_eval_metrics.zip", "replay_buffer.zip")


class _Loader(yaml.SafeLoader):
    """Reads the YAML that rl-zoo3 writes, which names Python's ordered dictionaries, without running anything."""


def _pairs(loader: _Loader, node: Any) -> dict[str, Any]:
    return dict(loader.construct_sequence(node, deep=True)[0])


def _sequence(loader: _Loader, _: str, node: Any) -> Any:
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _pairs)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _sequence)


def find_policy(path: Path) -> Path:
    """The zip of an agent: the path itself or, in a folder, `best_model.zip`, else the last one that was saved.

    Raises:
        UserError: There is none, or there are several.
    """
    if not path.is_dir():
        return path
    zips = [file for file in sorted(path.glob("*.zip")) if file.name not in NOT_POLICIES]
    finals = [file for file in zips if not _checkpoint_steps(file)]
    for name in ("best_model.zip", "policy.zip"):
        if path / name in finals:
            return path / name
    if len(finals) > 1:
        names = ", ".join(file.name for file in finals)
        raise UserError(f"the folder {path} holds several policies ({names}): name one of them.")
    if not zips:
        raise UserError(f"the folder {path} holds no policy: it has no zip that stable-baselines3's `save` wrote.")
    return finals[0] if finals else max(zips, key=_checkpoint_steps)


def find_statistics(policy: Path) -> Path | None:
    """The observation statistics that belong to a policy, where SB3's examples, its callbacks and rl-zoo3 put them.

    Raises:
        UserError: There are several, and nothing says which.
    """
    steps = _checkpoint_steps(policy)
    stem = policy.stem.replace(f"_{steps}_steps", f"_vecnormalize_{steps}_steps")
    beside = [policy.with_name(f"{stem}.pkl")] if steps else []
    beside += [policy.with_name("best_vecnormalize.pkl")] if policy.stem == "best_policy" else []  # of our own runs
    for path in beside + [folder / name for folder in _own_folders(policy) for name in STATISTICS]:
        if path.is_file():
            return path
    others = [folder / name for folder in _agent_folders(policy) for name in STATISTICS]
    others = [path for path in others if path.is_file()]
    if len(others) > 1:
        raise UserError(f"{policy} may belong to any of {', '.join(map(str, others))}: name one with --vec_normalize.")
    return others[0] if others else None


def says_normalized(policy: Path) -> bool:
    """Whether config.yml says that a policy has seen normalised observations: true, or VecNormalize's keywords."""
    value = read_config(policy).get("normalize")
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return False
    return bool(value.get("norm_obs", True) if isinstance(value, dict) else value)


def read_config(policy: Path) -> dict[str, Any]:
    """The hyperparameters in the config.yml that belongs to a policy; nothing where there is none."""
    return _read(policy, "config.yml")


def find_environment(policy: Path) -> dict[str, Any]:
    """What a policy was trained in, under the names of `PPOArguments`; nothing where no args.yml says it."""
    arguments, config = _read(policy, "args.yml"), read_config(policy)
    if "env" not in arguments:
        return {}
    environment: dict[str, Any] = {"env_id": str(arguments["env"])}
    keywords = _read(policy, "env_kwargs.yml") or arguments.get("env_kwargs")
    if isinstance(keywords, dict) and keywords:
        environment["env_kwargs"] = keywords
    if wrappers := config.get("env_wrapper"):
        environment["wrapper"] = wrappers
    if int(config.get("frame_stack") or 1) > 1:
        environment["frame_stack"] = int(config["frame_stack"])
    return environment


def newest_version(env_id: str) -> str:
    """The environment, or its newest version where this Gymnasium makes the named one no more (which is said aloud)."""
    try:
        namespace, name, version = parse_env_id(env_id)
        newest = find_highest_version(namespace, name)
    except gymnasium.error.Error:
        return env_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:  # the versions of MuJoCo's tasks that have moved are registered as a function that raises
            gone = callable(gymnasium.spec(env_id).entry_point) and newest != version
        except gymnasium.error.Error:
            gone = True
    if not gone or newest is None:
        return env_id
    modern = f"{namespace}/{name}-v{newest}" if namespace else f"{name}-v{newest}"
    print(f"mua_rl: Gymnasium has no {env_id} any more: {modern} takes its place, whose returns may differ.")
    return modern


def clip_range(policy: Path) -> float | None:
    """The clip range in config.yml (of `lin_0.2`, which falls to 0, where it began); None where there is none."""
    value = read_config(policy).get("clip_range")
    match = re.fullmatch(r"(?:lin_)?([\d.eE+-]+)", str(value))
    return float(match[1]) if match else None


def _own_folders(policy: Path) -> list[Path]:
    return [policy.with_suffix(""), policy.parent]


def _agent_folders(policy: Path) -> list[Path]:
    """Folders beside a policy that SB3's callbacks have named, in one of which rl-zoo3 describes the agent."""
    if policy.stem != "best_model" and not _checkpoint_steps(policy):
        return []
    return sorted(path for path in policy.parent.glob("*") if path.is_dir())


def _read(policy: Path, name: str) -> dict[str, Any]:
    paths = [folder / name for folder in _own_folders(policy) + _agent_folders(policy) if (folder / name).is_file()]
    if not paths:
        return {}
    try:
        content = yaml.load(paths[0].read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{paths[0]} cannot be read: {one_line(error)}") from None
    return content if isinstance(content, dict) else {}


def _checkpoint_steps(path: Path) -> int:
    """How many steps a checkpoint of SB3's callback was saved after, by its name; 0 for other files."""
    match = re.search(r"_(\d+)_steps$", path.stem)
    return int(match[1]) if match else 0
