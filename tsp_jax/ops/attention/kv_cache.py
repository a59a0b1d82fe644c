"""A cache of keys and values on one device: which slots new tokens get, and how they are written.

The tokens of each sequence are sharded over the sequence axes. A cache holds, per layer, all KV heads of this device's
tensor shard. A slot knows the position of its token, `EMPTY` if it has none; so any token may stand in any slot of any
device, and an empty slot is one that lies in every query's future. Heads stand before slots, as the products of
decoding want them.

Dims: B batch, t this device's new tokens, c this device's slots, K KV heads, H head, L layers, l layers written at
once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from tsp_jax.ops.stream import vary_alike

EMPTY = 2**31 - 1
"""position of a slot without a token: later than every query"""
NO_TOKEN = -1
"""position of a query that is only padding: earlier than every key"""


class KeyValues(NamedTuple):
    """This device's slots of the cache, all layers; or new tokens' keys and values."""

    k_LBKcH: jax.Array
    v_LBKcH: jax.Array


class Claim(NamedTuple):
    """The slots that this device's new tokens get, for each sequence one after another."""

    first_B1: jax.Array
    """int32"""
    count_B1: jax.Array
    """int32; the tokens that this device keeps, which stand first"""


def claim_slots(keys_Bc: jax.Array, positions_Bt: jax.Array) -> tuple[Claim, jax.Array]:
    """The next free slots of this device for new tokens.

    Args:
      keys_Bc: positions of the tokens in the slots, int32; used slots stand first.
      positions_Bt: of new tokens, `NO_TOKEN` for those, behind all others, of which this device shall keep none.

    Returns:
      (claim, keys_Bc with the new tokens). Tokens for which there is no room are lost.
    """
    slots, t = keys_Bc.shape[1], positions_Bt.shape[1]
    first_B1 = (keys_Bc != EMPTY).sum(axis=1, keepdims=True, dtype=jnp.int32)
    count_B1 = (positions_Bt != NO_TOKEN).sum(axis=1, keepdims=True, dtype=jnp.int32)
    turn_1t = jnp.arange(t, dtype=jnp.int32)[None]
    slots_Bt = jnp.where(turn_1t < count_B1, first_B1 + turn_1t, slots)
    rows_B1 = jnp.arange(keys_Bc.shape[0])[:, None]
    return Claim(first_B1, count_B1), keys_Bc.at[rows_B1, slots_Bt].set(positions_Bt, mode="drop")


def write_slots(cache: KeyValues, new: KeyValues, layer: jax.Array, claim: Claim) -> KeyValues:
    """Puts new tokens' keys and values into their slots.

    A sequence at a time, in place: a scatter, which takes all at once, compilers run on a transposed copy of the cache.

    Args:
      cache: all layers.
      new: of l layers, [l, B, K, t, H], any float dtype; t at most c.
      layer: [] int32, the first of the l layers.
      claim: the slots.
    """
    with jax.named_scope("write_slots"):
        return KeyValues(*(_write(old, fresh, layer, claim) for old, fresh in zip(cache, new, strict=True)))


def _write(array_LBKcH: jax.Array, new_lBKtH: jax.Array, layer: jax.Array, claim: Claim) -> jax.Array:
    slots, t = array_LBKcH.shape[3], new_lBKtH.shape[3]
    new_lBKtH = new_lBKtH.astype(array_LBKcH.dtype)
    array_LBKcH, new_lBKtH, first_B1, count_B1 = vary_alike(array_LBKcH, new_lBKtH, *claim)
    turn_t, zero = jnp.arange(t, dtype=jnp.int32), jnp.zeros((), jnp.int32)

    def write_row(row, array_LBKcH):
        start = jnp.minimum(first_B1[row, 0], slots - t)
        skip = first_B1[row, 0] - start  # slots of older tokens, where there is no room for t
        mine_t = (turn_t >= skip) & (turn_t < skip + count_B1[row, 0])
        new_l1KtH = jnp.roll(lax.dynamic_slice_in_dim(new_lBKtH, row, 1, axis=1), skip, axis=3)
        corner = layer, row, zero, start, zero
        old_l1KtH = lax.dynamic_slice(array_LBKcH, corner, new_l1KtH.shape)
        row_l1KtH = jnp.where(mine_t[None, None, None, :, None], new_l1KtH, old_l1KtH)
        return lax.dynamic_update_slice(array_LBKcH, row_l1KtH, corner)

    return lax.fori_loop(0, array_LBKcH.shape[1], write_row, array_LBKcH)


def own_tokens(positions_Bt: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Positions of tokens that every rank of `axes` has, `NO_TOKEN` but on the one rank that keeps the token.

    Token n of a sequence is rank (n mod R)'s: if every rank keeps as many of the tokens before it as the others, or one
    more than those after it, then so it stays.
    """
    if not axes:
        return positions_Bt
    mine_Bt = positions_Bt % lax.axis_size(axes) == lax.axis_index(axes)
    return jnp.where(mine_Bt, positions_Bt, NO_TOKEN)


def as_stored(k_BtKH: jax.Array, v_BtKH: jax.Array) -> KeyValues:
    """Of one layer, as the cache has them: [1, B, K, t, H]."""
    return KeyValues(*(jnp.swapaxes(array, 1, 2)[None] for array in (k_BtKH, v_BtKH)))


def row_major(array: jax.Array) -> jax.Array:
    """The array, whose bytes are to lie as its dims stand.

    For a part of the cache: else a compiler may choose what its one reader likes, for all of the cache, and transpose
    that before the loop over layers and after it.
    """
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))
