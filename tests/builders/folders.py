"""Small models, their random parameters, and Hugging Face folders of them."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from tests.builders.arrays import normal, place_case
from tsp_jax.config import ExpertsConfig, ModelConfig, RopeScaling
from tsp_jax.hf import weights as hf
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import paddings, to_logical, to_stored

# No two of V, D, F, N H and K H are alike, nor what 8 ranks have of them.
LLAMA = ModelConfig(vocab_size=72, d_model=28, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=12, d_ff=120)
QWEN = dataclasses.replace(
    LLAMA, vocab_size=71, d_ff=113, num_heads=9, num_kv_heads=3, qk_norm=True, tie_embeddings=True
)
SCALED = dataclasses.replace(
    LLAMA, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=64), activation="gelu"
)
_GEMMA = dataclasses.replace(
    LLAMA, d_model=32, norms="both", norm_unit_offset=True, embedding_scale=math.sqrt(32), activation="gelu",
    tie_embeddings=True, attention_scale=1 / 16,
)  # fmt: skip
FAMILIES = {
    "llama": dataclasses.replace(LLAMA, d_model=32),
    "mistral": dataclasses.replace(LLAMA, window=9),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, num_heads=9, num_kv_heads=3),
    "qwen3": QWEN,
    "gemma2": dataclasses.replace(_GEMMA, attention_softcap=50.0, logits_softcap=30.0),
    "gemma3_text": dataclasses.replace(_GEMMA, qk_norm=True),
    "phi3": dataclasses.replace(
        LLAMA, rope_scaling=RopeScaling(fraction=0.5)
    ),
    "smollm3": dataclasses.replace(LLAMA, num_kv_heads=2),
    "granite": dataclasses.replace(LLAMA, embedding_scale=12.0, residual_scale=0.25, logits_scale=0.125),
    "olmo2": dataclasses.replace(LLAMA, norms="post", qk_norm=True, qk_norm_width="all", num_heads=9, num_kv_heads=3),
    "mixtral": dataclasses.replace(LLAMA, window=9, d_ff=14, experts=ExpertsConfig(number=5, per_token=2)),
    "qwen3_moe": dataclasses.replace(
        QWEN, tie_embeddings=False, d_ff=14, experts=ExpertsConfig(number=10, per_token=3, normalize=False)
    ),
    "olmoe": dataclasses.replace(
        LLAMA, d_model=96, qk_norm=True, qk_norm_width="all", d_ff=14,
        experts=ExpertsConfig(number=6, per_token=2),
    ),
    "granitemoe": dataclasses.replace(
        LLAMA, embedding_scale=12.0, residual_scale=0.25, logits_scale=0.125, d_ff=14,
        experts=ExpertsConfig(number=6, per_token=2),
    ),
    "gpt_oss": dataclasses.replace(
        LLAMA, num_heads=9, num_kv_heads=3, d_ff=31, window=9, layer_kinds=("sliding", "full"), qkv_bias=True,
        out_bias=True, attention_sinks=True, activation="clamped_swiglu",
        experts=ExpertsConfig(number=6, per_token=2, router_bias=True, biases=True),
    ),
}  # fmt: skip
"""model_type -> a small model of this family"""
MODELS = {"llama": LLAMA, "padded_tied_qwen": QWEN, "scaled": SCALED}


def state_of(config: ModelConfig, placement: Placement) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Transformer(config, placement=placement, rngs=nnx.Rngs(0))))


def logical_params(config: ModelConfig) -> dict:
    """Random, norm scales too."""
    state = state_of(config, place_case("single"))
    logical = jax.eval_shape(partial(to_logical, paddings(state)), nnx.to_pure_dict(state))
    leaves, tree = jax.tree.flatten(logical)
    return jax.tree.unflatten(tree, [normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


def place_params(config: ModelConfig, placement: Placement) -> dict:
    """Those in stored form, on the devices."""
    state = state_of(config, placement)
    stored = to_stored(paddings(state), jax.tree.map(jnp.asarray, logical_params(config)))
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), stored, nnx.to_pure_dict(state))


def save_folder(folder: Path, config: ModelConfig = LLAMA, layout: str = "single", **kwargs) -> Path:
    placement = place_case(layout)
    hf.save_params(folder, place_params(config, placement), config, placement, **kwargs)
    return folder
