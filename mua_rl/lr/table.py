"""What an LR record gives over all ranks and for full finetuning."""

from dataclasses import replace

from rich.table import Table

from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.lr.transfer import transfer


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
        return replace(source, spec=FFT, lora_plus_ratio=1.0)
    try:
        return replace(
            source, spec=AdapterSpec.parse(rank, init or source.spec.init or "B", alpha or str(source.spec.alpha))
        )
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
