"""How trials are run: what a sweep asks of a backend, and the choice between the two that each algorithm has.

`mua_rl.sweep.single_runs` runs each trial as a run of its own (TRL's trainer for GRPO, SB3's for PPO), and
`mua_rl.sweep.stacked_runs` trains many in one process (stacked GRPO, stacked PPO).
"""

import os
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Protocol

from mua_rl.errors import UserError
from mua_rl.lr.spec import FFT
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import Request


class Stopped(Exception):
    """The sweep ends, and what runs with it."""


class Backend(Protocol):
    """Runs trials.

    Attributes:
        at_once: The most trials that `run` takes.
    """

    at_once: int

    def group(self, trial: Trial) -> Hashable:
        """Trials of one group can be run by one call."""

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """Run trials of one group; what each reached, in order.

        Raises:
            UserError: A run failed, other than by diverging; the message says how.
            Stopped: The sweep ends.
        """


class Chosen:
    """The backend for trials of full finetuning, and that for LoRA.

    Args:
        full, lora: The two backends.
    """

    def __init__(self, full: Backend, lora: Backend) -> None:
        self.full, self.lora = full, lora
        self.at_once = max(full.at_once, lora.at_once)

    def group(self, trial: Trial) -> Hashable:
        """See `Backend.group`."""
        return self._backend(trial).group(trial)

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `Backend.run`."""
        return self._backend(trials[0]).run(trials)

    def _backend(self, trial: Trial) -> Backend:
        return self.full if trial.spec == FFT else self.lora


def why_single(request: Request, trial: Trial, obstacle: str = "") -> str:
    """Why trials like this one cannot be trained in one process; "" where they can.

    Args:
        request: What was asked.
        trial: A trial.
        obstacle: See `Facts`.
    """
    if obstacle and trial.spec != FFT:
        return obstacle
    try:
        request.algorithm.check_stacked(request.trainer, request.adapter, trial)
    except UserError as error:
        return str(error)
    return ""


def choose_backends(
    request: Request,
    obstacle: str,
    folder: Path,
    stop: threading.Event,
    on_step: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> list[Backend]:
    """One backend for each worker.

    Args:
        request: What was asked.
        obstacle: See `Facts`.
        folder: The sweep's folder, under which runs and checkpoints lie.
        stop: Set from outside, it ends what runs.
        on_step: Told of the progress of trials in this process.
        say: Told why some trials are run one by one.

    Raises:
        UserError: `--side_by_side on` was given, and the trials cannot be trained so.
    """
    from mua_rl.sweep.single_runs import SingleRuns
    from mua_rl.sweep.stacked_runs import StackedRuns

    mode, stacked = request.sweep.side_by_side, {True: False, False: False}  # by whether a trial is of FFT
    for spec in {spec == FFT: spec for spec in request.specs}.values():
        if mode == "off":
            continue
        reason = why_single(request, Trial(spec, log2_lr=-10.0, seed=0), obstacle)
        if reason and mode == "on":
            raise UserError(f"--side_by_side on: {reason}")
        if reason:
            say(f"{'FFT' if spec == FFT else 'LoRA'} runs go one by one: {reason}")
        stacked[spec == FFT] = not reason
    backends: list[Backend] = []
    for environment in environments(request.sweep.workers):
        single: Backend = SingleRuns(request, folder, environment, stop)
        if any(stacked.values()):
            together = StackedRuns(request, folder, on_step, environment if request.sweep.workers > 1 else None)
            backends.append(Chosen(*(together if stacked[is_full] else single for is_full in (True, False))))
        else:
            backends.append(single)
    return backends


def environments(workers: int) -> list[dict[str, str]]:
    """Variables for the processes of each worker, that share out the cores and the GPUs of this machine."""
    import torch

    cores = str(max(1, (os.cpu_count() or 1) // workers))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": cores}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    if workers == 1 or len(gpus) < 2:  # one run may take all GPUs; several share the one there is
        return [threads] * workers
    return [{**threads, "CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} for k in range(workers)]


def die_with_parent() -> Callable[[], None] | None:
    """What a new process calls to be killed when the thread that made it ends, however that comes (Linux alone)."""
    if sys.platform != "linux":
        return None
    from mua_rl.rewards.sandbox import isolation

    return isolation.die_with_parent
