"""Some tokens at a time, and some keys and values at a time: the same numbers, and less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.ops.test_ops import (
    CE_COTANGENTS,
    activations,
    attention_args,
    attention_heads,
    ce_args,
    check_embedding,
    compiled_value_and_grads,
    desired_attention,
    desired_cross_entropy,
    desired_mlp,
    ids,
    mlp_args,
    sharded_attention,
    sharded_cross_entropy,
    sharded_embed,
    sharded_mlp,
)
from tsp_jax.inspect import list_buffers, parse
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.cross_entropy import cross_entropy
from tsp_jax.ops.mlp import mlp
from tsp_jax.ops.stream import Stream

B, T, D = 2, 30, 3


# ------------------------------------------------------------------------------------------------ over_chunks


def chunked(tokens: int, *, batch: int = B, length: int = T, updated_dtype=jnp.float32):
    """((updated, made, sums), tokens of every chunk that was seen) of a body that uses all it may."""
    sizes = set()

    def body(updated, read):
        x, (label, grad) = read
        sizes.add(x.shape[1])
        assert x.shape[0] == label.shape[0] == batch
        y = updated["y"].astype(jnp.float32) + x * label.astype(jnp.float32)[..., None]
        made = {"wide": jnp.concatenate([x, grad], axis=-1).astype(jnp.bfloat16), "number": label + 1}
        sums = jnp.einsum("btd,bte->de", x, grad), label.sum(axis=1)
        return {"y": y.astype(updated["y"].dtype)}, made, sums

    label = np.arange(batch * length, dtype=np.int32).reshape(batch, length) % 7
    x, grad = normal(0, batch, length, D), normal(1, batch, length, D)
    y = jnp.asarray(normal(2, batch, length, D), updated_dtype)
    run = jax.jit(lambda y, x, label, grad: over_chunks(body, {"y": y}, (x, (label, grad)), tokens=tokens))
    return jax.device_get(run(y, x, label, grad)), sizes


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1, 1), (2, 1), (4, 2), (11, 5), (12, 6), (29, 10), (30, 15), (59, 15), (60, 30), (10**9, 30)],
)
def test_chunks_are_the_largest_divisor_and_change_nothing(tokens, size):
    (updated, made, sums), sizes = chunked(tokens)
    whole, _ = chunked(10**9)
    assert sizes == {size}
    for array, desired in zip(jax.tree.leaves((updated, made)), jax.tree.leaves(whole[:2]), strict=True):
        assert array.dtype == desired.dtype
        np.testing.assert_array_equal(array, desired)
    assert_trees_near(sums, whole[2], F32_TOLERANCE)
    assert jax.tree.map(lambda array: array.dtype, sums) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize(("length", "size"), [(7, 1), (8, 4), (9, 3), (25, 5)])
def test_a_length_that_few_numbers_divide_makes_small_chunks(length, size):
    actual, sizes = chunked(6, batch=1, length=length)
    assert sizes == {size}
    assert_trees_near(actual, chunked(10**9, batch=1, length=length)[0], F32_TOLERANCE)


def test_updated_arrays_keep_their_dtype():
    (updated, _, _), _ = chunked(12, updated_dtype=jnp.bfloat16)
    (whole, _, _), _ = chunked(10**9, updated_dtype=jnp.bfloat16)
    assert updated["y"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updated["y"], whole["y"])


# ------------------------------------------------------------------------------------------------ ops

over_token_counts = pytest.mark.parametrize(
    ("layout", "tokens"), [("single", 7), ("tsp3", 8), ("data2_tsp4", 5), ("mix2_4", 12), ("tsp8", 1)]
)
"""of 96, 32, 12, 24 and 12 tokens of a device"""


@over_token_counts
def test_mlp_does_not_depend_on_tokens_at_a_time(layout, tokens):
    actual = compiled_value_and_grads(
        sharded_mlp(layout, Stream(buckets=5, tokens=tokens)), activations(4), *mlp_args()
    )
    assert_trees_near(actual, desired_mlp("silu"), F32_TOLERANCE)


@over_token_counts
def test_loss_does_not_depend_on_tokens_at_a_time(layout, tokens):
    f = sharded_cross_entropy(layout, Stream(buckets=3, tokens=tokens))
    assert_trees_near(compiled_value_and_grads(f, CE_COTANGENTS, *ce_args()), desired_cross_entropy(), F32_TOLERANCE)


@pytest.mark.parametrize(("layout", "tokens"), [("single", 7), ("tsp8", 4)])
def test_embedding_does_not_depend_on_tokens_at_a_time(layout, tokens):
    check_embedding(sharded_embed(layout, Stream(buckets=3, tokens=tokens)), ids())


@pytest.mark.parametrize(
    ("layout", "heads", "stream", "exchange_buckets"),
    [
        ("tsp2", "multi_head", Stream(tokens=6), 4),
        ("tsp8", "multi_head", Stream(tokens=4), 2),
        ("partial2_4", "shared_kv_heads", Stream("activations", tokens=8), 100),
    ],
)
def test_attention_does_not_depend_on_tokens_or_heads_at_a_time(layout, heads, stream, exchange_buckets):
    slots = attention_heads(heads, place_case(layout).size("heads"))
    f = sharded_attention(layout, slots, stream, exchange_buckets=exchange_buckets)
    actual = compiled_value_and_grads(f, activations(4), *attention_args(slots, norms=True))
    assert_trees_near(actual, desired_attention(slots, norms=True), F32_TOLERANCE)


# ------------------------------------------------------------------------------------------------ memory

LENGTH, FFN, VOCAB, WIDTH, CHUNK = 64, 112, 176, 8, 16
"""sizes that are told apart in a compiled program"""


def arrays_of(f, *args) -> set[tuple[int, ...]]:
    """Shapes of all arrays that a compiled function makes."""
    return {b.shape for b in list_buffers(parse(jax.jit(f).lower(*args).compile().as_text()))}


def holds(shapes: set[tuple[int, ...]], tokens: int, columns: int) -> bool:
    """Whether one of them has this many tokens and columns, however the batch of one stands in it."""
    return any({tokens, columns} <= set(shape) for shape in shapes)


@functools.cache
def shapes_of(op: str, tokens: int) -> set[tuple[int, ...]]:
    """Of value and gradients."""
    x, stream = normal(0, 1, LENGTH, WIDTH), Stream(tokens=tokens)
    if op == "mlp":
        weights = [normal(seed, FFN, WIDTH) for seed in (1, 2, 3)]
        return arrays_of(jax.grad(lambda *args: mlp(*args, stream=stream).sum(), (0, 1, 2, 3)), x, *weights)
    labels = np.arange(LENGTH, dtype=np.int32)[None]
    loss = jax.grad(lambda x, table: cross_entropy(x, table, labels, stream=stream).nll_Bt.sum(), (0, 1))
    return arrays_of(loss, x, normal(1, VOCAB, WIDTH))


@pytest.mark.parametrize(("op", "columns"), [("mlp", FFN), ("loss", VOCAB)])
def test_what_a_piece_makes_never_has_all_tokens(op, columns):
    assert not holds(shapes_of(op, CHUNK), LENGTH, columns)
    assert holds(shapes_of(op, CHUNK), CHUNK, columns)


@pytest.mark.parametrize(("op", "columns"), [("mlp", FFN), ("loss", VOCAB)])
def test_with_all_tokens_at_a_time_it_does(op, columns):
    """The negative above can fail."""
    assert holds(shapes_of(op, LENGTH), LENGTH, columns)
