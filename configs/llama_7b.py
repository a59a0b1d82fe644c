"""The model of the TSP paper (arXiv 2604.26294): 8.85 B parameters, 128 K tokens a replica.

Command:  python scripts/train.py llama_7b --mesh data=1,tsp=8
Hardware: 8 x MI300X or more; not run yet.
"""

from tsp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, StreamConfig

config = Config(
    model=ModelConfig(
        vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=16384
    ),
    stream=StreamConfig(attention_movement="gather", kernel="auto"),
    data=DataConfig(tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=100),
    layout="tsp",
    steps=1000,
    batch=1,
    seq_len=131072,
    compute_dtype="bfloat16",
    grad_dtype="bfloat16",
    remat="save_attention",
    workdir="runs/llama_7b",
    checkpoint_every=100,
)
