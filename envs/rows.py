"""Rows of a dataset, each with the place it came from, and what becomes of the bad ones."""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset

from mua_rl.errors import UserError, one_line

logger = logging.getLogger(__name__)

FAULT_COLUMN = "_fault"
"""Holds, instead of any other column, why a row cannot be read."""

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_SHOWN_FAULTS = 10
_HELD_OUT_ONE_IN = 8
_HELD_OUT_SPLITS = ("test", "validation", "held_out")


@dataclass(frozen=True)
class Row:
    """Columns of one row, and where it is: `file:line` (parquet: row number; hub: `id[split]:row`), from 1."""

    columns: dict[str, Any]
    place: str


class RowFault(ValueError):
    """Why one row cannot be scored."""


def read_split(
    source: str, split_names: Sequence[str], config: str | None = None, key: Sequence[str] = ()
) -> list[Row]:
    """The rows of one split of a dataset.

    Args:
        source: A file (see `key`); a folder with the files of the splits, in any of the published layouts
            (`test.jsonl`, `data/test-00000-of-00001.parquet`, `test/algebra/1.json`); or an id on the hub.
        split_names: Names that the split may go by, best first.
        config: The hub dataset's configuration; in a folder, its subfolder if there is one.
        key: The column that tells problems apart: the first of these that a row has. With it a lone file is shared
            between training and held-out split (`part_of_file`), unless its name is that of a held-out split: then all
            of it is held out. Without, it is the split that was asked for.

    Raises:
        UserError: Nothing is there, or it cannot be read, or a lone file has nothing for the split.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows, held_out = list(_read_file(path)), "train" not in split_names
        if not key or (held_out and _is_held_out_file(path)):
            return rows
        if _is_held_out_file(path):
            raise UserError(
                f"{path} is a held-out split by its name, with nothing to train on: give the folder that has train.* "
                "too, or a file with another name, of which one row in eight is held out."
            )
        return part_of_file(path, rows, held_out, key)
    if path.is_dir():
        folder = path / config if config and (path / config).is_dir() else path
        for name in split_names:
            files = _split_files(folder, name)
            if files:
                return [row for file in files for row in _read_file(file)]
        raise UserError(
            f"{path} has no file of the split {' or '.join(split_names)}: "
            f"expected for example {split_names[0]}.jsonl or {split_names[0]}-00000-of-00001.parquet."
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.name.endswith(_SUFFIXES):
        raise UserError(f"there is no file or folder {source}.")
    return _read_hub(source, split_names, config)


def part_of_file(path: Path | str, rows: Sequence[Row], held_out: bool, key: Sequence[str]) -> list[Row]:
    """The training or the held-out rows of data that has no splits: one in eight is held out, always the same ones.

    Args:
        path: For the message.
        rows: All rows.
        held_out: Which part.
        key: As for `read_split`; equal problems fall into one part.

    Raises:
        UserError: The part is empty, and the other is not.
    """
    part = [row for row in rows if _is_held_out(row, key) == held_out]
    if rows and not part:
        raise UserError(
            f"{path} has no rows {'to hold out' if held_out else 'to train on'} (of a file, one in eight is held out, "
            f"by a hash of its {key[0]}): give more rows, or a folder with train.jsonl and test.jsonl."
        )
    return part


def _is_held_out(row: Row, key: Sequence[str]) -> bool:
    value = next((row.columns[name] for name in key if name in row.columns), None)
    text = json.dumps(value, sort_keys=True, default=str)
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % _HELD_OUT_ONE_IN == 0


def _is_held_out_file(path: Path) -> bool:
    return any(_is_of_split(path, name) for name in _HELD_OUT_SPLITS)


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

    Raises:
        RowFault: It is not.
    """
    if FAULT_COLUMN in row.columns:
        raise RowFault(row.columns[FAULT_COLUMN])
    value = row.columns.get(name)
    if value is None:
        raise RowFault(f"no column {name!r}")
    if not isinstance(value, kinds):
        raise RowFault(f"column {name!r} has the wrong type: {type(value).__name__}")
    if not value if isinstance(value, (list, dict)) else isinstance(value, str) and not value.strip():
        raise RowFault(f"column {name!r} is empty")
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowFault(f"column {name!r} holds half of a character (a lone surrogate)") from None
    return value


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


def _split_files(folder: Path, name: str) -> list[Path]:
    for parent in (folder, folder / "data"):
        files = sorted(file for file in parent.glob(f"{name}*") if _is_of_split(file, name))
        if files:
            return files
    return sorted((folder / name).rglob("*.json")) if (folder / name).is_dir() else []


def _is_of_split(file: Path, name: str) -> bool:
    return file.name.startswith(name) and file.name.endswith(_SUFFIXES) and file.name[len(name)] in "-_."


def _read_file(path: Path) -> Iterable[Row]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path).to_pylist()
            return [Row(columns, f"{path}:{number}") for number, columns in enumerate(table, 1)]
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")  # Windows begins files with a byte order mark
    except Exception as error:  # pyarrow has its own families of errors
        raise UserError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".json":
        return _json_rows(path, text)
    return [
        Row(_parse_line(line), f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]


def _json_rows(path: Path, text: str) -> list[Row]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    values = value if isinstance(value, list) else [value]
    return [Row(_as_columns(columns), f"{path}:{number}") for number, columns in enumerate(values, 1)]


def _parse_line(line: str) -> dict[str, Any]:
    try:
        return _as_columns(json.loads(line))
    except (ValueError, RecursionError) as error:
        return {FAULT_COLUMN: f"not JSON: {error}"}


def _as_columns(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {FAULT_COLUMN: "not a JSON object"}


def _read_hub(dataset: str, split_names: Sequence[str], config: str | None) -> list[Row]:
    from datasets import load_dataset

    error: Exception | None = None
    for split in split_names:
        try:
            rows = load_dataset(dataset, config, split=split)
        except Exception as this_error:  # the hub's errors have no common class
            error = this_error
            continue
        return [Row(columns, f"{dataset}[{split}]:{number}") for number, columns in enumerate(rows, 1)]
    raise UserError(
        f"{dataset} is neither a local path nor to be had from the hub ({type(error).__name__}: {str(error)[:200]}); "
        f"download it and give the folder, as in --task NAME:/path/to/folder."
    )
