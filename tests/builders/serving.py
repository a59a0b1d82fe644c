"""Small models that serve prompts under every layout, and their logits by plain mathematics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.builders.arrays import place_case
from tsp_jax.config import Config, DType, ExpertsConfig, ModelConfig, RopeScaling, StreamConfig
from tsp_jax.inference import make_inference_program
from tsp_jax.inference.token_loop import prefill_prompts
from tsp_jax.ops import reference
from tsp_jax.stored import to_logical, to_stored

LOGITS_TOLERANCE = 1e-4
"""relative; float32 sums in another order, through two layers: 1e-6 is typical"""

MULTI_HEAD = ModelConfig(
    vocab_size=72, d_model=28, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=10, d_ff=120, init_std=0.2
)
WIDE = ModelConfig(
    vocab_size=160, d_model=56, num_layers=3, num_heads=16, num_kv_heads=16, head_dim=8, d_ff=208, init_std=0.2
)
"""every weight has more elements than any message of decode"""
MODELS = {
    "multi_head": MULTI_HEAD,
    "grouped": dataclasses.replace(MULTI_HEAD, num_kv_heads=2, qk_norm=True),
    "odd_heads": dataclasses.replace(
        MULTI_HEAD, vocab_size=71, d_ff=113, num_heads=9, num_kv_heads=3, tie_embeddings=True, activation="gelu"
    ),
    "thirds": dataclasses.replace(MULTI_HEAD, num_kv_heads=2, head_dim=12),  # three ranks could share a KV head
    "wide": WIDE,
    "biased": dataclasses.replace(
        MULTI_HEAD, num_heads=9, num_kv_heads=3, qkv_bias=True, residual_scale=0.7, embedding_scale=3.0,
        logits_scale=0.5,
    ),
    "gemma": dataclasses.replace(
        MULTI_HEAD, num_kv_heads=2, qk_norm=True, norms="both", norm_unit_offset=True, logits_softcap=3.0
    ),
    "olmo": dataclasses.replace(
        MULTI_HEAD, num_heads=9, num_kv_heads=3, qk_norm=True, qk_norm_width="all", norms="post", norm_eps=0.1
    ),
    "olmo_grouped": dataclasses.replace(
        MULTI_HEAD, num_kv_heads=2, qk_norm=True, qk_norm_width="all", qkv_bias=True, norm_eps=0.1
    ),
    "kinds": dataclasses.replace(
        MULTI_HEAD, num_layers=5, num_heads=9, num_kv_heads=3, window=19, local_rope_theta=50.0, rope_theta=500.0,
        layer_kinds=("sliding", "full_nope", "full"), rope_scaling=RopeScaling(kind="linear", factor=4.0),
    ),
    "windowed": dataclasses.replace(
        MULTI_HEAD, num_heads=9, num_kv_heads=3, window=19, attention_softcap=2.0, attention_scale=0.5,
        attention_sinks=True,
    ),
    "experts": dataclasses.replace(
        MULTI_HEAD, num_kv_heads=2, d_ff=14, experts=ExpertsConfig(number=6, per_token=2, shared=1)
    ),
    "gpt_oss": dataclasses.replace(
        MULTI_HEAD, num_heads=9, num_kv_heads=3, d_ff=31, window=19, layer_kinds=("sliding", "full"), qkv_bias=True,
        out_bias=True, attention_sinks=True, activation="clamped_swiglu",
        experts=ExpertsConfig(number=6, per_token=2, router_bias=True, biases=True),
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=32, truncate=False),
    ),
}  # fmt: skip
STREAM = StreamConfig(bucket_mib=0.004)
BATCH, CAPACITY, CHUNK, STEPS = 4, 128, 48, 67
LENGTHS = (1, 61, 13, 48)
"""of prompts: one token; more than a chunk, filling the cache with all steps; odd and no multiple of any ranks; a whole
chunk"""

CASES = [
    ("single", "odd_heads"), ("tsp2", "odd_heads"), ("tsp3", "grouped"), ("tsp4", "odd_heads"), ("tsp8", "multi_head"),
    ("tsp8", "grouped"), ("tsp8", "odd_heads"), ("tp8", "grouped"), ("tp2_sp4", "odd_heads"), ("tp4_sp2", "grouped"),
    ("sp8", "multi_head"), ("fsdp_cp8", "odd_heads"), ("data2_tsp4", "grouped"), ("mix2_4", "odd_heads"),
    ("two_axes2_4", "multi_head"), ("two_level2_4", "grouped"),
    ("mix2_3", "odd_heads"), ("mix3_2", "thirds"), ("fsdp4", "odd_heads"), ("replicas2_4", "grouped"),
    ("tsp4", "windowed"), ("tp2_sp4", "windowed"), ("mix2_3", "windowed"),
    ("tsp4", "biased"), ("mix2_3", "biased"), ("tp8", "gemma"), ("tsp4", "olmo"), ("mix2_4", "olmo_grouped"),
    ("tp8", "olmo_grouped"), ("tsp4", "kinds"), ("tp2_sp4", "kinds"),
    ("tsp4", "experts"), ("mix2_4", "experts"), ("tp4", "experts"), ("tsp4", "gpt_oss"), ("mix2_3", "gpt_oss"),
]  # fmt: skip
"""every layout; every model under tsp; fewer KV heads than ranks where that is another path"""


def config_of(model: str, **changes) -> Config:
    """A training configuration, for closed forms."""
    fields = {"model": MODELS[model], "stream": STREAM, "steps": 1, "batch": 1, "seq_len": 8}
    return Config(**({**fields, "compute_dtype": "float32"} | changes))


@functools.cache
def program_of(case: str, model: str, chunk: int = CHUNK, dtype: DType = "float32"):
    return make_inference_program(
        MODELS[model], place_case(case), stream=STREAM, dtype=dtype, batch=BATCH, capacity=CAPACITY, chunk=chunk
    )


@functools.cache
def served(case: str, model: str, chunk: int = CHUNK, dtype: DType = "float32"):
    """(program, params) of a model; its logical parameters are the same in every case."""
    program = program_of(case, model, chunk, dtype)
    shardings = jax.tree.map(lambda array: array.sharding, program.abstract_params)
    return program, program.cast_params(jax.device_put(to_stored(program.paddings, logical_params(model)), shardings))


@functools.cache
def logical_params(model: str):
    """Random, norm scales too, so that a test fails if one is used in place of another."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        value = rng.normal(size=leaf.shape)
        return (1 + 0.3 * value if "norm" in str(path) else 0.2 * value).astype(np.float32)

    program = program_of("single", model)
    logical = jax.eval_shape(functools.partial(to_logical, program.paddings), program.abstract_params)
    return jax.tree_util.tree_map_with_path(fill, logical)


