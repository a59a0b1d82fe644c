"""A small configuration, its training step compiled for virtual CPUs once."""

import functools

from tsp_jax.config import Config, ModelConfig, OptimizerConfig, StreamConfig
from tsp_jax.hardware.targets import parse_target
from tsp_jax.plan.compile import CompiledStep, compile_step

CPU = parse_target("cpu:8")
CONFIG = Config(
    model=ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=8, d_ff=64),
    stream=StreamConfig(
        attention_movement="gather",
        mlp_movement="gather",
        bucket_mib=0.0045,
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
    layout="tsp",
    mesh="data=1,tsp=8",
    steps=2,
    batch=1,
    seq_len=64,
    compute_dtype="float32",
    workdir="unused",
)


@functools.cache
def train_step() -> CompiledStep:
    """The training step of CONFIG; callers need the fixture `optax_promotes`."""
    return compile_step(CONFIG, CPU)
