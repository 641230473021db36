"""Does one learning rate serve LoRA at any rank and full finetuning (FFT) on shifted control tasks? (issue 3)

    python scripts/compare_ppo.py --workers 16                    # three tasks; run it again to go on
    python scripts/compare_ppo.py --tasks hopper --stages base tune table
    python scripts/compare_ppo.py --summary                       # the tables of what is there
    python scripts/compare_ppo.py --write_records mua_rl/assets/records

Stage 1 tunes: Init[B], α = 1, r = 8 over half-octaves of the learning rate, with seeds of their own. The smallest
learning rate whose mean held-out return lies within one standard error of the best is taken (a plateau is flat, and
its lower end is the safer one). Stage 2 takes that learning rate as it is to r = 4, r = 16 and FFT, with eight other
seeds. Beside them: the base policy, training from scratch with ten times the steps, and a sweep of FFT's own learning
rate, which shows what tuning FFT itself would have gained. One line of the CSV is one run.
"""

import argparse
import csv
import math
import os
import statistics
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mua_rl.flags import FlagParser

os.environ["OMP_NUM_THREADS"] = "1"  # one run per core

TUNED_RANK = 8
TABLE = {"LoRA r=4": 4, "LoRA r=8": 8, "LoRA r=16": 16, "FFT": None}
SCRATCH_FACTOR = 10
EPISODES = 40


@dataclass(frozen=True)
class Task:
    """A shifted task with its budget.

    Attributes:
        env_id: The shifted version.
        base: Family whose shipped base policy is adapted.
        steps: Environment steps of one adaptation.
        grid: log2 of the learning rates of stage 1.
        tuning_seeds: Seeds per learning rate in stage 1.
        table_seeds: Seeds per configuration in stage 2.
    """

    env_id: str
    base: str
    steps: int
    grid: tuple[float, ...]
    tuning_seeds: int
    table_seeds: int = 8


def half_octaves(low: float, high: float) -> tuple[float, ...]:
    """From `low` to `high`, both included, in steps of one half."""
    return tuple(low + k / 2 for k in range(int(2 * (high - low)) + 1))


TASKS = {
    "cartpole": Task("mua_rl/CartPole-LongPole-v0", "CartPole", 25_600, half_octaves(-10.5, -6.5), 8),
    "pendulum": Task("mua_rl/Pendulum-HighGravity-v0", "Pendulum", 40_960, half_octaves(-12, -8), 8),
    "halfcheetah": Task("mua_rl/HalfCheetah-HighGravity-v0", "HalfCheetah", 102_400, half_octaves(-13, -9.5), 4),
    "hopper": Task("mua_rl/Hopper-Heavy-v0", "Hopper", 102_400, half_octaves(-13, -9.5), 4),
}
DEFAULT_TASKS = ["cartpole", "pendulum", "halfcheetah"]


@dataclass(frozen=True)
class Run:
    """One training run, or none (`rank` "base")."""

    task: str
    stage: str
    rank: str
    log2_lr: float
    seed: int
    env_steps: int


@dataclass(frozen=True)
class Result(Run):
    """What a run reached on held-out episodes, and in training on average (`auc`)."""

    mean: float
    std: float
    iqm: float
    auc: float
    seconds: float
    machine: str


