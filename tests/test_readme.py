"""README's examples run as they stand, and its commands exist."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = re.search(r"## 1. A Flax model.*?```python\n(.*?)```", README, re.DOTALL)


def test_example_runs_as_it_stands_and_learns(tmp_path):
    assert EXAMPLE
    code = EXAMPLE[1]
    assert len(code.splitlines()) <= 25
    (tmp_path / "example.py").write_text(code)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"\d+\.\d+", done.stdout)]
    assert len(losses) == 10
    assert losses[-1] < 0.95 * losses[0]


def test_a_configuration_file_trains_as_it_stands(tmp_path):
    (code,) = re.findall(r"```python\n(import optax\n.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "text.txt").write_text("The text of a run is tokenized. " * 400)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "mine.py", "--steps", "2", "--data.files", "*.txt"]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout + done.stderr


def test_a_function_of_ones_own_is_inspected_as_it_stands(tmp_path):
    """The gradient of a replicated weight is summed over devices."""
    block = re.search(r"## 3. Inspect.*?```python\n(.*?)```", README, re.DOTALL)
    assert block
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", block[1]], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all-reduce data 1.0 " in done.stdout or "all-reduce data 1 " in done.stdout


def test_continuous_integration_calls_the_test_command_of_the_readme():
    """On the oldest Python and, through make newest, on the newest one."""
    assert "make test" in README
    assert {"make test", "make newest"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
    newest = re.search(r"^newest:\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert newest and "$(MAKE) test " in newest[1]


def test_pip_installs_from_the_clone():
    """The package is on no index."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    commands = re.findall(r"pip install ([^\s`]+)", README)
    assert set(commands) <= {".", *(f'".[{extra}]"' for extra in extras)}


@pytest.mark.parametrize(("end", "install"), [("oldest", "3.11"), ("newest", "3.13")])
def test_a_missing_python_is_said_in_a_line(tmp_path, end, install):
    env = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    (tmp_path / "seq").symlink_to(shutil.which("seq") or "")
    done = subprocess.run(["/bin/bash", ROOT / ".ci" / "python", end], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Python 3.1") and line.endswith(f"use pyenv install {install}")


@pytest.mark.soak
def test_every_command_runs_in_an_empty_environment(tmp_path):
    """Installs, trains, fine-tunes, inspects and plans, for a quarter of an hour; its note is kept in benchmarks/."""
    script = ROOT / "benchmarks" / "readme_commands.py"
    done = subprocess.run([sys.executable, script, tmp_path / "note.md"], capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout[-4000:]
