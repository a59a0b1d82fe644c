"""Gather arrays of tokens over the axes that shard the sequence, and scatter their gradients.

Dims: B batch, t this device's tokens, S tokens of all R ranks.
"""

import jax
from jax import lax


def gather_sequence(*arrays_Bt: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """All-gathers each array [B, t, ...] -> [B, S, ...], ranks in order.

    Arrays are not packed into one message. So with B = 1 the output of an all-gather is the result, without a copy.

    Moves: one all-gather per array, (R - 1) / R of the gathered bytes.
    """
    if not axes:
        return arrays_Bt
    with jax.named_scope("gather_sequence"):
        return tuple(lax.all_gather(array, axes, axis=1, tiled=True) for array in arrays_Bt)


def scatter_sequence(*arrays_BS: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Reduce-scatters each array [B, S, ...] -> [B, t, ...], summed over ranks: the transpose of `gather_sequence`.

    Moves: one reduce-scatter per array, (R - 1) / R of its bytes.
    """
    if not axes:
        return arrays_BS
    with jax.named_scope("scatter_sequence"):
        mine = [lax.psum_scatter(array, axes, scatter_dimension=1, tiled=True) for array in arrays_BS]
        # The TPU compiler splits the reduce-scatter into an all-reduce and a slice. Without the barrier it fuses the
        # slice into each consumer, and keeps the whole sum for them.
        return tuple(lax.optimization_barrier(mine))
