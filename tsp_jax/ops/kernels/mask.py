"""Which query may attend to which key, for single tokens and for tiles of tokens, and how a score is computed.

The rule is written once, here: `may_attend`. Its tile form, `tiles_to_visit`, reads only each tile's least and greatest
position and segment, so it is correct for any order of tokens (a zigzag order, packed documents, a cache).

Dims: B batch, T query tokens, S key tokens; n query tiles, m key tiles.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tsp_jax.config import ModelConfig

MASKED = -1e30
"""score of a query and a key that may not attend; finite, so that a query without any allowed key does not give NaN"""
LATEST = 2**31 - 1
"""position of a padding key, which no query attends to; a padding query has -LATEST, and attends to no key"""
PADDING = 2**31 - 1
"""segment of tokens that fill a sequence after its documents; routers do not count them"""


class Scores(NamedTuple):
    """How the score of a query and a key is computed, and which keys a query may attend to. Hashable.

    ``score = cap(scale q k^T)``, where ``cap(s) = softcap tanh(s / softcap)``, or s without a soft cap.
    """

    causal: bool = True
    """a query attends to no later key"""
    window: int | None = None
    """a query attends to keys at a distance of less than `window` positions, its own included; None: at any distance"""
    softcap: float | None = None
    """bound of the absolute score; None: no bound"""
    scale: float | None = None
    """factor of the product of query and key; None: 1 / sqrt(H)"""
    total: int | None = None
    """tokens of the whole sequence, if the keys are only those near the queries; only cost estimates depend on it"""

    @classmethod
    def of(cls, model: ModelConfig) -> "Scores":
        """The scores of a decoder's attention; where only some layers have a window, of those."""
        return cls(True, model.window, model.attention_softcap, model.attention_scale)

    def scale_of(self, head_dim: int) -> float:
        """The factor of the product of query and key."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def cap(self, scaled: jax.Array) -> jax.Array:
        """Scores from scaled products, float32."""
        return scaled if self.softcap is None else self.softcap * jnp.tanh(scaled * (1.0 / self.softcap))

    def uncap_grad(self, grad: jax.Array, scores: jax.Array) -> jax.Array:
        """Gradient of scaled products, from that of the scores: ``grad (1 - (scores / softcap)^2)``."""
        return grad if self.softcap is None else grad * (1.0 - jnp.square(scores * (1.0 / self.softcap)))


class Tokens(NamedTuple):
    """What decides which query tokens may attend to which key tokens."""

    positions: Any
    """[B, T] int32, not negative except for padding"""
    segments: Any
    """[B, T] int32, document numbers; `PADDING` after the last document"""

    @classmethod
    def one_document(cls, positions: jax.Array) -> "Tokens":
        """Tokens that all belong to one document."""
        return cls(positions, jnp.zeros_like(positions))


def may_attend(queries: Tokens, keys: Tokens, scores: Scores = Scores()) -> jax.Array:
    """Whether a query may attend to a key.

    Both must be in the same segment; the key is not later if `scores` is causal, and within the window. Positions and
    segments of queries broadcast against those of keys; the result is a bool array of that shape.
    """
    allowed = keys.segments == queries.segments
    if scores.causal:
        allowed &= keys.positions <= queries.positions
    else:
        allowed &= (keys.positions < LATEST) & (queries.positions > -LATEST)
    if scores.window is not None:
        allowed &= _distance(queries.positions, keys.positions) < scores.window
        if not scores.causal:
            allowed &= _distance(queries.positions, keys.positions) > -scores.window
    return allowed


def _distance(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """How many positions keys are before queries. The position of a padding query counts as 0: no overflow."""
    return jnp.maximum(queries, 0) - keys


def tiles_to_visit(
    queries: Tokens, keys: Tokens, query_tile: int, key_tile: int, scores: Scores = Scores()
) -> tuple[jax.Array, jax.Array]:
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
    visit_Bnm = (low_k <= high_q) & (low_q <= high_k)
    unmasked_Bnm = (low_q == high_k) & (low_k == high_q)
    if scores.causal:
        visit_Bnm &= first_k <= last_q
        unmasked_Bnm &= last_k <= first_q
    else:
        visit_Bnm &= (first_k < LATEST) & (last_q > -LATEST)
        unmasked_Bnm &= (last_k < LATEST) & (first_q > -LATEST)
    if scores.window is not None:
        visit_Bnm &= _distance(first_q, last_k) < scores.window
        unmasked_Bnm &= _distance(last_q, first_k) < scores.window
        if not scores.causal:
            visit_Bnm &= _distance(last_q, first_k) > -scores.window
            unmasked_Bnm &= _distance(first_q, last_k) > -scores.window
    return visit_Bnm, unmasked_Bnm


def mean_visits(
    q_len: int, k_len: int, query_tile: int, key_tile: int, scores: Scores = Scores()
) -> tuple[float, float]:
    """Mean number of tiles that attention visits: (key tiles per query tile, query tiles per key tile).

    The means follow from shapes alone. They assume that this device's queries are a fair sample of all positions (true
    of a zigzag order and of one rank), and that all tokens are one document. Only cost estimates of compiled programs
    depend on them, no results. `k_len` is the length of the whole sequence, in which the tokens of a tile are
    contiguous, unless `scores.total` is that length.
    """
    total = scores.total or k_len
    num_q, num_k = max(1, total // query_tile), total // key_tile
    visits = 0
    for tile in range(num_q):
        first, last = tile * query_tile, (tile + 1) * query_tile - 1
        low, high = 0, num_k
        if scores.causal:
            high = min(num_k, last // key_tile + 1)
        elif scores.window is not None:
            high = min(num_k, (last + scores.window - 1) // key_tile + 1)
        if scores.window is not None:
            low = max(0, first - scores.window + 1) // key_tile
        visits += max(0, high - low)
    return visits / num_q, visits / num_k * (q_len / k_len)