def execute(run: Run) -> Result:
    """Train and evaluate; called in a process of its own."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger

    from mua_rl.adapter.adapters import Full, LoRA
    from mua_rl.ppo.arguments import FINETUNING, limit_threads, linear_decay
    from mua_rl.ppo.base import SHIPPED, read_base_policy
    from mua_rl.ppo.envs import build_envs, evaluation_envs, with_statistics
    from mua_rl.ppo.evaluation import evaluate
    from mua_rl.ppo.trainer import PPO
    from mua_rl.run.machine import machine

    class Curve(BaseCallback):
        """Mean return of the episodes that ended in each rollout."""

        def __init__(self) -> None:
            super().__init__()
            self.means: list[float] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
            self.means.append(statistics.fmean(returns) if returns else self.means[-1] if self.means else math.nan)
            self.model.ep_info_buffer.clear()  # type: ignore[union-attr]

    limit_threads()
    task, started = TASKS[run.task], time.perf_counter()
    base = read_base_policy(SHIPPED / task.base / "policy.zip")
    envs = build_envs(task.env_id, base.n_envs, run.seed)
    curve = Curve()
    if run.stage == "scratch":
        model = from_scratch(task, envs, run)
        envs = model.get_env()
    else:
        envs = with_statistics(envs, base.vec_normalize) if base.vec_normalize else envs
        adapter = LoRA(int(run.rank), target_modules="hidden") if run.rank.isdigit() else Full("hidden")
        options: dict[str, Any] = {"seed": run.seed, "device": "cpu", **FINETUNING}
        model = PPO.from_base(base, envs, adapter=adapter, learning_rate=linear_decay(2.0**run.log2_lr), **options)
    model.set_logger(Logger(None, []))
    if run.env_steps:
        model.learn(run.env_steps, callback=curve)
    held_out = evaluation_envs(build_envs(task.env_id, 8, 0), envs)
    returns = evaluate(model, held_out, EPISODES)
    return Result(
        **asdict(run),
        mean=round(returns.mean, 2),
        std=round(returns.std, 2),
        iqm=round(returns.iqm, 2),
        auc=round(statistics.fmean([value for value in curve.means if not math.isnan(value)] or [math.nan]), 2),
        seconds=round(time.perf_counter() - started, 1),
        machine=machine("cpu"),
    )


def from_scratch(task: Task, envs: Any, run: Run) -> Any:
    """Plain SB3 with the recipe that made the base policy, on the shifted task."""
    import stable_baselines3
    from make_base_policies import RECIPES
    from stable_baselines3.common.utils import LinearSchedule
    from stable_baselines3.common.vec_env import VecNormalize

    recipe = {key: value for key, value in RECIPES[task.base].items() if key not in ("steps", "n_envs", "normalize")}
    recipe["learning_rate"] = LinearSchedule(recipe["learning_rate"], 0.0, 1.0)
    if RECIPES[task.base]["normalize"]:
        envs = VecNormalize(envs, gamma=recipe.get("gamma", 0.99))
    return stable_baselines3.PPO("MlpPolicy", envs, seed=run.seed, device="cpu", **recipe)


def tuning_runs(name: str, task: Task, rank: str, stage: str) -> list[Run]:
    """A sweep of the learning rate; its seeds are none of the table's."""
    return [Run(name, stage, rank, lr, 100 + seed, task.steps) for seed in range(task.tuning_seeds) for lr in task.grid]


def table_runs(name: str, task: Task, log2_lr: float) -> list[Run]:
    """Stage 2."""
    return [
        Run(name, "table", str(rank or "full"), log2_lr, seed, task.steps)
        for seed in range(task.table_seeds)
        for rank in TABLE.values()
    ]


STAGES = ("base", "scratch", "tune", "table", "tune-fft")


def first_runs(name: str, task: Task) -> list[Run]:
    """What waits for nothing: the base policy, training from scratch, stage 1."""
    scratch = [Run(name, "scratch", "full", 0, seed, SCRATCH_FACTOR * task.steps) for seed in range(task.table_seeds)]
    return [Run(name, "base", "base", 0, 0, 0), *scratch, *tuning_runs(name, task, str(TUNED_RANK), "tune")]


def key(run: Run) -> tuple:
    """What identifies a run in the CSV."""
    return (run.task, run.stage, run.rank, run.log2_lr, run.seed, run.env_steps)


def tuned(results: list[Result], name: str, stage: str = "tune") -> tuple[float, float] | None:
    """(log2 of the chosen learning rate, log2 of the best), once a sweep is complete."""
    task, by_lr = TASKS[name], defaultdict(list)
    for result in results:
        if (result.task, result.stage) == (name, stage):
            by_lr[result.log2_lr].append(result.mean)
    if sum(map(len, by_lr.values())) < len(task.grid) * task.tuning_seeds:
        return None
    means = {lr: mean_and_error(values) for lr, values in by_lr.items()}
    best = max(means, key=lambda lr: means[lr][0])
    floor = means[best][0] - means[best][1]
    return min(lr for lr, (mean, _) in means.items() if mean >= floor), best


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def read(path: Path) -> list[Result]:
    """The runs that are done."""
    if not path.exists():
        return []
    types = {field.name: field.type for field in fields(Result)}
    with open(path, encoding="utf-8") as stream:
        return [Result(**{k: types[k](v) for k, v in row.items()}) for row in csv.DictReader(stream)]  # type: ignore


