"""Each trial as a run of its own, in a process of its own: TRL's trainer for GRPO, SB3's for PPO."""

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from mua_rl.errors import UserError
from mua_rl.exits import ExitCode
from mua_rl.files import write_whole
from mua_rl.lr.spec import FFT
from mua_rl.run.algorithms import RewardCurve
from mua_rl.run.folder import ADAPTER_FOLDER, MODEL_FOLDER, RunFolder
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import Request
from mua_rl.sweep.backend import Stopped, die_with_parent
from mua_rl.sweep.early_stop import why_hopeless

POLL_SECONDS = 0.5
ENDED = (ExitCode.OK, ExitCode.DIVERGED, ExitCode.WORSE, ExitCode.STOPPED)
"""Exit codes of a trainer whose run came to its end."""
WEIGHTS = ("checkpoint-*", MODEL_FOLDER, ADAPTER_FOLDER, "policy.zip", "best_policy.zip")
"""What a run folder holds of trained weights."""


class SingleRuns:
    """Runs a trial by its algorithm's command, as `python -m mua_rl.grpo`, in a run folder with a log beside it.

    A run that had ended before is read, not repeated; one that was cut off goes on from its checkpoint.

    Args:
        request: What was asked.
        folder: The sweep's folder; the runs lie under its `runs/`.
        environment: The variables of the processes, beside this one's.
        stop: Set from outside, it ends what runs.
    """

    at_once = 1

    def __init__(self, request: Request, folder: Path, environment: dict[str, str], stop: threading.Event) -> None:
        self.request, self.environment, self.stop = request, environment, stop
        self.reward, self.judged = request.algorithm.names.reward_key, request.algorithm.judged_key
        self.die_with_parent = die_with_parent()
        self.runs = folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.config = folder / "trainer.yaml"
        write_whole(self.config, yaml.safe_dump(request.trainer_settings, sort_keys=True, allow_unicode=True))

    def group(self, trial: Trial) -> Hashable:
        """See `Backend.group`: every trial is by itself."""
        return trial

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `Backend.run`."""
        return [self._run(trial) for trial in trials]

    def _run(self, trial: Trial) -> TrialResult:
        folder = RunFolder(self.runs / trial.name)
        started, stopped = time.monotonic(), ""
        if folder.result() is None:
            stopped = self._execute(trial, folder)
        seconds, result = time.monotonic() - started, folder.result()
        if result is None:
            result = stopped_result(folder, self.reward, stopped, seconds)
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
        curve = reward_curve(folder, self.judged)
        if not curve or curve[-1][0] >= self.request.steps:
            return ""
        same_curve = trial.name.partition("-lr")[0]
        others = [RunFolder(path) for path in self.runs.glob(f"{same_curve}-lr*") if path.is_dir()]
        peers = [reward_curve(other, self.judged) for other in others if other.path != folder.path]
        return why_hopeless(curve, [peer for peer in peers if peer], self.request.steps, independent=True)


def trial_flags(trial: Trial) -> list[str]:
    """What makes a trainer run a trial."""
    spec = trial.spec
    flags = ["--rank", str(spec.rank or "full"), "--lr", repr(trial.learning_rate), "--seed", str(trial.seed)]
    return flags if spec == FFT else [*flags, "--init", spec.init, "--alpha", str(spec.alpha)]


def reward_curve(folder: RunFolder, key: str) -> RewardCurve:
    """(step, mean training reward of that step) from a run's metrics, which call the reward by a key."""
    return [(line["step"], line[key]) for line in folder.metrics() if isinstance(line.get(key), (int, float))]


def stopped_result(folder: RunFolder, key: str, reason: str, seconds: float) -> TrialResult:
    """The result of a run that was stopped before its end, from its metrics.

    Args:
        folder: The run's folder.
        key: What its metrics call the training reward.
        reason: Why it was stopped.
        seconds: Wall time.
    """
    before = folder.score_before()
    steps = max((line["step"] for line in folder.metrics()), default=0)
    known = math.nan if before is None else before[0]
    return TrialResult.of_training(math.nan, math.nan, known, folder.rewards(key), steps, seconds, reason)


def remove_weights(folder: RunFolder) -> None:
    """Delete what a run trained: a sweep is after its learning rate alone."""
    for pattern in WEIGHTS:
        for path in folder.path.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _end(process: subprocess.Popen) -> None:
    """End a process, at first kindly."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
