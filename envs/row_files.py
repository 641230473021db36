"""The rows of one split, from a file, a folder, a saved dataset or the hub."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, load_dataset, load_from_disk

from mua_rl.envs.rows import FAULT_COLUMN, Row
from mua_rl.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TEXT_SUFFIXES = (".jsonl", ".json", *_DELIMITERS)
_SUFFIXES = (".parquet", ".arrow", *_TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES))
_HELD_OUT_ONE_IN = 8
_HELD_OUT_SPLITS = ("test", "validation", "held_out")


def read_split(
    source: str, split_names: Sequence[str], config: str | None = None, key: Sequence[str] = ()
) -> list[Row]:
    """The rows of one split of a dataset.

    Args:
        source: A file, or the folder of a saved `Dataset` (see `key`); the folder of a saved `DatasetDict`; a folder
            with the files of the splits, in any of the published layouts (`test.jsonl`,
            `data/test-00000-of-00001.parquet`, `test/algebra/1.json`); or an id on the hub.
        split_names: Names that the split may go by, best first.
        config: The hub dataset's configuration; in a folder, its subfolder if there is one.
        key: The column that tells problems apart: the first of these that a row has. With it a lone file is shared
            between training and held-out split (`part_of_file`), unless its name is that of a held-out split: then all
            of it is held out. Without, it is the split that was asked for.

    Raises:
        UserError: Nothing is there, or it cannot be read, or a lone file has nothing for the split.
    """
    path = Path(source).expanduser()
    if is_one_table(path):
        rows, held_out = _read_table(path), "train" not in split_names
        if not key or (held_out and _is_held_out_file(path)):
            return rows
        if _is_held_out_file(path):
            raise UserError(
                f"{path} is a held-out split by its name, with nothing to train on: give the folder that has train.* "
                "too, or a file with another name, of which one row in eight is held out."
            )
        return part_of_file(path, rows, held_out, key)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            return _read_saved_split(path, split_names)
        folder = path / config if config and (path / config).is_dir() else path
        for name in split_names:
            if is_one_table(folder / name):
                return _read_table(folder / name)
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


def is_one_table(path: Path) -> bool:
    """Whether a path is rows without splits: a file, or what `Dataset.save_to_disk` has written."""
    return path.is_file() or (path / "state.json").is_file()


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


def _read_table(path: Path) -> list[Row]:
    if path.is_file():
        return list(_read_file(path))
    return [Row(columns, f"{path}:{number}") for number, columns in enumerate(_load_saved(path), 1)]


def _read_saved_split(path: Path, split_names: Sequence[str]) -> list[Row]:
    splits = _load_saved(path)
    name = next((name for name in split_names if name in splits), None)
    if name is None:
        raise UserError(f"{path} has no split {' or '.join(split_names)}, only {', '.join(splits)}.")
    return [Row(columns, f"{path}[{name}]:{number}") for number, columns in enumerate(splits[name], 1)]


def _load_saved(path: Path) -> Any:
    try:
        return load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow have their own families of errors
        raise UserError(f"{path} cannot be read as a saved dataset: {error}") from error


def _split_files(folder: Path, name: str) -> list[Path]:
    for parent in (folder, folder / "data"):
        files = sorted(file for file in parent.glob(f"{name}*") if _is_of_split(file, name))
        if files:
            return files
    return sorted(file for file in (folder / name).rglob("*") if file.name.endswith(_SUFFIXES))


def _is_of_split(file: Path, name: str) -> bool:
    return file.name.startswith(name) and file.name.endswith(_SUFFIXES) and file.name[len(name)] in "-_."


def _read_file(path: Path) -> Iterable[Row]:
    try:
        if path.suffix in (".parquet", ".arrow"):
            return _table_rows(path)
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")  # Windows begins files with a byte order mark
    except Exception as error:  # pyarrow has its own families of errors
        raise UserError(f"{path} cannot be read: {error}") from error
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".json":
        return _json_rows(path, text)
    if kind in _DELIMITERS:
        return _csv_rows(path, text, _DELIMITERS[kind])
    return [
        Row(_parse_line(line), f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]


def _table_rows(path: Path) -> list[Row]:
    is_parquet = path.suffix == ".parquet"
    table = pyarrow.parquet.read_table(path) if is_parquet else Dataset.from_file(str(path)).data.table
    return [Row(columns, f"{path}:{number}") for number, columns in enumerate(table.to_pylist(), 1)]


def _csv_rows(path: Path, text: str, delimiter: str) -> list[Row]:
    """Rows of a table with a line of column names; an empty cell is a column that the row does not have."""
    csv.field_size_limit(1 << 31)  # the default is too short for tests
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        names = next(reader, [])
        if len(set(names)) < len(names) or not all(names):
            raise UserError(f"{path} does not begin with a line of column names, each its own: {names}.")
        line = reader.line_num + 1
        for cells in reader:
            columns: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
            if len(cells) > len(names):
                columns = {FAULT_COLUMN: f"{len(cells)} cells for {len(names)} columns"}
            if cells:
                rows.append(Row(columns, f"{path}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} is not CSV (line {reader.line_num}): {error}.") from error
    return rows


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