def append(path: Path, result: Result) -> None:
    """Add one line; a run that is cut off loses no earlier one."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Result)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(result))


def run_all(path: Path, names: list[str], workers: int, deadline: float, stages: list[str]) -> None:
    """Work through the grid, the longest runs first, and give a task its stage 2 as soon as its stage 1 is complete."""
    results = read(path)
    done = {key(result) for result in results}
    submitted: set[tuple] = set()
    pending: set[Future] = set()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def submit(runs: list[Run]) -> None:
        for run in runs:
            if run.stage in stages and key(run) not in done | submitted:
                submitted.add(key(run))
                pending.add(pool.submit(execute, run))

    def submit_tables() -> None:
        for name in names:
            if chosen := tuned(results, name):
                submit(table_runs(name, TASKS[name], chosen[0]))

    first = [run for name in names for run in first_runs(name, TASKS[name])]
    submit(sorted(first, key=lambda run: -run.env_steps))
    submit_tables()
    submit([run for name in names for run in tuning_runs(name, TASKS[name], "full", "tune-fft")])
    while pending and time.monotonic() < deadline:
        finished, pending_now = wait(pending, timeout=5, return_when=FIRST_COMPLETED)
        pending.clear()
        pending.update(pending_now)
        for future in finished:
            result = future.result()
            append(path, result)
            results.append(result)
            print(f"{len(results):4d}  {result}", flush=True)
        submit_tables()
    if pending:
        print(f"out of time with {len(pending)} runs to go: run the same command again", flush=True)
        for process in (pool._processes or {}).values():
            process.terminate()
    pool.shutdown(wait=not pending, cancel_futures=True)


def summary(results: list[Result]) -> str:
    """The tables in Markdown: mean held-out return ± standard error over seeds."""
    lines = ["| task (env steps) | base policy | " + " | ".join(TABLE) + " | from scratch, 10 × the steps |"]
    lines.append("|" + "---|" * (len(TABLE) + 3))
    for name, task in TASKS.items():
        if all(result.task != name for result in results):
            continue
        chosen = tuned(results, name)
        cells = [f"{task.env_id} ({task.steps:,})", cell(results, name, "base", "base")]
        cells += [cell(results, name, "table", str(rank or "full")) for rank in TABLE.values()]
        cells.append(cell(results, name, "scratch", "full"))
        lines.append("| " + " | ".join(cells) + " |")
        if chosen:
            lines[-1] = lines[-1].replace(")", f"; η = 2^{chosen[0]:g})", 1)
    for stage, label in (("tune", f"LoRA r={TUNED_RANK}"), ("tune-fft", "FFT")):
        for name in TASKS:
            sweep = [r for r in results if (r.task, r.stage) == (name, stage)]
            if sweep:
                measured = sorted({r.log2_lr for r in sweep})
                means = {lr: mean_and_error([r.mean for r in sweep if r.log2_lr == lr]) for lr in measured}
                lines += [
                    "",
                    f"{name}, {label}, stage 1: "
                    + ", ".join(f"2^{lr:g}: {m:.0f} ± {e:.0f}" for lr, (m, e) in means.items()),
                ]
    return "\n".join(lines)


def cell(results: list[Result], name: str, stage: str, rank: str) -> str:
    """One configuration's mean ± standard error, and how many seeds."""
    values = [r.mean for r in results if (r.task, r.stage, r.rank) == (name, stage, rank)]
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean:.0f}" if len(values) == 1 else f"{mean:.0f} ± {error:.0f} ({len(values)})"


def write_records(results: list[Result], names: list[str], folder: Path) -> None:
    """One LR record per task whose stage 1 is complete, named after its base policy."""
    from mua_rl.ppo.arguments import PPOArguments
    from mua_rl.ppo.run import recipe_of
    from mua_rl.ppo.setup import set_up
    from mua_rl.run.arguments import AdapterArguments

    for name in names:
        task, chosen = TASKS[name], tuned(results, name)
        if chosen is None:
            continue
        arguments = PPOArguments(env_id=task.env_id, total_timesteps=task.steps)
        setup = set_up(arguments, AdapterArguments(rank=str(TUNED_RANK), lr=2.0 ** chosen[0]))
        runs = [r for r in results if (r.task, r.stage, r.log2_lr) == (name, "tune", chosen[0])]
        before = [r.mean for r in results if (r.task, r.stage) == (name, "base")]
        scores = before[0] if before else None, statistics.fmean(r.mean for r in runs)
        note = "smallest learning rate within one standard error of the best in scripts/compare_ppo.py, stage 1"
        recipe, spec, seeds = recipe_of(arguments, setup), setup.configuration.spec, sorted(r.seed for r in runs)
        record = recipe.record(spec, setup.rate.value, scores, seeds, "sweep", note, task.steps)
        print(record.save(folder / f"ppo-{task.base.lower()}.json"))


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=DEFAULT_TASKS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("runs/compare_ppo.csv"))
    parser.add_argument("--time_limit", type=float, default=math.inf, help="seconds after which to stop")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument(
        "--write_records", type=Path, metavar="FOLDER", help="write the tuned learning rates as LR records"
    )
    parser.add_argument("--summary", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    if arguments.write_records:
        write_records(read(arguments.output), arguments.tasks, arguments.write_records)
    elif not arguments.summary:
        deadline = time.monotonic() + arguments.time_limit
        run_all(arguments.output, arguments.tasks, arguments.workers, deadline, arguments.stages)
    print(summary(read(arguments.output)))


if __name__ == "__main__":
    main()
