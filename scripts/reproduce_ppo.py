"""PPO's learning-rate curves at width 256: FFT, Init[B] and Init[A] over ranks, tasks and base checkpoints (issue 6).

    python scripts/reproduce_ppo.py --prepare                     # make the base checkpoints only (minutes, CPU)
    python scripts/reproduce_ppo.py                               # all trials, CPU (hours; run it again to go on)
    python scripts/reproduce_ppo.py --device cuda --per_group 400 # … hundreds of them at once
    python scripts/reproduce_ppo.py --only task=pendulum rank=full,8 --output runs/half.csv

Each base checkpoint is plain SB3 on the nominal task; each trial adapts it to the shifted one. One line of the CSV is
one trial; lines that are there are not repeated. Two processes share the work by `--only` and write a CSV each.
"""

import argparse
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_ppo import TASKS, half_octaves
from selection import passes

from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import parse
from mua_rl.sweep.csv_study import CSVStudy
from mua_rl.sweep.search import FixedTrials
from mua_rl.sweep.stacked_runs import StackedRuns
from mua_rl.sweep.work import work

WIDTH = 256
BASE_SEEDS = (0, 1)
RANKS = (2, 8, 32)  # at most WIDTH / 8
GRIDS: dict[tuple[str, str], tuple[float, ...]] = {
    ("B", "1"): half_octaves(-12, -3),
    ("A", "1"): half_octaves(-12, -3),
    ("A", "1/r"): half_octaves(-11, -1),
}
FFT_GRID = half_octaves(-14, -5)
DEFAULT_TASKS = ("cartpole", "pendulum")


@dataclass(frozen=True)
class Curve:
    """A curve with the task and the base checkpoint that its trials adapt."""

    task: str
    base: str
    spec: AdapterSpec
    grid: tuple[float, ...]

    def trials(self, seeds: int) -> tuple[Trial, ...]:
        """All trials of the curve."""
        return tuple(Trial(self.spec, log2_lr, seed) for log2_lr in self.grid for seed in range(seeds))


def all_curves() -> list[Curve]:
    """Every curve, one base checkpoint after the other and LoRA in order of rank."""
    grids = {FFT: FFT_GRID}
    grids |= {AdapterSpec.parse(rank, *scheme): grid for rank in RANKS for scheme, grid in GRIDS.items()}
    return [
        Curve(task, f"{TASKS[task].base}-w{WIDTH}-s{seed}", spec, grid)
        for seed in BASE_SEEDS
        for task in DEFAULT_TASKS
        for spec, grid in grids.items()
    ]


def wanted(curve: Curve, only: Sequence[str]) -> bool:
    """Whether a curve passes every filter `name=value[,value…]` of task, base, rank (full: FFT), init and alpha."""
    spec = {**curve.spec.as_dict(), "rank": str(curve.spec.rank or "full")}
    return passes({"task": curve.task, "base": curve.base, **spec}, only)


def base_path(folder: Path, base: str) -> Path:
    """Where a base checkpoint lies."""
    return folder / f"{base}.zip"


def prepare(folder: Path, base: str) -> None:
    """Pretrain a base checkpoint with the recipe of the shipped policy, but wider; on one thread."""
    from make_base_policies import RECIPES, UNSAVED, evaluate, make_envs
    from stable_baselines3 import PPO
    from stable_baselines3.common.utils import LinearSchedule

    torch.set_num_threads(1)
    family, width, seed = base.split("-")
    recipe: dict[str, Any] = dict(RECIPES[family])
    steps, n_envs, peak = recipe.pop("steps"), recipe.pop("n_envs"), recipe.pop("learning_rate")
    assert not recipe.pop("normalize")
    recipe["policy_kwargs"] = {"net_arch": [int(width[1:])] * 2}
    env_id = f"mua_rl/{family}-v0"
    envs = make_envs(env_id, n_envs, int(seed[1:]))
    options = {"learning_rate": LinearSchedule(peak, 0.0, 1.0), "seed": int(seed[1:]), "device": "cpu", **recipe}
    model = PPO("MlpPolicy", envs, **options).learn(steps)
    print(f"{base}: held-out return (mean, standard deviation) {evaluate(model, env_id, None, 40)}", flush=True)
    model.policy.optimizer.state.clear()  # its moments would triple the file
    model.save(base_path(folder, base), exclude=UNSAVED)


def train(curves: Sequence[Curve], options: argparse.Namespace, deadline: float) -> bool:
    """Train what the CSV lacks of curves that share their task and their base; whether all of it is done."""
    task, base = TASKS[curves[0].task], curves[0].base
    flags = ["--algo", "ppo", "--env_id", task.env_id, "--total_timesteps", str(task.steps)]
    backend = StackedRuns(
        parse([*flags, "--base", str(base_path(options.work, base)), "--device", options.device]), options.work
    )
    backend.at_once = options.per_group
    study = CSVStudy(options.output, ("ppo", task.env_id, base), options.device)
    plans = [FixedTrials(curve.spec, curve.trials(options.seeds)) for curve in curves]

    def show(trial: Trial, outcome: TrialResult) -> None:
        print(f"{curves[0].task} {base} {trial.name}: {outcome.score:.1f}", flush=True)

    return work(study, plans, backend, show, deadline, threading.Event())


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce_ppo"), help="folder of the base checkpoints")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce_ppo.csv"))
    parser.add_argument("--prepare", action="store_true", help="make the base checkpoints and stop")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="of task, base, rank, init, alpha")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--per_group", type=int, default=32, help="trials side by side")
    parser.add_argument("--time_limit", type=float, default=math.inf, help="seconds after which no group is started")
    options = parser.parse_args()

    deadline = time.monotonic() + options.time_limit
    curves = [curve for curve in all_curves() if wanted(curve, options.only)]
    options.work.mkdir(parents=True, exist_ok=True)
    for base in dict.fromkeys(curve.base for curve in curves):
        if not base_path(options.work, base).exists():
            prepare(options.work, base)
    if options.prepare:
        return
    for task, base in dict.fromkeys((curve.task, curve.base) for curve in curves):
        if not train([curve for curve in curves if (curve.task, curve.base) == (task, base)], options, deadline):
            print("out of time: run the same command again", flush=True)
            return


if __name__ == "__main__":
    run_command(main)
