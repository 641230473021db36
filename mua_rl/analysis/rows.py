"""A sweep's CSV: one line for each run that has ended, appended by any number of processes."""

import csv
import fcntl
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mua_rl.errors import UserError
from mua_rl.run.trial import Trial, TrialResult


@dataclass(frozen=True)
class SweepRow:
    """A run of a sweep.

    Attributes:
        algorithm: As in an LR record.
        task: Task name or environment id.
        base: Name of the base policy.
        trial: What was trained.
        result: What it reached.
        machine: What it ran on; seconds compare on one machine only.
    """

    algorithm: str
    task: str
    base: str
    trial: Trial
    result: TrialResult
    machine: str


_KEY = ["algorithm", "task", "base"]
_TRIAL: dict[str, type] = {"rank": int, "init": str, "alpha": str, "log2_lr": float, "seed": int}
_RESULT = get_type_hints(TrialResult)
_OLD_RESULT = {
    "metric": float, "error": float, "before": float, "reward_mean": float, "reward_last": float, "diverged": bool,
    "stopped": str, "steps": int, "seconds": float,
}  # fmt: skip
"""The result's columns before version 0.2, whose files are still read."""
COLUMNS = [*_KEY, *_TRIAL, *_RESULT, "machine"]
_OLD_COLUMNS = [*_KEY, *_TRIAL, *_OLD_RESULT, "machine"]


def append(path: Path | str, rows: Iterable[SweepRow]) -> None:
    """Add whole lines to a CSV, which is made with its header where there is none.

    One write under a lock: processes that append to one file at a time neither mix lines nor repeat the header. A file
    with the columns of before version 0.2 is brought up to date first.

    Raises:
        UserError: The file is there and has other columns.
    """
    rows = list(rows)
    if not rows:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        text = (stream.readall() or b"").decode(errors="replace")
        if text and _columns(text.splitlines()[0], path) == _OLD_COLUMNS:
            rows, text = [*_parse_rows(text, path), *rows], ""
            stream.truncate(0)
        # A line that was cut off gets an end: `read` names it, and the next one stays whole.
        start = "" if text.endswith("\n") else "\n" if text else _line(COLUMNS)
        stream.write((start + "".join(_line(_cells(row)) for row in rows)).encode())


def read(path: Path | str) -> list[SweepRow]:
    """The rows of a CSV, in order.

    Raises:
        UserError: There is no such file, or it lacks a column, or a line cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the sweep's CSV {path} cannot be read: {error}.") from None
    if not text.strip():
        raise UserError(f"the sweep's CSV {path} is empty: run the sweep first.")
    return _parse_rows(text, path)


def _parse_rows(text: str, path: Path) -> list[SweepRow]:
    """The rows in a CSV's text.

    Raises:
        UserError: As `read`.
    """
    _columns(text.splitlines()[0], path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return [_row(values) for values in reader]
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"line {reader.line_num} of {path} is no run of a sweep ({error}): delete the line, and the sweep will "
            "run that trial again."
        ) from None


def read_all(paths: Sequence[Path | str]) -> list[SweepRow]:
    """The rows of several CSVs, each run once: of repeated ones the last.

    Raises:
        UserError: As `read`.
    """
    rows = [row for path in paths for row in read(path)]
    return list({(row.algorithm, row.task, row.base, row.trial): row for row in rows}.values())


def _columns(line: str, path: Path) -> list[str]:
    """The columns that a header names.

    Raises:
        UserError: They are not those of a sweep's CSV.
    """
    names = next(csv.reader([line]), [])
    if names in (COLUMNS, _OLD_COLUMNS):
        return names
    if missing := [name for name in COLUMNS if name not in names]:
        raise UserError(
            f"{path} is no sweep's CSV: line 1 lacks the column{'s'[: len(missing) > 1]} {', '.join(missing)}; name "
            "another file."
        )
    raise UserError(f"{path} has other columns than a sweep's CSV: line 1 should be {','.join(COLUMNS)}.")


def _cells(row: SweepRow) -> list[str]:
    values = {**vars(row), **row.trial.as_dict(), **row.result.as_dict()}
    return ["" if values[name] is None else str(values[name]) for name in COLUMNS]


def _line(cells: Sequence[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(cells)
    return stream.getvalue()


def _row(values: dict[str, Any]) -> SweepRow:
    """The row of a line's values.

    Raises:
        ValueError: The values make no row.
    """
    if None in values or None in values.values():
        raise ValueError("it has too many or too few values")
    kinds = _OLD_RESULT if "metric" in values else _RESULT
    trial, result = ({name: _parse(name, types[name], values[name]) for name in types} for types in (_TRIAL, kinds))
    if not math.isfinite(trial["log2_lr"]):
        raise ValueError(f"log2_lr is {trial['log2_lr']}")
    algorithm, task, base = (values[name] for name in _KEY)
    return SweepRow(algorithm, task, base, Trial.from_dict(trial), TrialResult.from_dict(result), values["machine"])


def _parse(name: str, kind: type, text: str) -> Any:
    try:
        if name == "rank" and not text:
            return None
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} is {text!r}") from None
