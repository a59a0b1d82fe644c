"""The notebook that fine-tunes SmolLM2, as it stands, and the answers to its exercises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.index


def run(folder: Path, *words: str) -> str:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT), "STEPS": "3"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_notebook_and_its_answers(tmp_path):
    pytest.importorskip("transformers")
    for name in ("scripts", "docs", "examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = run(tmp_path, "examples/fine_tune.py").splitlines()
    theirs, ours = (line.partition(":")[2].strip() for line in lines[-2:])
    assert ours and theirs.removesuffix("<|im_end|>").strip() == ours

    def summary(name: str, *flags: str) -> dict:
        words = ["models/smollm2", "--data.files", "docs/*.md", "--data.packing", "best-fit", "--seq-len", "512"]
        words += ["--steps", "1", "--compute-dtype", "float32", "--cpu-devices", "8", "--workdir", f"runs/{name}"]
        run(tmp_path, "scripts/train.py", *words, *flags)
        return json.loads((tmp_path / "runs" / name / "summary.json").read_text())

    # 1: the frozen weights have no moments
    whole, adapters = summary("whole"), summary("adapters", "--lora.rank", "16")
    assert adapters["peak_bytes"] < 0.6 * whole["peak_bytes"]
    # 2: the loss does not; what is received does
    tensor = summary("tensor", "--layout", "tp", "--mesh", "model=8")
    assert tensor["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert tensor["bytes_per_step"] != whole["bytes_per_step"]
