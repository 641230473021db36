"""The wheel holds what the checkout holds, installs nothing generic, and imports nothing heavy."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"mua_rl": ROOT / "mua_rl", "mua_rl.envs": ROOT / "envs", "mua_rl.rewards": ROOT / "rewards"}


def test_every_folder_with_code_is_a_package():
    """setuptools leaves a folder without `__init__.py` out of the wheel, though it imports from the checkout."""
    for folder in SOURCES.values():
        for file in folder.rglob("*.py"):
            assert (file.parent / "__init__.py").exists() or "assets" in file.parts, file


@pytest.mark.parametrize("linked", ["envs", "rewards"])
def test_a_plain_clone_has_the_top_level_folders_inside_the_package(linked):
    assert (ROOT / "mua_rl" / linked).is_symlink()
    assert (ROOT / "mua_rl" / linked).resolve() == ROOT / linked


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what git tracks, so that nothing of the working tree's rest gets in."""
    scratch = tmp_path_factory.mktemp("wheel")
    if (ROOT / ".git").exists():
        files = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
        names = [name for name in files.stdout.split("\0") if name and (ROOT / name).exists()]
    else:
        names = [
            str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
        ]
    for name in names:
        target = scratch / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(scratch)]
    subprocess.run([*command, str(scratch / "source")], check=True, capture_output=True)
    return next(scratch.glob("*.whl"))


def test_the_wheel_holds_every_module_and_asset_and_nothing_generic(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in inside} == {"mua_rl"}
    expected = set()
    for name, folder in SOURCES.items():
        folder = wheel.parent / "source" / folder.relative_to(ROOT)
        for file in folder.rglob("*"):
            parts = file.relative_to(folder).parts
            if file.is_file() and (file.suffix == ".py" or "assets" in parts):
                expected.add("/".join([*name.split("."), *parts]))
    assert expected - inside == set()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel unpacked as pip would, and an environment whose interpreter sees it before the checkout."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "SITE": str(site)}


def in_wheel(installed, code, cwd):
    return subprocess.run([sys.executable, "-c", code], env=installed, cwd=cwd, capture_output=True, text=True)


def test_every_module_of_the_wheel_imports_away_from_the_checkout(installed, tmp_path):
    code = """
import importlib, os, pkgutil, mua_rl
assert mua_rl.__file__.startswith(os.environ["SITE"]), mua_rl.__file__
for module in pkgutil.walk_packages(mua_rl.__path__, "mua_rl."):
    importlib.import_module(module.name)
    print(module.name)
"""
    done = in_wheel(installed, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"mua_rl.grpo.run", "mua_rl.envs.arithmetic", "mua_rl.lr.rules"} <= set(done.stdout.split())


def test_the_wheel_trains(installed, tmp_path):
    flags = "--rank 4 --max_steps 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --output_dir run"
    command = [sys.executable, "-m", "mua_rl.grpo", *flags.split()]
    done = subprocess.run(command, env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "lr_record.json").exists()
    assert "run folder" in done.stdout


def requirement_names(requirements):
    return {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}


def third_party_imports(path):
    """Distributions that a module imports outside functions (where an optional one would be)."""
    installed = importlib.metadata.packages_distributions()
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"mua_rl"}:
            yield installed.get(name, [name])[0].lower()


def test_what_a_core_install_imports_is_a_core_dependency():
    """Found by running the README's first command in an empty environment: an import that only [dev] brought along."""
    code = """
import sys, mua_rl.grpo.run, mua_rl.lr.table
from mua_rl.envs import arithmetic
print(*[m.__file__ for n, m in sys.modules.items() if n.startswith("mua_rl") and getattr(m, "__file__", None)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    declared = requirement_names(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    missing = {
        f"{distribution} ({Path(file).name})"
        for file in done.stdout.split()
        for distribution in third_party_imports(Path(file))
        if distribution.replace("_", "-") not in declared
    }
    assert missing == set()


@pytest.mark.parametrize(
    "module", ["mua_rl", "mua_rl.envs", "mua_rl.rewards", "mua_rl.lr.transfer", "mua_rl.lr.__main__"]
)
def test_importing_us_imports_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HEAVY = ("vllm", "stable_baselines3", "torch", "transformers", "trl", "gymnasium", "sympy")


def test_the_trainers_import_neither_vllm_nor_each_other():
    code = """
import sys
import trl.trainer.grpo_trainer
theirs = set(sys.modules)  # TRL imports vLLM where there is one
import mua_rl.grpo.run
print([m for m in ("vllm", "stable_baselines3") if m in sys.modules and m not in theirs])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if "-m pytest" in line]
    assert commands, "README.md has no test command"
    assert commands[0] in (ROOT / ".ci" / "run").read_text()
