"""Tune the embedded model's learning rate with LoRA, check it with full finetuning, and write the shipped LR record.

    python scripts/tune_embedded.py [--out runs/tune-embedded] [--write]

Runs `python -m mua_rl.grpo` over learning rates and seeds, one run after the other; a run that is there already is not
repeated. The record's learning rate is the smallest whose mean held-out accuracy at rank 32 lies within one standard
error of the best: on a plateau the small end is the safe one. `--write` puts it into the package.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mua_rl.record import LRRecord
from mua_rl.run import RunFolder

SHIPPED = Path(__file__).parent.parent / "mua_rl" / "assets" / "records" / "arithmetic-1m.json"
TUNED_RANK = "32"
SEEDS = (1, 2)
GRID = {TUNED_RANK: (9, 10, 11, 12), "full": (10, 11, 12)}


def run_folder(out: Path, rank: str, k: int, seed: int) -> RunFolder:
    """The finished run at learning rate 2^-k, made if it is not there."""
    folder = RunFolder(out / f"r{rank}-lr2^-{k}-s{seed}")
    if folder.result() is None:
        flags = ["--rank", rank, "--lr", str(2.0**-k), "--seed", str(seed), "--save_strategy", "no"]
        flags += ["--output_dir", str(folder.path)]
        subprocess.run([sys.executable, "-m", "mua_rl.grpo", *flags], check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tune-embedded"))
    parser.add_argument("--write", action="store_true", help="write the shipped record")
    args = parser.parse_args()
    rows = []
    for rank, exponents in GRID.items():
        for k in exponents:
            for seed in SEEDS:
                result = run_folder(args.out, rank, k, seed).result()
                assert result is not None
                rows.append(
                    {"rank": rank, "log2_lr": -k, "seed": seed, "accuracy": result.get("held_out/after", 0.0)}
                    | {"error": result.get("held_out/standard_error", 0.0), "seconds": result.get("seconds", 0.0)}
                )
    with open(args.out / "grid.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    means = {}
    for rank, exponents in GRID.items():
        for k in exponents:
            accuracies = [row["accuracy"] for row in rows if row["rank"] == rank and row["log2_lr"] == -k]
            means[rank, k] = statistics.mean(accuracies)
            print(f"rank {rank:>4}  lr 2^-{k}  held-out accuracy {means[rank, k]:.3f}  {accuracies}")
    best = max(GRID[TUNED_RANK], key=lambda k: means[TUNED_RANK, k])
    error = next(row["error"] for row in rows if row["rank"] == TUNED_RANK and row["log2_lr"] == -best)
    chosen = max(k for k in GRID[TUNED_RANK] if means[TUNED_RANK, k] >= means[TUNED_RANK, best] - error)
    print(f"best 2^-{best}; smallest within one standard error ({error:.3f}): 2^-{chosen}")
    if args.write:
        records = [LRRecord.load(run_folder(args.out, TUNED_RANK, chosen, seed).path) for seed in SEEDS]
        metric = {**records[0].metric, "after": means[TUNED_RANK, chosen]}
        note = f"scripts/tune_embedded.py: rank {TUNED_RANK}, a grid of {len(GRID[TUNED_RANK])} rates"
        replace(records[0], seeds=list(SEEDS), metric=metric, note=note).save(SHIPPED)
        print(f"wrote {SHIPPED}")


if __name__ == "__main__":
    main()
