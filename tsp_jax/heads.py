"""How attention heads are sharded over ranks: how heads are padded, and which rows of the weights a rank stores.

Tensor axes shard heads, so heads are padded until every tensor shard has equally many. Folded axes shard the rows of
weights, and ranks gather whole heads before use, so folded axes need no padded heads.

Dims: N query heads, K KV heads, G = N / K, H head, R ranks.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tsp_jax.layout import Layout, num_ranks

LARGEST_WASTE = 1 / 16
"""Largest share of zeros that may be added to a unit of heads, so that its rows divide over the ranks. If every smaller
unit needs more zeros, all heads form one unit."""


class Heads(NamedTuple):
    """Attention heads, padded so that ranks hold equally many.

    Padded query head (k, g) is query head g of KV head k. Real heads come first along both dimensions. Padded
    query heads are numbered in row-major order. Each of R ranks holds n = kv * group / R of them: rank p holds the
    heads from number p n on. If there are fewer padded KV heads than ranks, several ranks share a KV head.
    """

    kv: int
    """number of padded KV heads, the real ones included"""
    group: int
    """number of padded query heads per padded KV head, the real ones included"""
    num_kv_heads: int
    """K, number of real KV heads"""
    real_group: int
    """G = N / K, number of real query heads per KV head"""
    dim: int
    """H, width of a head"""

    @property
    def query(self) -> int:
        """Number of padded query heads, the real ones included."""
        return self.kv * self.group

    @property
    def padded(self) -> bool:
        """Whether there is any head that is not real."""
        return (self.kv, self.group) != (self.num_kv_heads, self.real_group)

    def shard(self, ranks: int) -> "Heads":
        """The heads that each of `ranks` ranks holds; padded ones count as real."""
        kv = max(1, self.kv // ranks)
        group = self.query // ranks // kv
        return Heads(kv=kv, group=group, num_kv_heads=kv, real_group=group, dim=self.dim)


def pad_heads(num_heads: int, num_kv_heads: int, head_dim: int, ranks: int = 1) -> Heads:
    """The fewest padded heads that `ranks` ranks can share evenly.

    The number of padded KV heads is a multiple of the number of ranks, or divides it.
    """
    kv = next(kv for kv in itertools.count(num_kv_heads) if kv % ranks == 0 or ranks % kv == 0)
    real_group = num_heads // num_kv_heads
    sharing = max(1, ranks // kv)
    group = -(-real_group // sharing) * sharing
    return Heads(kv=kv, group=group, num_kv_heads=num_kv_heads, real_group=real_group, dim=head_dim)


class HeadRows(NamedTuple):
    """Which rows of a projection over heads each rank stores.

    A unit is a group of consecutive heads. Rank r of R stores the r-th part of the rows of each unit, unit after unit,
    so that gathering any number of units gives whole heads. If R does not divide a unit's rows, zeros are appended.
    """

    num_heads: int
    """heads whose rows the ranks share"""
    dim: int
    """H, rows of a head"""
    ranks: int
    """R, number of ranks"""
    unit: int
    """number of heads per unit; with a single unit, each rank has consecutive rows"""
    whole: bool
    """whether every rank stores whole heads; all heads then form a single unit"""

    @classmethod
    def of(cls, num_heads: int, dim: int, ranks: int, whole: bool) -> "HeadRows":
        """Rows with whole heads on each rank if `whole`, else with the smallest units that keep to `LARGEST_WASTE`."""
        sizes = (size for size in range(1, num_heads) if num_heads % size == 0)
        small = (size for size in sizes if -size * dim % ranks <= LARGEST_WASTE * size * dim)
        return cls(num_heads, dim, ranks, num_heads if whole else next(small, num_heads), whole)

    @property
    def units(self) -> int:
        """Number of units."""
        return self.num_heads // self.unit

    @property
    def rows_of_unit(self) -> int:
        """Rows of a unit on each rank, zeros included."""
        return -(-self.unit * self.dim // self.ranks)

    @property
    def stored(self) -> int:
        """Rows on all ranks, zeros included."""
        return self.units * self.rows_of_unit * self.ranks

    @property
    def in_order(self) -> bool:
        """Whether the rows of all ranks, concatenated, are the rows of the heads in order, without zeros."""
        return self.units == 1 and self.stored == self.num_heads * self.dim

    @property
    def parts(self) -> int:
        """Number of parts into which each rank's rows can be split such that gathering one part gives whole heads."""
        return self.num_heads // self.ranks if self.whole else self.units

    def by_head(self, rows: jax.Array, axis: int) -> jax.Array:
        """Reorders the gathered rows of any number of units: rank after rank -> head after head, without zeros."""
        if self.in_order:
            return rows
        before, after = rows.shape[:axis], rows.shape[axis + 1 :]
        by_rank = rows.reshape(*before, self.ranks, -1, self.rows_of_unit, *after)
        by_unit = by_rank.swapaxes(axis, axis + 1).reshape(*before, by_rank.shape[axis + 1], -1, *after)
        real = lax.slice_in_dim(by_unit, 0, self.unit * self.dim, axis=axis + 1)
        return real.reshape(*before, -1, *after)

    def by_rank(self, rows: jax.Array, axis: int) -> jax.Array:
        """Transpose of `by_head`."""
        if self.in_order:
            return rows
        before, after, unit_rows = rows.shape[:axis], rows.shape[axis + 1 :], self.unit * self.dim
        real = rows.reshape(*before, -1, unit_rows, *after)
        zero_rows = self.ranks * self.rows_of_unit - unit_rows
        by_unit = jnp.pad(real, [(0, zero_rows if dim == axis + 1 else 0) for dim in range(real.ndim)])
        by_unit = by_unit.reshape(*before, -1, self.ranks, self.rows_of_unit, *after)
        return by_unit.swapaxes(axis, axis + 1).reshape(*before, -1, *after)

    def units_of(self, head_numbers: Sequence[Sequence[int]]) -> list[list[int]]:
        """[R, u]: for each rank, the units that contain the heads in the rank's row of `head_numbers`.

        A negative number means a padded head, which is in no unit. Shorter rows are filled up with unit 0.
        """
        units = [sorted({head // self.unit for head in row if head >= 0}) for row in head_numbers]
        most = max(1, *map(len, units))
        return [[*row, *[0] * (most - len(row))] for row in units]

    def places_of(self, head_numbers: Sequence[Sequence[int]]) -> list[list[int]]:
        """[R, n]: index of each of a rank's heads among the heads of its units (`units_of`); -1 for padded heads."""
        return [
            [units.index(head // self.unit) * self.unit + head % self.unit if head >= 0 else -1 for head in row]
            for units, row in zip(self.units_of(head_numbers), head_numbers, strict=True)
        ]


class HeadSharding(NamedTuple):
    """Heads on tensor shards, each of which has several folded ranks."""

    heads: Heads
    """padded so that every tensor shard has equally many"""
    tensor: int
    """number of tensor shards"""
    folded: int
    """number of folded ranks of a tensor shard"""

    @classmethod
    def of(
        cls, layout: Layout, sizes: Mapping[str, int], num_heads: int, num_kv_heads: int, head_dim: int
    ) -> "HeadSharding":
        """The sharding of a model's real heads under a layout whose mesh axes have these sizes."""
        axes = layout.axes("heads")
        tensor, folded = num_ranks(axes.tensor, sizes), num_ranks(axes.folded, sizes)
        return cls(pad_heads(num_heads, num_kv_heads, head_dim, tensor), tensor, folded)

    @property
    def shard(self) -> Heads:
        """Heads of one tensor shard."""
        return self.heads.shard(self.tensor)

    @property
    def by_rank(self) -> Heads:
        """Heads of one tensor shard, padded so that its folded ranks share them evenly; used where tokens move."""
        return pad_heads(self.shard.query, self.shard.kv, self.heads.dim, self.folded)

    @property
    def own(self) -> Heads:
        """The part of `by_rank` that one rank computes, for the tokens of all folded ranks of its tensor shard."""
        return self.by_rank.shard(self.folded)

    @property
    def even(self) -> bool:
        """Whether the folded ranks of a tensor shard share its heads evenly, without padding."""
        return not self.by_rank.padded

    @property
    def kv_head_spans_shards(self) -> bool:
        """Whether tensor shards share KV heads, so that each gathers all KV heads and uses one."""
        return self.heads.kv < self.tensor

    @property
    def queries(self) -> HeadRows:
        """Rows of Wq, and of Wo, of one tensor shard."""
        return HeadRows.of(self.shard.query, self.heads.dim, self.folded, whole=self.even)

    @property
    def keys_values(self) -> HeadRows:
        """Rows of Wk, and of Wv, of one tensor shard; of all shards if they share KV heads."""
        if self.kv_head_spans_shards:
            return HeadRows.of(self.heads.kv, self.heads.dim, self.tensor * self.folded, whole=False)
        whole = self.even and self.shard.kv % self.folded == 0
        return HeadRows.of(self.shard.kv, self.heads.dim, self.folded, whole)

    @property
    def stored(self) -> tuple[int, int]:
        """(rows of Wq, rows of Wk) on all ranks, zeros included. Wo has as many rows as Wq, and Wv as many as Wk."""
        spans = self.kv_head_spans_shards
        return self.tensor * self.queries.stored, (1 if spans else self.tensor) * self.keys_values.stored

    def own_heads(self) -> tuple[list[list[int]], list[list[int]]]:
        """Numbers of the heads of each rank (`own`): query heads [R, n], KV heads [R, k]; -1 for padded heads.

        Heads and ranks are numbered as in `queries` and in `keys_values`.
        """
        shard, padded = self.shard, self.by_rank
        more_kv, more_group = (0, padded.kv - shard.kv), (0, padded.group - shard.group)
        numbers = np.arange(shard.query).reshape(shard.kv, shard.group)
        queries = np.pad(numbers, (more_kv, more_group), constant_values=-1).reshape(self.folded, -1)
        if self.kv_head_spans_shards:
            keys_values = np.arange(self.tensor) * self.heads.kv // self.tensor
        else:
            keys_values = np.pad(np.arange(shard.kv), more_kv, constant_values=-1)
        ranks = self.keys_values.ranks
        keys_values = np.repeat(keys_values, max(1, ranks // len(keys_values))).reshape(ranks, -1)
        return queries.tolist(), keys_values.tolist()
