"""Every text file is UTF-8, whatever the locale: a rate file has an α in it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("mua_rl", "envs", "rewards", "scripts") for path in (ROOT / folder).rglob("*.py"))
OPENERS = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper"}
OTHER_OPEN = re.compile("os|tarfile|cls|[A-Z].*")
"""Whose `open` gives no text file: `RunFolder.open`."""
BINARY_BY_DEFAULT = {"NamedTemporaryFile", "TemporaryFile"}


def calls_in_the_locales_encoding(source):
    """The lines of calls that open a file, or a process's pipes, as text and name no encoding."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in keywords or (name == "TextIOWrapper" and len(call.args) > 1):
            continue
        if any(
            isinstance(keywords.get(key), ast.Constant) and keywords[key].value
            for key in ("text", "universal_newlines")
        ):
            yield call.lineno
        receiver = getattr(call.func, "value", None)
        other = name == "open" and isinstance(receiver, ast.Name) and OTHER_OPEN.fullmatch(receiver.id)
        if name not in OPENERS or other:
            continue
        modes = [value for value in [*call.args[:2], keywords.get("mode")] if isinstance(value, ast.Constant)]
        mode = next((str(value.value) for value in modes if set(str(value.value)) <= set("rwaxbt+")), "")
        if "b" not in mode and not (name in BINARY_BY_DEFAULT and not mode):
            yield call.lineno


@pytest.mark.parametrize(
    "source", ["open(p)", "p.read_text()", "p.open('w')", "os.fdopen(3, 'w')", "run(a, text=True)"]
)
def test_a_text_without_an_encoding_is_found(source):
    assert list(calls_in_the_locales_encoding(source)) == [1]


@pytest.mark.parametrize(
    "source", ["open(p, 'rb')", "p.read_text(encoding='utf-8')", "p.open(mode='wb')", "p.read_bytes()"]
)
def test_bytes_and_named_encodings_are_left_alone(source):
    assert not list(calls_in_the_locales_encoding(source))


def test_no_file_is_opened_in_the_encoding_of_the_locale():
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in calls_in_the_locales_encoding(path.read_text(encoding="utf-8"))
    ]
    assert places == []


def in_a_locale_without_greek(code, *arguments):
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, timeout=120)


def test_a_command_prints_and_writes_its_alpha_in_a_locale_that_has_none(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from mua_rl.exits import run_command\n"
        "from mua_rl.files import write_whole\n"
        "def main():\n"
        "    print('\\u03b1 = 1')\n"
        "    write_whole(pathlib.Path(sys.argv[1]), '\\u03b1')\n"
        "run_command(main)\n"
    )
    done = in_a_locale_without_greek(code, tmp_path / "rate")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u03b1 = 1\n", b"")
    assert (tmp_path / "rate").read_bytes() == "α".encode()


def test_a_config_file_is_utf_8_in_a_locale_that_is_not(tmp_path):
    (tmp_path / "config.yaml").write_text("run_name: α-run\nlr: 1e-4\n", encoding="utf-8")
    code = (
        "import sys\n"
        "from mua_rl.grpo.arguments import parse\n"
        "arguments, _, given = parse(['--config', sys.argv[1]])\n"
        "assert arguments.run_name == given['run_name'] == '\\u03b1-run', given\n"
    )
    done = in_a_locale_without_greek(code, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
