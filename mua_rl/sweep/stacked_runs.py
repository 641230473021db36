"""Many trials in one process: stacked GRPO and stacked PPO."""

import os
import sys
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mua_rl.lr.spec import FFT
from mua_rl.run.algorithms import RewardCurve, Stacking
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import Request
from mua_rl.sweep.backend import die_with_parent
from mua_rl.sweep.early_stop import why_hopeless


class StackedRuns:
    """Trains trials together, in this process or, so that several groups can train at once, in one of its own.

    Args:
        request: What was asked.
        folder: The sweep's folder; trials have their checkpoints under `runs/`, and go on from there after a crash.
        on_step: Told of the progress of trials in this process.
        environment: The variables of a process of its own; `None`: this process.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        on_step: Callable[[int, int], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.at_once = request.algorithm.most_stacked
        self.request, self.runs, self.on_step = request, folder / "runs", on_step
        self.curves: dict[Trial, RewardCurve] = {}
        self.pool = None
        if environment is not None:
            self.pool = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_enter, initargs=(environment,)
            )

    def group(self, trial: Trial) -> Hashable:
        """See `Backend.group`.

        LoRA trials go together, whatever their ranks, and FFT trials do; those that were cut off go on with those that
        were at the same step.
        """
        return "stacked", trial.spec == FFT, self.request.algorithm.progress(self.runs, trial)

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `Backend.run`."""
        if self.pool is not None:
            return self.pool.submit(_train, self.request, self.runs, list(trials), None, {}).result()
        return _train(self.request, self.runs, list(trials), self.on_step, self.curves)


def _train(
    request: Request,
    runs: Path,
    trials: list[Trial],
    on_step: Callable[[int, int], None] | None,
    curves: dict[Trial, RewardCurve],
) -> list[TrialResult]:
    """Train a group.

    Args:
        request, runs, trials, on_step: As of `StackedRuns`.
        curves: The reward curves of trials that were trained before, to which these are added.
    """

    def judge(trial: Trial, curve: RewardCurve) -> str:
        curves[trial] = curve
        peers = [other for peer, other in curves.items() if other and peer != trial and peer.spec == trial.spec]
        return why_hopeless(curve, peers, request.steps, independent=True)

    stacking = Stacking(
        checkpoints=runs,
        threads=max(1, (os.cpu_count() or 1) // request.sweep.workers),
        memory=request.sweep.arms_memory,
        on_step=on_step,
        why_hopeless=judge if request.sweep.early_stop else None,
    )
    return request.algorithm.train_stacked(request.trainer, request.adapter, trials, stacking)


def _enter(environment: dict[str, str]) -> None:
    """Called first in a process of a group's own."""
    if parent_dies := die_with_parent():
        parent_dies()
    os.environ.update(environment)
    if (threads := os.environ.get("OMP_NUM_THREADS")) and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
