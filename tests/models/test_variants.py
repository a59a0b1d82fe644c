"""Parameters of the variants of a layer: how many there are, and their first values."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from tests.builders.arrays import place_case
from tsp_jax.config import ExpertsConfig, ModelConfig
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import logical_params

PLAIN = ModelConfig(vocab_size=16, d_model=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=10)
VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "biases and sinks": {"qkv_bias": True, "attention_sinks": True},
    "biases of everything": {
        "qkv_bias": True, "out_bias": True,
        "experts": ExpertsConfig(number=3, per_token=2, router_bias=True, biases=True),
    },
    "norms over heads": {"qk_norm": True},
    "norms over all heads": {"qk_norm": True, "qk_norm_width": "all"},
    "norms after": {"norms": "post"},
    "norms before and after": {"norms": "both", "norm_unit_offset": True, "qk_norm": True},
    "kinds of layers": {"layer_kinds": ("sliding", "full_nope"), "window": 4},
}  # fmt: skip


def make(changes: dict) -> Transformer:
    return Transformer(dataclasses.replace(PLAIN, **changes), placement=place_case("single"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("case", VARIANTS)
def test_number_of_parameters(case):
    state = nnx.state(nnx.eval_shape(lambda: make(VARIANTS[case])))
    params = jax.tree.leaves(jax.eval_shape(logical_params, state))
    assert sum(math.prod(param.shape) for param in params) == dataclasses.replace(PLAIN, **VARIANTS[case]).num_params


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms_first_multiply_by_one_and_biases_are_zero(unit_offset):
    model = make({"norms": "both", "norm_unit_offset": unit_offset, "qk_norm": True, "qkv_bias": True})
    layers, scale = model.layers, 0.0 if unit_offset else 1.0
    outer = layers.attention_norm, layers.attention_post_norm, layers.mlp_norm, layers.mlp_post_norm
    for norm in (*outer, model.final_norm):
        assert norm is not None and norm.scale is not None
        assert (np.asarray(norm.scale[...]) == scale).all()
    attention = layers.attention
    assert attention.q_norm is not None and (np.asarray(attention.q_norm[...]) == scale).all()
    assert attention.q_bias is not None and not np.asarray(attention.q_bias[...]).any()
