"""Which tiles the programs of a fused kernel visit, from the tiles' least and greatest positions and segments.

A list for each program: tiles that can hold an allowed pair of tokens, first those in which every pair is allowed. What
the order of tokens is does not matter. Programs with the longest lists start first. In long sequences an entry is a
span of several tiles, so that the lists stay small.

Dims: B batch, T query tokens, S key tokens; Q, C tokens of a query and a key tile; n tiles that have a program each, m
spans that these may visit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.ops.kernels.tiles import Tile
from tsp_jax.ops.kernels.xla import Tokens, mean_visits

MOST_ENTRIES = 1 << 22
"""of the lists of a kernel, for one row of the batch: 16 MiB"""
LAST = 2**31 - 1
"""position of a key that only fills a tile up, which no query sees; such a query has -LAST, and sees no key"""


class Visits(NamedTuple):
    """Which tiles each program visits."""

    turns: Any
    """[B, n]: tile of the i-th program, those with most to visit first"""
    order: Any
    """[B, n, m]: for each tile its spans, first the whole ones, then the other needed ones"""
    whole: Any
    """[B, n]: how many tiles of them need no mask"""
    needed: Any
    """[B, n]: how many tiles there are to visit"""


class Plan(NamedTuple):
    """What a kernel reads besides heads."""

    visits: Visits
    queries: Tokens
    keys: Tokens
    tile: Tile
    by_key: bool
    """programs are of key tiles; else of query tiles"""
    span: int
    """tiles that an entry of a list stands for"""

    @classmethod
    def of(cls, queries: Tokens, keys: Tokens, tile: Tile, by_key: bool) -> "Plan":
        queries, keys = _pad_tokens(queries, tile.query, -LAST), _pad_tokens(keys, tile.key, LAST)
        sizes = queries.positions.shape[1] // tile.query, keys.positions.shape[1] // tile.key
        span = span_of(*(sizes[::-1] if by_key else sizes))
        listed = tile._replace(query=tile.query * span) if by_key else tile._replace(key=tile.key * span)
        needed_Bnm, whole_Bnm = needed_tiles(queries, keys, listed)
        if by_key:
            needed_Bnm, whole_Bnm = needed_Bnm.swapaxes(1, 2), whole_Bnm.swapaxes(1, 2)
        num = needed_Bnm.shape[-1]
        rank = 2 - needed_Bnm.astype(jnp.int32) - whole_Bnm.astype(jnp.int32)
        order = jnp.sort(rank * num + lax.broadcasted_iota(jnp.int32, rank.shape, 2), axis=-1) % num
        whole, needed = (span * x.sum(axis=-1, dtype=jnp.int32) for x in (whole_Bnm, needed_Bnm))
        turns = jnp.argsort(-needed, axis=-1, stable=True).astype(jnp.int32)
        return cls(Visits(turns, order, whole, needed), queries, keys, tile, by_key, span)

    def pairs(self) -> float:
        """Pairs of tiles visited by all programs of a head, on average; see `mean_visits`."""
        lengths = self.queries.positions.shape[1], self.keys.positions.shape[1]
        if self.by_key:
            _, visits = mean_visits(*lengths, self.tile.query * self.span, self.tile.key)
            return lengths[1] // self.tile.key * visits * self.span
        visits, _ = mean_visits(*lengths, self.tile.query, self.tile.key * self.span)
        return lengths[0] // self.tile.query * visits * self.span


def span_of(programs: int, tiles: int) -> int:
    """The smallest power of two that divides the tiles and keeps the lists short enough, or else the largest."""
    span = 1
    while programs * tiles // span > MOST_ENTRIES and tiles % (2 * span) == 0:
        span *= 2
    return span


def _pad_tokens(tokens: Tokens, tile: int, position: int) -> Tokens:
    more = ((0, 0), (0, -tokens.positions.shape[1] % tile))
    positions = jnp.pad(tokens.positions, more, constant_values=position)
    return Tokens(positions, jnp.pad(tokens.segments, more, mode="edge"))


def needed_tiles(queries: Tokens, keys: Tokens, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """[B, T/Q, S/C] bool: tile pairs that may hold an allowed pair of tokens, and those that hold no other."""

    def ends(x_BT: jax.Array, size: int, axis: int):
        tiles = x_BT.reshape(x_BT.shape[0], -1, size)
        return (jnp.expand_dims(end, axis) for end in (tiles.min(axis=-1), tiles.max(axis=-1)))

    (first_q, last_q), (low_q, high_q) = (ends(x, tile.query, 2) for x in queries)
    (first_k, last_k), (low_k, high_k) = (ends(x, tile.key, 1) for x in keys)
    needed = (first_k <= last_q) & (low_k <= high_q) & (low_q <= high_k)
    return needed, (last_k <= first_q) & (low_q == high_k) & (low_k == high_q)
