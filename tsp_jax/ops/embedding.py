"""Vocabulary embedding, a row-wise op: each row of the table is added to the outputs of the tokens with its id.

Dims: B batch, t this device's tokens, D model, V vocabulary, v this device's rows of it, p rows of one bucket, R folded
ranks, S tokens of all sequence ranks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.padding import RealRows
from tsp_jax.ops.rowwise import Grads, RowwiseOp, rowwise
from tsp_jax.ops.stream import Arrays, Bucket, Stream, zeros


def local_ids(ids_Bt: jax.Array, table_vD: jax.Array, axes: Axes) -> jax.Array:
    """Token ids relative to this tensor shard's first row; ids of other shards fall outside its v R rows."""
    if not axes.tensor:
        return ids_Bt
    ranks = lax.axis_size(axes.folded) if axes.folded else 1
    return ids_Bt - lax.axis_index(axes.tensor) * table_vD.shape[0] * ranks


def embed(
    ids_Bt: jax.Array, table_vD: jax.Array, *, axes: Axes = Axes(), stream: Stream = Stream(),
    dtype: jax.typing.DTypeLike = jnp.float32, vocab_size: int | None = None,
) -> jax.Array:  # fmt: skip
    """``table[ids]``.

        forward:  x[b, t] = table[ids[b, t]]
        wgrad:    dtable[i] = sum of dx[b, t] over tokens with ids[b, t] = i

    Args:
      ids_Bt: token ids, int32; an id outside [0, V) gives zeros.
      table_vD: this device's rows, any float dtype.
      axes: folded axes: table buckets move past tokens, or tokens past rows; tensor axes: partial outputs are summed.
      stream: movement (gather, ring or activations), buckets and chunks; the number of buckets divides v.
      dtype: compute dtype, of the result and of the buckets.
      vocab_size: V; rows from V on are padding. None: all rows of all ranks are real.

    Returns:
      [B, t, D] in `dtype`.

    Moves: forward all-gathers of V D (R - 1) / R table elements; backward reduce-scatters of as many gradients (the VJP
      does not read the table). If activations move: forward all-gathers of B S (R - 1) / R ids and a
      reduce-scatter of B S D (R - 1) / R elements; backward all-gathers of the ids and of dx. Over tensor axes one
      all-reduce of [B, t, D] forward.
    Keeps: the ids and the table.
    """
    with jax.named_scope("tsp/embed"):
        op = _TableRows(jnp.dtype(dtype), jnp.dtype(dtype))
        real = RealRows.of(table_vD, axes, vocab_size)
        if real.padded:
            ids_Bt = jnp.where(ids_Bt < real.rows, ids_Bt, -1)
        return rowwise(op, (local_ids(ids_Bt, table_vD, axes),), (table_vD,), axes=axes, stream=stream)


@dataclasses.dataclass(frozen=True)
class _TableRows(RowwiseOp):
    """A token's partial output is its row on one rank and zeros on all others, so the sum is exact in any dtype."""

    dtype: Any
    accumulator_dtype: Any
    chunked: bool = False

    def partial(self, inputs: Arrays, bucket: Bucket) -> jax.Array:
        index_Bt, inside_Bt = bucket.find(inputs[0])
        return jnp.where(inside_Bt[..., None], bucket.arrays[0][index_Bt], jnp.zeros((), self.dtype))

    def partial_vjp(self, inputs: Arrays, dy_BtD: jax.Array, bucket: Bucket) -> tuple[Grads, Arrays]:
        index_Bt, inside_Bt = bucket.find(inputs[0])
        rows_BtD = jnp.where(inside_Bt[..., None], dy_BtD.astype(jnp.float32), 0.0)
        return (None,), (zeros(bucket.arrays[0].shape, jnp.float32, like=dy_BtD).at[index_Bt].add(rows_BtD),)
