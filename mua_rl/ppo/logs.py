"""Where SB3's logger writes in a run of ours: the run folder's metrics, TensorBoard (and W&B by it), the terminal."""

import math
import sys
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat

from mua_rl.run.folder import RunFolder

RETURN = "rollout/ep_rew_mean"
"""SB3's name of the mean return over the last `stats_window_size` training episodes."""


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
