"""Keys and values past the ranks that share a sequence, and their gradients back."""

import jax
from jax import lax


def gather_sequence(*arrays_Bt: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Each [B, t, ...] -> [B, S, ...], ranks in order.

    A message an array: with B = 1 what arrives is the result, with nothing to cut or to turn.

    Moves: an all-gather for each array, (R - 1) / R of the gathered bytes.
    """
    if not axes:
        return arrays_Bt
    with jax.named_scope("gather_sequence"):
        return tuple(lax.all_gather(array, axes, axis=1, tiled=True) for array in arrays_Bt)


def scatter_sequence(*arrays_BS: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Transpose of `gather_sequence`: each [B, S, ...] -> [B, t, ...], summed over ranks.

    Moves: a reduce-scatter for each array, (R - 1) / R of the full-sequence bytes.
    """
    if not axes:
        return arrays_BS
    with jax.named_scope("scatter_sequence"):
        mine = [lax.psum_scatter(array, axes, scatter_dimension=1, tiled=True) for array in arrays_BS]
        # TPU's compiler takes the scatter apart into a sum and a slice. Without the barrier the slice is merged into
        # each reader, and the whole sum is kept for them.
        return tuple(lax.optimization_barrier(mine))
