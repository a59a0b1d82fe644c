"""The embedding under its layouts and movements, value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.ops import PADDED_STREAMS, D, V, activations, compiled_value_and_grads, ids, over_streams
from tsp_jax.ops.embedding import embed
from tsp_jax.ops.stream import Stream


def sharded_embed(layout: str, stream: Stream, dtype=jnp.float32, vocab_size: int | None = None):
    placement = place_case(layout)
    spec = placement.layout.spec

    def local(tokens, table):
        axes = placement.layout.axes("vocab")
        return embed(tokens, table, axes=axes, stream=stream, dtype=dtype, vocab_size=vocab_size)

    return placement.shard_map(local, (spec("batch", "sequence"), spec("vocab", None)), spec("batch", "sequence", None))


def check_embedding(f, tokens: np.ndarray, vocab_size: int = V):
    """Rows are copied, so they are the same bits; gradients are sums."""
    table, cotangent = normal(5, V, D), activations(4)
    out, (dtable,) = compiled_value_and_grads(functools.partial(f, tokens), cotangent, table)
    inside = (tokens >= 0) & (tokens < vocab_size)
    np.testing.assert_array_equal(out, np.where(inside[..., None], table[np.where(inside, tokens, 0)], 0))
    desired = np.zeros_like(table)
    np.add.at(desired, tokens[inside], cotangent[inside])
    assert_trees_near(dtable, desired, F32_TOLERANCE)


@over_streams
def test_embedding(layout, movement):
    """Ids outside of the vocabulary give zeros."""
    check_embedding(sharded_embed(layout, Stream(movement, 3)), ids(-V // 2, V + V // 2))


@pytest.mark.parametrize(("layout", "movement"), PADDED_STREAMS)
@pytest.mark.parametrize("vocab_size", [9, 70])
def test_padded_rows_are_outside_of_the_vocabulary(layout, movement, vocab_size):
    f = sharded_embed(layout, Stream(movement, 3), vocab_size=vocab_size)
    check_embedding(f, ids(-V // 2, V + V // 2), vocab_size)


@pytest.mark.parametrize(("layout", "chunk_tokens"), [("single", 7), ("tsp8", 4)])
def test_embedding_does_not_depend_on_chunks(layout, chunk_tokens):
    check_embedding(sharded_embed(layout, Stream(buckets=3, chunk_tokens=chunk_tokens)), ids())


def test_embedding_in_bfloat16_rounds_the_rows_once():
    tokens, table = ids(), normal(5, V, D)
    out = jax.jit(sharded_embed("tsp8", Stream(buckets=3), jnp.bfloat16))(tokens, table)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.asarray(table, jnp.bfloat16)[tokens])
