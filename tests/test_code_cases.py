"""What right and wrong programs, and bad rows, get, by kinds (tests/code_cases): right ones 1, wrong ones 0.

A file holds one kind; in it, `#### name | expected | entry point | modules`, the program, and behind `---- tests`,
`---- tests list` (one test a line) and `---- prelude` the row. Expected is 1, 0, or `bad` for a row that is refused.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mua_rl.rewards.faults import BadRow
from mua_rl.rewards.sandbox.pool import Pool
from mua_rl.rewards.sandbox.row import parse_row
from mua_rl.rewards.sandbox.settings import Settings

FOLDER = Path(__file__).parent / "code_cases"
KINDS = sorted(path.stem for path in FOLDER.glob("*.txt"))


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, Pool]]:
    with Pool(Settings(seconds=10.0, workers=1)) as plain:
        found = {"": plain}
        yield found
        for pool in found.values():
            pool.close()


def cases(kind: str) -> Iterator[tuple[str, str, str, dict[str, object]]]:
    """Name, expectation, modules and columns of each case, its program among them."""
    for part in (FOLDER / f"{kind}.txt").read_text().split("#### ")[1:]:
        title, _, text = part.partition("\n")
        name, expected, entry_point, *modules = title.split(" | ")
        source, *sections = text.split("---- ")
        columns: dict[str, object] = {"source": source, "entry_point": None if entry_point == "-" else entry_point}
        for section in sections:
            header, _, content = section.partition("\n")
            lines = content.strip().splitlines()
            columns[header.split()[0]] = lines if header.endswith("list") else content
        yield name, expected, "".join(modules), columns


@pytest.mark.parametrize("kind", KINDS)
def test_programs_get_what_they_deserve(pools: dict[str, Pool], kind: str) -> None:
    wrong = {}
    for name, expected, modules, columns in cases(kind):
        if modules and modules not in pools:
            pytest.importorskip(modules)
            pools[modules] = Pool(Settings(seconds=10.0, workers=1, memory_mb=2048, modules=(modules,)))
        try:
            row = parse_row(columns["tests"], columns["entry_point"], columns.get("prelude"))
            verdict = pools[modules].run(str(columns["source"]), row)
            given, detail = str(int(verdict.ok)), f"{verdict.reason.value}: {verdict.detail}"
        except BadRow as fault:
            given, detail = "bad", str(fault)
        if given != expected:
            wrong[name] = f"{given}, not {expected} ({detail})"
    assert wrong == {}


def test_each_kind_has_at_least_six_cases() -> None:
    assert all(len(list(cases(kind))) >= 6 for kind in KINDS)
