"""Parameters on a mesh: padded rows, and logical arrays that every device holds a part of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import normal
from tsp_jax.layout import make_mesh
from tsp_jax.stored import (
    LARGEST_MULTIPLE,
    ExpertBiasPadding,
    ExpertPadding,
    NoPadding,
    RowPadding,
    abstract_logical,
    in_dtype,
)


@given(st.integers(1, 300_000), st.integers(1, 128))
def test_every_rank_holds_equally_many_rows_and_hardly_more_than_it_must(rows, ranks):
    padding = RowPadding.over(rows, ranks)
    fewest = -(-rows // ranks)
    assert padding.rows == rows
    assert padding.stored % ranks == 0
    assert fewest <= padding.stored // ranks < 1.01 * fewest
    assert padding.padded == (rows % ranks > 0)


@given(st.integers(6400, 300_000), st.integers(2, 128))
def test_many_padded_rows_are_a_multiple_that_buckets_divide(per_rank, ranks):
    assert RowPadding.over(per_rank * ranks - 1, ranks).stored // ranks % LARGEST_MULTIPLE == 0


@pytest.mark.parametrize(
    ("rows", "ranks", "stored"),
    [
        (151_936, 7, 7 * 21_760),  # 340 times 64
        (49_152, 5, 5 * 9856),  # 154 times 64
        (1536, 5, 5 * 308),  # 77 times 4; 312 would be 1.3 % more
        (9, 8, 16),
        (1, 3, 3),
        (151_936, 8, 151_936),
        (152_000, 1, 152_000),
    ],
)
def test_stored_rows(rows, ranks, stored):
    assert RowPadding.over(rows, ranks).stored == stored


@pytest.mark.parametrize(("rows", "ranks"), [(9, 8), (24, 8)])
def test_pad_then_unpad_is_the_identity(rows, ranks):
    padding, logical = RowPadding.over(rows, ranks), normal(0, 2, rows, 5)
    stored = padding.pad(jnp.asarray(logical))
    assert stored.shape == (2, padding.stored, 5)
    np.testing.assert_array_equal(padding.unpad(stored), logical)
    assert np.count_nonzero(stored) == np.count_nonzero(logical)


@pytest.mark.parametrize(("tensor", "folded"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_shards_hold_whole_experts_or_a_part_of_each(tensor, folded):
    """Each row holds its expert's number and its own: 5 experts of 7 rows."""
    rows = np.stack(np.meshgrid(np.arange(1, 6), np.arange(1, 8), indexing="ij"), axis=-1).reshape(35, 2)
    padding = ExpertPadding(5, 7, tensor, folded)
    assert padding.padded == (tensor * folded > 1)
    stored = np.asarray(padding.pad(jnp.asarray(rows)))
    np.testing.assert_array_equal(padding.unpad(jnp.asarray(stored)), rows)
    shards = stored.reshape(tensor, folded, -1, padding.shard_rows, 2)
    for t, f, e, i in np.ndindex(shards.shape[:-1]):
        expert, row = f * shards.shape[2] + e, t * padding.shard_rows + i
        real = expert < 5 and row < 7
        np.testing.assert_array_equal(shards[t, f, e, i], [expert + 1, row + 1] if real else [0, 0])


@pytest.mark.parametrize(
    ("rows", "tensor", "stored"),
    [(2880, 8, 368), (2880, 4, 720), (2880, 1, 2880), (2881, 1, 2881), (14, 4, 4), (360, 3, 120)],
)
def test_tensor_ranks_hold_rows_that_the_kernel_takes_where_that_adds_little(rows, tensor, stored):
    assert ExpertPadding(32, rows, tensor).shard_rows == stored


def test_selection_biases_are_never_rounded():
    params = {"mlp": {name: jax.ShapeDtypeStruct((4,), jnp.float32) for name in ("selection_bias", "router_bias")}}
    assert {name: array.dtype for name, array in in_dtype(params, "bfloat16")["mlp"].items()} == {
        "selection_bias": jnp.float32, "router_bias": jnp.bfloat16
    }  # fmt: skip


@pytest.mark.parametrize(("tensor", "folded"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_shards_hold_the_biases_of_their_rows_in_whole_rows(tensor, folded):
    """5 experts of 7 rows of width 2: an expert's biases fill 3.5 rows, or parts of 3 elements 1.5 rows."""
    biases = np.stack(np.meshgrid(np.arange(1, 6), np.arange(1, 8), indexing="ij"), axis=0).reshape(2, 35)
    weights = ExpertPadding(5, 7, tensor, folded)
    padding = ExpertBiasPadding(weights, 2)
    stored = np.asarray(padding.pad(jnp.asarray(biases)))
    assert stored.shape == (2, padding.stored, 2)
    np.testing.assert_array_equal(padding.unpad(jnp.asarray(stored)), biases)
    shards = stored.reshape(2, tensor, folded, -1, padding.shard_rows * 2)
    for t, f, e, i in np.ndindex(shards.shape[1:]):
        expert, row = f * shards.shape[3] + e, t * weights.shard_rows + i
        real = expert < 5 and row < 7 and i < weights.shard_rows
        np.testing.assert_array_equal(shards[:, t, f, e, i], [expert + 1, row + 1] if real else [0, 0])


@pytest.mark.parametrize(
    ("rows", "stored", "shape", "spec", "desired"),
    [
        (16, 16, (3, 16, 6), P(None, ("a", "b"), None), P(None, ("a", "b"), None)),
        (12, 16, (3, 16, 6), P(None, ("a", "b"), None), P(None, "a", "b")),  # 4 of 8 ranks divide 12, 2 divide 6
        (13, 16, (3, 16, 24), P(None, ("a", "b"), None), P(None, None, ("a", "b"))),
        (13, 16, (4, 16, 5), P(None, ("a", "b"), None), P("a", None, None)),
        (13, 16, (3, 16, 5), P(None, ("a", "b"), None), P(None, None, None)),
        (13, 16, (3, 16, 8), P(None, "a", "b"), P(None, None, ("a", "b"))),  # ZeRO-1: a moment's D is sharded
    ],
)
def test_logical_arrays_are_sharded_as_far_as_axes_divide_them(rows, stored, shape, spec, desired):
    mesh = make_mesh({"a": 4, "b": 2})
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    logical = abstract_logical(RowPadding(rows, stored), array)
    assert logical.shape == (shape[0], rows, shape[2])
    assert logical.sharding.is_equivalent_to(NamedSharding(mesh, desired), 3)


def test_a_logical_array_without_padding_has_the_sharding_of_the_stored_one():
    sharding = NamedSharding(make_mesh({"a": 8}), P())
    array = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    assert abstract_logical(NoPadding(), array).sharding is sharding
