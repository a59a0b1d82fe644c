"""Bucket counts from one size, and the sizes that they leave."""

import pytest

from tsp_jax.cost.traffic import OpSharding, num_buckets
from tsp_jax.layout import LAYOUTS

MIB = 2**20


@pytest.mark.parametrize(
    ("rows", "nbytes", "bucket_bytes", "count"),
    [
        (8, 100, 100, 1),
        (8, 100, 1000, 1),  # smaller than a bucket
        (8, 400, 100, 4),
        (8, 300, 100, 4),  # 4 / 3 is nearer than 3 / 2
        (12, 500, 100, 6),  # 6 / 5 is nearer than 5 / 4
        (8, 1e9, 1, 8),  # a row is the smallest bucket
        (7, 300, 100, 7),  # 7 / 3 is nearer than 3
        (2018, 300, 100, 2),  # not 1009 buckets of two rows
        (1, 1e9, 1, 1),
    ],
)
def test_buckets_are_as_near_to_their_size_as_the_rows_allow(rows, nbytes, bucket_bytes, count):
    assert num_buckets(rows, nbytes, bucket_bytes) == count


@pytest.mark.parametrize(
    ("layout", "sizes", "count"),
    [
        ("single", {}, 8),
        ("tp", {"model": 8}, 1),  # tensor axes shard the weights: one rank receives an eighth
        ("tp_sp", {"model": 2, "seq": 4}, 4),
        ("sp", {"seq": 8}, 8),
        ("tsp", {"tsp": 8}, 8),
    ],
)
def test_a_bucket_is_as_large_on_every_layout(layout, sizes, count):
    """The MLP of llama_7b, 384 MiB of bfloat16 weights."""
    row = LAYOUTS[layout]
    ranks = {name: sizes.get(name, 1) for name in row.axis_names}
    sharding = OpSharding.of(row, ranks, "mlp", batch=1, seq_len=131072, itemsize=2, grad_itemsize=4)
    local_rows = 16384 // (sharding.folded * sharding.tensor)
    assert sharding.weight_buckets(local_rows, 3 * 16384 * 4096, 64 * MIB) == count


@pytest.mark.parametrize(
    ("layout", "sizes", "count"), [("tsp", {"tsp": 8}, 4), ("sp", {"seq": 8}, 1), ("single", {}, 1)]
)
def test_no_bucket_is_a_full_weight_where_weights_are_gathered(layout, sizes, count):
    row = LAYOUTS[layout]
    ranks = {name: sizes.get(name, 1) for name in row.axis_names}
    sharding = OpSharding.of(row, ranks, "heads", batch=1, seq_len=131072, itemsize=2, grad_itemsize=4)
    assert sharding.weight_buckets(4, 4096 * 4096, 1e12) == count
