"""The programs in docs/ run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def test_a_model_saved_on_one_mesh_is_restored_on_another(tmp_path):
    """With its optimizer: the losses of later steps are equal, and fall."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_model.md").read_text(), re.DOTALL)
    (tmp_path / "own_model.py").write_text("\n".join(blocks))
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "own_model.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    there, here = (np.array(line.split(":")[1].split(), float) for line in done.stdout.splitlines())
    np.testing.assert_allclose(here, there, rtol=1e-5)
    assert there.shape == (3,)
    assert (np.diff(there) < -1e-3).all()


def test_the_example_of_inspection_reports_on_its_own_step(tmp_path):
    """2 products of 2,048 x 1,024 x 4,096 forward and 3 backward, and gradients that data parallelism sums."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "inspect.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(block)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    figures = done.stdout.splitlines()[-1]
    assert str(5 * 2.0 * 2048 * 1024 * 4096 / 8) in figures and "'all-reduce', 'data'" in figures
