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
