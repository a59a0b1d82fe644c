"""Ops on chunks of tokens: the same numbers, and less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal
from tsp_jax.inspect import list_buffers, parse
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.cross_entropy import cross_entropy
from tsp_jax.ops.mlp import mlp
from tsp_jax.ops.stream import Stream

B, T, D = 2, 30, 3


# ------------------------------------------------------------------------------------------------ over_chunks


def chunked(chunk_tokens: int, *, batch: int = B, length: int = T, updated_dtype=jnp.float32):
    """((updated, new, sums), sizes of all chunks) of a body that uses every kind of array."""
    sizes = set()

    def body(updated, read):
        x, (label, grad) = read
        sizes.add(x.shape[1])
        assert x.shape[0] == label.shape[0] == batch
        y = updated["y"].astype(jnp.float32) + x * label.astype(jnp.float32)[..., None]
        new = {"wide": jnp.concatenate([x, grad], axis=-1).astype(jnp.bfloat16), "number": label + 1}
        sums = jnp.einsum("btd,bte->de", x, grad), label.sum(axis=1)
        return {"y": y.astype(updated["y"].dtype)}, new, sums

    label = np.arange(batch * length, dtype=np.int32).reshape(batch, length) % 7
    x, grad = normal(0, batch, length, D), normal(1, batch, length, D)
    y = jnp.asarray(normal(2, batch, length, D), updated_dtype)
    run = jax.jit(lambda y, x, label, grad: over_chunks(body, {"y": y}, (x, (label, grad)), chunk_tokens=chunk_tokens))
    return jax.device_get(run(y, x, label, grad)), sizes


@pytest.mark.parametrize(
    ("chunk_tokens", "size"),
    [(1, 1), (2, 1), (4, 2), (11, 5), (12, 6), (29, 10), (30, 15), (59, 15), (60, 30), (10**9, 30)],
)
def test_chunks_are_the_largest_divisor_and_change_nothing(chunk_tokens, size):
    (updated, new, sums), sizes = chunked(chunk_tokens)
    whole, _ = chunked(10**9)
    assert sizes == {size}
    for array, desired in zip(jax.tree.leaves((updated, new)), jax.tree.leaves(whole[:2]), strict=True):
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


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        (2048, 16384),  # llama_7b's MLP under tsp 8 and tp 8: all tokens of a rank at 128 K
        (1024, 32768),  # its heads
        (8000, 4194),  # a quarter of its vocabulary
        (16384, 2048),  # its MLP under fsdp_cp
        (2**30, 1),
    ],
)
def test_a_chunk_makes_a_product_as_large_as_two_buckets(rows, tokens):
    stream = Stream(product_bytes=2 * 64 * 2**20)
    assert stream.chunk(rows) == tokens
    assert stream._replace(chunk_tokens=100).chunk(rows) == min(100, tokens)


# ------------------------------------------------------------------------------------------------ memory

LENGTH, FFN, VOCAB, WIDTH, CHUNK = 64, 112, 176, 8, 16
"""sizes that are distinct in a compiled program"""


def arrays_of(f, *args) -> set[tuple[int, ...]]:
    """Shapes of all arrays of a compiled function."""
    return {b.shape for b in list_buffers(parse(jax.jit(f).lower(*args).compile().as_text()))}


def holds(shapes: set[tuple[int, ...]], tokens: int, columns: int) -> bool:
    """Whether one of them has this many tokens and columns, wherever its batch dimension of one is."""
    return any({tokens, columns} <= set(shape) for shape in shapes)


@functools.cache
def shapes_of(op: str, stream: Stream) -> set[tuple[int, ...]]:
    """Shapes of all arrays of an op's value and gradients."""
    x = normal(0, 1, LENGTH, WIDTH)
    if op == "mlp":
        weights = [normal(seed, FFN, WIDTH) for seed in (1, 2, 3)]
        return arrays_of(jax.grad(lambda *args: mlp(*args, stream=stream).sum(), (0, 1, 2, 3)), x, *weights)
    labels = np.arange(LENGTH, dtype=np.int32)[None]
    loss = jax.grad(lambda x, table: cross_entropy(x, table, labels, stream=stream).nll_Bt.sum(), (0, 1))
    return arrays_of(loss, x, normal(1, VOCAB, WIDTH))


@pytest.mark.parametrize(("op", "columns"), [("mlp", FFN), ("loss", VOCAB)])
def test_intermediate_results_never_have_all_tokens(op, columns):
    assert not holds(shapes_of(op, Stream(chunk_tokens=CHUNK)), LENGTH, columns)
    assert holds(shapes_of(op, Stream(chunk_tokens=CHUNK)), CHUNK, columns)


@pytest.mark.parametrize(("op", "columns"), [("mlp", FFN), ("loss", VOCAB)])
def test_the_bound_on_products_counts_the_rows_of_the_bucket(op, columns):
    bound = Stream(product_bytes=4 * CHUNK * columns)
    assert not holds(shapes_of(op, bound), LENGTH, columns)
    assert holds(shapes_of(op, bound), CHUNK, columns)


@pytest.mark.parametrize(("op", "columns"), [("mlp", FFN), ("loss", VOCAB)])
def test_without_chunks_they_do(op, columns):
    """The negative above can fail."""
    assert holds(shapes_of(op, Stream(chunk_tokens=LENGTH)), LENGTH, columns)
