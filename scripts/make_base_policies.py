"""Pretrain the PPO policies that ship in mua_rl/assets/policies (issue 3): plain SB3 on the nominal tasks.

    python scripts/make_base_policies.py                 # all of them, one after the other
    python scripts/make_base_policies.py CartPole Hopper

Each folder holds `policy.zip` (an ordinary SB3 zip, without the optimiser's moments), `vecnormalize.pkl` where the
observations were normalised, and `info.json`: how it was made and what it reaches, on the nominal task and on every
shifted version. Seeded, on one thread; other package versions give other weights.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from mua_rl.envs.control import FAMILIES, Family

POLICIES = Path(__file__).resolve().parent.parent / "mua_rl" / "assets" / "policies"
EVALUATION_SEED = 10_000

NET = {"net_arch": [128, 128]}
RECIPES: dict[str, dict[str, Any]] = {
    "CartPole": dict(
        steps=200_000, n_envs=8, normalize=False, learning_rate=1e-3, n_steps=128, batch_size=128, n_epochs=5,
        policy_kwargs=NET,
    ),
    "Acrobot": dict(
        steps=300_000, n_envs=8, normalize=False, learning_rate=1e-3, n_steps=256, batch_size=256, n_epochs=5,
        policy_kwargs=NET,
    ),
    "Pendulum": dict(
        steps=300_000, n_envs=8, normalize=False, learning_rate=1e-3, n_steps=256, batch_size=256, n_epochs=5,
        gamma=0.95, policy_kwargs=NET,
    ),
    "HalfCheetah": dict(
        steps=1_500_000, n_envs=8, normalize=True, learning_rate=5e-4, n_steps=256, batch_size=256, n_epochs=10,
        gamma=0.98, gae_lambda=0.92, policy_kwargs={**NET, "log_std_init": -1.0},
    ),
    "Hopper": dict(
        steps=1_500_000, n_envs=8, normalize=True, learning_rate=5e-4, n_steps=256, batch_size=256, n_epochs=10,
        policy_kwargs={**NET, "log_std_init": -1.0},
    ),
}  # fmt: skip
UNSAVED = ["_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"]


def make_envs(env_id: str, n_envs: int, seed: int, stats: VecNormalize | None = None) -> VecEnv:
    """Monitored environments; with `stats`, observations are normalised by a frozen copy of its statistics."""
    envs = make_vec_env(env_id, n_envs=n_envs, seed=seed)
    if stats is None:
        return envs
    frozen = VecNormalize(envs, training=False, norm_reward=False)
    frozen.obs_rms = stats.obs_rms
    return frozen


def evaluate(model: PPO, env_id: str, stats: VecNormalize | None, episodes: int) -> tuple[float, float]:
    """Mean and standard deviation of the return over held-out episodes, deterministic actions."""
    mean, std = evaluate_policy(model, make_envs(env_id, 8, EVALUATION_SEED, stats), n_eval_episodes=episodes)
    return round(float(mean), 1), round(float(std), 1)  # type: ignore[arg-type]


def pretrain(family: Family, seed: int, episodes: int) -> dict[str, Any]:
    """Train one base policy, write its folder and return what info.json holds."""
    recipe = dict(RECIPES[family.name])
    steps, n_envs, normalize = recipe.pop("steps"), recipe.pop("n_envs"), recipe.pop("normalize")
    peak_lr = recipe.pop("learning_rate")
    envs = make_envs(family.env_id(), n_envs, seed)
    stats = VecNormalize(envs, gamma=recipe.get("gamma", 0.99)) if normalize else None
    started = time.perf_counter()
    model = PPO(
        "MlpPolicy", stats or envs, learning_rate=LinearSchedule(peak_lr, 0.0, 1.0), seed=seed, device="cpu", **recipe
    )
    model.learn(steps)
    seconds = time.perf_counter() - started

    folder = POLICIES / family.name
    folder.mkdir(parents=True, exist_ok=True)
    model.policy.optimizer.state.clear()  # its moments belong to a finished run and would triple the file
    model.save(folder / "policy.zip", exclude=UNSAVED)
    if stats is not None:
        stats.save(str(folder / "vecnormalize.pkl"))
    ids = [family.env_id(), *map(family.env_id, family.shifts)]
    info = {
        "env_id": family.env_id(),
        "env_steps": steps,
        "seed": seed,
        "recipe": RECIPES[family.name],
        "seconds": round(seconds),
        "return_mean_std": {env_id: evaluate(model, env_id, stats, episodes) for env_id in ids},
        "episodes": episodes,
        "versions": {package: version(package) for package in ("stable-baselines3", "gymnasium", "torch", "mujoco")},
    }
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=40, help="held-out episodes per task in info.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for family in FAMILIES:
        if family.name in (arguments.families or RECIPES):
            print(json.dumps(pretrain(family, arguments.seed, arguments.episodes)["return_mean_std"], indent=2))


if __name__ == "__main__":
    main()
