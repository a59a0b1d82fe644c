"""A KV cache on one device: which entries new tokens get, and how they are written.

Each sequence's tokens are sharded over the sequence axes. For each layer, a device's shard of the cache holds all KV
heads of its tensor shard. The position of each entry's token is stored, so any token may be in any entry of any device.
An entry without a token has the position `EMPTY`, which is later than every query, so the causal mask hides it. The
heads dim comes before the entries dim, the order that the matrix products of decode need.

Dims: B batch, t this device's new tokens, s this device's cache entries, K KV heads of this tensor shard, H head,
L layers, l the layers written at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from tsp_jax.ops.stream import vary_alike

EMPTY = 2**31 - 1
"""position of a cache entry without a token: later than every query"""
NO_TOKEN = -1
"""position of a padding query: earlier than every key"""


class KeyValues(NamedTuple):
    """Keys and values: either those of new tokens, or this device's shard of the cache, with all layers."""

    k_LBKsH: jax.Array
    v_LBKsH: jax.Array


class NewEntries(NamedTuple):
    """The cache entries of this device's new tokens; they are consecutive in each sequence."""

    first_B1: jax.Array
    """int32, index of the first entry for new tokens in each sequence"""
    count_B1: jax.Array
    """int32, number of new tokens that this device keeps; they come before the tokens that it does not keep"""


def allocate_entries(positions_Bs: jax.Array, new_positions_Bt: jax.Array) -> tuple[NewEntries, jax.Array]:
    """Gives new tokens the next free entries of this device; tokens that do not fit are dropped.

    Args:
      positions_Bs: int32, position of each entry's token; used entries come first.
      new_positions_Bt: int32, positions of the new tokens. Tokens that this device does not keep come last, and have
        `NO_TOKEN`.

    Returns:
      (the new tokens' entries, positions_Bs with the new tokens).
    """
    s, t = positions_Bs.shape[1], new_positions_Bt.shape[1]
    first_B1 = (positions_Bs != EMPTY).sum(axis=1, keepdims=True, dtype=jnp.int32)
    count_B1 = (new_positions_Bt != NO_TOKEN).sum(axis=1, keepdims=True, dtype=jnp.int32)
    index_1t = jnp.arange(t, dtype=jnp.int32)[None]
    entries_Bt = jnp.where(index_1t < count_B1, first_B1 + index_1t, s)
    rows_B1 = jnp.arange(positions_Bs.shape[0])[:, None]
    positions_Bs = positions_Bs.at[rows_B1, entries_Bt].set(new_positions_Bt, mode="drop")
    return NewEntries(first_B1, count_B1), positions_Bs


def write_entries(cache: KeyValues, new: KeyValues, layer: jax.Array, entries: NewEntries) -> KeyValues:
    """Writes the keys and values of new tokens to their entries, in place, and returns the cache of all layers.

    Sequences are written one at a time: compilers would run a scatter for all of them on a transposed copy of the
    cache. `new` has l layers, of which `layer` is the first, in any float dtype. It has t tokens of each sequence, at
    most as many as there are entries (s).
    """
    with jax.named_scope("write_entries"):
        return KeyValues(*(_write(old, fresh, layer, entries) for old, fresh in zip(cache, new, strict=True)))


def _write(array_LBKsH: jax.Array, new_lBKtH: jax.Array, layer: jax.Array, entries: NewEntries) -> jax.Array:
    s, t = array_LBKsH.shape[3], new_lBKtH.shape[3]
    new_lBKtH = new_lBKtH.astype(array_LBKsH.dtype)
    array_LBKsH, new_lBKtH, first_B1, count_B1 = vary_alike(array_LBKsH, new_lBKtH, *entries)
    index_t, zero = jnp.arange(t, dtype=jnp.int32), jnp.zeros((), jnp.int32)

    def write_row(row, array_LBKsH):
        start = jnp.minimum(first_B1[row, 0], s - t)
        skip = first_B1[row, 0] - start  # older tokens' entries, where fewer than t are free
        is_new_t = (index_t >= skip) & (index_t < skip + count_B1[row, 0])
        new_l1KtH = jnp.roll(lax.dynamic_slice_in_dim(new_lBKtH, row, 1, axis=1), skip, axis=3)
        corner = layer, row, zero, start, zero
        old_l1KtH = lax.dynamic_slice(array_LBKsH, corner, new_l1KtH.shape)
        row_l1KtH = jnp.where(is_new_t[None, None, None, :, None], new_l1KtH, old_l1KtH)
        return lax.dynamic_update_slice(array_LBKsH, row_l1KtH, corner)

    # A loop over one sequence is none to a compiler, which then is free to transpose the cache.
    return row_major(lax.fori_loop(0, array_LBKsH.shape[1], write_row, array_LBKsH))


def own_positions(positions_Bt: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Positions of the tokens that this rank keeps, `NO_TOKEN` for the others.

    Every rank of `axes` has all tokens; rank n mod R keeps token n of a sequence. This keeps ranks balanced: if their
    token counts differ by at most one, with the larger counts on earlier ranks, the same holds with the new tokens.
    """
    if not axes:
        return positions_Bt
    is_own_Bt = positions_Bt % lax.axis_size(axes) == lax.axis_index(axes)
    return jnp.where(is_own_Bt, positions_Bt, NO_TOKEN)


def to_cache_order(k_BtKH: jax.Array, v_BtKH: jax.Array) -> KeyValues:
    """Keys and values of one layer in the cache's order of dims, [1, B, K, t, H]."""
    return KeyValues(*(jnp.swapaxes(array, 1, 2)[None] for array in (k_BtKH, v_BtKH)))


def row_major(array: jax.Array) -> jax.Array:
    """The array, constrained to a row-major layout in memory.

    The array is a part of the cache. Without the constraint, a compiler may give the whole cache the layout that the
    only reader of this part prefers, and transpose the cache before and after the loop over layers.
    """
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))
