"""Learning rates found on `arithmetic`, taken unchanged to another task (issue 6): what does FFT lose there?

    python scripts/second_task.py --time_limit 500 -- --max_completion_length 32       # on a GPU; resumable
    python scripts/second_task.py --model embedded --task arithmetic --steps 2 --grid -12 -11   # in miniature, on a CPU

The LR record is that of SmolLM2's Init[B] r = 16 in docs/results/reproduce_grpo.csv: the fitted optimum, as the end of
a sweep writes it. It stays beside the CSV of results, and a later call reads it from there. From it
`mua_rl.lr.transfer.transfer` gives the learning rates of LoRA at other ranks and of FFT. They are run as they are, and
FFT over a grid beside them. One line of the CSV is one run; lines that are there are not repeated.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from reproduce_grpo import add_run_options, run_all

from mua_rl.analysis.measured import sweeps_of
from mua_rl.analysis.outcomes import best_of
from mua_rl.analysis.rows import read
from mua_rl.analysis.tables import ReportTable
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lr.record import LRRecord
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.lr.transfer import transfer
from mua_rl.run.trial import Trial, TrialResult
from mua_rl.sweep.arguments import parse
from mua_rl.sweep.closing import make_record
from mua_rl.sweep.facts import find_facts
from mua_rl.sweep.search import HIGHEST, LOWEST, FixedTrials, Search

TASK = "reasoning-gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=2,answer=number,size=4096"
SOURCE = Path(__file__).parents[1] / "docs" / "results" / "reproduce_grpo.csv"
SOURCE_RANK = 16
VALUES = {"score": "held-out accuracy", "reward_last": "reward of the last tenth"}


def make_source_record(options: argparse.Namespace) -> LRRecord:
    """The record of the source task, as the end of its sweep writes it.

    Raises:
        UserError: The source gives no record.
    """
    rows = [row for row in read(options.source) if (row.algorithm, row.base) == ("grpo", options.source_base)]
    if len({row.task for row in rows}) != 1:
        raise UserError(f"{options.source} has GRPO runs of {options.source_base} on no task, or on several.")
    [sweep] = sweeps_of(rows)
    facts = find_facts(parse(["--algo", "grpo", "--model", options.model, "--task", sweep.task, "--ranks", "full"]))
    curve = AdapterSpec(SOURCE_RANK)
    if curve not in sweep.curves:
        raise UserError(f"{options.source} has no optimum of {curve.label}: name another --source.")
    measured = sweep.curves[curve]
    seeds = tuple(sorted({seed for _, _, seed in measured.points}))
    search = Search(curve, scan=(), step=1.0, resolution=1.0, seeds=seeds)
    record = make_record(facts.recipe, search, measured, {row.trial: row.result for row in rows})
    if record is None:
        raise UserError(f"{options.source} gives no record: no run of {curve.label} got better than the base.")
    return record


def transferred(options: argparse.Namespace) -> dict[AdapterSpec, float]:
    """log2 of the learning rate that each curve gets from the record of the source task.

    Rounded to hundredths, so that another machine's last digits do not make another run of it.

    Raises:
        UserError: The source gives no record, the record cannot be read, or a rank does not fit the model.
    """
    if min(options.ranks) < 1:
        raise UserError("--ranks takes LoRA ranks from 1 on; full finetuning is run in any case.")
    if not all(LOWEST <= lr <= HIGHEST for lr in options.grid):
        raise UserError(f"--grid takes exponents between {LOWEST:g} and {HIGHEST:g}, as in -14 -13 -12.")
    path = options.output.with_suffix(".record.json")
    record = LRRecord.load(path) if path.exists() else make_source_record(options)
    ranks = [str(rank) for rank in options.ranks]
    request = parse(["--algo", "grpo", "--model", options.model, "--task", record.task, "--ranks", *ranks, "full"])
    recipe = find_facts(request).recipe
    print(f"the record of {record.task}: {record.note}")
    rates = {}
    for curve in [*(AdapterSpec(rank) for rank in options.ranks), FFT]:
        rate = transfer(record, recipe.configuration(curve))
        rates[curve] = round(math.log2(rate.value), 2)
        print(f"{curve.label}: 2^{rates[curve]:g}: {rate.reason}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        record.save(path)  # more runs of the source would move its optimum, and with it what is to be run here
    return rates


def trials(rates: Mapping[AdapterSpec, float], options: argparse.Namespace) -> list[Trial]:
    """At the transferred learning rates, then FFT's grid, each seed after the other."""
    at_once = [Trial(curve, rate, seed) for seed in options.seeds for curve, rate in rates.items()]
    grid = [Trial(FFT, float(lr), seed) for seed in options.grid_seeds for lr in options.grid]
    return list(dict.fromkeys([*at_once, *grid]))


def table(
    rates: Mapping[AdapterSpec, float], done: Mapping[Trial, TrialResult], options: argparse.Namespace, value: str
) -> ReportTable:
    """Means over seeds, and what is lost of the gain of FFT's best learning rate of the grid."""
    wanted = trials(rates, options)
    on_grid = {lr: [done[a] for a in wanted if a.spec == FFT and a.log2_lr == lr] for lr in map(float, options.grid)}
    best = best_of(on_grid)
    if best is None:
        raise UserError("FFT diverged at every learning rate of the grid: give smaller ones with --grid.")
    base = statistics.fmean(outcome.before for outcome in done.values())
    highest = _mean(on_grid[best], value)

    def line(name: str, log2_lr: float, runs: Sequence[TrialResult]) -> list[str]:
        mean = _mean(runs, value)
        error = statistics.fmean(run.standard_error for run in runs) if value == "score" else math.nan
        lost = f"{(highest - mean) / (highest - base):.1%}" if highest > base else "–"
        spread = f" ± {error:.3f}" if math.isfinite(error) else ""
        return [name, f"{log2_lr:g}", str(len(runs)), f"{mean:.3f}{spread}", lost]

    lines = [
        line(f"{c.label}, transferred", lr, [done[a] for a in wanted if a.spec == c and a.log2_lr == lr])
        for c, lr in rates.items()
    ]
    lines += [line("FFT, the grid's best" if lr == best else "FFT", lr, runs) for lr, runs in sorted(on_grid.items())]
    return ReportTable(
        f"{options.task}, {options.model}: {VALUES[value]}; {base:.3f} held out before training",
        ["what", "log2 η", "runs", VALUES[value], "lost of the gain"],
        lines,
    )


def _mean(runs: Sequence[TrialResult], value: str) -> float:
    """NaN where a run diverged."""
    return statistics.fmean(math.nan if run.is_lost else getattr(run, value) for run in runs)


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="of the LoRA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="at the transferred learning rates")
    parser.add_argument("--grid", type=float, nargs="+", default=[-17, -16, -15, -14, -13, -12], help="log2, of FFT")
    parser.add_argument("--grid_seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--source", type=Path, default=SOURCE, help="CSV of the sweep that the record is made of")
    parser.add_argument("--source_base", default="smollm2", help="whose runs of it")
    add_run_options(parser, "second_task")
    options = parser.parse_args()

    rates = transferred(options)
    wanted = trials(rates, options)
    plans = [FixedTrials(spec, tuple(trial for trial in wanted if trial.spec == spec)) for spec in rates]
    done = run_all(plans, options)
    if done is not None:
        for value in VALUES:
            print(table(rates, done, options, value).markdown(), end="\n\n")


if __name__ == "__main__":
    run_command(main)
