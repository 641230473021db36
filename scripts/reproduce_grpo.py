"""GRPO's learning-rate curves on SmolLM2: FFT, Init[B] and Init[A] over ranks, each with its optimum found (issue 6).

    python scripts/reproduce_grpo.py --only rank=4,16 --time_limit 500      # LoRA: many trials in one process
    python scripts/reproduce_grpo.py --only rank=full --parallel 5          # FFT: runs of their own, five at once
    python scripts/reproduce_grpo.py --model embedded --steps 120 --per_group 12               # a small model, on a CPU
    python -m mua_rl.analysis.report docs/results/reproduce_grpo.csv --out docs/results/reproduce_grpo

The search and its runs are those of `python -m mua_rl.sweep`. One line of the CSV is one run; lines that are there are
not repeated, so the same command goes on after a stop, and several processes share the work by `--only`. Every run
rolls out by transformers, so that all curves have the same kind of completions.
"""

import argparse
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from selection import passes

from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lr.spec import AdapterSpec
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import parse
from mua_rl.sweep.backend import choose_backends
from mua_rl.sweep.csv_study import CSVStudy
from mua_rl.sweep.search import Plan, Search
from mua_rl.sweep.work import work_together

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


def run_all(plans: Sequence[Plan], options: argparse.Namespace) -> dict[Trial, TrialResult] | None:
    """Run what the plans want, as `python -m mua_rl.sweep` does, into the CSV.

    Returns:
        What all trials reached; `None` where time ran out before.

    Raises:
        UserError: An option cannot be used, or a run failed.
    """
    for name in ("steps", "per_group", "parallel"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} takes a number from 1 on, not {getattr(options, name)}.")
    ranks = dict.fromkeys(str(plan.spec.rank or "full") for plan in plans)
    common = ["--model", options.model, "--task", options.task, "--max_steps", options.steps, "--report_to", "none"]
    common += ["--held_out_steps", 0, "--save_strategy", "no", "--early_stop", "false", "--workers", options.parallel]
    request = parse([str(flag) for flag in [*common, "--ranks", *ranks, *options.flags]])
    stop = threading.Event()
    backends = choose_backends(request, "", options.work, stop)
    for backend in backends:
        backend.at_once = options.per_group

    def show(trial: Trial, outcome: TrialResult) -> None:
        print(f"{trial.name}: {outcome.score:.3f} (reward {outcome.reward_mean:.3f})", flush=True)

    study = CSVStudy(options.output, ("grpo", options.task, options.model))
    if not work_together(study, plans, backends, show, time.monotonic() + options.time_limit, stop):
        print("out of time: run the same command again", flush=True)
        return None
    return study.outcomes()


def add_run_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what `run_all` reads, but for the task; files are called `name`."""
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--per_group", type=int, default=15, help="LoRA trials side by side")
    parser.add_argument("--parallel", type=int, default=1, help="FFT runs, or groups of LoRA trials, at once")
    parser.add_argument("--time_limit", type=float, default=math.inf, help="seconds after which no run is started")
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
    done = run_all(curves, options)
    if done is None:
        return
    for search in curves:
        if fault := search.verdict(done):
            print(f"{search.spec.label}: {fault}")


if __name__ == "__main__":
    run_command(main)
