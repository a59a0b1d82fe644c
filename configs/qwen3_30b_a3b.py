"""Qwen3-30B-A3B, a mixture of 128 experts, 8 a token, at 128 K tokens on eight GPUs.

Command:  python scripts/inspect_hlo.py qwen3_30b_a3b --target mi300x:8
Hardware: compiled for 8 x MI300X; it has not run on one.
Source:   sizes of https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json; 30.5 B parameters, 3.3 B active.
"""

from tsp_jax.config import Config, ExpertsConfig, ModelConfig, StreamConfig

config = Config(
    model=ModelConfig(
        vocab_size=151_936,
        d_model=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        d_ff=768,
        experts=ExpertsConfig(number=128, per_token=8, balance_loss=0.001),
        qk_norm=True,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
    ),
    # Experts move past tokens: at 16 K tokens a device that is more bytes, but the same work whatever routers choose.
    stream=StreamConfig(mlp_movement="gather", grad_dtype="bfloat16"),
    layout="tsp",
    mesh="data=1,tsp=8",
    steps=1000,
    batch=1,
    seq_len=131_072,
    grad_dtype="bfloat16",
    remat="save_attention",
    workdir="runs/qwen3_30b_a3b",
)
