"""What JAX prints about an installed plugin whose hardware is absent."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tsp_jax.hardware import private_jax
from tsp_jax.hardware.devices import is_present

ROOT = Path(__file__).parents[2]
PLUGIN = 'def initialize():\n    raise ValueError("No AMD GPUs were found, skipping ROCm plugin initialization")\n'
ERROR = "Jax plugin configuration error: Exception when calling"


def printed(folder: Path, code: str) -> str:
    """Standard error of a program that finds a ROCm plugin in a folder."""
    plugin = folder / "jax_plugins" / "xla_rocm7"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(PLUGIN)
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(is_present("rocm"), reason="an AMD GPU is present")
def test_no_traceback_after_import(tmp_path):
    assert printed(tmp_path, "import tsp_jax, jax; jax.devices()") == ""


@pytest.mark.skipif(is_present("rocm"), reason="an AMD GPU is present")
def test_jax_alone_prints_one(tmp_path):
    """Else nothing is left to hush."""
    assert "No AMD GPUs were found" in printed(tmp_path, "import jax; jax.devices()")


@pytest.mark.parametrize(
    ("message", "present", "shown"),
    [
        ("Jax plugin configuration error: Exception when calling jax_plugins.xla_rocm7.initialize()", (), False),
        ("Jax plugin configuration error: Exception when calling jax_plugins.xla_rocm7.initialize()", ("rocm",), True),
        (
            "Jax plugin configuration error: Exception when calling jax_plugins.xla_cuda12.initialize()",
            ("rocm",),
            False,
        ),
        ("Jax plugin configuration error: Exception when calling jax_plugins.someones.initialize()", (), True),
        ("Unable to initialize backend 'rocm'", (), True),
    ],
)
def test_only_what_is_no_error_is_dropped(monkeypatch, message, present, shown):
    monkeypatch.setattr(private_jax, "is_present", lambda platform: platform in present)
    record = logging.LogRecord("jax._src.xla_bridge", logging.ERROR, "", 0, message, None, None)
    assert bool(logging.getLogger("jax._src.xla_bridge").filter(record)) == shown
