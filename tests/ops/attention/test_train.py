"""Attention for training under its layouts and movements, value and every gradient, against the reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import BF16_TOLERANCE, assert_trees_near, normal
from tests.builders.ops import activations, compiled_value_and_grads
from tests.builders.sharded_attention import (
    HEADS,
    attention_args,
    check_attention,
    desired_attention,
    sharded_attention,
)
from tsp_jax.errors import ConfigError
from tsp_jax.ops.attention.sinks import add_sinks, sinks_grad
from tsp_jax.ops.kernels.mask import MASKED, Scores
from tsp_jax.ops.stream import Stream

MANY, FEW, ALL = ("multi_head", "shared_kv_heads"), ("one_kv_head_a_rank", "one_kv_head"), tuple(HEADS)[:4]
ATTENTION_CASES = {
    "gather": {
        "single": MANY,
        "tp8": (*ALL, "9_of_3"),
        "tp2_sp4": MANY,
        "tsp2": (*FEW, "9_of_3", "4_of_1", "14_of_2", "28_of_4"),
        "tsp3": (*MANY, "5"),
        "tsp4": ("9_of_3", "4_of_1", "14_of_2", "28_of_4"),
        "tsp8": (*ALL, "9_of_3", "4_of_1", "14_of_2", "28_of_4", "5", "18"),
        "mix2_4": (*ALL, "9_of_3", "5"),
        "mix2_3": ("9_of_3",),
        "mix3_2": ("14_of_2",),
        "two_axes2_4": FEW,
        "two_level2_4": (*MANY, "9_of_3"),
    },
    "ring": {"tsp8": (*MANY, "9_of_3")},
    "activations": {
        "tsp2": MANY,
        "tsp3": (*FEW, "14_of_2"),
        "tsp8": (*MANY, "9_of_3", "4_of_1", "28_of_4", "18"),
        "mix2_4": (*ALL, "9_of_3", "5"),
        "mix3_2": ("28_of_4",),
        "two_axes2_4": MANY,
        "two_level2_4": (*FEW, "9_of_3"),
    },
}
"""movement -> layout -> heads"""


@pytest.mark.parametrize(
    ("movement", "layout", "heads"),
    [
        (movement, layout, heads)
        for movement, layouts in ATTENTION_CASES.items()
        for layout, kinds in layouts.items()
        for heads in kinds
    ],
)
def test_attention(movement, layout, heads):
    check_attention(layout, heads, Stream(movement, token_buckets=2), norms=heads != "one_kv_head_a_rank")


@pytest.mark.parametrize("heads", ["multi_head", "shared_kv_heads"])
def test_attention_inside_data_parallelism(heads):
    check_attention("data2_tsp4", heads, Stream(), norms=True)


@pytest.mark.parametrize("heads", ["multi_head", "shared_kv_heads"])
def test_attention_in_bfloat16_is_near_float32(heads):
    x, weights, norms, _ = attention_args(heads, norms=True)
    f = sharded_attention("tsp2", heads, Stream())
    out, grads = compiled_value_and_grads(f, activations(4), jnp.asarray(x, jnp.bfloat16), weights, norms, None)
    assert out.dtype == jnp.bfloat16
    assert_trees_near((out, grads), desired_attention(heads, norms=True), BF16_TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "heads", "stream", "counts"),
    [
        ("tsp2", "multi_head", Stream(chunk_tokens=6), {"exchange_buckets": 4}),
        ("two_level2_4", "shared_kv_heads", Stream("activations", chunk_tokens=8), {"exchange_buckets": 100}),
        ("tsp8", "18", Stream(chunk_tokens=6), {"buckets": 6, "exchange_buckets": 3}),
        ("tsp8", "9_of_3", Stream(), {"buckets": 100, "exchange_buckets": 3}),
    ],
)
def test_attention_does_not_depend_on_chunks_or_buckets(layout, heads, stream, counts):
    check_attention(layout, heads, stream, norms=True, **counts)


VARIANTS = [
    ("single", "shared_kv_heads", "gather"),
    ("tp2_sp4", "shared_kv_heads", "gather"),
    ("tp8", "9_of_3", "gather"),
    ("tsp4", "9_of_3", "gather"),
    ("mix2_4", "one_kv_head", "gather"),
    ("tsp8", "14_of_2", "activations"),
    ("mix3_2", "28_of_4", "activations"),
    ("two_level2_4", "9_of_3", "activations"),
]


@pytest.mark.parametrize(("layout", "heads", "movement"), VARIANTS)
def test_attention_with_windows_sinks_and_soft_caps(layout, heads, movement):
    """Sinks of heads that are padded or sharded unevenly meet their own heads."""
    scores = Scores(window=11, softcap=2.0, scale=0.4)
    check_attention(layout, heads, Stream(movement), norms=True, sinks=True, scores=scores, exchange_buckets=2)


@pytest.mark.parametrize(("layout", "movement"), [("tsp4", "gather"), ("tsp4", "activations"), ("mix2_4", "gather")])
def test_attention_of_an_encoder(layout, movement):
    check_attention(layout, "shared_kv_heads", Stream(movement), norms=False, scores=Scores(causal=False))


def test_a_query_without_keys_has_only_its_sink():
    """Its output and the gradients are 0, not NaN."""
    out, lse, sinks = jnp.zeros((1, 2, 3, 1, 4)), jnp.full((1, 2, 3, 1), MASKED), normal(0, 3, 1)
    new_out, new_lse = add_sinks(out, lse, sinks)
    assert not new_out.any()
    np.testing.assert_array_equal(new_lse, np.broadcast_to(sinks, lse.shape))
    assert not np.asarray(sinks_grad(jnp.zeros_like(lse), new_lse, sinks)).any()


def test_sinks_of_other_heads_are_refused():
    f = sharded_attention("single", "multi_head", Stream())
    x, weights, norms, _ = attention_args("multi_head", norms=True)
    with pytest.raises(ConfigError, match=r"attention: sinks_N is \[5\]; use \[8\], one for each query head"):
        f(x, weights, norms, normal(0, 5))
