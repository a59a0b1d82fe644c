"""A wheel of the package holds every module and configuration, and its commands run outside a clone."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["scripts"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy of the sources, with the setuptools that is installed."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("tsp_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_list_of_packages_is_complete():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "tsp_jax").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | {"tsp_jax.configs"}


def test_every_module_and_configuration_is_in_the_wheel(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tsp_jax").rglob("*.py")}
    page = {str(path.relative_to(ROOT)) for path in (ROOT / "tsp_jax/tools/page").iterdir() if path.is_file()}
    configs = {f"tsp_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == modules | configs | page | {"tsp_jax/py.typed"}


def test_commands_are_in_the_wheel(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    lines = wheel.read(name).decode().split("\n")
    assert {f"{command} = {target}" for command, target in COMMANDS.items()} <= set(lines)


def test_a_command_finds_its_configurations_outside_a_clone(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    module = COMMANDS["tsp-train"].removesuffix(":main")
    code = f"import sys; from {module} import main; sys.argv[:] = ['/usr/bin/tsp-train', 'huge']; main()"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    # -P: the working directory is not searched, so that the package is the wheel's.
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    names = "llama3_70b, llama_7b, qwen3_30b_a3b, qwen3_8b, smollm2_135m, tiny"
    known = f"{names}, the path of a .py file, or a Hugging Face folder"
    assert (done.returncode, done.stderr) == (2, f"error: configuration huge is unknown; use one of {known}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command(command, monkeypatch, capsys):
    module, _, function = COMMANDS[command].partition(":")
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}", "--help"])
    with pytest.raises(SystemExit) as stopped:
        getattr(import_module(module), function)()
    out, err = capsys.readouterr()
    assert (stopped.value.code or 0, err) == (0, "")
    assert out.startswith(f"usage: {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_name_the_command_or_the_configurations(command, monkeypatch, capsys):
    module, _, function = COMMANDS[command].partition(":")
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}"])
    with pytest.raises(SystemExit, match="2"):
        getattr(import_module(module), function)()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("tiny" in err or command in err)
