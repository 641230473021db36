"""Rows of a dataset, each with the place that it came from, and what becomes of the bad ones."""

import ast
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from datasets import Dataset

from mua_rl.errors import UserError, one_line

logger = logging.getLogger(__name__)

FAULT_COLUMN = "_fault"
"""Holds, instead of any other column, why a row cannot be read."""

_SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Row:
    """Columns of one row, and where it is: `file:line` (in a table: `file:row`; hub: `id[split]:row`), from 1."""

    columns: dict[str, Any]
    place: str


class RowFault(ValueError):
    """Why one row cannot be scored."""


def keep_good_rows(
    rows: Sequence[Row], check: Callable[[Sequence[Row]], Sequence[str | None]], task: str, bad_rows: str
) -> list[Row]:
    """The rows that can be scored; the others are reported with their place, or refused.

    Args:
        rows: All rows of a split, with what `convert_rows` found.
        check: What is wrong with each of the rows that have no fault yet, or `None`.
        task: For the report.
        bad_rows: "skip" or "refuse".

    Raises:
        UserError: `bad_rows` is "refuse" and a row is bad, or no row is left.
    """
    open_rows = [row for row in rows if FAULT_COLUMN not in row.columns]
    faults = {row.place: row.columns[FAULT_COLUMN] for row in rows if FAULT_COLUMN in row.columns}
    faults |= {row.place: fault for row, fault in zip(open_rows, check(open_rows), strict=True) if fault is not None}
    bad = [f"{row.place}: {faults[row.place]}" for row in rows if row.place in faults]
    good = [row for row in rows if row.place not in faults]
    if bad and bad_rows == "refuse":
        raise UserError(f"{task}: {len(bad)} of {len(rows)} rows cannot be scored; the first: {bad[0]}")
    if not good:
        raise UserError(f"{task}: no row can be scored" + (f"; the first: {bad[0]}" if bad else ": there are none."))
    if bad:
        shown = "\n  ".join(bad[:_SHOWN_FAULTS])
        more = f"\n  and {len(bad) - _SHOWN_FAULTS} more" if len(bad) > _SHOWN_FAULTS else ""
        logger.warning(
            "%s: skipped %d of %d rows that cannot be scored:\n  %s%s", task, len(bad), len(rows), shown, more
        )
    return good


def column(row: Row, name: str, kinds: type | tuple[type, ...] = str) -> Any:
    """The value of a column that must be there, of that type, and not empty.

    Where text is none of the types, as in a CSV file, it is read as the JSON or Python literal that it holds.

    Raises:
        RowFault: It is not.
    """
    if FAULT_COLUMN in row.columns:
        raise RowFault(row.columns[FAULT_COLUMN])
    value = row.columns.get(name)
    if value is None:
        raise RowFault(f"no column {name!r}")
    if isinstance(value, str) and not issubclass(str, kinds):
        value = _literal(value)
    if not isinstance(value, kinds):
        raise RowFault(f"column {name!r} has the wrong type: {type(value).__name__}")
    if not value if isinstance(value, (list, dict)) else isinstance(value, str) and not value.strip():
        raise RowFault(f"column {name!r} is empty")
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowFault(f"column {name!r} holds half of a character (a lone surrogate)") from None
    return value


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def to_dataset(columns: dict[str, list[Any]], task: str) -> Dataset:
    """Columns of rows as a dataset.

    Raises:
        UserError: Values of one column, or of one key of its chat messages, are of several types.
    """
    try:
        return Dataset.from_dict(columns)
    except pyarrow.ArrowException as error:
        raise UserError(f"{task}: rows have values of several types in one place: {one_line(error)}.") from None


def convert_rows(rows: Sequence[Row], convert: Callable[[Row], dict[str, Any]]) -> list[Row]:
    """Each row with the columns that `convert` makes of it; a `RowFault` becomes the row's fault."""
    converted = []
    for row in rows:
        try:
            converted.append(Row(convert(row), row.place))
        except RowFault as fault:
            converted.append(Row({FAULT_COLUMN: str(fault)}, row.place))
    return converted
