"""GRPO's learning-rate curves on SmolLM2: FFT, Init[B] and Init[A] over ranks, each with its optimum found (issue 6).

    python scripts/reproduce_grpo.py --only rank=4,16 --time_limit 500      # LoRA: many trials in one process
    python scripts/reproduce_grpo.py --only rank=full --parallel 5          # FFT: runs of their own, five at once
    python scripts/reproduce_grpo.py --model embedded --steps 120 --per_group 12 --parallel 1  # a small model, on a CPU
    python -m mua_rl.analysis.report docs/results/reproduce_grpo.csv --out docs/results/reproduce_grpo

Each curve is searched as `python -m mua_rl.sweep` does (`mua_rl.sweep.search`). One line of the CSV is one run; lines
that are there are not repeated, so the same command goes on after a stop, and several processes share the work by
`--only`. Every run rolls out by transformers, so that all curves have the same kind of completions.
"""

import argparse
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from selection import passes

from mua_rl.analysis.rows import Row, append, read
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.stacked.trainer import train_side_by_side
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.run.folder import RunFolder
from mua_rl.run.machine import machine
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.runner import ENDED, trial_flags
from mua_rl.sweep.search import Search

SCHEMES = (("B", "1"), ("A", "1"), ("A", "1/r"))
# log2 of the learning rate around which each curve's search begins; it goes on where the optimum lies elsewhere.
CENTRES: dict[str, dict[int | None, tuple[float, ...]]] = {
    # model: {rank: one for each of SCHEMES}; None: FFT
    "smollm2": {4: (-12, -10, -9), 16: (-12, -10, -9), 64: (-13, -11, -8), 256: (-13, -12, -8), None: (-14,)},
    "embedded": {4: (-9, -8, -7), 16: (-10, -9, -7), 64: (-11, -10, -7), None: (-11,)},
}
SPAN = 2


def searches(seeds: Sequence[int], resolution: float, model: str = "smollm2") -> list[Search]:
    """One for each curve; another model than those of `CENTRES` begins where SmolLM2 does."""
    return [
        Search(
            AdapterSpec.parse(rank, *scheme),
            tuple(float(centre + k) for k in range(-SPAN, SPAN + 1)),
            1.0,
            resolution,
            tuple(seeds),
        )
        for rank, centres in CENTRES.get(model, CENTRES["smollm2"]).items()
        for scheme, centre in zip(SCHEMES if rank else [("", "")], centres, strict=True)
    ]


def wanted(search: Search, only: Sequence[str]) -> bool:
    """Whether a curve passes every filter `name=value[,value…]` of rank (full: FFT), init and alpha."""
    spec = search.spec
    return passes({**spec.as_dict(), "rank": str(spec.rank or "full")}, only)


def flags(options: argparse.Namespace) -> list[str]:
    """What all runs have in common."""
    common = ["--model", options.model, "--task", options.task, "--max_steps", options.steps, "--report_to", "none"]
    return [str(flag) for flag in [*common, "--held_out_steps", 0, "--save_strategy", "no", *options.flags]]


def train_lora(trials: Sequence[Trial], options: argparse.Namespace) -> list[TrialResult]:
    """Side by side."""
    arguments, _, _ = parse(flags(options))
    return train_side_by_side(arguments, trials)


def train_full(trials: Sequence[Trial], options: argparse.Namespace) -> list[TrialResult]:
    """Each as a run of its own, all at once; of the time each has its share, as trials side by side have."""

    def train(trial: Trial) -> TrialResult:
        run = RunFolder(options.work / trial.name)
        shutil.rmtree(run.path, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "mua_rl.grpo",
            *flags(options),
            *trial_flags(trial),
            "--output_dir",
            str(run.path),
        ]
        output = options.work / f"{trial.name}.log"
        start = time.monotonic()
        with open(output, "w", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=log).returncode
        if code not in ENDED:
            last = output.read_text(encoding="utf-8").splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"{run.path.name} failed with code {code}: {last[0]} ({output})")
        result = run.result()
        assert result is not None
        return replace(result, seconds=(time.monotonic() - start) / len(trials))

    with ThreadPoolExecutor(options.parallel) as pool:
        return list(pool.map(train, trials))


def run_all(
    pending: Callable[[Mapping[Trial, TrialResult]], Sequence[Trial]], options: argparse.Namespace
) -> dict[Trial, TrialResult] | None:
    """Run what is pending, group by group, until nothing is; each group's runs go to the CSV as it ends.

    Args:
        pending: The trials to run next, given what all trials have reached so far.

    Returns:
        What all trials reached; `None` where time ran out before.

    Raises:
        UserError: An option cannot be used, or a run of FFT failed.
    """
    for name in ("steps", "per_group", "parallel"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} takes a number from 1 on, not {getattr(options, name)}.")
    options.work.mkdir(parents=True, exist_ok=True)
    start, slowest = time.monotonic(), 0.0
    while True:
        rows = read(options.output) if options.output.exists() else []
        done = {row.trial: row.result for row in rows if (row.task, row.base) == (options.task, options.model)}
        trials = sorted(pending(done), key=lambda trial: trial.spec.rank or 0)  # a group is padded to its largest rank
        if not trials:
            return done
        full = trials[0].rank is None
        size = options.parallel if full else options.per_group
        group = [trial for trial in trials if (trial.spec == FFT) == full][:size]
        began = time.monotonic()
        if began - start + slowest > options.time_limit:
            print(f"out of time with {len(trials)} runs waiting: run the same command again", flush=True)
            return None
        outcomes = (train_full if full else train_lora)(group, options)
        append(
            options.output,
            [Row("grpo", options.task, options.model, a, o, machine()) for a, o in zip(group, outcomes, strict=True)],
        )
        took = time.monotonic() - began
        slowest = max(slowest, took)
        for trial, outcome in zip(group, outcomes, strict=True):
            print(f"{trial.name}: {outcome.score:.3f} (reward {outcome.reward_mean:.3f})", flush=True)
        print(f"{len(group)} runs in {took:.0f} s", flush=True)


def add_run_options(parser: argparse.ArgumentParser, name: str) -> None:
    """What `run_all` and `flags` read, but for the task; files are called `name`."""
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--per_group", type=int, default=15, help="LoRA trials side by side")
    parser.add_argument("--parallel", type=int, default=5, help="FFT runs at once")
    parser.add_argument("--time_limit", type=float, default=math.inf, help="seconds to start groups for")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{name}"), help="folder of the FFT runs")
    parser.add_argument("--output", type=Path, default=Path(f"runs/{name}.csv"))
    parser.add_argument("flags", nargs="*", help="after --: more flags of mua_rl.grpo")


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--resolution", type=float, default=0.5, help="octaves between the best rate and the next")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="of rank, init and alpha")
    add_run_options(parser, "reproduce_grpo")
    options = parser.parse_args()

    curves = [
        search for search in searches(options.seeds, options.resolution, options.model) if wanted(search, options.only)
    ]
    if not curves:
        raise UserError(f"--only {' '.join(options.only)} leaves no curve: see the script's CENTRES.")
    if not 0 < options.resolution <= 1:
        raise UserError(f"--resolution takes octaves above 0 and up to 1, not {options.resolution}.")
    done = run_all(lambda done: [trial for search in curves for trial in search.next_trials(done)], options)
    if done is None:
        return
    for search in curves:
        if fault := search.verdict(done):
            print(f"{search.spec.label}: {fault}")


if __name__ == "__main__":
    run_command(main)
