"""The base policy: what an SB3 PPO zip holds, read without trusting it to fit this machine's package versions.

A zip of stable-baselines3 or rl-zoo3 holds Python pickles: read only those whose origin you trust.
"""

import base64
import io
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
from mua_rl.ppo.pickles import read_pickle

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
    """Read an SB3 PPO zip.

    Args:
        path: The zip, of this package, stable-baselines3 or rl-zoo3.
        vec_normalize: Its observation statistics; "auto" looks where stable-baselines3's callbacks and rl-zoo3 put
            them; "none" and "new" take none.

    Raises:
        UserError: There is no such file, it is no SB3 zip, it holds another algorithm than PPO, or several statistics
            may be its own.
    """
    path = Path(path)
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
    wanted = {"policy_class", "policy_kwargs", "observation_space", "action_space", "n_envs", *INHERITED}
    values = {key: _value(value) if key in wanted else None for key, value in keys.items()}
    data, params, _ = load_from_zip_file(path, device="cpu", custom_objects=values)
    assert data is not None
    if data.get("policy_class") is None or "policy" not in params:
        raise UserError(f"the policy class of {path} ({module}) cannot be imported here.")
    if keys.get("policy_kwargs") and values["policy_kwargs"] is None:
        raise UserError(f"the network of {path} cannot be built: its policy_kwargs cannot be read here.")
    options = {key: data[key] for key in INHERITED if data.get(key) is not None}
    # Its pickle may hold a function, which another Python cannot read; SB3 writes its text beside it.
    if constant := re.search(r"ConstantSchedule\(val=([\d.e+-]+)\)", str(keys["clip_range"])):
        options["clip_range"] = float(constant[1])
    return BasePolicy(
        path=path,
        policy_class=data["policy_class"],
        policy_kwargs=_modern_policy_kwargs(data.get("policy_kwargs") or {}),
        observation_space=data.get("observation_space"),
        action_space=data.get("action_space"),
        state_dict=params["policy"],  # type: ignore[arg-type]
        options=options,
        n_envs=int(data.get("n_envs") or 8),
        vec_normalize=_statistics(path, vec_normalize),
        normalized=_says_normalized(path),
    )


def _value(value: Any) -> Any:
    """One entry of a zip's data, which holds JSON, and pickles in it; None for a pickle that cannot be read here."""
    if not isinstance(value, dict) or ":serialized:" not in value:
        return value
    try:
        return read_pickle(io.BytesIO(base64.b64decode(value[":serialized:"])))
    except Exception:  # of any kind: it may want another Python, or a package that is not here
        return None


def shipped_policy(env_id: str) -> Path | None:
    """The zip of the policy that ships for a task's family (pretrained on the nominal version), if there is one."""
    for family in FAMILIES:
        ids = {family.nominal_id, family.env_id(), *map(family.env_id, family.shifts)}
        path = SHIPPED / family.name / "policy.zip"
        if env_id.partition(":")[2] in ids or env_id in ids:
            return path if path.exists() else None
    return None


def _statistics(path: Path, vec_normalize: Path | str) -> Path | None:
    if vec_normalize in ("none", "new"):
        return None
    return _find_vec_normalize(path) if vec_normalize == "auto" else _existing(Path(vec_normalize))


def _find_vec_normalize(path: Path) -> Path | None:
    """The statistics that belong to a zip, where stable-baselines3's callbacks and rl-zoo3 put them.

    Raises:
        UserError: There are several, and nothing says which.
    """
    names = ("vecnormalize.pkl", "vec_normalize.pkl")
    checkpoint = re.fullmatch(r"(.*)_([0-9]+_steps)", path.stem)
    own = [f"{checkpoint[1]}_vecnormalize_{checkpoint[2]}.pkl"] if checkpoint else []
    stem = path.with_suffix("")  # rl-zoo3: Env-v1.zip beside Env-v1/vecnormalize.pkl
    candidates = [path.parent / name for name in (*own, *names)] + [stem / name for name in names]
    if found := next((candidate for candidate in candidates if candidate.is_file()), None):
        return found
    others = [file for folder in _settings_folders(path) for name in names if (file := folder / name).is_file()]
    if len(others) > 1:
        several = " or ".join(map(str, others))
        raise UserError(f"{path} may belong to {several}: name one with --vec_normalize, or none.")
    return others[0] if others else None


def _settings_folders(path: Path) -> list[Path]:
    """rl-zoo3's folders of settings and statistics beside a zip: Env-v1 for Env-v1.zip and for best_model.zip."""
    shared = re.fullmatch(r"best_model|.*_[0-9]+_steps", path.stem) is not None
    folders = sorted(folder for folder in path.parent.iterdir() if folder.is_dir())
    return [
        folder
        for folder in folders
        if folder.name == path.stem or shared or not folder.with_name(f"{folder.name}.zip").exists()
    ]


def _says_normalized(path: Path) -> bool:
    """Whether rl-zoo3's settings beside a zip say that its observations were normalised."""
    for folder in _settings_folders(path):
        settings = folder / "config.yml"  # it holds Python objects, which are not made here
        text = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
        said = re.search(r"- normalize\n\s*- (.*)", text)
        if said and not re.match(r"false|null", said[1]) and not re.search(r"norm_obs\W+False", said[1]):
            return True
    return False


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
