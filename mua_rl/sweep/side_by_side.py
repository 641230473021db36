"""Trials side by side in one process, by `mua_rl.trials`; and which trials go side by side, which singly."""

import copy
import math
import os
import sys
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mua_rl.errors import UserError
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import Request
from mua_rl.sweep.runner import Runner, Single, die_with_parent
from mua_rl.sweep.search import RewardCurve, why_hopeless

AT_ONCE = {"grpo": 8, "ppo": 32}
"""The most trials in one process: more of them gain little by then, and take memory."""

OnStep = Callable[[int, int], None]
"""Told of a step that trials have taken together, and of how many there will be."""


class SideBySide:
    """Trains trials side by side, in this process or, so that several groups can train at once, in one of its own.

    Args:
        request: What was asked.
        folder: The sweep's; GRPO trials have their checkpoints under `runs/`, and go on from there after a crash.
        on_step: Told of progress; by GRPO in this process alone.
        environment: Variables of a process of its own; `None`: this process.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        on_step: OnStep | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.at_once = AT_ONCE[request.sweep.algo]
        self.request, self.runs, self.on_step = request, folder / "runs", on_step
        self.peers: dict[Trial, RewardCurve] = {}
        self.pool = None
        if environment is not None:
            self.pool = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_enter, initargs=(environment,)
            )

    def group(self, trial: Trial) -> Hashable:
        """See `Runner.group`: LoRA trials go together, whatever their ranks, and FFT trials do; those that were cut off
        go on with those that were at the same step."""
        if self.request.sweep.algo == "ppo":
            return "side by side", trial.spec == FFT
        from mua_rl.grpo.stacked.checkpoint import mark

        return "side by side", trial.spec == FFT, mark(self.runs, trial)

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `Runner.run`."""
        if self.pool is not None:
            return self.pool.submit(_train, self.request, self.runs, list(trials), None, None).result()
        return _train(self.request, self.runs, list(trials), self.on_step, self.peers)


class Chosen:
    """Side by side what goes side by side, and the rest singly.

    Args:
        together, single: The two ways.
        singly: Whether trials of full finetuning (True) and of LoRA (False) must be run singly.
    """

    def __init__(self, together: SideBySide, single: Single, singly: dict[bool, bool]) -> None:
        self.together, self.single, self.singly = together, single, singly
        self.at_once = together.at_once

    def group(self, trial: Trial) -> Hashable:
        """See `Runner.group`."""
        return self._runner(trial).group(trial)

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `Runner.run`."""
        return self._runner(trials[0]).run(trials)

    def _runner(self, trial: Trial) -> Runner:
        return self.single if self.singly[trial.spec == FFT] else self.together


def why_not(request: Request, curve: AdapterSpec, obstacle: str = "") -> str:
    """Why trials of a curve cannot be trained side by side; "" where they can.

    Args:
        obstacle: `Facts.obstacle`.
    """
    if obstacle and curve != FFT:
        return obstacle
    trial = Trial(curve, log2_lr=-10.0, seed=0)
    try:
        if request.sweep.algo == "grpo":
            from mua_rl.grpo.stacked.settings import check

            check(request.trainer, [trial])
        else:
            from mua_rl.ppo.stacked import trainer as ppo

            for envs in ppo.StackedPPO(request.trainer, [trial], *_ppo_base(request)).vec_envs:
                envs.close()
    except UserError as error:
        return str(error)
    return ""


def _train(
    request: Request, runs: Path, trials: list[Trial], on_step: OnStep | None, peers: dict[Trial, RewardCurve] | None
) -> list[TrialResult]:
    """Train a group.

    Args:
        runs: Folder of the checkpoints.
        peers: Reward curves of trials that were trained before, to which these are added.
    """
    if request.sweep.algo == "ppo":
        from mua_rl.ppo.arguments import limit_threads
        from mua_rl.ppo.stacked import trainer as ppo

        limit_threads()
        threads = max(1, (os.cpu_count() or 1) // request.sweep.workers)
        return ppo.train_side_by_side(request.trainer, trials, *_ppo_base(request), workers=threads)
    from mua_rl.grpo.stacked import trainer as grpo

    curves: dict[Trial, RewardCurve] = {} if peers is None else peers
    steps = request.trainer.max_steps

    def keep_going(trial: Trial, history: list[dict[str, float]]) -> str | None:
        rewards = [(step, metrics["reward"]) for step, metrics in enumerate(history, 1)]
        curves[trial] = [(step, reward) for step, reward in rewards if not math.isnan(reward)]
        others = [curve for other, curve in curves.items() if curve and other != trial and other.spec == trial.spec]
        return why_hopeless(curves[trial], others, steps, independent=True) or None

    return grpo.train_side_by_side(
        copy.copy(request.trainer),
        trials,
        request.adapter.adapter("mlp").target_modules,
        on_step=(lambda step, _: on_step(step, steps)) if on_step else None,
        keep_going=keep_going if request.sweep.early_stop else None,
        start_from=request.adapter.start_from,
        memory=request.sweep.arms_memory,
        checkpoints=runs,
    )


def _ppo_base(request: Request) -> tuple[Any, Any]:
    """The base policy and the target modules.

    Raises:
        UserError: There is no base policy.
    """
    from mua_rl.ppo.setup import find_base

    base, name, _ = find_base(request.trainer, request.adapter.start_from)
    if base is None:
        raise UserError(f"{name} has no stacked form: run it singly.")
    return base, request.adapter.adapter("hidden").target_modules


def _enter(environment: dict[str, str]) -> None:
    """Called first in a process of a group's own."""
    if parent_dies := die_with_parent():
        parent_dies()
    os.environ.update(environment)
    if (threads := os.environ.get("OMP_NUM_THREADS")) and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
