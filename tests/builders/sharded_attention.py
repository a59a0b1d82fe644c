"""The attention op of training under a layout, and the plain mathematics to compare with."""

import functools

import numpy as np

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, packed_batch, place_case
from tests.builders.attention import rule_of
from tests.builders.ops import B, D, S, V, activations, compiled_value_and_grads
from tsp_jax.heads import HeadSharding
from tsp_jax.ops import reference
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadNorms
from tsp_jax.ops.attention.train import attention
from tsp_jax.ops.kernels import XlaKernel
from tsp_jax.ops.kernels.mask import Scores, Tokens
from tsp_jax.ops.stream import Stream
from tsp_jax.stored import HeadPadding
from tsp_jax.training.data import sequence_order

HEAD_DIM, THETA, EPS = 24, 100.0, 1e-3
HEADS = {
    "multi_head": (8, 8), "one_kv_head_a_rank": (16, 8), "shared_kv_heads": (8, 2), "one_kv_head": (8, 1),
    "9_of_3": (9, 3), "4_of_1": (4, 1), "14_of_2": (14, 2), "28_of_4": (28, 4), "5": (5, 5), "18": (18, 18),
}  # fmt: skip
"""(query heads, KV heads); those of the second row are uneven over 8 ranks, 5 over any, 18 over 8 in units of one"""


def sharded_attention(
    layout: str, heads: str, stream: Stream, buckets: int = 2, exchange_buckets: int = 1, scores: Scores = Scores(),
    token_order: str = "any", order: str = "",
):  # fmt: skip
    placement = place_case(layout)
    spec = placement.layout.spec
    sharding = HeadSharding.of(placement.layout, placement.mesh.shape, *HEADS[heads], HEAD_DIM)
    config = AttentionConfig(
        sharding.heads, THETA, EPS, buckets, buckets, XlaKernel(5, 4), exchange_buckets=exchange_buckets,
        scores=scores, token_order=token_order,
    )  # fmt: skip

    def local(x, weights, norms, sinks, tokens):
        axes = placement.layout.axes("heads")
        return attention(x, weights, tokens, norms, sinks, config=config, axes=axes, stream=stream)[0]

    x_spec, token_spec = spec("batch", "sequence", None), spec("batch", "sequence")
    f = placement.shard_map(local, (x_spec, spec("heads", None), spec(None), spec(None), token_spec), x_spec)
    order = sequence_order(S, placement.size("sequence"), order or (token_order if token_order != "any" else "zigzag"))
    batch = packed_batch(B, S, V)
    tokens = Tokens(batch.positions[:, order], batch.segment_ids[:, order])
    back = np.argsort(order)

    def natural(x, weights, norms, sinks):
        q, k, v, o = weights
        queries, keys_values = HeadPadding(sharding, True), HeadPadding(sharding, False)
        stored = AttentionWeights(queries.pad(q), keys_values.pad(k), keys_values.pad(v), queries.pad(o))
        return f(x[:, order], stored, norms, sinks, tokens)[:, back]

    return natural


def reference_attention(scores: Scores, x, weights, norms, sinks):
    batch = packed_batch(B, S, V)
    return reference.attention(
        x, *weights, batch.positions, batch.segment_ids, head_dim=HEAD_DIM, theta=THETA, norms=norms, eps=EPS,
        sinks_N=sinks, **rule_of(scores),
    )  # fmt: skip


def attention_args(heads: str, norms: bool, sinks: bool = False):
    queries, keys_values = HEADS[heads]
    rows = [count * HEAD_DIM for count in (queries, keys_values, keys_values, queries)]
    weights = AttentionWeights(*(normal(seed, count, D, std=0.3) for seed, count in enumerate(rows)))
    scales = HeadNorms(1 + normal(8, HEAD_DIM, std=0.3), 1 + normal(9, HEAD_DIM, std=0.3))
    return activations(0), weights, scales if norms else None, normal(10, queries) if sinks else None


@functools.cache
def desired_attention(heads: str, norms: bool, sinks: bool = False, scores: Scores = Scores()):
    f = functools.partial(reference_attention, scores)
    return compiled_value_and_grads(f, activations(4), *attention_args(heads, norms, sinks))


def check_attention(
    layout: str, heads: str, stream: Stream, norms: bool, sinks: bool = False, scores: Scores = Scores(), **counts
):
    f = sharded_attention(layout, heads, stream, scores=scores, **counts)
    actual = compiled_value_and_grads(f, activations(4), *attention_args(heads, norms, sinks))
    assert_trees_near(actual, desired_attention(heads, norms, sinks, scores), F32_TOLERANCE)
