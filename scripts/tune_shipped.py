"""Tune a learning rate with LoRA by a sweep, check it with full finetuning, and ship the sweep's LR record.

    python scripts/tune_shipped.py                                    # the embedded model, on two CPU cores
    python scripts/tune_shipped.py --name smollm2-arithmetic -- --model smollm2 --use_vllm --max_steps 60   # on a GPU

What is run is `python -m mua_rl.sweep --ranks 32 full`, with what stands after `--`; the same command goes on after a
stop. `--write` puts the record into the package.
"""

import argparse
from pathlib import Path

from rich.console import Console

from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lr.record import LRRecord
from mua_rl.sweep.arguments import parse
from mua_rl.sweep.run import sweep

RECORDS = Path(__file__).parent.parent / "mua_rl" / "assets" / "records"


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="arithmetic-1m", help="name of the record")
    parser.add_argument("--rank", default="32", help="the rank that is tuned")
    parser.add_argument("--out", default="runs/tune-shipped", help="folder of the sweep")
    parser.add_argument("--write", action="store_true", help="write the record into the package")
    parser.add_argument("flags", nargs="*", help="after --: more flags of mua_rl.sweep")
    options = parser.parse_args()
    folder = sweep(parse(["--ranks", options.rank, "full", "--output_dir", options.out, *options.flags]), Console())
    if options.write:
        print(f"wrote {LRRecord.load(folder).save(RECORDS / f'{options.name}.json')}")


if __name__ == "__main__":
    run_command(main)
