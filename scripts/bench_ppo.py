"""Environment steps per second of LoRA PPO and full finetuning against plain stable-baselines3, in one run (issue 3).

    python scripts/bench_ppo.py
    python scripts/bench_ppo.py --env mua_rl/HalfCheetah-HighGravity-v0 --net 256 256

All three have the same network, options, environments and seeds. Their rollouts, updates and evaluations alternate in
small pieces within one process, so that whatever else the machine does falls on all of them alike; the figures are
medians over the pieces. The target is a whole iteration (rollout and update) of LoRA at 0.95 of SB3's speed or more.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import stable_baselines3
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

import mua_rl.envs.control  # noqa: F401  (registers the tasks)
from mua_rl.adapter.adapters import Full, LoRA
from mua_rl.flags import FlagParser
from mua_rl.ppo.trainer import PPO
from mua_rl.run.machine import machine


def build(name: str, arguments: argparse.Namespace) -> tuple[stable_baselines3.PPO, BaseCallback]:
    """One of the contestants, ready for its first rollout, and the callback that rollouts need."""
    options = {
        "n_steps": arguments.n_steps,
        "batch_size": arguments.batch_size,
        "n_epochs": arguments.n_epochs,
        "policy_kwargs": {"net_arch": arguments.net},
        "seed": 0,
        "device": "cpu",
    }
    envs = make_vec_env(arguments.env, n_envs=arguments.n_envs, seed=0)
    if name == "SB3":
        model = stable_baselines3.PPO("MlpPolicy", envs, **options)
    else:
        adapter = Full("hidden") if name == "FFT" else LoRA(arguments.rank, target_modules="hidden")
        model = PPO("MlpPolicy", envs, adapter=adapter, **options)
    model.set_logger(Logger(None, []))
    return model, model._setup_learn(10**9)[1]


def timed(piece: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    piece()
    return time.perf_counter() - start


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="mua_rl/CartPole-LongPole-v0")
    parser.add_argument("--net", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--n_envs", type=int, default=8)
    parser.add_argument("--n_steps", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--n_epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    names = ["SB3", f"LoRA r={arguments.rank}", "FFT"]
    models = {name: build(name, arguments) for name in names}
    rollout: dict[str, list[float]] = {name: [] for name in names}
    update: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(arguments.rounds + 2):
        for name in names[round_number % 3 :] + names[: round_number % 3]:
            model, callback = models[name]
            assert model.env is not None
            collect = timed(partial(model.collect_rollouts, model.env, callback, model.rollout_buffer, model.n_steps))
            learn = timed(model.train)
            if round_number >= 2:  # the first two warm up
                rollout[name].append(collect)
                update[name].append(learn)

    transitions = arguments.n_envs * arguments.n_steps
    where = f"{machine('cpu')}, load {os.getloadavg()[0]:.1f}"
    table = Table(title=f"{arguments.env}, net {arguments.net}, median of {arguments.rounds} rounds, {where}")
    for heading in ("", "rollout steps/s", "update ms", "all steps/s", "of SB3"):
        table.add_column(heading, justify="right")
    totals = {name: [a + b for a, b in zip(rollout[name], update[name], strict=True)] for name in names}
    figures = {}
    for name in names:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(totals["SB3"], totals[name], strict=True))
        figures[name] = {
            "rollout_steps_per_second": transitions / statistics.median(rollout[name]),
            "update_ms": 1000 * statistics.median(update[name]),
            "steps_per_second": transitions / statistics.median(totals[name]),
            "ratio_to_sb3": ratio,
        }
        table.add_row(name, *(f"{value:,.0f}" for value in list(figures[name].values())[:3]), f"{ratio:.3f}")
    Console(width=140).print(table)
    print(json.dumps({"machine": where, "env": arguments.env, "net": arguments.net, **figures}))


if __name__ == "__main__":
    main()
