"""Tune a learning rate with LoRA, check it with full finetuning, and write an LR record that the package ships.

    python scripts/tune_shipped.py                                    # the embedded model, on two CPU cores
    python scripts/tune_shipped.py --model smollm2 --lora 12 13 14 15 --full 13 14 15 --parallel 3 \
        --name smollm2-arithmetic -- --use_vllm --max_steps 60        # SmolLM2, on a GPU

Runs `python -m mua_rl.grpo` over learning rates 2^-k and seeds; a run that has ended is not repeated. The record's
learning rate is the smallest whose mean held-out accuracy at the tuned rank lies within two standard errors of the
best (so that the two cannot be told apart): on a plateau the small end is the safe one. `--write` puts the record into
the package.
"""

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder

RECORDS = Path(__file__).parent.parent / "mua_rl" / "assets" / "records"


def finished_run(args: argparse.Namespace, rank: str, k: float, seed: int) -> dict:
    """One row of the grid: the result of the run at learning rate 2^-k, made if it is not there."""
    run = RunFolder(args.out / f"r{rank}-lr2^-{k:g}-s{seed}")
    if run.result() is None:
        shutil.rmtree(run.path, ignore_errors=True)  # of a run that was cut off: it takes minutes, so it starts anew
        flags = ["--model", args.model, "--rank", rank, "--lr", str(2.0**-k), "--seed", str(seed)]
        flags += ["--save_strategy", "no", "--output_dir", str(run.path), *args.flags]
        with open(args.out / f"{run.path.name}.log", "w", encoding="utf-8") as log:
            subprocess.run([sys.executable, "-m", "mua_rl.grpo", *flags], stdout=log, stderr=log)
    result = run.result()
    row = {
        "rank": rank,
        "log2_lr": -k,
        "seed": seed,
        "accuracy": result.score if result else 0.0,
        "error": result.standard_error if result else 0.0,
        "diverged": result is None or result.is_lost,
        "seconds": result.seconds if result else 0.0,
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--name", default="arithmetic-1m", help="of the record")
    parser.add_argument("--rank", default="32", help="the rank that is tuned")
    parser.add_argument("--lora", type=float, nargs="+", default=[10, 11, 12], help="k of 2^-k, at the tuned rank")
    parser.add_argument("--full", type=float, nargs="*", default=[10, 11, 12], help="k of 2^-k, full finetuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/tune-shipped"))
    parser.add_argument("--write", action="store_true", help="write the record into the package")
    parser.add_argument("flags", nargs="*", help="after --: more flags of mua_rl.grpo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    grid = [(args.rank, k, seed) for seed in args.seeds for k in args.lora]
    grid += [("full", k, seed) for seed in args.seeds for k in args.full]
    with ThreadPoolExecutor(args.parallel) as pool:
        rows = list(pool.map(lambda point: finished_run(args, *point), grid))
    with open(args.out / "grid.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    means = {}
    for rank, k in dict.fromkeys((rank, k) for rank, k, _ in grid):
        accuracies = [row["accuracy"] for row in rows if (row["rank"], row["log2_lr"]) == (rank, -k)]
        means[rank, k] = statistics.mean(accuracies)
        listed = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        print(f"rank {rank:>4}  lr 2^-{k:<4g}  held-out accuracy {means[rank, k]:.3f}  ({listed})")
    best = max(args.lora, key=lambda k: means[args.rank, k])
    error = max(row["error"] for row in rows if (row["rank"], row["log2_lr"]) == (args.rank, -best))
    chosen = max(k for k in args.lora if means[args.rank, k] >= means[args.rank, best] - 2 * error)
    print(f"best 2^-{best:g}; smallest within two standard errors (of {error:.3f}): 2^-{chosen:g}")
    if args.write:
        folders = [args.out / f"r{args.rank}-lr2^-{chosen:g}-s{seed}" for seed in args.seeds]
        record = LRRecord.load(folders[0])
        metric = {**record.metric, "after": means[args.rank, chosen]}
        note = f"scripts/tune_shipped.py: rank {args.rank}, {len(args.lora)} rates, {len(args.seeds)} seeds"
        written = replace(record, seeds=args.seeds, metric=metric, note=note).save(RECORDS / f"{args.name}.json")
        print(f"wrote {written}")


if __name__ == "__main__":
    main()
