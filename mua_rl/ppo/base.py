"""The base policy: what an SB3 PPO zip holds, read without trusting it to fit this machine's package versions.

A zip of stable-baselines3 or rl-zoo3 holds Python pickles: read only those whose origin you trust.
"""

import base64
import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from torch import nn

from mua_rl.envs.control import FAMILIES
from mua_rl.errors import UserError, one_line
from mua_rl.ppo import zoo
from mua_rl.ppo.pickles import unpickle

SHIPPED = Path(__file__).parents[1] / "assets" / "policies"
INHERITED = (
    "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "normalize_advantage", "ent_coef", "vf_coef",
    "max_grad_norm", "use_sde", "sde_sample_freq", "target_kl",
)  # fmt: skip
"""PPO options that a run takes from the base policy's zip where it is given none."""


@dataclass(frozen=True)
class BasePolicy:
    """A pretrained actor-critic.

    Attributes:
        path: The zip.
        policy_class, policy_kwargs: What builds the network.
        observation_space, action_space: What it was trained on; None where the zip's pickle cannot be read here.
        state_dict: Its weights, on the CPU.
        options: PPO options it was trained with, out of `INHERITED`, and a constant clip range.
        n_envs: Environments it was trained in.
        vec_normalize: Observation statistics that belong to it, if any.
        normalized: Whether settings beside it say that it has seen normalised observations.
    """

    path: Path
    policy_class: type[ActorCriticPolicy]
    policy_kwargs: dict[str, Any]
    observation_space: spaces.Space | None
    action_space: spaces.Space | None
    state_dict: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    n_envs: int = 8
    vec_normalize: Path | None = None
    normalized: bool = False

    def check_spaces(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        """Refuse an environment on which the policy cannot act.

        Bounds of observations are not compared: Gymnasium has changed some (CartPole's velocities) and they matter to
        no network. Bounds of actions are, since they are what the policy's output means.

        Raises:
            UserError: The shapes, kinds or action bounds differ.
        """
        for name, ours, theirs, strict in (
            ("observations", self.observation_space, observation_space, False),
            ("actions", self.action_space, action_space, True),
        ):
            if ours is None:
                continue
            same = ours == theirs if strict else _same_kind(ours, theirs)
            if not same:
                both = f"{name} {ours}, and this environment has {theirs}"
                raise UserError(f"{self.path} was trained with {' '.join(both.split())}.")

    def load_into(self, policy: nn.Module) -> None:
        """Copy the weights into a policy built from `policy_class` and `policy_kwargs`.

        Raises:
            UserError: They do not fit.
        """
        try:
            missing, unexpected = policy.load_state_dict(self.state_dict, strict=False)
        except RuntimeError as error:
            raise UserError(f"the weights of {self.path} do not fit the policy: {one_line(error)}") from None
        # Before SB3 1.7 actor and critic had one feature extractor under one name.
        missing = [name for name in missing if not name.startswith(("pi_features_extractor", "vf_features_extractor"))]
        if missing or unexpected:
            raise UserError(f"the weights of {self.path} do not fit the policy: {missing or unexpected} differ.")


def read_base_policy(path: Path | str, vec_normalize: Path | str = "auto") -> BasePolicy:
    """Read an SB3 PPO zip, written under any gym or Gymnasium.

    Args:
        path: The zip, of this package, stable-baselines3 or rl-zoo3, or a folder of theirs (`zoo.find_policy`).
        vec_normalize: Its observation statistics; "auto": those that `zoo.find_statistics` finds; "none", "new": none.

    Raises:
        UserError: There is no such file, it is no SB3 zip, it holds another algorithm than PPO, or its network or its
            statistics cannot be told.
    """
    path = zoo.find_policy(Path(path))
    if not path.is_file():
        raise UserError(f"there is no base policy at {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            keys = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError):
        raise UserError(f"{path} is no zip written by stable-baselines3's `save`.") from None
    module = str(keys.get("policy_class", {}).get("__module__", ""))
    if "clip_range" not in keys or "n_epochs" not in keys or module.startswith("sb3_contrib"):
        raise UserError(f"{path} holds another algorithm than stable-baselines3's PPO (its policy is from {module}).")
    policy_class = _read_entry(keys, "policy_class", path)
    policy_kwargs = _read_entry(keys, "policy_kwargs", path) or {}
    try:
        _, params, _ = load_from_zip_file(path, device="cpu", custom_objects=dict.fromkeys(keys))
    except Exception as error:  # a zip can be damaged in any way
        raise UserError(f"the weights of {path} cannot be read: {one_line(error)}") from None
    if policy_class is None or "policy" not in params:
        raise UserError(f"{path} is no zip written by stable-baselines3's `save`.")
    options = {key: keys[key] for key in INHERITED if keys.get(key) is not None}
    # Its pickle may hold a function, which another Python cannot read; SB3 writes its text beside it.
    constant = re.search(r"ConstantSchedule\(val=([\d.e+-]+)\)", str(keys["clip_range"]))
    clip_range = float(constant[1]) if constant else zoo.clip_range(path)
    if clip_range is not None:
        options["clip_range"] = clip_range
    statistics = None
    if vec_normalize == "auto":
        statistics = zoo.find_statistics(path)
    elif vec_normalize not in ("none", "new"):
        statistics = _existing(Path(vec_normalize))
    return BasePolicy(
        path=path,
        policy_class=policy_class,
        policy_kwargs=_modern_policy_kwargs(policy_kwargs),
        observation_space=_read_entry(keys, "observation_space", None),
        action_space=_read_entry(keys, "action_space", None),
        state_dict=params["policy"],  # type: ignore[arg-type]
        options=options,
        n_envs=int(keys.get("n_envs") or 8),
        vec_normalize=statistics,
        normalized=zoo.says_normalized(path),
    )


def _read_entry(keys: dict[str, Any], name: str, path: Path | None) -> Any:
    """An entry of a zip's data: JSON, or a pickle in it; None where it cannot be read and no path is given.

    Raises:
        UserError: The entry of the zip at the path cannot be read.
    """
    entry = keys.get(name)
    if not isinstance(entry, dict) or ":serialized:" not in entry:
        return entry
    try:
        return unpickle(base64.b64decode(entry[":serialized:"]))
    except Exception as error:  # a pickle can fail in any way
        if path is None:
            return None
        raise UserError(f"the {name} of {path} cannot be read here: {one_line(error)}") from None


def shipped_policy(env_id: str) -> Path | None:
    """The zip of the policy that ships for a task's family (pretrained on the nominal version), if there is one."""
    for family in FAMILIES:
        ids = {family.nominal_id, family.env_id(), *map(family.env_id, family.shifts)}
        path = SHIPPED / family.name / "policy.zip"
        if env_id.partition(":")[2] in ids or env_id in ids:
            return path if path.exists() else None
    return None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"there are no observation statistics at {path}.")
    return path


def _modern_policy_kwargs(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """As SB3's own `load`: without a device, and `net_arch=[dict(...)]` of SB3 < 1.8 as `dict(...)`."""
    kwargs = {key: value for key, value in policy_kwargs.items() if key not in ("device", "use_sde")}
    net_arch = kwargs.get("net_arch")
    if isinstance(net_arch, list) and net_arch and isinstance(net_arch[0], dict):
        kwargs["net_arch"] = net_arch[0]
    return kwargs


def _same_kind(ours: spaces.Space, theirs: spaces.Space) -> bool:
    if isinstance(ours, spaces.Dict) and isinstance(theirs, spaces.Dict):
        return ours.spaces.keys() == theirs.spaces.keys() and all(
            _same_kind(ours[key], theirs[key]) for key in ours.spaces
        )
    if isinstance(ours, spaces.Box) and isinstance(theirs, spaces.Box):
        return ours.shape == theirs.shape and (ours.dtype == "uint8") == (theirs.dtype == "uint8")
    return ours == theirs
