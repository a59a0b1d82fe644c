"""Attention with RoPE that depends on the length of a sequence (longrope)."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tsp_jax.config import RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.nn import Attention
from tsp_jax.ops import reference

T, D, N, K, H = 12, 20, 4, 2, 6
SCALING = RopeScaling(
    kind="longrope", factor=4.0, original_context=T, short_factors=(1.0, 1.2, 1.5), long_factors=(2.0, 4.0, 7.0)
)


def make_attention(scaling: RopeScaling) -> Attention:
    return Attention(
        D, N, K, H, placement=place_case("tsp2"), rope_scaling=scaling, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize(("context", "factors"), [(T, SCALING.short_factors), (T - 1, SCALING.long_factors)])
def test_the_length_is_that_of_the_whole_sequence(context, factors):
    """Not that of a device's tokens."""
    layer = make_attention(dataclasses.replace(SCALING, original_context=context))
    x_BTD, positions = jnp.asarray(normal(0, 2, T, D)), jnp.tile(jnp.arange(T, dtype=jnp.int32), (2, 1))
    single = dataclasses.replace(SCALING, original_context=context, short_factors=factors, long_factors=factors)
    weights = (w[...] for w in (layer.w_q, layer.w_k, layer.w_v, layer.w_o))
    desired = reference.attention(
        x_BTD, *weights, positions, jnp.zeros_like(positions), head_dim=H, theta=10_000.0, scaling=single
    )
    assert_trees_near(layer(x_BTD), desired, F32_TOLERANCE)


def test_factors_that_do_not_fit_the_heads_are_refused():
    with pytest.raises(ConfigError, match=r"Attention: rope_scaling.long_factors has 2 values, heads of 6 have 3"):
        make_attention(dataclasses.replace(SCALING, long_factors=(1.0, 2.0)))
