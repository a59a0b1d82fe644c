"""Llama-3-70B: 70.6 B parameters, 128 K tokens a replica, weights over all devices.

Command:  python scripts/train.py llama3_70b --mesh data=8,tsp=8
Hardware: 64 x MI300X or more; not run yet.
"""

from tsp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, StreamConfig

config = Config(
    model=ModelConfig(
        vocab_size=128256,
        d_model=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        d_ff=28672,
        rope_theta=500_000.0,
    ),
    stream=StreamConfig(attention_movement="gather", kernel="auto"),
    data=DataConfig(tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=100),
    layout="tsp(weights=data+tsp)",
    steps=1000,
    batch=8,
    seq_len=131072,
    compute_dtype="bfloat16",
    grad_dtype="bfloat16",
    remat="save_attention",
    workdir="runs/llama3_70b",
    checkpoint_every=100,
)
