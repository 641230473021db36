"""Where SB3's logger writes in a run of ours: the run folder's metrics, TensorBoard (and W&B by it), the terminal."""

import math
import sys
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat

from mua_rl.run.folder import RunFolder

RETURN = "rollout/ep_rew_mean"
"""SB3's name of the mean return over the last `stats_window_size` training episodes."""


OWN_RETURN = "rollout/return"
"""The mean return of the episodes that ended in this rollout alone."""


class OwnReturns(BaseCallback):
    """Logs `OWN_RETURN`, which rollouts of one policy give independently, as running means over 100 episodes are not.

    It begins when every environment has ended an episode: until then only the short ones are among those that ended.
    """

    def _on_training_start(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget all: every environment begins a new episode."""
        self._returns: list[float] = []
        self._waiting = set(range(self.training_env.num_envs))

    def _on_step(self) -> bool:
        for number, info in enumerate(self.locals["infos"]):
            if "episode" in info:
                self._waiting.discard(number)
                self._returns.append(float(info["episode"]["r"]))
        return True

    def _on_rollout_end(self) -> None:
        if self._returns and not self._waiting:
            self.logger.record(OWN_RETURN, sum(self._returns) / len(self._returns))
            self._returns = []


class RunFolderWriter(KVWriter):
    """Appends what SB3 logs to the run's metrics, one line per rollout; `step` counts environment steps."""

    def __init__(self, run: RunFolder):
        self.run = run

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        numbers = {name: float(value) for name, value in key_values.items() if isinstance(value, (int, float))}
        numbers |= {name: float(value) for name, value in key_values.items() if hasattr(value, "dtype")}
        self.run.log(step, {name: value for name, value in numbers.items() if math.isfinite(value)})

    def close(self) -> None:
        """Every line is on disk already."""


def make_logger(run: RunFolder, tensorboard: Path | None, verbose: int) -> Logger:
    """SB3's logger with the run folder, TensorBoard and, if verbose, the terminal behind it."""
    formats: list[KVWriter] = [RunFolderWriter(run)]
    if tensorboard is not None:
        formats.append(TensorBoardOutputFormat(str(tensorboard)))
    if verbose:
        formats.append(HumanOutputFormat(sys.stdout))
    return Logger(str(run.path), formats)
