"""What the scripts of the fields ask of a data set: that it can be read, and has the columns and examples they take."""

import os
from collections.abc import Sequence

from datasets import Dataset, Image, load_dataset

from mua_rl.errors import UserError, one_line


def read(name: str, split: str = "train", config: str | None = None, least: int = 1) -> Dataset:
    """A split of a data set.

    Args:
        name: A hub id, a folder, or a JSONL file.
        split: As `datasets` takes it, e.g. "test" or "train[:50000]"; a file is one, "train".
        config: Of a data set of the hub.
        least: Examples that there must be.

    Raises:
        UserError: It cannot be read, or has too few examples.
    """
    place = os.path.expanduser(name)
    try:
        if os.path.isfile(place):
            rows = load_dataset("json", data_files=place, split=split)
        else:
            rows = load_dataset(place, config, split=split)
    except Exception as error:  # the hub's errors have no common class
        cause = error.__cause__ or error  # `datasets` says there what is wrong with a file
        reason = one_line(f"{type(cause).__name__}: {cause}", 300)
        raise UserError(
            f"the data set {name} cannot be read ({reason}): --dataset_name takes a hub id, a folder or a JSONL file."
        ) from None
    if len(rows) < least:
        raise UserError(f"the data set {name} has too few examples in {split}: {len(rows)}, not {least} or more.")
    return rows


def find_columns(rows: Dataset, name: str, *choices: Sequence[str], flags: str = "") -> Sequence[str]:
    """The first choice of columns that are all there.

    Args:
        rows: Of a data set.
        name: Its name.
        choices: Columns that go together.
        flags: Those that name the columns; "" where their names are fixed.

    Raises:
        UserError: Of each choice a column is missing.
    """
    for columns in choices:
        if set(columns) <= set(rows.column_names):
            return columns
    wanted, there = ", or ".join(" and ".join(columns) for columns in choices), ", ".join(rows.column_names)
    cure = f"say which to take by {flags}" if flags else "rename its columns, or take another"
    raise UserError(f"the data set {name} has no columns {wanted}, but {there}: {cure}.")


def check_images(rows: Dataset, column: str) -> None:
    """Refuse a column that is of something else.

    Raises:
        UserError: It holds no images.
    """
    if not isinstance(rows.features[column], Image):
        raise UserError(f"the column {column} holds no images: say which does with --image_column.")


def check_held_out(held_out: int, examples: int) -> None:
    """Refuse to hold out so many examples that none is left to learn from.

    Raises:
        UserError: None is.
    """
    if held_out >= examples:
        raise UserError(f"--held_out takes fewer than all {examples} examples, not {held_out}.")
