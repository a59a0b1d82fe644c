"""Visit lists of the Triton kernels: which tiles each program visits, worked out in XLA (`mask.tiles_to_visit`).

The list of a program has the tiles that need no mask first, then those that need one. Programs with the longest lists
start first. In long sequences an entry of a list is a span of several tiles, so that the lists stay small.

Dims: B batch, T query tokens, S key tokens; n tiles that have a program each, m spans that a program may visit.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from tsp_jax.ops.kernels.mask import LATEST, Scores, Tokens, mean_visits, tiles_to_visit
from tsp_jax.ops.kernels.tiles import Tile

MOST_ENTRIES = 1 << 22
"""most entries of a kernel's visit lists, per row of the batch: 16 MiB"""


class Visits(NamedTuple):
    """Which tiles each program visits, int32."""

    programs: Any
    """[B, n]: the tile of each program; the tiles with the most to visit come first"""
    order: Any
    """[B, n, m]: for each tile, its spans in order: unmasked, masked, then not visited"""
    unmasked: Any
    """[B, n]: how many tiles need no mask"""
    visited: Any
    """[B, n]: how many tiles are visited"""


class Plan(NamedTuple):
    """What a kernel reads besides queries, keys and values, and its static sizes."""

    visits: Visits
    queries: Tokens
    keys: Tokens
    tile: Tile
    by_key: bool
    """whether a program has a key tile and visits query tiles; else it is the other way round"""
    span: int
    """tiles that one list entry covers"""
    scores: Scores

    @classmethod
    def of(cls, queries: Tokens, keys: Tokens, tile: Tile, by_key: bool, scores: Scores = Scores()) -> "Plan":
        """The plan for queries [B, T] and keys [B, S], padded to whole tiles."""
        queries, keys = pad_tokens(queries, tile.query, -LATEST), pad_tokens(keys, tile.key, LATEST)
        num_q, num_k = queries.positions.shape[1] // tile.query, keys.positions.shape[1] // tile.key
        if by_key:
            span = span_of(num_k, num_q)
            both = tiles_to_visit(queries, keys, tile.query * span, tile.key, scores)
            visit_Bnm, unmasked_Bnm = (x.swapaxes(1, 2) for x in both)
        else:
            span = span_of(num_q, num_k)
            visit_Bnm, unmasked_Bnm = tiles_to_visit(queries, keys, tile.query, tile.key * span, scores)
        num = visit_Bnm.shape[-1]
        rank = 2 - visit_Bnm.astype(jnp.int32) - unmasked_Bnm.astype(jnp.int32)
        order = jnp.sort(rank * num + lax.broadcasted_iota(jnp.int32, rank.shape, 2), axis=-1) % num
        unmasked, visited = (span * x.sum(axis=-1, dtype=jnp.int32) for x in (unmasked_Bnm, visit_Bnm))
        programs = jnp.argsort(-visited, axis=-1, stable=True).astype(jnp.int32)
        return cls(Visits(programs, order, unmasked, visited), queries, keys, tile, by_key, span, scores)

    def mean_pairs(self) -> float:
        """Mean number of pairs of tiles that all programs of a head visit together; see `mean_visits`."""
        lengths = self.queries.positions.shape[1], self.keys.positions.shape[1]
        return mean_pairs(*lengths, self.tile, self.by_key, self.span, self.scores)


def mean_pairs(q_len: int, k_len: int, tile: Any, by_key: bool, span: int, scores: Scores) -> float:
    """Mean number of pairs of tiles that are visited for whole tiles of queries and keys; see `mean_visits`."""
    if by_key:
        _, visits = mean_visits(q_len, k_len, tile.query * span, tile.key, scores)
        return k_len // tile.key * visits * span
    visits, _ = mean_visits(q_len, k_len, tile.query, tile.key * span, scores)
    return q_len // tile.query * visits * span


def span_of(programs: int, tiles: int, most: int | None = None) -> int:
    """The smallest power of two that divides `tiles` and keeps visit lists short enough: `most` or `MOST_ENTRIES`.

    If none keeps them short enough, the largest power of two that divides `tiles`.
    """
    span, most = 1, most or MOST_ENTRIES
    while programs * tiles // span > most and tiles % (2 * span) == 0:
        span *= 2
    return span


def pad_tokens(tokens: Tokens, tile: int, position: int) -> Tokens:
    """Tokens padded to whole tiles, with `position` and the segment of the last token."""
    padding = ((0, 0), (0, -tokens.positions.shape[1] % tile))
    positions = jnp.pad(tokens.positions, padding, constant_values=position)
    return Tokens(positions, jnp.pad(tokens.segments, padding, mode="edge"))
