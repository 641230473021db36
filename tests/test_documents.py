"""ARCHITECTURE.md names files that exist, and keeps the ways through the package as short as they were promised."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "ARCHITECTURE.md").read_text()


def test_every_file_and_folder_that_is_named_exists():
    named = re.findall(r"`([\w/]+(?:\.py|/))`", TEXT) + re.findall(r"`(envs/control|mua_rl/[\w/]+)`", TEXT)
    assert len(named) > 40
    missing = [path for path in named if not ((ROOT / path).exists() or (ROOT / "mua_rl" / path).exists())]
    assert missing == []


@pytest.mark.parametrize(("way", "most"), [("learning rate", 7), ("completion", 9), ("trial", 9)])
def test_a_way_is_no_longer_than_promised(way, most):
    (section,) = re.findall(rf"## The way of a {way}.*?\n(.*?)\n## ", TEXT, re.DOTALL)
    steps = re.findall(r"^(\d+)\. `", section, re.MULTILINE)
    assert list(map(int, steps)) == list(range(1, len(steps) + 1))
    assert 5 <= len(steps) <= most


def test_every_folder_of_the_package_has_its_place():
    folders = {path.name for path in (ROOT / "mua_rl").iterdir() if (path / "__init__.py").exists()}
    table = set(re.findall(r"^\|.*", TEXT, re.MULTILINE))
    missing = {folder for folder in folders if not any(f"`{folder}/`" in row for row in table)}
    assert missing == set()


def test_the_tests_that_the_theory_names_exist():
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "theory.md").read_text(encoding="utf-8"))
    assert len(named) >= 12
    missing = [(file, test) for file, test in named if f"def {test}" not in (ROOT / file).read_text(encoding="utf-8")]
    assert missing == []
