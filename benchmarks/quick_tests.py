"""Which faults `make quick` finds: plants one fault after another in a copy of the package and runs the quick tests.

``python benchmarks/quick_tests.py [NAME ...]`` prints a line per fault: found or missed, and the seconds that it took.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STOPPED = (1, 2)
"""exit codes of pytest: a test failed; or -x stopped the workers after one did"""
FAULTS = {
    "MLP: dx lacks the up projection": (
        "ops/mlp.py",
        "matmul(jnp.concatenate([dgate_Btp, dup_Btp], axis=-1), jnp.concatenate([gate_pD, up_pD]))",
        "matmul(dgate_Btp, gate_pD)",
    ),
    "ring: shards in the wrong order": ("ops/stream.py", "(me - index) % ranks", "(me + index) % ranks"),
    "pipeline: the current message fetched again": (
        "ops/pipeline.py",
        "following = fetch(carry, index + 1)\n        received",
        "following = fetch(carry, index)\n        received",
    ),
    "bucket: rows looked up without the shard": ("ops/stream.py", "row % shard_rows", "row % rows"),
    "padding: rows of a tensor shard counted from zero": ("ops/padding.py", "first + bucket.rows()", "bucket.rows()"),
    "row-wise: no sum over tensor axes": (
        "ops/rowwise.py",
        "return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD",
        "return y_BtD",
    ),
    "loss: softmax sum not rescaled": ("ops/cross_entropy.py", "sum_Bt * jnp.exp(max_Bt - new_max_Bt)", "sum_Bt"),
    "mask: a token may not attend to itself": (
        "ops/kernels/mask.py",
        "keys.positions <= queries",
        "keys.positions < queries",
    ),
    "mask: other segments are attended to": (
        "ops/kernels/mask.py",
        "keys.segments == queries.segments",
        "keys.segments == keys.segments",
    ),
    "RoPE: the wrong direction": ("ops/rope.py", "first * cos - second * sin", "first * cos + second * sin"),
    "attention: keys' gradients not scattered": (
        "ops/attention/train.py",
        "*exchange.scatter(*grads[1:])",
        "*(g[:, : q_BtcGH.shape[1]] for g in grads[1:])",
    ),
    "heads: a group one head too large": (
        "heads.py",
        "group = -(-real_group // sharing) * sharing",
        "group = (real_group // sharing + 1) * sharing",
    ),
    "traffic: an all-reduce counted once": (
        "cost/traffic.py",
        "2 * elements * itemsize * _others(self.tensor)",
        "elements * itemsize * _others(self.tensor)",
    ),
    "remat: layers backward in forward order": (
        "models/keep.py",
        "(dx_BTD, buffers), _ = scan_layers(step, carry, params, period=len(layers), xs=dsmall, reverse=True)",
        "(dx_BTD, buffers), _ = scan_layers(step, carry, params, period=len(layers), xs=dsmall)",
    ),
    "optimizer: norms decay": ("training/optimizer_table.py", "path[-1].key not in NOT_DECAYED", "True"),
    "data: contiguous chunks instead of zigzag": ("training/data.py", "chunks[: shards - 1 : -1]", "chunks[shards:]"),
    "step: infinite updates are taken": (
        "training/safety/finite.py",
        "jnp.isfinite(loss) & jnp.isfinite(grad_norm)",
        "jnp.isfinite(loss) | True",
    ),
    "checkpoint: hashes not compared": (
        "training/checkpoint_manifest.py",
        "found = _sha256(folder / name)",
        "found = digest",
    ),
    "serving: a rank gets all new tokens of its front": (
        "inference/cache.py",
        "front, back = new - new // 2, new // 2",
        "front, back = new, new * 0",
    ),
    "decode: partial softmaxes not weighted": (
        "ops/attention/decode.py",
        "out_bNH * jnp.exp(lse_bN - total_bN)[..., None]",
        "out_bNH * jnp.exp(lse_bN * 0)[..., None]",
    ),
    "sampling: top-p keeps one token too few": (
        "inference/sampling.py",
        "jnp.cumsum(probs_BV, axis=-1) - probs_BV",
        "jnp.cumsum(probs_BV, axis=-1)",
    ),
    "inspect: an all-reduce moves half": ("inspect/collectives.py", '"all-reduce": 2}', '"all-reduce": 1}'),
    "links: a full mesh has one link": ("hardware/links.py", "min(len(members) - 1, hardware.num_links)", "1"),
    "layout: folded axes count as tensor axes": (
        "layout.py",
        "folded=tuple(name for name in self.tokens if name in names)",
        "folded=()",
    ),
    "hf: RoPE's base is ignored": ("hf/rope.py", "return rope.rope_theta, ", "return 10_000.0, "),
}
"""fault -> (file of the package, text, wrong text)"""


def is_found(folder: Path, file: str, text: str, wrong: str) -> bool:
    """Whether the quick tests of a copy of the repository fail with a fault in it."""
    path = folder / "tsp_jax" / file
    right = path.read_text()
    assert right.count(text) == 1, f"{file} holds {right.count(text)} times: {text}"
    path.write_text(right.replace(text, wrong))
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-m", "quick and not index and not soak"]
    try:
        return subprocess.run(command, cwd=folder, env=env, capture_output=True).returncode in STOPPED
    finally:
        path.write_text(right)


def main(names: list[str]) -> None:
    """Tries the named faults, or all."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, folder, ignore=ignored)
        found = 0
        for name in names or FAULTS:
            began = time.monotonic()
            caught = is_found(folder, *FAULTS[name])
            found += caught
            print(f"{'found' if caught else 'MISSED'}  {time.monotonic() - began:4.0f} s  {name}", flush=True)
    print(f"{found} of {len(names or FAULTS)} found")


if __name__ == "__main__":
    main(sys.argv[1:])
