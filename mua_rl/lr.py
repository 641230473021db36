"""`python -m mua_rl.lr RECORD [--rank R]`: the learning rate that a record gives for a rank or for full finetuning."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mua_rl.arguments import parse_rank
from mua_rl.errors import UserError, exit_on_user_error
from mua_rl.policy import check_exponent, transfer
from mua_rl.record import LRRecord
from mua_rl.rules import AlphaRule, Configuration, Scheme

EPILOG = """examples:
  python -m mua_rl.lr runs/my-run              the table over all ranks and full finetuning
  python -m mua_rl.lr runs/my-run --rank 128   the learning rate at rank 128, and why
  python -m mua_rl.lr runs/my-run --rank full  the same for full finetuning"""


def target_configuration(
    record: LRRecord, rank: int | None, init: str | None = None, alpha: str | None = None
) -> Configuration:
    """The record's configuration at another rank (`None`: full finetuning), initialisation or multiplier.

    Args:
        init, alpha: "A" or "B", and a rule as `AlphaRule.parse` reads it; `None`: the record's. Of a record of full
            finetuning, Init[B] and α = 1: the LoRA that shares its learning rate.

    Raises:
        UserError: The layers have no such rank, or the multiplier cannot be read.
    """
    source = record.configuration()
    if rank is None:
        return Configuration(Scheme.FFT, source.width, optimizer=source.optimizer, outputs=source.outputs)
    scheme = Scheme(f"Init[{init}]") if init else source.scheme
    if scheme is Scheme.FFT:
        scheme = Scheme.INIT_B
    try:
        rule = AlphaRule.parse(alpha) if alpha else source.alpha
        return replace(source, scheme=scheme, rank=rank, alpha=rule)
    except ValueError as error:
        raise UserError(str(error)) from None


def table(record: LRRecord, name: str, init: str | None, alpha: str | None, rank_exponent: float | None) -> Table:
    """One row per power-of-two rank up to the smallest fan-in, one for full finetuning, and its warning below."""
    source, largest = record.configuration(), min(record.widths)
    title = f"{name}: {record.learning_rate:.4g} for {source}"
    columns = Table(title=title, title_justify="left", caption_justify="left")
    for heading in ("rank", "learning rate", "times the record's", "nine times in ten"):
        columns.add_column(heading, justify="right")
    ranks = sorted({2**k for k in range(largest.bit_length()) if 2**k <= largest} | {source.rank or 1})
    targets = [(str(rank), target_configuration(record, rank, init, alpha)) for rank in ranks]
    for label, target in [*targets, ("full", target_configuration(record, None))]:
        try:
            rate = transfer(record, target, name, rank_exponent)
            unknown = "not measured" if target.rank else "see below"
            accuracy = rate.accuracy or (unknown if rate.warning else "")
            if rate.warning and target.rank is None:
                columns.caption = f"full: {rate.warning}"
            cells = (f"{rate.value:.4g}", f"{rate.value / record.learning_rate:.4g}", accuracy)
        except UserError as error:
            cells = ("–", str(error).rsplit(": ", 1)[-1], "")
        columns.add_row(label, *cells, style="bold" if target == source else None)
    return columns


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mua_rl.lr", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("record", type=Path, help="an LR record, or the folder of a finished run")
    parser.add_argument("--rank", help="target rank; 0 or full: full finetuning. Without it: the whole table")
    parser.add_argument("--init", choices=["A", "B"], help="target initialisation (default: the record's)")
    parser.add_argument("--alpha", help="target multiplier, e.g. 1, 1/r, 16/sqrt(r) (default: the record's)")
    parser.add_argument(
        "--rank-exponent", "--rank_exponent", type=float, help="c of the factor (r/m)^-c beside the theory (see README)"
    )
    args = parser.parse_args()
    record, name = LRRecord.load(args.record), str(args.record)
    if args.rank_exponent is not None:
        check_exponent(args.rank_exponent)
    if args.rank is None:
        Console().print(table(record, name, args.init, args.alpha, args.rank_exponent))
        return
    target = target_configuration(record, parse_rank(args.rank), args.init, args.alpha)
    rate = transfer(record, target, name, args.rank_exponent)
    print(f"{rate.value:.6g}  for {target}\n{rate.reason}")
    if rate.warning:
        print(f"warning: {rate.warning}", file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main)
