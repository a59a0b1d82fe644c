"""SmolLM2-135M: 134.5 M parameters, sizes of the published model.

Command:  python scripts/train.py smollm2_135m --layout dp
Hardware: 8 x H100 or MI300X; not run yet.
"""

from tsp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, StreamConfig

config = Config(
    model=ModelConfig(
        vocab_size=49152,
        d_model=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
    stream=StreamConfig(attention_movement="gather", kernel="auto"),
    data=DataConfig(tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
    layout="tsp",
    steps=1000,
    batch=8,
    seq_len=8192,
    compute_dtype="bfloat16",
    grad_dtype="bfloat16",
    remat="save_attention",
    workdir="runs/smollm2_135m",
    checkpoint_every=100,
)
