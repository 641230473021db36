"""A sweep's CSV: one line for each run that has ended, appended by any number of processes."""

import csv
import fcntl
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from mua_rl.errors import UserError
from mua_rl.lr.rules import AlphaRule
from mua_rl.run.trial import Arm, Outcome


@dataclass(frozen=True)
class Row:
    """A run of a sweep.

    Attributes:
        algorithm: As in an LR record.
        task: Task name or environment id.
        base: Name of the base policy.
        arm: What was trained.
        outcome: What it reached.
        machine: What it ran on; seconds compare on one machine only.
    """

    algorithm: str
    task: str
    base: str
    arm: Arm
    outcome: Outcome
    machine: str


_ARM, _OUTCOME = [f.name for f in fields(Arm)], [f.name for f in fields(Outcome)]
COLUMNS = ["algorithm", "task", "base", *_ARM, *_OUTCOME, "machine"]
_TYPES = get_type_hints(Arm) | get_type_hints(Outcome)


def append(path: Path | str, rows: Iterable[Row]) -> None:
    """Add whole lines to a CSV, which is made with its header where there is none.

    One write under a lock: processes that append to one file at a time neither mix lines nor repeat the header.

    Raises:
        UserError: The file is there and has other columns.
    """
    text = "".join(_line(_cells(row)) for row in rows)
    if not text:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        there = stream.readall() or b""
        if not there:
            text = _line(COLUMNS) + text
        else:
            _check_header(there.decode(errors="replace").splitlines()[0], path)
            if not there.endswith(b"\n"):  # cut off in the middle of a line: `read` names it, and this one stays whole
                text = "\n" + text
        stream.write(text.encode())


def read(path: Path | str) -> list[Row]:
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
    _check_header(text.splitlines()[0], path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return [_row(values) for values in reader]
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"line {reader.line_num} of {path} is no run of a sweep ({error}): delete the line, and the sweep will "
            "run that arm again."
        ) from None


def read_all(paths: Sequence[Path | str]) -> list[Row]:
    """The rows of several CSVs, each run once: of repeated ones the last.

    Raises:
        UserError: As `read`.
    """
    rows = [row for path in paths for row in read(path)]
    return list({(row.algorithm, row.task, row.base, row.arm): row for row in rows}.values())


def _check_header(line: str, path: Path) -> None:
    names = next(csv.reader([line]), [])
    if missing := [name for name in COLUMNS if name not in names]:
        raise UserError(
            f"{path} is no sweep's CSV: line 1 lacks the column{'s'[: len(missing) > 1]} {', '.join(missing)}; name "
            "another file."
        )
    if names != COLUMNS:
        raise UserError(f"{path} has other columns than a sweep's CSV: line 1 should be {','.join(COLUMNS)}.")


def _cells(row: Row) -> list[str]:
    values = {**vars(row), **asdict(row.arm), **asdict(row.outcome)}
    return ["" if values[name] is None else str(values[name]) for name in COLUMNS]


def _line(cells: Sequence[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(cells)
    return stream.getvalue()


def _row(values: dict[str, Any]) -> Row:
    """Raises ValueError where the values make no row."""
    if None in values or None in values.values():
        raise ValueError("it has too many or too few values")
    arm = Arm(**{name: _parse(name, values[name]) for name in _ARM})
    outcome = Outcome(**{name: _parse(name, values[name]) for name in _OUTCOME})
    if not math.isfinite(arm.log2_lr):
        raise ValueError(f"log2_lr is {arm.log2_lr}")
    if arm.rank is not None:
        if arm.rank < 1 or arm.init not in ("A", "B"):
            raise ValueError(f"rank {arm.rank} and init {arm.init!r} make no LoRA")
        AlphaRule.parse(arm.alpha)
    return Row(values["algorithm"], values["task"], values["base"], arm, outcome, values["machine"])


def _parse(name: str, text: str) -> Any:
    kind = _TYPES[name]
    try:
        if kind == int | None:
            return int(text) if text else None
        if kind is bool:
            return {"True": True, "False": False}[text]
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} is {text!r}") from None
