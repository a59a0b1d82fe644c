"""Virtual CPU devices run collectives without a deadlock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_on_virtual_devices(number, code, **environment):
    """What a process prints that sets up virtual devices, without the settings of these tests."""
    code = f"import os, jax\nimport tsp_jax\ntsp_jax.use_cpu_devices({number})\n{code}"
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("flags", ["", "--xla_cpu_collective_call_terminate_timeout_seconds=7"])
def test_virtual_devices_wait_for_each_other_on_a_busy_machine(flags):
    """XLA reads the flag, which ends the process when a device is late, after JAX is imported."""
    late = "--xla_cpu_collective_call_terminate_timeout_seconds="
    printed = run_on_virtual_devices(2, "print(os.environ['XLA_FLAGS'], len(jax.devices()))", XLA_FLAGS=flags)
    assert printed == [flags or f"{late}3600", "2"]


MANY_PROGRAMS = """
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((8,), ("tsp",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jax.numpy.ones((64, 24)), NamedSharding(mesh, PartitionSpec("tsp")))
gather = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, PartitionSpec()))
for _ in range(3000):
    y = gather(x)
print(y.sum())
"""


def test_many_programs_in_flight_on_virtual_devices_end():
    """With one thread a device they stood still for ever after a few hundred programs (jax 0.10.2, up to 8 cores)."""
    assert run_on_virtual_devices(8, MANY_PROGRAMS) == ["3072.0"]


LARGE_VOCABULARY = """
import numpy as np
from tsp_jax.config import Config, ModelConfig
from tsp_jax.layout import place
from tsp_jax.training.data import Batch
from tsp_jax.training.step import make_program
model = ModelConfig(
    vocab_size=49_152, d_model=256, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=32, d_ff=512,
    tie_embeddings=True,
)
config = Config(model=model, layout="tsp", mesh="tsp=8", steps=1, batch=4, seq_len=512, compute_dtype="float32")
program = make_program(config, place("tsp", data=1, tsp=8))
tokens = np.arange(4 * 512, dtype=np.int32).reshape(1, 4, 512)
positions = np.broadcast_to(np.arange(512, dtype=np.int32), tokens.shape)
batch = Batch(tokens, np.roll(tokens, -1, axis=-1), positions, np.zeros_like(tokens))
print(program.step(program.init(), batch)[1].loss)
"""


def test_virtual_devices_meet_in_the_same_collectives():
    """Where all of them have JAX's one channel, this step ends the process or stands still (jax 0.10.2 and 0.12)."""
    (loss,) = run_on_virtual_devices(8, LARGE_VOCABULARY)
    assert 10 < float(loss) < 12  # log(49,152) is 10.8


def test_threads_that_the_environment_sets_are_kept():
    assert run_on_virtual_devices(2, "print(os.environ['PJRT_NPROC'])", PJRT_NPROC="5") == ["5"]
