"""Process tokens in chunks, so that the intermediate results of an op never cover all tokens at once.

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
    body: Callable[[Tree, Tree], tuple[Tree, Tree, Tree]], updated_Bt: Tree, read_Bt: Tree, *, chunk_tokens: int
) -> tuple[Tree, Tree, Tree]:
    """Runs `body` on chunks of tokens, one after another.

    Args:
      body: (chunks of `updated_Bt`, chunks of `read_Bt`) -> (new chunks of `updated_Bt`, chunks of new arrays, terms to
        sum over chunks); chunks are [B, c, ...].
      updated_Bt: arrays [B, t, ...] that are updated in place.
      read_Bt: arrays [B, t, ...] that are only read; incoming gradients, if any, last.
      chunk_tokens: at most this many tokens of all B rows form a chunk; c is the largest divisor of t that fits.

    Returns:
      (updated arrays, new arrays [B, t, ...], sums).
    """
    first, *_, last = 2 * jax.tree.leaves(read_Bt)
    batch, length = first.shape[:2]
    size = largest_divisor(length, max(1, chunk_tokens // batch))
    if size == length:
        return body(updated_Bt, read_Bt)

    def take(tree: Tree, index) -> Tree:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * size, size, axis=1), tree)

    def put(tree: Tree, chunks: Tree, index) -> Tree:
        def update(x, chunk):
            return lax.dynamic_update_slice_in_dim(x, chunk.astype(x.dtype), index * size, axis=1)

        return jax.tree.map(update, tree, chunks)

    def step(carry, index):
        updated, new, sums = carry
        chunks, new_chunks, terms = body(take(updated, index), take(read_Bt, index))
        return (put(updated, chunks, index), put(new, new_chunks, index), jax.tree.map(jnp.add, sums, terms)), None

    _, new_chunks, terms = jax.eval_shape(body, take(updated_Bt, 0), take(read_Bt, 0))
    # Like a gradient where there is one: backward's buffers are then not made before backward (see `zeros`).
    new = jax.tree.map(lambda x: zeros((batch, length, *x.shape[2:]), x.dtype, like=last), new_chunks)
    sums = jax.tree.map(lambda x: zeros(x.shape, x.dtype, like=last), terms)
    return lax.scan(step, (updated_Bt, new, sums), jnp.arange(length // size))[0]
