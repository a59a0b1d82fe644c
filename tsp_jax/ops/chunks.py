"""Some tokens at a time: what an op makes of a bucket of weights never has the size of all tokens.

Dims: B batch, t this device's tokens, c tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import largest_divisor
from tsp_jax.ops.stream import zeros

Tree = Any


def over_chunks(
    body: Callable[[Tree, Tree], tuple[Tree, Tree, Tree]], updated_Bt: Tree, read_Bt: Tree, *, tokens: int
) -> tuple[Tree, Tree, Tree]:
    """Runs `body` on chunks of tokens, one after another.

    Args:
      body: (chunks of `updated_Bt`, chunks of `read_Bt`) -> (new chunks of `updated_Bt`, chunks of made arrays, what is
        to be summed over chunks); chunks are [B, c, ...].
      updated_Bt: arrays [B, t, ...] that change in place.
      read_Bt: arrays [B, t, ...] that are read.
      tokens: of all B rows in a chunk, at most; the largest divisor of t that fits is used.

    Returns:
      (updated arrays, made arrays [B, t, ...], sums).
    """
    first, *_, late = 2 * jax.tree.leaves(read_Bt)  # gradients stand last
    batch, length = first.shape[:2]
    size = largest_divisor(length, max(1, tokens // batch))
    if size == length:
        return body(updated_Bt, read_Bt)

    def cut(tree: Tree, index) -> Tree:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * size, size, axis=1), tree)

    def paste(tree: Tree, chunks: Tree, index) -> Tree:
        def put(x, chunk):
            return lax.dynamic_update_slice_in_dim(x, chunk.astype(x.dtype), index * size, axis=1)

        return jax.tree.map(put, tree, chunks)

    def turn(carry, index):
        updated, made, sums = carry
        chunks, more, terms = body(cut(updated, index), cut(read_Bt, index))
        return (paste(updated, chunks, index), paste(made, more, index), jax.tree.map(jnp.add, sums, terms)), None

    _, more, terms = jax.eval_shape(body, cut(updated_Bt, 0), cut(read_Bt, 0))
    made = jax.tree.map(lambda x: zeros((batch, length, *x.shape[2:]), x.dtype, like=late), more)
    sums = jax.tree.map(lambda x: zeros(x.shape, x.dtype, like=late), terms)
    return lax.scan(turn, (updated_Bt, made, sums), jnp.arange(length // size))[0]
