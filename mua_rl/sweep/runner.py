"""How trials are run: each as a run of its own in a process of its own, or several side by side in one process."""

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import yaml

from mua_rl.errors import UserError
from mua_rl.exits import ExitCode
from mua_rl.files import write_whole
from mua_rl.lr.spec import FFT
from mua_rl.run.folder import ADAPTER_FOLDER, MODEL_FOLDER, RunFolder
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import Request
from mua_rl.sweep.search import why_hopeless

POLL_SECONDS = 0.5
ENDED = (ExitCode.OK, ExitCode.DIVERGED, ExitCode.WORSE, ExitCode.STOPPED)
"""Exit codes of a trainer whose run came to its end."""
REWARD = {"grpo": "reward", "ppo": "rollout/ep_rew_mean"}
"""What a line of a run's metrics calls its training reward."""
JUDGED = {"grpo": "reward", "ppo": "rollout/return"}
"""What it calls the mean reward of that step alone, which no other step has a part in."""
WEIGHTS = ("checkpoint-*", MODEL_FOLDER, ADAPTER_FOLDER, "policy.zip")
"""What a run folder holds of trained weights."""


class Stopped(Exception):
    """The sweep ends, and what runs with it."""


class Runner(Protocol):
    """Runs trials.

    Attributes:
        at_once: The most trials that `run` takes.
    """

    at_once: int

    def group(self, trial: Trial) -> Hashable:
        """Trials of one group can be run by one call."""

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """What the trials reach, in order.

        Raises:
            UserError: A run failed, other than by diverging; the message says how.
            Stopped: The sweep ends.
        """


class Single:
    """Runs a trial as `python -m mua_rl.grpo` or `mua_rl.ppo`, in a run folder under `runs/`, with a log beside it.

    A run that had ended before is read, not repeated; one that was cut off goes on from its checkpoint.

    Args:
        request: What was asked.
        folder: The sweep's.
        environment: Variables of the processes, beside this one's.
        stop: Set from outside, it ends what runs.
    """

    at_once = 1

    def __init__(self, request: Request, folder: Path, environment: dict[str, str], stop: threading.Event) -> None:
        self.request, self.environment, self.stop = request, environment, stop
        self.die_with_parent = die_with_parent()
        self.runs = folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.config = folder / "trainer.yaml"
        write_whole(self.config, yaml.safe_dump(request.given, sort_keys=True, allow_unicode=True))

    def group(self, trial: Trial) -> Hashable:
        """See `Runner.group`: every trial is by itself."""
        return trial

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `Runner.run`."""
        return [self._run(trial) for trial in trials]

    def _run(self, trial: Trial) -> TrialResult:
        folder = RunFolder(self.runs / trial.name)
        started, stopped = time.monotonic(), ""
        if folder.result() is None:
            stopped = self._execute(trial, folder)
        seconds, result = time.monotonic() - started, folder.result()
        if result is None:
            result = stopped_result(folder, self.request.sweep.algo, stopped, seconds)
        outcome = replace(result, seconds=max(seconds, result.seconds))
        if not self.request.sweep.keep_weights:
            remove_weights(folder)
        return outcome

    def _execute(self, trial: Trial, folder: RunFolder) -> str:
        """Run to the end; why it was stopped early, or "".

        Raises:
            UserError: The process failed.
            Stopped: The sweep ends.
        """
        if folder.last_checkpoint():
            flags = ["--resume", str(folder.path)]
        else:
            shutil.rmtree(folder.path, ignore_errors=True)  # cut off before there was anything to go on from
            flags = ["--config", str(self.config), *trial_flags(trial), "--output_dir", str(folder.path)]
        log = folder.path.with_name(f"{folder.path.name}.log")
        with open(log, "a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"mua_rl.{self.request.sweep.algo}", *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environment},
                preexec_fn=self.die_with_parent,  # or a killed sweep's run would go on beside its own repetition
            )
            try:
                while process.poll() is None:
                    if self.stop.wait(POLL_SECONDS):
                        raise Stopped
                    if reason := self._why_hopeless(trial, folder):
                        return reason
            finally:
                _end(process)
        if process.returncode not in ENDED:
            last = " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
            raise UserError(f"the run {folder.path.name} failed with code {process.returncode} (see {log}): {last}")
        return ""

    def _why_hopeless(self, trial: Trial, folder: RunFolder) -> str:
        if not self.request.sweep.early_stop or self.request.steps < 1:
            return ""
        curve = reward_curve(folder, self.request.sweep.algo)
        if not curve or curve[-1][0] >= self.request.steps:
            return ""
        same_curve = trial.name.partition("-lr")[0]
        others = [RunFolder(path) for path in self.runs.glob(f"{same_curve}-lr*") if path.is_dir()]
        peers = [reward_curve(other, self.request.sweep.algo) for other in others if other.path != folder.path]
        return why_hopeless(curve, [peer for peer in peers if peer], self.request.steps, independent=True)


def trial_flags(trial: Trial) -> list[str]:
    """What makes a trainer run a trial."""
    spec = trial.spec
    flags = ["--rank", str(spec.rank or "full"), "--lr", repr(trial.learning_rate), "--seed", str(trial.seed)]
    return flags if spec == FFT else [*flags, "--init", spec.init, "--alpha", str(spec.alpha)]


def reward_curve(folder: RunFolder, algorithm: str) -> list[tuple[int, float]]:
    """(step, mean training reward of that step) from a run's metrics."""
    key = JUDGED[algorithm]
    return [(line["step"], line[key]) for line in folder.metrics() if isinstance(line.get(key), (int, float))]


def stopped_result(folder: RunFolder, algorithm: str, reason: str, seconds: float) -> TrialResult:
    """The result of a run that was stopped before its end, from its metrics.

    Args:
        folder: The run's.
        algorithm: Which trainer's.
        reason: Why it was stopped.
        seconds: Wall time.
    """
    before = folder.score_before()
    steps = max((line["step"] for line in folder.metrics()), default=0)
    rewards = folder.rewards(REWARD[algorithm])
    known = math.nan if before is None else before[0]
    return TrialResult.of_training(math.nan, math.nan, known, rewards, steps, seconds, reason)


def remove_weights(folder: RunFolder) -> None:
    """Delete what a run trained: a sweep is after its learning rate alone."""
    for pattern in WEIGHTS:
        for path in folder.path.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


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


def _end(process: subprocess.Popen) -> None:
    """End a process, at first kindly."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
