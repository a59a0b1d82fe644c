"""The list of visited pairs of tiles of the TPU kernels, worked out in XLA (`mask.tiles_to_visit`).

A TPU runs the steps of a kernel's grid one after the other, so one list holds the pairs of all tiles, and the grid is as
long as the list. A pair is an own tile, whose results stay in VMEM, and a span of other tiles, which pass by. The pairs
of one own tile are neighbours. The list is read from SMEM, so in long sequences a span has several tiles.

Dims: B batch, T query tokens, S key tokens; n own tiles and m spans per row of the batch; E entries, B n m.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsp_jax.ops.kernels.mask import LATEST, Scores, Tokens, tiles_to_visit
from tsp_jax.ops.kernels.visits import mean_pairs, pad_tokens, span_of

MOST_ENTRIES = 1 << 16
"""most entries of a kernel's list, over all rows of the batch: 512 KiB of SMEM, which has 1 MiB"""
RUN, MASK, FIRST, LAST = 1, 2, 4, 8
"""flags of a pair: some query may attend to some key; not every one may; first and last pair of its own tile"""
FLAG_BITS = 4


class PairList(NamedTuple):
    """The visited pairs, and the tokens they compare. Tiles are counted through all rows of the batch."""

    own_E: Any
    """int32: own tile of each pair"""
    other_E: Any
    """int32: span of other tiles of each pair, shifted left by `FLAG_BITS`, and flags"""
    number: Any
    """int32: how many entries are pairs; the rest means nothing"""
    queries: Tokens
    """padded to whole tiles; `keys` likewise"""
    keys: Tokens
    span: int
    """tiles of a span"""
    mean: float
    """mean number of pairs of tiles that a head and a row of the batch visit; see `mask.mean_visits`"""

    @classmethod
    def of(cls, queries: Tokens, keys: Tokens, tile: Any, by_key: bool, scores: Scores = Scores()) -> "PairList":
        """The list for queries [B, T] and keys [B, S]; own tiles are of keys if `by_key`, else of queries."""
        queries, keys = pad_tokens(queries, tile.query, -LATEST), pad_tokens(keys, tile.key, LATEST)
        (batch, q_len), (_, k_len) = queries.positions.shape, keys.positions.shape
        num_q, num_k = q_len // tile.query, k_len // tile.key
        own_tiles, other_tiles = (num_k, num_q) if by_key else (num_q, num_k)
        span = span_of(batch * own_tiles, other_tiles, MOST_ENTRIES)
        spans = (tile.query * span, tile.key) if by_key else (tile.query, tile.key * span)
        both = tiles_to_visit(queries, keys, *spans, scores)
        visit_Bnm, unmasked_Bnm = (x.swapaxes(1, 2) for x in both) if by_key else both
        mean = mean_pairs(q_len, k_len, tile, by_key, span, scores)
        return cls(*_compact(visit_Bnm, unmasked_Bnm), queries, keys, span, mean)


def _compact(visit_Bnm: jax.Array, unmasked_Bnm: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(own_E, other_E, number) of `PairList`. An own tile without any pair to visit is listed once, to be written."""
    batch, num_own, num_other = visit_Bnm.shape
    lonely_Bn1 = ~visit_Bnm.any(axis=2, keepdims=True)
    listed_Bnm = visit_Bnm | (lonely_Bn1 & (jnp.arange(num_other) == 0))
    run_mask_E = (visit_Bnm * RUN + (visit_Bnm & ~unmasked_Bnm) * MASK).reshape(-1)
    index_E = np.arange(batch * num_own * num_other, dtype=np.int32)
    last = np.int32(np.iinfo(np.int32).max)
    sorted_E = jnp.sort(jnp.where(listed_Bnm.reshape(-1), index_E * (RUN + MASK + 1) + run_mask_E, last))
    index_E, run_mask_E = sorted_E // (RUN + MASK + 1), sorted_E % (RUN + MASK + 1)
    own_E, other_E = index_E // num_other, index_E % num_other + index_E // (num_own * num_other) * num_other
    changes = own_E[1:] != own_E[:-1]
    first_E, last_E = jnp.pad(changes, (1, 0), constant_values=True), jnp.pad(changes, (0, 1), constant_values=True)
    flags_E = run_mask_E + first_E * FIRST + last_E * LAST
    number = listed_Bnm.sum(dtype=jnp.int32)
    return own_E, (other_E << FLAG_BITS) + flags_E, number
