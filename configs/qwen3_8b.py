"""Qwen3-8B: 8.19 B parameters, one sequence of 1 M tokens over 8 devices.

Command:  python scripts/train.py qwen3_8b --mesh data=1,tsp=8
Hardware: 8 x H100 or MI300X; not run yet.
"""

from tsp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, StreamConfig

config = Config(
    model=ModelConfig(
        vocab_size=151936,
        d_model=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=12288,
        qk_norm=True,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
    ),
    stream=StreamConfig(attention_movement="gather", kernel="auto"),
    data=DataConfig(tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=20),
    layout="tsp",
    steps=1000,
    batch=1,
    seq_len=1048576,
    compute_dtype="bfloat16",
    grad_dtype="bfloat16",
    remat="offload_attention",
    workdir="runs/qwen3_8b",
    checkpoint_every=100,
)
