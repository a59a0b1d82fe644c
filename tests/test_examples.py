"""The notebooks of examples/: they run, and the answers to their exercises."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

FROM_SCRATCH = """
# 1: bytes of tsp, 3 x 2 F D, against those of two all-reduces, 2 x 2 T D, each times 4 (R - 1) / R
print(next(tokens for tokens in range(10_000) if 4 * tokens * D >= 6 * F * D), 3 * F // 2)

# 2: both weights are fetched twice, and their gradients sent once, in a message for each bucket
print([messages for messages, _ in moved.values()])
BUCKETS = 8
doubled = received(compiled(tsp).as_text())
print([messages for messages, _ in doubled.values()], [doubled[kind][1] == moved[kind][1] for kind in moved])

# 3: hidden columns of a bucket, [T / R, F / BUCKETS], are as many then as a device's tokens
print(largest_buffers(tsp, number=1))
check(tsp)
"""


PLAN = """
# 1: below, every device has a whole sequence under fsdp
def fastest(seq_len):
    found = candidates(seq_len, 128 * 131072)
    return min(found, key=found.get)

first = next(seq_len for seq_len in (2**k for k in range(10, 18)) if fastest(seq_len) != "fsdp")
print(first, fastest(first))

# 2: one replica
def peak_bytes(number):
    config = dataclasses.replace(base, layout="tsp", mesh=f"data=1,tsp={number}", batch=1)
    return estimate(config, parse_target(f"mi300x:{number}")).peak_bytes

print(next(number for number in (1, 2, 4, 8, 16) if peak_bytes(number) <= usable))
"""


OWN_MODEL = """
# 1: partial outputs are summed over tensor axes, in each layer
def sums_outputs(name):
    place = tsp_jax.place(name, **LAYOUTS[name])
    graphdef, state = nnx.split(MyModel(place, nnx.Rngs(0)))
    sizes = ",".join(f"{axis}={size}" for axis, size in place.mesh.shape.items())
    forward = lambda state, tokens: nnx.merge(graphdef, state)(tokens)
    found = tsp_jax.inspect.compile_for(forward, state, tokens, target=f"cpu:{place.mesh.size}", mesh=sizes).report()
    return any(c.op == "all-reduce" and "tsp/mlp" in c.scope for c in found.collectives)

print([name for name in LAYOUTS if sums_outputs(name)])

# 2: an equal part of the rows of all heads
(rows,) = {shard.data.shape[0] for shard in model.attention.w_q[...].addressable_shards}
print(rows, 9 * 8 / 8)
"""
COLLECTIVE = """
# 1: before, twice as many; after, as many
less = received(after)
MICRO = 16
batches = array(MICRO, B, D, spec=P(None, "data"))
print(received(show(accumulated)) / received(before), received(show(reduced_once)) / less)

# 2: up to rounding
import numpy as np
rng = np.random.default_rng(0)
real = {name: rng.normal(size=shape.shape).astype(np.float32) for name, shape in weights.items()}
tokens = rng.normal(size=batches.shape).astype(np.float32)
one, other = jax.jit(accumulated)(real, tokens), jax.jit(reduced_once)(real, tokens)
print(max(float(abs(one[name] - other[name]).max() / abs(one[name]).max()) for name in one) < 1e-5)
"""


def printed(notebook: str, answers: str) -> list[str]:
    """Lines that a notebook prints, followed by those of its exercises' answers."""
    code = (ROOT / "examples" / notebook).read_text() + answers
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    del env["XLA_FLAGS"]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tsp_from_scratch_and_its_answers():
    *_, first, second, third, fourth = printed("tsp_from_scratch.py", FROM_SCRATCH)
    assert first == "768 768"
    assert second == "[16, 8]"
    assert third == "[32, 16] [True, True]"
    assert fourth == "[((128, 64), 32)]"


def test_plan_a_job_and_its_answers():
    lines = printed("plan_a_job.py", PLAN)
    assert "fastest at 128 K: tsp, weights over all | fastest at 4 K: fsdp" in lines
    assert lines[-2] == "32768 tsp, weights over all"
    assert lines[-1] == "8"


def test_own_model_and_its_answers():
    *_, sums, rows = printed("own_model.py", OWN_MODEL)
    assert sums == "['tp', 'tp_sp']"
    assert rows == "9 9.0"


def test_find_a_collective_and_its_answers():
    lines = printed("find_a_collective.py", COLLECTIVE)
    assert any("all-reduce over data: 8 x 0.92 MB" in line for line in lines)
    assert any("all-reduce over data: 1 x 0.92 MB" in line for line in lines)
    assert "2.0 1.0" in lines
    assert lines[-1] == "True"
