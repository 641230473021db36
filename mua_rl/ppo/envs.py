"""Building vectorised environments for PPO, with the guard that stops on a non-finite observation or reward."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecNormalize,
    unwrap_vec_normalize,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

import mua_rl.envs.control  # noqa: F401  (registers the tasks)
from mua_rl.errors import UserError, one_line
from mua_rl.ppo.pickles import read_statistics


class FiniteGuard(VecEnvWrapper):
    """Raises a `UserError` that names environment and step when an observation or a reward is NaN or infinite.

    Likewise when an environment fails.

    It sits below `VecNormalize`, whose statistics a single NaN would spoil for good. SB3's `VecCheckNan` names neither
    the environment nor the step, and does not see the last observation of an episode.
    """

    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        self.steps = 0

    def reset(self) -> VecEnvObs:
        try:
            observations = self.venv.reset()
        except Exception as error:  # an environment can fail in any way
            raise _failure("a reset", error) from error
        self._check("observation after a reset", observations)
        return observations

    def step_wait(self) -> VecEnvStepReturn:
        self.steps += 1
        try:
            observations, rewards, dones, infos = self.venv.step_wait()
        except Exception as error:
            raise _failure(f"its step {self.steps} of this run", error) from error
        self._check("reward", rewards)
        self._check("observation", observations)
        # SB3 hands on the next episode's first observation and keeps the last one in the info.
        for env in map(int, np.flatnonzero(dones)):
            self._check("last observation of an episode", infos[env].get("terminal_observation"), env)
        return observations, rewards, dones, infos

    def _check(self, what: str, values: Any, env: int | None = None) -> None:
        """Check the values of all environments, stacked, or of one."""
        if isinstance(values, dict):
            for key, value in values.items():
                self._check(f"{what} {key!r}", value, env)
            return
        values = np.asarray(values)
        if values.dtype.kind != "f" or np.isfinite(values).all():
            return
        if env is None:
            env = int(np.nonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))[0][0])
            values = values[env]
        raise UserError(
            f"environment {env} gave a non-finite {what} at its step {self.steps} of this run ({values}): "
            "training has stopped, and the last checkpoint is kept."
        )


def _failure(when: str, error: Exception) -> UserError:
    """What to say of an environment that has failed."""
    reason = one_line(f"{type(error).__name__}: {error}")
    return UserError(
        f"an environment failed at {when} ({reason}): training has stopped, and the last checkpoint is kept."
    )


def check_env_id(env_id: str) -> None:
    """Import what an environment is named by, and look it up.

    Raises:
        UserError: Gymnasium knows no such environment, or a package that it needs is missing.
    """
    try:
        if environment_class(env_id) is None:
            gymnasium.spec(env_id.rpartition(":")[2])
    except UserError:
        raise
    except Exception as error:  # somebody's module can fail in any way
        raise UserError(f"no environment {env_id!r}: {one_line(error)}") from None


def environment_class(env_id: str) -> Callable[..., gymnasium.Env] | None:
    """The class, or function, that `module:Class` or `file.py:Class` names; None for a Gymnasium id.

    The module is imported in any case, and may register the id.
    """
    module, _, name = env_id.rpartition(":")
    return getattr(_import_module(module), name, None) if module else None


def build_envs(
    env_id: str,
    n_envs: int,
    seed: int,
    env_kwargs: dict[str, Any] | None = None,
    wrapper: Any = None,
    frame_stack: int = 1,
    subprocesses: bool = False,
) -> VecEnv:
    """Monitored, seeded and guarded environments.

    Args:
        env_id: As `gymnasium.make` takes it, or a class as `environment_class` does.
        n_envs: How many.
        seed: Environment i is seeded with `seed + i`.
        env_kwargs: Keywords of the environment.
        wrapper: What is put around each environment, as `find_wrappers` takes it.
        frame_stack: How many observations are stacked (1 = none).
        subprocesses: One process per environment instead of one for all.

    Raises:
        UserError: The environment or the wrapper does not exist or cannot be built.
    """
    check_env_id(env_id)
    wrappers = find_wrappers(wrapper)
    try:
        envs = make_vec_env(
            partial(_make, env_id),
            n_envs=n_envs,
            seed=seed,
            env_kwargs=env_kwargs,
            wrapper_class=partial(_wrap, wrappers) if wrappers else None,
            vec_env_cls=SubprocVecEnv if subprocesses else DummyVecEnv,
        )
    except UserError:
        raise
    except Exception as error:  # an environment can fail in any way
        raise UserError(f"the environment {env_id!r} cannot be built: {one_line(error)}") from None
    envs = FiniteGuard(envs)
    return VecFrameStack(envs, frame_stack) if frame_stack > 1 else envs


def _make(env_id: str, max_episode_steps: int | None = None, **keywords: Any) -> gymnasium.Env:
    """As `gymnasium.make`; named here so that a process that unpickles it imports this module, and so our tasks."""
    if (built := environment_class(env_id)) is None:
        return gymnasium.make(env_id.rpartition(":")[2], max_episode_steps=max_episode_steps, **keywords)
    env = built(**keywords)
    return env if max_episode_steps is None else gymnasium.wrappers.TimeLimit(env, max_episode_steps)


Wrappers = list[tuple[Callable[..., gymnasium.Env], dict[str, Any]]]


def find_wrappers(value: Any) -> Wrappers:
    """Wrappers and their keywords, the innermost first.

    Args:
        value: `module:Class` (or rl-zoo3's `module.Class`), `{"module:Class": {keyword: value}}`, or a list of these.

    Raises:
        UserError: There is no such wrapper.
    """
    wrappers: Wrappers = []
    for item in value if isinstance(value, list) else [value] if value else []:
        for name, keywords in (item if isinstance(item, dict) else {item: None}).items():
            if not isinstance(name, str) or not isinstance(keywords, dict | None):
                raise UserError(
                    f"a wrapper is written as module:Class or {{module:Class: {{keyword: value}}}}, not {item}."
                )
            wrappers.append((import_from(name), keywords or {}))
    return wrappers


def _wrap(wrappers: Wrappers, env: gymnasium.Env) -> gymnasium.Env:
    for wrapper, keywords in wrappers:
        env = wrapper(env, **keywords)
    return env


def new_statistics(envs: VecEnv, gamma: float) -> VecNormalize:
    """Training environments normalised with statistics that begin with nothing; of dictionaries, the vectors alone.

    Raises:
        UserError: The observations are none that can be normalised.
    """
    space = envs.observation_space
    keys = None
    if isinstance(space, spaces.Dict):
        keys = [key for key, part in space.items() if isinstance(part, spaces.Box) and not is_image_space(part)]
    if keys == [] or not isinstance(space, (spaces.Box, spaces.Dict)):
        raise UserError(
            f"--vec_normalize new is for vectors of numbers, and there are none in {one_line(space)}: drop it."
        )
    return VecNormalize(envs, gamma=gamma, norm_obs_keys=keys)


def with_statistics(envs: VecEnv, path: Path) -> VecNormalize:
    """Training environments normalised with saved statistics, which go on being updated.

    Raises:
        UserError: The file cannot be read, or belongs to other observations.
    """
    try:
        normalized = read_statistics(path)
        normalized.set_venv(envs)
    except (AssertionError, ValueError) as error:
        raise UserError(f"the observation statistics {path} do not fit {envs.observation_space}: {error}") from None
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"the observation statistics {path} cannot be read: {error}") from None
    normalized.training = True
    return normalized


def evaluation_envs(envs: VecEnv, training: VecEnv) -> VecEnv:
    """`envs` as seen by a policy that is trained in `training`: with its statistics, which evaluation never changes."""
    statistics = unwrap_vec_normalize(training)
    if statistics is None:
        return envs
    keys = statistics.norm_obs_keys
    frozen = VecNormalize(envs, training=False, norm_obs=statistics.norm_obs, norm_reward=False, norm_obs_keys=keys)
    if statistics.norm_obs:
        frozen.obs_rms = statistics.obs_rms  # the object itself, so that later evaluations see later statistics
    frozen.clip_obs, frozen.epsilon = statistics.clip_obs, statistics.epsilon
    return frozen


def import_from(name: str) -> Callable[..., Any]:
    """The object that `module:attribute`, `file.py:attribute` or `module.attribute` names; one of gym is Gymnasium's.

    Raises:
        UserError: There is none.
    """
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    module = f"gymnasium{module[3:]}" if module.partition(".")[0] == "gym" else module
    try:
        return getattr(_import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise UserError(f"cannot import {name!r} (written as module:attribute): {error}") from None


def _import_module(name: str) -> ModuleType:
    """Import a module by its name, or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[path.stem] = module
    return module
