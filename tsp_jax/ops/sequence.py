"""Keys and values past the ranks that share a sequence, and their gradients back."""

import jax
import jax.numpy as jnp
from jax import lax


def gather_sequence(*arrays_Bt: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Each [B, t, ...] -> [B, S, ...], ranks in order, all in one message (shapes and dtypes must agree).

    Moves: one all-gather, (R - 1) / R of the gathered bytes.
    """
    if not axes:
        return arrays_Bt
    with jax.named_scope("gather_sequence"):
        message = jnp.stack(arrays_Bt, axis=1)
        return tuple(jnp.moveaxis(lax.all_gather(message, axes, axis=2, tiled=True), 1, 0))


def scatter_sequence(*arrays_BS: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Transpose of `gather_sequence`: each [B, S, ...] -> [B, t, ...], summed over ranks.

    Moves: one reduce-scatter, (R - 1) / R of the full-sequence bytes.
    """
    if not axes:
        return arrays_BS
    with jax.named_scope("scatter_sequence"):
        message = jnp.stack(arrays_BS, axis=1)
        mine = lax.psum_scatter(message, axes, scatter_dimension=2, tiled=True)
        # TPU's compiler takes the scatter apart into a sum and a slice. Without the barrier the slice is merged into
        # each reader, and the whole sum is kept for them.
        return tuple(jnp.moveaxis(lax.optimization_barrier(mine), 1, 0))