@functools.cache
def reference_forward(model: str):
    """Jitted (logical params, tokens [B, T]) -> logits [B, T, V]."""
    config = MODELS[model]

    def forward(params, tokens_BT):
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        segments = jnp.zeros_like(positions)
        return reference.decoder_logits(params, tokens_BT, positions, segments, config=config)

    return jax.jit(forward)


def reference_logits(model: str, sequences) -> np.ndarray:
    """[B, T, V] of sequences of any lengths up to the capacity."""
    padded = np.zeros((BATCH, CAPACITY), np.int32)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return np.asarray(reference_forward(model)(logical_params(model), padded))


def make_prompts(lengths=LENGTHS) -> list[list[int]]:
    return [np.random.default_rng([row, n]).integers(0, 71, n).tolist() for row, n in enumerate(lengths)]


def greedy(program, params, logits, cache, steps: int):
    """(new tokens [B, steps], the logits [B, steps, V] of each, cache with all of them)."""
    tokens, seen = [], []
    for _ in range(steps):
        seen.append(np.asarray(logits))
        tokens.append(seen[-1].argmax(axis=-1).astype(np.int32))
        logits, cache = program.decode(params, cache, jax.device_put(tokens[-1], program.abstract_tokens.sharding))
    return np.stack(tokens, axis=1), np.stack(seen, axis=1), cache


@functools.cache
def continued(case: str, model: str, steps: int = STEPS):
    """(prompts, new tokens, their logits, cache)."""
    program, params = served(case, model)
    prompts = make_prompts()
    logits, cache = prefill_prompts(program, params, program.init_cache(), prompts)
    return prompts, *greedy(program, params, logits, cache, steps)
