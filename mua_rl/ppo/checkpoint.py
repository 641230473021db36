"""Checkpoints of a PPO run, and the resumption that ends where an unbroken run would have ended.

An environment's inner state cannot be saved in general. So a checkpoint is a point where every environment starts a
new episode, from a seed that depends on the run's seed and the step alone, whether the run is broken there or not: the
episodes under way are cut (their tails are bootstrapped by the critic, as at the end of any rollout). With that a
resumed run equals the unbroken one bit by bit on the CPU, provided that the environments depend on their seed alone.
"""

import json
import os
import pickle
import random
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from mua_rl.errors import UserError, one_line
from mua_rl.ppo.evaluation import TRAINING_SEEDS
from mua_rl.ppo.trainer import PPO

PREFIX = "checkpoint-"  # as `RunFolder.last_checkpoint` looks for them
SCRATCH = ".checkpoint"
"""Where a checkpoint is written, before it gets its name; what a kill or a full disk left there is removed first."""


class Checkpoints(BaseCallback):
    """Writes a checkpoint whenever `every` more environment steps have been trained on, and keeps the last `keep`.

    Every environment begins a new episode then, of which `on_restart` is told.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2, on_restart: Callable[[], None] = lambda: None):
        super().__init__()
        self.folder, self.every, self.keep, self.on_restart = folder, every, keep, on_restart
        self._last = 0

    def _on_training_start(self) -> None:
        self._last = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        # Between one update and the next rollout: the one moment at which no transition is under way.
        steps = self.model.num_timesteps
        if steps // self.every > self._last // self.every:
            save_checkpoint(self.model, self.folder / f"{PREFIX}{steps}")  # type: ignore[arg-type]
            for old in list_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
            restart_episodes(self.model)  # type: ignore[arg-type]
            self.on_restart()
            if self.model.use_sde:  # SB3 has drawn the rollout's noise by now, and a resumed run draws it once more
                self.model.policy.reset_noise(self.model.n_envs)  # type: ignore[operator]
            self._last = steps

    def _on_step(self) -> bool:
        return True


def save_checkpoint(model: PPO, folder: Path) -> None:
    """Write everything that training needs into `folder`, whole or not at all.

    `policy.zip` in it is the merged policy, for plain SB3.
    """
    scratch = folder.with_name(SCRATCH)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model.save(scratch / "policy.zip")
    if isinstance(statistics := model.get_vec_normalize_env(), VecNormalize):
        statistics.save(str(scratch / "vecnormalize.pkl"))
    torch.save(
        {
            "learner": model.learner.state_dict(),
            "optimizer": model.learner.optimizer.state_dict(),
            "num_timesteps": model.num_timesteps,
            "n_updates": model._n_updates,
            "progress_remaining": model._current_progress_remaining,
            "episodes": [{key: float(episode[key]) for key in "rlt"} for episode in model.ep_info_buffer or ()],
            "logged": (dict(model.logger.name_to_value), dict(model.logger.name_to_excluded)),
            "random_states": _random_states(),
        },
        scratch / "training_state.pt",
    )
    (scratch / "trainer_state.json").write_text(
        json.dumps({"global_step": model.num_timesteps}) + "\n", encoding="utf-8"
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def load_checkpoint(model: PPO, folder: Path) -> None:
    """Put a model that was built as at the run's start into the state of a checkpoint.

    `learn(total - model.num_timesteps, reset_num_timesteps=False)` then goes on.

    Raises:
        UserError: The checkpoint cannot be read or belongs to another network.
    """
    try:
        state = torch.load(folder / "training_state.pt", map_location=model.device, weights_only=False)
        model.learner.load_state_dict(state["learner"])
        model.learner.optimizer.load_state_dict(state["optimizer"])
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be resumed from ({one_line(error)}): delete it, and --resume goes on from "
            "the one before it."
        ) from None
    model.merge()
    model.num_timesteps = state["num_timesteps"]
    model._n_updates = state["n_updates"]
    model._current_progress_remaining = state["progress_remaining"]
    values, excluded = state["logged"]
    model.logger.name_to_value.update(values)
    model.logger.name_to_excluded.update(excluded)
    model.ep_info_buffer = deque(state["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    if isinstance(statistics := model.get_vec_normalize_env(), VecNormalize):
        saved = VecNormalize.load(str(folder / "vecnormalize.pkl"), statistics.venv)
        for ours, theirs in zip(_moments(statistics), _moments(saved), strict=True):
            vars(ours).update(vars(theirs))  # in place: environments to evaluate in have these very objects
    restart_episodes(model)
    _set_random_states(state["random_states"])


def restart_episodes(model: PPO) -> None:
    """Start a new episode in every environment, from seeds that follow from the run's seed and step."""
    assert model.env is not None
    sequence = np.random.SeedSequence([model.seed or 0, model.num_timesteps])
    model.env.seed(int(sequence.generate_state(1)[0]) % TRAINING_SEEDS)
    model._last_obs = model.env.reset()  # type: ignore[assignment]
    model._last_episode_starts = np.ones((model.env.num_envs,), dtype=bool)
    if (statistics := model.get_vec_normalize_env()) is not None:
        model._last_original_obs = statistics.get_original_obs()


def _moments(statistics: VecNormalize) -> list[RunningMeanStd]:
    """Running means and variances: of the return, and of the observations that are normalised."""
    observed: Any = statistics.obs_rms if statistics.norm_obs else {}
    return [statistics.ret_rms, *(observed.values() if isinstance(observed, dict) else [observed])]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, the oldest first; a copy that somebody has put aside, `checkpoint-9-best`, is none."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
