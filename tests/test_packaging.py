"""The wheel holds what the checkout holds, installs nothing generic, and imports nothing heavy."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
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
def clone(tmp_path_factory):
    """A plain clone: a copy of what git tracks, so that nothing of the working tree's rest gets in."""
    folder = tmp_path_factory.mktemp("clone")
    if (ROOT / ".git").exists():
        files = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
        names = [name for name in files.stdout.split("\0") if name and (ROOT / name).exists()]
    else:
        paths = [path for path in ROOT.rglob("*") if path.is_file() or path.is_symlink()]
        names = [str(path.relative_to(ROOT)) for path in paths if ".venv" not in path.parts]
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    """The wheel that is built from the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(clone)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_asset_and_nothing_generic(clone, wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in inside} == {"mua_rl"}
    expected = set()
    for name, folder in SOURCES.items():
        folder = clone / folder.relative_to(ROOT)
        for file in folder.rglob("*"):
            parts = file.relative_to(folder).parts
            if file.is_file() and (file.suffix == ".py" or "assets" in parts):
                expected.add("/".join([*name.split("."), *parts]))
    assert expected - inside == set()


class Layout:
    """An environment that has our dependencies and, of us, what was installed into it."""

    def __init__(self, folder, *installed):
        venv.create(folder, symlinks=True)
        self.python = str(folder / "bin" / "python")
        site = next(folder.glob("lib/*/site-packages"))
        # Folders by name in a .pth file are searched last, and no .pth in them is read: no editable install of ours.
        (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        if installed:
            pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps"]
            subprocess.run([*pip, "--no-build-isolation", *map(str, installed)], check=True, capture_output=True)

    def run(self, *arguments, cwd):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [self.python, *arguments]
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def plain(wheel, tmp_path_factory):
    """A plain installation: that of the wheel, as `pip install .` makes it."""
    return Layout(tmp_path_factory.mktemp("plain") / "venv", "--force-reinstall", wheel)


WHERE = """
import mua_rl, mua_rl.envs.arithmetic, mua_rl.rewards.math, mua_rl.lr.__main__
print(mua_rl.__file__)
"""


@pytest.mark.slow
def test_it_works_from_a_plain_clone_with_nothing_of_ours_installed(clone, tmp_path):
    done = Layout(tmp_path / "venv").run("-c", WHERE, cwd=clone)
    assert done.stdout.strip() == str(clone / "mua_rl" / "__init__.py"), done.stderr


@pytest.mark.slow
def test_it_works_from_an_editable_installation_in_any_folder(clone, tmp_path):
    layout = Layout(tmp_path / "venv", "-e", clone)
    for folder in (clone, tmp_path):
        done = layout.run("-c", WHERE, cwd=folder)
        assert done.stdout.strip() == str(clone / "mua_rl" / "__init__.py"), done.stderr


@pytest.mark.slow
def test_a_plain_installation_runs_a_trainer_in_the_clone_whose_folder_wins(clone, plain):
    done = plain.run("-c", WHERE, cwd=clone)
    assert done.stdout.strip() == str(clone / "mua_rl" / "__init__.py"), done.stderr
    done = plain.run("-m", "mua_rl.grpo", "--help", cwd=clone)
    assert done.returncode == 0, done.stderr
    assert "--lr_from" in done.stdout


@pytest.mark.slow
def test_every_module_of_the_wheel_imports_away_from_the_clone(plain, tmp_path):
    code = """
import importlib, pkgutil, mua_rl
print(mua_rl.__file__)
for module in pkgutil.walk_packages(mua_rl.__path__, "mua_rl."):
    importlib.import_module(module.name)
    print(module.name)
"""
    done = plain.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    place, *modules = done.stdout.split()
    assert Path(place).is_relative_to(Path(plain.python).parents[1])
    assert {"mua_rl.grpo.run", "mua_rl.envs.arithmetic", "mua_rl.lr.rules"} <= set(modules)


@pytest.mark.slow
def test_the_wheel_trains(plain, tmp_path):
    flags = "--rank 4 --max_steps 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --output_dir run"
    done = plain.run("-m", "mua_rl.grpo", *flags.split(), cwd=tmp_path)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_grpo_imports_neither_vllm_nor_sb3_and_ppo_does_not_import_trl():
    code = """
import sys
import mua_rl.ppo.run
print("trl" in sys.modules)
sb3 = {name for name in sys.modules if name.startswith("stable_baselines3")}
for name in sb3:
    del sys.modules[name]
import trl.trainer.grpo_trainer
theirs = set(sys.modules)  # TRL imports vLLM where there is one
import mua_rl.grpo.run
print(any(name in sys.modules and name not in theirs for name in ("vllm", "stable_baselines3")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if "-m pytest" in line]
    assert commands, "README.md has no test command"
    assert commands[0] in (ROOT / ".ci" / "run").read_text()
