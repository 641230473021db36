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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from compare_ppo import TASKS, half_octaves
from selection import passes

from mua_rl.analysis import rows
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.ppo.base import BasePolicy, read_base_policy
from mua_rl.run.machine import machine
from mua_rl.run.trial import Trial, TrialResult

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
class Work:
    """A trial with the task and the base checkpoint that it adapts."""

    task: str
    base: str
    trial: Trial

    def columns(self) -> dict[str, str]:
        """What identifies it in the CSV."""
        return columns(TASKS[self.task].env_id, self.base, self.trial)


def columns(env_id: str, base: str, trial: Trial) -> dict[str, str]:
    """What identifies a trial among all of them."""
    values = {"task": env_id, "base": base, **trial.as_dict()}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def all_work(seeds: int) -> list[Work]:
    """Every trial, one base checkpoint after the other and LoRA in order of rank."""
    curves = [(FFT, FFT_GRID)]
    curves += [(AdapterSpec.parse(rank, *scheme), grid) for rank in RANKS for scheme, grid in GRIDS.items()]
    return [
        Work(
            task,
            f"{TASKS[task].base}-w{WIDTH}-s{base_seed}",
            Trial(spec, log2_lr, seed),
        )
        for base_seed in BASE_SEEDS
        for task in DEFAULT_TASKS
        for spec, grid in curves
        for log2_lr in grid
        for seed in range(seeds)
    ]


def wanted(work: Work, only: Sequence[str]) -> bool:
    """Whether it passes every filter `name=value[,value…]` (task: its short name; rank: full for FFT)."""
    return passes({**work.columns(), "task": work.task, "rank": str(work.trial.spec.rank or "full")}, only)


def groups(work: Sequence[Work], per_group: int) -> Iterator[list[Work]]:
    """What trains side by side: one task, one base, LoRA or FFT, at most `per_group` trials."""
    for _, run in groupby(work, key=lambda one: (one.task, one.base, one.trial.spec.rank is None)):
        trials = list(run)
        size = math.ceil(len(trials) / math.ceil(len(trials) / per_group))
        yield from (trials[begin : begin + size] for begin in range(0, len(trials), size))


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


def finished(path: Path) -> set[tuple[str, ...]]:
    """The trials of a CSV, by the values of `Work.columns`."""
    if not path.exists():
        return set()
    return {tuple(columns(row.task, row.base, row.trial).values()) for row in rows.read(path)}


def append(path: Path, work: Sequence[Work], outcomes: Sequence[TrialResult], where: str) -> None:
    """Add a group's lines."""
    done = zip(work, outcomes, strict=True)
    rows.append(path, [rows.Row("ppo", TASKS[one.task].env_id, one.base, one.trial, o, where) for one, o in done])


def train_group(work: Sequence[Work], base: BasePolicy, device: str) -> list[TrialResult]:
    """Train the trials of a group."""
    from mua_rl.ppo.arguments import PPOArguments
    from mua_rl.ppo.stacked.trainer import train_side_by_side

    task = TASKS[work[0].task]
    arguments = PPOArguments(env_id=task.env_id, total_timesteps=task.steps)
    return train_side_by_side(arguments, [one.trial for one in work], base, device=device)


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce_ppo"), help="folder of the base checkpoints")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce_ppo.csv"))
    parser.add_argument("--prepare", action="store_true", help="make the base checkpoints and stop")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="of task, base, rank, init, …")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--per_group", type=int, default=32, help="trials side by side")
    parser.add_argument("--time_limit", type=float, default=math.inf, help="seconds to start groups for")
    arguments = parser.parse_args()

    start = time.monotonic()
    work = [one for one in all_work(arguments.seeds) if wanted(one, arguments.only)]
    arguments.work.mkdir(parents=True, exist_ok=True)
    for base in dict.fromkeys(one.base for one in work):
        if not base_path(arguments.work, base).exists():
            prepare(arguments.work, base)
    if arguments.prepare:
        return
    done = finished(arguments.output)
    remaining = [one for one in work if tuple(one.columns().values()) not in done]
    print(f"{len(remaining)} of {len(work)} trials to train", flush=True)
    took = 0.0
    for group in groups(remaining, arguments.per_group):
        began = time.monotonic()
        if began - start + took > arguments.time_limit:  # the next group takes as long as the last one
            print("out of time: run the same command again", flush=True)
            return
        base = read_base_policy(base_path(arguments.work, group[0].base))
        outcomes = train_group(group, base, arguments.device)
        append(arguments.output, group, outcomes, machine(arguments.device))
        took = time.monotonic() - began
        best = max((outcome.score for outcome in outcomes if not math.isnan(outcome.score)), default=math.nan)
        print(f"{group[0].task} {group[0].base}: {len(group)} trials in {took:.0f} s, best {best:.1f}", flush=True)


if __name__ == "__main__":
    run_command(main)
