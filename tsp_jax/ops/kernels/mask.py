"""Which query may attend to which key, for single tokens and for tiles of tokens.

The rule is written once, here: `may_attend`. Its tile form, `tiles_to_visit`, reads only each tile's least and greatest
position and segment, so it is correct for any order of tokens (a zigzag order, packed documents, a cache).

Dims: B batch, T query tokens, S key tokens; n query tiles, m key tiles.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30
"""score of a query and a key that may not attend; finite, so that a query without any allowed key does not give NaN"""
LATEST = 2**31 - 1
"""position of a padding key, which no query attends to; a padding query has -LATEST, and attends to no key"""


class Tokens(NamedTuple):
    """What decides which query tokens may attend to which key tokens."""

    positions: Any
    """[B, T] int32"""
    segments: Any
    """[B, T] int32, document numbers"""

    @classmethod
    def one_document(cls, positions: jax.Array) -> "Tokens":
        """Tokens that all belong to one document."""
        return cls(positions, jnp.zeros_like(positions))


def may_attend(queries: Tokens, keys: Tokens) -> jax.Array:
    """Whether a query may attend to a key: the key is not later, and both are in the same segment.

    Positions and segments of queries broadcast against those of keys; the result is a bool array of that shape.
    """
    return (keys.positions <= queries.positions) & (keys.segments == queries.segments)


def tiles_to_visit(queries: Tokens, keys: Tokens, query_tile: int, key_tile: int) -> tuple[jax.Array, jax.Array]:
    """The tile form of `may_attend`: which pairs of tiles to visit, and which of these need no mask.

    A pair of tiles is visited if, by the least and greatest positions and segments in the two tiles, some query may
    attend to some key. If a tile has several segments, a visited pair of tiles may still have no such query and key.

    Returns:
      (visit [B, n, m] bool, unmasked [B, n, m] bool), for tiles of `query_tile` of the T queries and `key_tile` of the
      S keys. Unmasked tiles are those in which every pair may attend.
    """

    def bounds(x_BT: jax.Array, tile: int, other_dim: int) -> tuple[jax.Array, jax.Array]:
        tiles = x_BT.reshape(x_BT.shape[0], -1, tile)
        return jnp.expand_dims(tiles.min(axis=-1), other_dim), jnp.expand_dims(tiles.max(axis=-1), other_dim)

    (first_q, last_q), (low_q, high_q) = (bounds(x, query_tile, 2) for x in queries)
    (first_k, last_k), (low_k, high_k) = (bounds(x, key_tile, 1) for x in keys)
    visit_Bnm = (first_k <= last_q) & (low_k <= high_q) & (low_q <= high_k)
    return visit_Bnm, (last_k <= first_q) & (low_q == high_k) & (low_k == high_q)


def mean_visits(q_len: int, k_len: int, query_tile: int, key_tile: int) -> tuple[float, float]:
    """Mean number of tiles that causal attention visits: (key tiles per query tile, query tiles per key tile).

    The means follow from shapes alone. They assume that this device's queries are a fair sample of all positions (true
    of a zigzag order and of one rank), and that all tokens are one document. Only cost estimates of compiled programs
    depend on them, no results. `k_len` is the length of the whole sequence, in which the tokens of a tile are
    contiguous.
    """
    num_q, num_k = max(1, k_len // query_tile), k_len // key_tile
    visits = sum(min(num_k, -(-(a + 1) * query_tile // key_tile)) for a in range(num_q))
    return visits / num_q, visits / num_k * (q_len / k_len)
