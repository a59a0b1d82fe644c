"""Rows of a vocabulary that may be sharded over the same axes as the tokens.

Dims: B batch, t this device's tokens, T those of all folded ranks, D model, v this device's rows of the vocabulary, p
the rows of one bucket.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.sequence import gather_sequence
from tsp_jax.ops.stationary import moves_tokens, over_gathered_tokens, resident_bucket
from tsp_jax.ops.stream import Bucket, Stream, custom_vjp, over_buckets, over_buckets_with_grads, vary_alike, zeros


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
      axes: folded axes: table buckets move past tokens, or tokens past rows; tensor axes: partial rows are summed.
      stream: movement (gather, ring or activations) and buckets; v divisible by the buckets.
      dtype: of the result and of the buckets.

    Returns:
      [B, t, D] in `dtype`.

    Moves: forward V D (R - 1) / R; backward as many gradients. Or activations: ids here, and forward B S D (R - 1) / R
      rows home, backward as many here. Over tensor axes one all-reduce of [B, t, D].
    Keeps: the ids (activations: of all tokens).
    """
    with jax.named_scope("tsp/embed"):
        ids_Bt, table_vD = vary_alike(ids_Bt, table_vD)
        run = _moved if moves_tokens(axes.folded, stream) else _streamed
        x_BtD = run(local_ids(ids_Bt, table_vD, axes), table_vD, axes.folded, stream, jnp.dtype(dtype))
        return lax.psum(x_BtD, axes.tensor) if axes.tensor else x_BtD


def _rows_or(x_BtD: jax.Array, ids_Bt: jax.Array, bucket: Bucket, rows: int) -> jax.Array:
    """Rows of ids that are in a bucket (of shards of `rows` rows), else x."""
    index_Bt, inside_Bt = bucket.find(ids_Bt, rows)
    return jnp.where(inside_Bt[..., None], bucket.arrays[0][index_Bt], x_BtD)


def _rows_grad(dx_BtD: jax.Array, ids_Bt: jax.Array, bucket: Bucket, rows: int) -> jax.Array:
    """Gradient of a bucket's rows, float32."""
    index_Bt, inside_Bt = bucket.find(ids_Bt, rows)
    rows_BtD = jnp.where(inside_Bt[..., None], dx_BtD.astype(jnp.float32), 0.0)
    return zeros(bucket.arrays[0].shape, jnp.float32, like=dx_BtD).at[index_Bt].add(rows_BtD)


@custom_vjp(2, 3, 4)
def _streamed(ids_Bt, table_vD, folded, stream, dtype):
    return _streamed_forward(ids_Bt, table_vD, folded, stream, dtype)[0]


def _streamed_forward(ids_Bt, table_vD, folded, stream, dtype):
    def body(x_BtD, bucket: Bucket):
        return _rows_or(x_BtD, ids_Bt, bucket, table_vD.shape[0]), None

    x_BtD = zeros((*ids_Bt.shape, table_vD.shape[-1]), dtype, like=table_vD)
    x_BtD, _ = over_buckets(body, x_BtD, (table_vD,), axes=folded, stream=stream, dtype=dtype)
    return x_BtD, (ids_Bt, table_vD)


def _streamed_backward(folded, stream, dtype, residuals, dx_BtD):
    ids_Bt, table_vD = residuals

    def body(carry, bucket: Bucket):
        def chunk(_, read):
            ids_Bc, dx_BcD = read
            return (), (), (_rows_grad(dx_BcD, ids_Bc, bucket, table_vD.shape[0]),)

        return carry, over_chunks(chunk, (), (ids_Bt, dx_BtD), tokens=stream.tokens)[2], None

    _, (dtable_vD,), _ = over_buckets_with_grads(body, (), (table_vD,), axes=folded, stream=stream, dtype=dtype)
    return None, dtable_vD


_streamed.defvjp(_streamed_forward, _streamed_backward)


@custom_vjp(2, 3, 4)
def _moved(ids_Bt, table_vD, folded, stream, dtype):
    return _moved_forward(ids_Bt, table_vD, folded, stream, dtype)[0]


def _moved_forward(ids_Bt, table_vD, folded, stream, dtype):
    bucket = resident_bucket(table_vD, dtype)
    (ids_BT,) = gather_sequence(ids_Bt, axes=folded)
    ids_BT -= lax.axis_index(folded) * table_vD.shape[0]

    def body(carry, _, here):
        (ids_Bp,) = here
        zero_BpD = zeros((*ids_Bp.shape, table_vD.shape[-1]), dtype, like=table_vD)
        return carry, (_rows_or(zero_BpD, ids_Bp, bucket, table_vD.shape[0]),), ()

    _, (x_BtD,), _ = over_gathered_tokens(body, (), (), (ids_BT,), axes=folded, stream=stream)
    return x_BtD, (ids_BT, table_vD)


def _moved_backward(folded, stream, dtype, residuals, dx_BtD):
    ids_BT, table_vD = residuals
    bucket = resident_bucket(table_vD, dtype)

    def body(dtable_vD, arrived, here):
        (dx_BpD,), (ids_Bp,) = arrived, here
        return dtable_vD + _rows_grad(dx_BpD, ids_Bp, bucket, table_vD.shape[0]), (), ()

    dtable_vD = zeros(table_vD.shape, jnp.float32, like=dx_BtD)
    dtable_vD, _, _ = over_gathered_tokens(body, dtable_vD, (dx_BtD,), (ids_BT,), axes=folded, stream=stream)
    return None, dtable_vD.astype(table_vD.dtype)


_moved.defvjp(_moved_forward, _moved_backward)
