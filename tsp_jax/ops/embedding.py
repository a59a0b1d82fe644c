"""Rows of a vocabulary that is sharded over the same axis as the tokens.

Dims: B batch, t this device's tokens, D model, v this device's rows of the vocabulary, p the rows of one piece.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.chunks import over_tokens
from tsp_jax.ops.stream import Piece, Stream, custom_vjp, fold, fold_with_grads, vary_alike, zeros


def local_ids(ids_Bt: jax.Array, table_vD: jax.Array, axes: Axes) -> jax.Array:
    """Token ids counted from the first row that this device's tensor shard holds; others fall outside of it."""
    if not axes.tensor:
        return ids_Bt
    ranks = lax.axis_size(axes.folded) if axes.folded else 1
    return ids_Bt - lax.axis_index(axes.tensor) * table_vD.shape[0] * ranks


def embed(
    ids_Bt: jax.Array,
    table_vD: jax.Array,
    *,
    axes: Axes = Axes(),
    stream: Stream = Stream(),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """``table[ids]``.

    Args:
      ids_Bt: token ids, int32; an id outside [0, V) gives zeros.
      table_vD: this device's rows.
      axes: folded axes: table pieces move past tokens; tensor axes: partial rows are summed.
      stream: movement (gather or ring) and buckets; v divisible by the buckets.
      dtype: of the result and of the pieces.

    Returns:
      [B, t, D] in `dtype`.

    Moves: forward V D (R - 1) / R; backward as many gradients. Over tensor axes one all-reduce of [B, t, D].
    Keeps: the ids.
    """
    with jax.named_scope("tsp/embed"):
        ids_Bt, table_vD = vary_alike(ids_Bt, table_vD)
        x_BtD = _streamed(local_ids(ids_Bt, table_vD, axes), table_vD, axes.folded, stream, jnp.dtype(dtype))
        return lax.psum(x_BtD, axes.tensor) if axes.tensor else x_BtD


@custom_vjp(2, 3, 4)
def _streamed(ids_Bt, table_vD, folded, stream, dtype):
    return _forward(ids_Bt, table_vD, folded, stream, dtype)[0]


def _forward(ids_Bt, table_vD, folded, stream, dtype):
    def body(x_BtD, piece: Piece):
        index_Bt, inside_Bt = piece.find(ids_Bt, table_vD.shape[0])
        rows_BtD = piece.arrays[0][index_Bt]
        return jnp.where(inside_Bt[..., None], rows_BtD, x_BtD), None

    x_BtD = zeros((*ids_Bt.shape, table_vD.shape[-1]), dtype, like=table_vD)
    x_BtD, _ = fold(body, x_BtD, (table_vD,), axes=folded, stream=stream, dtype=dtype)
    return x_BtD, (ids_Bt, table_vD)


def _backward(folded, stream, dtype, residuals, dx_BtD):
    ids_Bt, table_vD = residuals

    def body(carry, piece: Piece):
        def chunk(_, read):
            ids_Bc, dx_BcD = read
            index_Bc, inside_Bc = piece.find(ids_Bc, table_vD.shape[0])
            rows_BcD = jnp.where(inside_Bc[..., None], dx_BcD.astype(jnp.float32), 0.0)
            return (), (), (zeros(piece.arrays[0].shape, jnp.float32, like=dx_BcD).at[index_Bc].add(rows_BcD),)

        return carry, over_tokens(chunk, (), (ids_Bt, dx_BtD), tokens=stream.tokens)[2], None

    _, (dtable_vD,), _ = fold_with_grads(body, (), (table_vD,), axes=folded, stream=stream, dtype=dtype)
    return None, dtable_vD


_streamed.defvjp(_forward, _backward)
