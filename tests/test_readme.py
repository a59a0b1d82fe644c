"""The README's example runs as it stands, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = re.search(r"## Your own Flax model.*?```python\n(.*?)```", README, re.DOTALL)


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


def test_continuous_integration_calls_the_test_command_of_the_readme():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
