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
from tsp_jax.heads import Heads, pad_heads
from tsp_jax.ops import reference
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadNorms
from tsp_jax.ops.attention.train import attention
from tsp_jax.ops.kernels import XlaKernel
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.stream import Stream

HEAD_DIM, THETA, EPS = 24, 100.0, 1e-3  # a head's columns can be shared by 8 ranks, and by 3
HEADS = {"multi_head": (8, 8), "one_kv_head_a_rank": (16, 8), "shared_kv_heads": (8, 2), "one_kv_head": (8, 1)}
HEADS_OF_3 = {"multi_head": (6, 6), "one_kv_head_a_rank": (6, 3), "shared_kv_heads": (6, 1), "one_kv_head": (3, 1)}


def attention_heads(heads: str, ranks: int) -> Heads:
    """Head slots without padding, so that stored and logical weights are the same."""
    return pad_heads(*(HEADS_OF_3 if ranks == 3 else HEADS)[heads], HEAD_DIM, ranks)


def sharded_attention(layout: str, heads: Heads, stream: Stream, buckets: int = 2, exchange_buckets: int = 1):
    placement = place_case(layout)
    spec = placement.layout.spec
    config = AttentionConfig(
        heads.kv, HEAD_DIM, THETA, EPS, buckets, buckets, XlaKernel(5, 4), exchange_buckets=exchange_buckets
    )

    def local(x, weights, norms, tokens):
        axes = placement.layout.axes("heads")
        return attention(x, weights, tokens, norms, config=config, axes=axes, stream=stream)

    x_spec, token_spec = spec("batch", "sequence", None), spec("batch", "sequence")
    f = placement.shard_map(local, (x_spec, spec("heads", None), spec(None), token_spec), x_spec)
    order = zigzag(S, placement)
    batch = packed_batch(B, S, V)
    tokens = Tokens(batch.positions[:, order], batch.segment_ids[:, order])
    back = np.argsort(order)

    def natural(x, weights, norms):
        return f(x[:, order], weights, norms, tokens)[:, back]

    return natural


def reference_attention(x, weights, norms):
    batch = packed_batch(B, S, V)
    return reference.attention(
        x, *weights, batch.positions, batch.segment_ids, head_dim=HEAD_DIM, theta=THETA, norms=norms, eps=EPS
    )


def attention_args(heads: Heads, norms: bool):
    rows = [count * HEAD_DIM for count in (heads.query, heads.kv, heads.kv, heads.query)]
    weights = AttentionWeights(*(normal(seed, count, D, std=0.3) for seed, count in enumerate(rows)))
    scales = HeadNorms(1 + normal(8, HEAD_DIM, std=0.3), 1 + normal(9, HEAD_DIM, std=0.3))
    return activations(0), weights, scales if norms else None


@functools.cache
def desired_attention(heads: Heads, norms: bool):
    return compiled_value_and_grads(reference_attention, activations(4), *attention_args(heads, norms))


def check_attention(layout: str, heads: str, stream: Stream, norms: bool):
    ranks = place_case(layout).size("heads")
    slots = attention_heads(heads, ranks)
    assert not slots.padded
    f = sharded_attention(layout, slots, stream, buckets=2)
    actual = compiled_value_and_grads(f, activations(4), *attention_args(slots, norms))
    # Slots, and so `desired_attention`, are equal for all numbers of ranks but 3.
    assert_trees_near(actual, desired_attention(slots, norms), F32_TOLERANCE)


MANY, FEW, ALL = ("multi_head", "shared_kv_heads"), ("one_kv_head_a_rank", "one_kv_head"), tuple(HEADS)
ATTENTION_CASES = {
    "gather": {
        "single": MANY,
        "tp8": ALL,
        "tp2_sp4": MANY,
        "tsp2": FEW,
        "tsp3": MANY,
        "tsp8": ALL,
        "mix2_4": ALL,
        "two_axes2_4": FEW,
        "two_level2_4": MANY,
    },
    "activations": {
        "tsp2": MANY,
        "tsp3": FEW,
        "tsp8": MANY,
        "mix2_4": ALL,
        "two_axes2_4": MANY,
        "two_level2_4": FEW,
    },
}
"""movement -> layout -> heads: every layout with half of the kinds of heads, layouts with most roles with all"""


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
    slots = attention_heads(heads, 2)
    x, weights, norms = attention_args(slots, norms=True)
    f = sharded_attention("tsp2", slots, Stream())
    out, grads = compiled_value_and_grads(f, activations(4), jnp.asarray(x, jnp.bfloat16), weights, norms)
    assert out.dtype == jnp.bfloat16
    assert_trees_near((out, grads), desired_attention(slots, norms=True), BF16_TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "heads", "stream", "exchange_buckets"),
    [
        ("tsp2", "multi_head", Stream(chunk_tokens=6), 4),
        ("two_level2_4", "shared_kv_heads", Stream("activations", chunk_tokens=8), 100),
    ],
)
def test_attention_does_not_depend_on_chunks_or_exchange_buckets(layout, heads, stream, exchange_buckets):
    slots = attention_heads(heads, place_case(layout).size("heads"))
    f = sharded_attention(layout, slots, stream, exchange_buckets=exchange_buckets)
    actual = compiled_value_and_grads(f, activations(4), *attention_args(slots, norms=True))
    assert_trees_near(actual, desired_attention(slots, norms=True), F32_TOLERANCE)
