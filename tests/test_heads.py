"""Padded heads: equally many on every rank, as few as possible, and exact."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders.arrays import normal
from tsp_jax.heads import pad_heads
from tsp_jax.stored import HeadPadding


@st.composite
def head_numbers(draw):
    """(num_heads, num_kv_heads, head_dim, ranks)"""
    num_kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    return num_kv_heads * group, num_kv_heads, 2 * draw(st.integers(1, 64)), draw(st.integers(1, 16))


def _can_share(kv: int, group: int, head_dim: int, ranks: int) -> bool:
    """Whether every rank gets whole query heads of the same KV heads, and equal parts of KV columns."""
    if kv % ranks == 0:
        return True
    return ranks % kv == 0 and group % (ranks // kv) == 0 and head_dim % (ranks // kv) == 0


@given(head_numbers())
def test_every_rank_gets_equally_many_heads(numbers):
    heads = pad_heads(*numbers)
    _, _, head_dim, ranks = numbers
    assert heads.query % ranks == 0
    assert heads.kv * head_dim % ranks == 0
    assert _can_share(heads.kv, heads.group, head_dim, ranks)


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
    num_heads, num_kv_heads, head_dim, ranks = numbers
    heads = pad_heads(*numbers)
    real_group = num_heads // num_kv_heads
    fewest = min(
        kv * group
        for kv in range(num_kv_heads, num_kv_heads + ranks)
        for group in range(real_group, real_group + ranks)
        if _can_share(kv, group, head_dim, ranks)
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
        ((8, 1, 2, 8), (4, 8)),
        ((14, 2, 64, 1), (2, 7)),
        ((14, 2, 64), (2, 7)),
        ((8, 2, 12, 6), (2, 6)),
        ((8, 2, 12, 3, 2), (3, 4)),  # the second of three groups would need both KV heads
        ((8, 2, 12, 2, 3), (2, 6)),
        ((9, 3, 10, 2, 3), (6, 3)),
    ],
)
def test_pad_heads(numbers, padded):
    heads = pad_heads(*numbers)
    assert (heads.kv, heads.group) == padded


@pytest.mark.parametrize("queries", [True, False])
def test_pad_then_unpad_is_the_identity(queries):
    heads = pad_heads(9, 3, 8, 8)
    rows = normal(0, 2, (9 if queries else 3) * 8, 20)
    padding = HeadPadding(heads, queries)
    padded = padding.pad(jnp.asarray(rows))
    assert padded.shape == (2, (heads.query if queries else heads.kv) * 8, 20)
    np.testing.assert_array_equal(padding.unpad(padded), rows)
    assert np.count_nonzero(padded) == np.count_nonzero(rows)
