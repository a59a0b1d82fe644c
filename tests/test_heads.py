"""Heads over ranks: padded for tensor shards as little as possible, rows stored without padded heads, and exact."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders.arrays import normal
from tsp_jax.heads import HeadRows, HeadSharding, pad_heads
from tsp_jax.stored import HeadPadding


@st.composite
def head_numbers(draw):
    """(num_heads, num_kv_heads, head_dim, ranks)"""
    num_kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    return num_kv_heads * group, num_kv_heads, 2 * draw(st.integers(1, 64)), draw(st.integers(1, 16))


@st.composite
def head_shardings(draw):
    """HeadShardings, on 1 to 4 tensor shards with 1 to 16 folded ranks"""
    num_heads, num_kv_heads, head_dim, folded = draw(head_numbers())
    tensor = draw(st.integers(1, 4))
    return HeadSharding(pad_heads(num_heads, num_kv_heads, head_dim, tensor), tensor, folded)


def _can_share(kv: int, group: int, ranks: int) -> bool:
    """Whether every rank gets whole query heads of the same KV heads."""
    return kv % ranks == 0 or (ranks % kv == 0 and group % (ranks // kv) == 0)


@given(head_numbers())
def test_every_rank_gets_equally_many_heads(numbers):
    heads, ranks = pad_heads(*numbers), numbers[-1]
    assert heads.query % ranks == 0
    assert _can_share(heads.kv, heads.group, ranks)


@given(head_numbers())
def test_every_real_head_is_stored(numbers):
    num_heads, num_kv_heads, head_dim, _ = numbers
    heads = pad_heads(*numbers)
    assert (heads.num_kv_heads, heads.real_group, heads.dim) == (num_kv_heads, num_heads // num_kv_heads, head_dim)
    assert heads.kv >= num_kv_heads
    assert heads.group >= heads.real_group
    assert heads.padded == (heads.kv * heads.group > num_heads or heads.kv > num_kv_heads)


@given(head_numbers())
def test_no_fewer_padded_heads_would_do(numbers):
    num_heads, num_kv_heads, _, ranks = numbers
    heads = pad_heads(*numbers)
    real_group = num_heads // num_kv_heads
    fewest = min(
        kv * group
        for kv in range(num_kv_heads, num_kv_heads + ranks)
        for group in range(real_group, real_group + ranks)
        if _can_share(kv, group, ranks)
    )
    assert heads.query == fewest


@pytest.mark.parametrize(
    ("numbers", "padded"),
    [
        ((32, 32, 128, 8), (32, 1)),
        ((32, 8, 128, 8), (8, 4)),
        ((32, 4, 128, 8), (4, 8)),
        ((9, 3, 64, 4), (4, 3)),
        ((9, 3, 64, 8), (4, 4)),
        ((8, 1, 2, 8), (1, 8)),
        ((14, 2, 64, 1), (2, 7)),
        ((14, 2, 64), (2, 7)),
        ((8, 2, 12, 6), (2, 6)),
        ((9, 3, 10, 6), (3, 4)),
    ],
)
def test_pad_heads(numbers, padded):
    heads = pad_heads(*numbers)
    assert (heads.kv, heads.group) == padded


@given(head_shardings())
def test_folded_ranks_pad_no_heads(sharding):
    heads, queries, keys_values = sharding.heads, sharding.queries, sharding.keys_values
    assert heads == pad_heads(heads.num_kv_heads * heads.real_group, heads.num_kv_heads, heads.dim, sharding.tensor)
    assert queries.num_heads * sharding.tensor == heads.query
    assert keys_values.num_heads == (heads.kv if heads.kv < sharding.tensor else heads.kv // sharding.tensor)


@given(head_shardings())
def test_whole_heads_of_a_rank_are_those_it_attends_with(sharding):
    own_queries, own_keys_values = sharding.own_heads()
    for rows, own in ((sharding.queries, own_queries), (sharding.keys_values, own_keys_values)):
        if rows.whole:
            assert own == np.arange(rows.num_heads).reshape(rows.ranks, -1).tolist()


@given(head_shardings())
def test_every_rank_attends_with_keys_of_its_queries(sharding):
    """Query head i of a tensor shard belongs to KV head i // group of it."""
    own_queries, own_keys_values = sharding.own_heads()
    group, own = sharding.shard.group, sharding.own
    for rank, query_heads in enumerate(own_queries):
        for place, head in enumerate(query_heads):
            if head >= 0 and not sharding.kv_head_spans_shards:
                assert own_keys_values[rank][place // own.group] == head // group
    found = sorted(head for query_heads in own_queries for head in query_heads if head >= 0)
    assert found == list(range(sharding.shard.query))


@pytest.mark.parametrize(
    ("numbers", "rows"),
    [
        # heads, H, ranks: heads of a unit, rows of it on a rank
        ((9, 64, 8), (1, 8)),
        ((32, 128, 64), (1, 2)),
        ((8, 128, 64), (1, 2)),
        ((64, 128, 512), (4, 1)),
        ((9, 64, 7), (3, 28)),
        ((5, 6, 7), (5, 5)),
    ],
)
def test_a_unit_is_the_fewest_heads_whose_rows_divide_over_the_ranks(numbers, rows):
    found = HeadRows.of(*numbers, whole=False)
    assert (found.unit, found.rows_of_unit) == rows


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize(
    ("numbers", "tensor", "folded"),
    [((9, 3, 8), 1, 8), ((8, 2, 6), 1, 4), ((9, 3, 8), 2, 4), ((4, 1, 8), 4, 2), ((5, 5, 6), 1, 7), ((9, 3, 8), 8, 1)],
)
def test_pad_then_unpad_is_the_identity(numbers, tensor, folded, queries):
    sharding = HeadSharding(pad_heads(*numbers, tensor), tensor, folded)
    heads, padding = sharding.heads, HeadPadding(sharding, queries)
    count = heads.num_kv_heads * (heads.real_group if queries else 1)
    rows = normal(0, 2, count * heads.dim, 3)
    padded = padding.pad(jnp.asarray(rows))
    assert padded.shape == (2, sharding.stored[0 if queries else 1], 3)
    assert padded.shape[1] % (sharding.tensor * sharding.folded) == 0
    np.testing.assert_array_equal(padding.unpad(padded), rows)
    assert np.count_nonzero(padded) == np.count_nonzero(rows)
    assert padding.padded or np.array_equal(padded, rows)


def test_a_rank_stores_its_part_of_each_unit():
    sharding = HeadSharding(pad_heads(3, 3, 4), tensor=1, folded=2)
    rows = HeadPadding(sharding, True).pad(jnp.arange(12)[:, None])[:, 0]
    assert rows.tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
