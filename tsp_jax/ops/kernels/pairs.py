"""The list of visited pairs of tiles of the TPU kernels, worked out in XLA (`mask.tiles_to_visit`).

A core of a TPU runs the steps of a kernel's grid one after the other, so one list holds the pairs of all tiles, and the
grid is as long as the list. A pair is an own tile, whose results stay in VMEM, and a span of other tiles, which pass.
The pairs of one own tile are neighbours. The list is read from SMEM, so in long sequences a span has several tiles.

Dims: B batch, T query tokens, S key tokens; n own tiles and m spans per row of the batch; c cores; E entries, B n m.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tsp_jax.ops.kernels.mask import LATEST, Scores, Tokens, tiles_to_visit
from tsp_jax.ops.kernels.visits import mean_pairs, pad_tokens, span_of

MOST_ENTRIES = 1 << 16
"""most entries of a kernel's lists, over all rows of the batch and all cores: 512 KiB of SMEM, which has 1 MiB"""
RUN, MASK, FIRST, LAST, FIRST_OF_ROW = 1, 2, 4, 8, 16
"""flags of a pair: some query may attend to some key; not every one may; the first and the last pair of its own tile;
the first pair of its row of the batch"""
FLAG_BITS = 5


class PairList(NamedTuple):
    """The visited pairs, and the tokens they compare. Tiles are counted through all rows of the batch."""

    own_cE: Any
    """int32: own tile of each pair"""
    other_cE: Any
    """int32: span of other tiles of each pair, shifted left by `FLAG_BITS`, and flags"""
    number: Any
    """int32: how many entries the cores run; a core with fewer pairs repeats its last one, without any flag"""
    queries: Tokens
    """padded to whole tiles; `keys` likewise"""
    keys: Tokens
    span: int
    """tiles of a span"""
    mean: float
    """mean number of pairs of tiles that a head and a row of the batch visit; see `mask.mean_visits`"""

    @classmethod
    def of(
        cls, queries: Tokens, keys: Tokens, tile: Any, by_key: bool, scores: Scores = Scores(), cores: int = 1
    ) -> "PairList":
        """The list for queries [B, T] and keys [B, S]; own tiles are of keys if `by_key`, else of queries."""
        queries, keys = pad_tokens(queries, tile.query, -LATEST), pad_tokens(keys, tile.key, LATEST)
        (batch, q_len), (_, k_len) = queries.positions.shape, keys.positions.shape
        num_q, num_k = q_len // tile.query, k_len // tile.key
        num_own, num_other = (num_k, num_q) if by_key else (num_q, num_k)
        span = span_of(cores * batch * num_own, num_other, MOST_ENTRIES)
        sizes = (tile.query * span, tile.key) if by_key else (tile.query, tile.key * span)
        both = tiles_to_visit(queries, keys, *sizes, scores)
        visit_Bnm, unmasked_Bnm = (x.swapaxes(1, 2) for x in both) if by_key else both
        mean = mean_pairs(q_len, k_len, tile, by_key, span, scores)
        return cls(*_compact(visit_Bnm, unmasked_Bnm, cores), queries, keys, span, mean)


def _cores_of_tiles(visit_Bnm: jax.Array, cores: int) -> jax.Array:
    """[B, n]: the core of each own tile. From the tile with the most pairs down, they go to cores 0, 1, 1, 0, 0, ..."""
    rank_Bn = jnp.argsort(jnp.argsort(-visit_Bnm.sum(axis=2), axis=1, stable=True), axis=1)
    return (rank_Bn + 1) // 2 % cores


def _compact(visit_Bnm: jax.Array, unmasked_Bnm: jax.Array, cores: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(own_cE, other_cE, number) of `PairList`. An own tile without any pair to visit is listed once, to be written."""
    batch, num_own, num_other = visit_Bnm.shape
    lonely_Bn1 = ~visit_Bnm.any(axis=2, keepdims=True)
    listed_Bnm = visit_Bnm | (lonely_Bn1 & (jnp.arange(num_other).reshape(1, 1, -1) == 0))
    core_1Bn1 = _cores_of_tiles(visit_Bnm, cores)[None, :, :, None]
    listed_cE = (listed_Bnm[None] & (core_1Bn1 == jnp.arange(cores).reshape(-1, 1, 1, 1))).reshape(cores, -1)
    number_c1 = listed_cE.sum(axis=1, keepdims=True, dtype=jnp.int32)
    run_mask_1E = (_mark(visit_Bnm, RUN) + _mark(visit_Bnm & ~unmasked_Bnm, MASK)).reshape(1, -1)
    entry_1E, base = jnp.arange(batch * num_own * num_other, dtype=jnp.int32)[None], RUN + MASK + 1
    sorted_cE = jnp.sort(jnp.where(listed_cE, entry_1E * base + run_mask_1E, LATEST), axis=1)
    sorted_cE = jnp.where(entry_1E < number_c1, sorted_cE, jnp.take_along_axis(sorted_cE, number_c1 - 1, axis=1))
    pair_cE, run_mask_cE = sorted_cE // base, sorted_cE % base
    own_cE, row_cE = pair_cE // num_other, pair_cE // (num_own * num_other)

    def first(x_cE: jax.Array) -> jax.Array:
        return jnp.pad(x_cE[:, 1:] != x_cE[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    first_cE = first(own_cE)
    last_cE = jnp.pad(first_cE[:, 1:], ((0, 0), (0, 1))) | (entry_1E == number_c1 - 1)
    flags_cE = run_mask_cE + _mark(first_cE, FIRST) + _mark(last_cE, LAST) + _mark(first(row_cE), FIRST_OF_ROW)
    flags_cE = jnp.where(entry_1E < number_c1, flags_cE, 0)
    other_cE = pair_cE % num_other + row_cE * num_other
    return own_cE, (other_cE << FLAG_BITS) + flags_cE, number_c1.max()


def _mark(where: jax.Array, flag: int) -> jax.Array:
    return jnp.where(where, jnp.int32(flag), jnp.int32(0))
