"""PPO trials side by side against the same number of plain stable-baselines3 runs one after another (issue 7).

    python scripts/bench_sweep_ppo.py                                        # CartPole, 32 trials, two threads
    python scripts/bench_sweep_ppo.py --env mua_rl/HalfCheetah-HighGravity-v0 --trials 8 --steps 8192 --kinds full 8

Both start from the shipped base policy and take the same environment steps with the same options; building models and
environments counts, importing packages and evaluating do not. Only `--singles` of the SB3 runs are timed, at learning
rates spread over the sweep's, and their mean stands for all. CPU seconds stand beside the wall's, which other programs
on the machine lengthen. By default no update stops early, so that every run does all of its work; `--target_kl 0.03`
is what finetuning uses.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")

import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger

from mua_rl.flags import FlagParser
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.ppo.arguments import PPOArguments
from mua_rl.ppo.base import BasePolicy, read_base_policy, shipped_policy
from mua_rl.ppo.setup import training_envs
from mua_rl.ppo.stacked.trainer import StackedPPO
from mua_rl.run.machine import machine
from mua_rl.run.trial import Trial

LOW, HIGH = -11.0, -7.0
# Without these, large blocks go back to the operating system each time and their pages are faulted in anew.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_TOP_PAD_": "268435456"}


def sweep(rank: int | None, trials: int) -> list[Trial]:
    """Eight learning rates in half-octaves, with as many seeds as it takes."""
    return [Trial(AdapterSpec.parse(rank), LOW + k % 8 * (HIGH - LOW) / 8, k // 8) for k in range(trials)]


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call: on the wall, and of all threads on the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def run_side_by_side(arguments: PPOArguments, trials: Sequence[Trial], base: BasePolicy, workers: int) -> None:
    """All trials at once, on `workers` threads."""
    groups = [StackedPPO(arguments, trials[first::workers], base) for first in range(workers)]
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(StackedPPO.train, groups))


def run_singly(arguments: PPOArguments, trial: Trial, base: BasePolicy) -> None:
    """One run of plain SB3, fully finetuned, at the trial's learning rate."""
    envs = training_envs(arguments, base)
    schedule = arguments.schedule(trial.learning_rate)
    options = {**base.options, **arguments.sb3_options()}
    model = stable_baselines3.PPO(
        base.policy_class, envs, learning_rate=schedule, policy_kwargs=base.policy_kwargs, device="cpu", **options
    )
    base.load_into(model.policy)
    model.set_logger(Logger(None, []))
    model.learn(arguments.total_timesteps)


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="mua_rl/CartPole-LongPole-v0")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--singles", type=int, default=3, help="SB3 runs that are timed")
    parser.add_argument("--steps", type=int, default=10_240, help="environment steps of each trial")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["full", "8"], help="full, or ranks")
    parser.add_argument("--target_kl", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = shipped_policy(options.env)
    if path is None:
        parser.error(f"no base policy ships for {options.env}")
    base = read_base_policy(path)
    arguments = PPOArguments(env_id=options.env, total_timesteps=options.steps, target_kl=options.target_kl)

    singles = [Trial(FFT, LOW + (k + 0.5) * (HIGH - LOW) / options.singles, 0) for k in range(options.singles)]
    single_times = [timed(lambda trial=trial: run_singly(arguments, trial, base)) for trial in singles]  # type: ignore[misc]
    single = {clock: sum(times[clock] for times in single_times) / len(singles) for clock in ("wall", "cpu")}
    figures = {}
    for kind in options.kinds:
        trials = sweep(None if kind == "full" else int(kind), options.trials)
        together = timed(lambda trials=trials: run_side_by_side(arguments, trials, base, options.workers))  # type: ignore[misc]
        figures["FFT" if kind == "full" else f"LoRA r={kind}"] = {
            "seconds": together,
            "times_faster_wall": options.trials * single["wall"] / together["wall"],
            "times_less_cpu": options.trials * single["cpu"] / together["cpu"],
        }
    report = {
        "machine": f"{machine('cpu')}, load {os.getloadavg()[0]:.1f}",
        "malloc_hints": all(os.environ.get(name) == value for name, value in MALLOC.items()),
        **vars(options),
        "sb3_seconds_per_run": single,
        "sb3_runs_timed": len(singles),
        **figures,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
