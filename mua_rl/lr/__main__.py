"""`python -m mua_rl.lr RECORD [--rank R]`: the learning rate that a record gives for a rank or for full finetuning."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lr.rank import parse_rank
from mua_rl.lr.record import LRRecord
from mua_rl.lr.spec import multiplier_rule
from mua_rl.lr.table import table, target_configuration
from mua_rl.lr.transfer import check_exponent, transfer

EPILOG = """examples:
  python -m mua_rl.lr runs/my-run              the table over all ranks and full finetuning
  python -m mua_rl.lr runs/my-run --rank 128   the learning rate at rank 128, and why
  python -m mua_rl.lr runs/my-run --rank full  the same for full finetuning"""


def main() -> None:
    """Run the command line."""
    parser = FlagParser(
        prog="python -m mua_rl.lr", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("record", type=Path, help="an LR record, or the folder of a finished run")
    parser.add_argument("--rank", help="target rank; 0 or full: full finetuning. Without it: the whole table")
    parser.add_argument("--init", choices=["A", "B"], help="target initialisation (default: the record's)")
    parser.add_argument("--alpha", help="target multiplier of B A, e.g. 1, 1/r, 16/sqrt(r) (default: the record's)")
    parser.add_argument(
        "--lora_alpha", type=float, help="PEFT's lora_alpha instead of --alpha, which is lora_alpha / r"
    )
    parser.add_argument("--rank_exponent", type=float, help="c of the factor (r/m)^-c beside the theory (see README)")
    args = parser.parse_args()
    alpha = args.alpha
    if alpha is not None or args.lora_alpha is not None:
        alpha = str(multiplier_rule("1" if alpha is None else alpha, args.lora_alpha))
    record, name = LRRecord.load(args.record), str(args.record)
    if args.rank_exponent is not None:
        check_exponent(args.rank_exponent)
    if args.rank is None:
        Console().print(table(record, name, args.init, alpha, args.rank_exponent))
        return
    target = target_configuration(record, parse_rank(args.rank), args.init, alpha)
    rate = transfer(record, target, name, args.rank_exponent)
    print(f"{rate.value:.6g}  for {target}\n{rate.reason}")
    if rate.warning:
        print(f"warning: {rate.warning}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
