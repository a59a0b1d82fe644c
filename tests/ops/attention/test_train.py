"""Attention for training under its layouts and movements, value and every gradient, against the reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import (
    BF16_TOLERANCE,
    F32_TOLERANCE,
    assert_trees_near,
    normal,
    packed_batch,
    place_case,
    zigzag,
)
from tests.builders.ops import B, D, S, V, activations, compiled_value_and_grads
from tsp_jax.heads import HeadSharding
from tsp_jax.ops import reference
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadNorms
from tsp_jax.ops.attention.train import attention
from tsp_jax.ops.kernels import XlaKernel
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.stream import Stream
from tsp_jax.stored import HeadPadding

HEAD_DIM, THETA, EPS = 24, 100.0, 1e-3
HEADS = {
    "multi_head": (8, 8), "one_kv_head_a_rank": (16, 8), "shared_kv_heads": (8, 2), "one_kv_head": (8, 1),
    "9_of_3": (9, 3), "4_of_1": (4, 1), "14_of_2": (14, 2), "28_of_4": (28, 4), "5": (5, 5), "18": (18, 18),
}  # fmt: skip
"""(query heads, KV heads); those of the second row are uneven over 8 ranks, 5 over any, 18 over 8 in units of one"""


def sharded_attention(layout: str, heads: str, stream: Stream, buckets: int = 2, exchange_buckets: int = 1):
    placement = place_case(layout)
    spec = placement.layout.spec
    sharding = HeadSharding.of(placement.layout, placement.mesh.shape, *HEADS[heads], HEAD_DIM)
    config = AttentionConfig(
        sharding.heads, THETA, EPS, buckets, buckets, XlaKernel(5, 4), exchange_buckets=exchange_buckets
    )

    def local(x, weights, norms, tokens):
        axes = placement.layout.axes("heads")
        return attention(x, weights, tokens, norms, config=config, axes=axes, stream=stream)[0]

    x_spec, token_spec = spec("batch", "sequence", None), spec("batch", "sequence")
    f = placement.shard_map(local, (x_spec, spec("heads", None), spec(None), token_spec), x_spec)
    order = zigzag(S, placement)
    batch = packed_batch(B, S, V)
    tokens = Tokens(batch.positions[:, order], batch.segment_ids[:, order])
    back = np.argsort(order)

    def natural(x, weights, norms):
        q, k, v, o = weights
        queries, keys_values = HeadPadding(sharding, True), HeadPadding(sharding, False)
        stored = AttentionWeights(queries.pad(q), keys_values.pad(k), keys_values.pad(v), queries.pad(o))
        return f(x[:, order], stored, norms, tokens)[:, back]

    return natural


def reference_attention(x, weights, norms):
    batch = packed_batch(B, S, V)
    return reference.attention(
        x, *weights, batch.positions, batch.segment_ids, head_dim=HEAD_DIM, theta=THETA, norms=norms, eps=EPS
    )


def attention_args(heads: str, norms: bool):
    queries, keys_values = HEADS[heads]
    rows = [count * HEAD_DIM for count in (queries, keys_values, keys_values, queries)]
    weights = AttentionWeights(*(normal(seed, count, D, std=0.3) for seed, count in enumerate(rows)))
    scales = HeadNorms(1 + normal(8, HEAD_DIM, std=0.3), 1 + normal(9, HEAD_DIM, std=0.3))
    return activations(0), weights, scales if norms else None


@functools.cache
def desired_attention(heads: str, norms: bool):
    return compiled_value_and_grads(reference_attention, activations(4), *attention_args(heads, norms))


def check_attention(layout: str, heads: str, stream: Stream, norms: bool, **counts: int):
    f = sharded_attention(layout, heads, stream, **counts)
    actual = compiled_value_and_grads(f, activations(4), *attention_args(heads, norms))
    assert_trees_near(actual, desired_attention(heads, norms), F32_TOLERANCE)


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
    x, weights, norms = attention_args(heads, norms=True)
    f = sharded_attention("tsp2", heads, Stream())
    out, grads = compiled_value_and_grads(f, activations(4), jnp.asarray(x, jnp.bfloat16), weights, norms)
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
