"""Cross-entropy over a sharded vocabulary, without [B, T, V] logits in forward or backward.

Dims: B batch, t this device's tokens, T those of all R folded ranks, D model, v this device's rows of the vocabulary, p
the rows of one bucket.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes, AxisNames
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.embedding import local_ids
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.sequence import gather_sequence
from tsp_jax.ops.stationary import moves_tokens, over_gathered_tokens, resident_bucket
from tsp_jax.ops.stream import Bucket, Stream, custom_vjp, over_buckets, over_buckets_with_grads, vary_alike, zeros

Sums = tuple[jax.Array, jax.Array, jax.Array]
"""of a token, over the logits seen so far: their maximum, the sum of their exponentials relative to it, the label's"""
IGNORE = -1
"""label of a token that has none"""


class TokenLosses(NamedTuple):
    """Per token, float32; both 0 where the label is ignored."""

    nll_Bt: jax.Array
    """negative log-likelihood of the label, nats"""
    lse_Bt: jax.Array
    """log-partition of the logits (its square is the z-loss)"""


def cross_entropy(
    x_BtD: jax.Array, table_vD: jax.Array, labels_Bt: jax.Array, *, axes: Axes = Axes(), stream: Stream = Stream()
) -> TokenLosses:
    """``logsumexp(x table^T) - (x table^T)[label]``, by an online log-sum-exp over buckets of the vocabulary.

    Args:
      x_BtD: final hidden states, in the compute dtype.
      table_vD: this device's rows of the output head (or of a tied embedding).
      labels_Bt: next tokens, int32; negative: ignored.
      axes: folded axes: buckets of the head move past tokens, or tokens past its rows; tensor axes: partial sums are
        combined.
      stream: movement (gather, ring or activations) and buckets; v divisible by the buckets.

    Moves: forward V D (R - 1) / R; backward the same again and as many gradients. Or activations: forward B S D
      (R - 1) / R, backward twice that (x, dx), and six numbers a token: its label, two partial sums, and what backward
      tells of it. Over tensor axes all-reduces of [B, t] float32 (two sums, a maximum), and backward one of [B, t, D].
    Keeps: its inputs and one float32 a token (activations: also the labels of all tokens).
    Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867.
    """
    with jax.named_scope("tsp/loss"):
        x_BtD, table_vD, labels_Bt = vary_alike(x_BtD, table_vD, labels_Bt)
        local_Bt = local_ids(labels_Bt, table_vD, axes)
        run = _moved if moves_tokens(axes.folded, stream) else _streamed
        lse_Bt, label_Bt = run(x_BtD, table_vD, local_Bt, axes.folded, stream)
        if axes.tensor:
            top_Bt = lax.pmax(lax.stop_gradient(lse_Bt), axes.tensor)
            lse_Bt = top_Bt + jnp.log(lax.psum(jnp.exp(lse_Bt - top_Bt), axes.tensor))
            label_Bt = lax.psum(label_Bt, axes.tensor)
            labels_Bt = lax.pmax(labels_Bt, axes.tensor)
        real_Bt = labels_Bt >= 0
        return TokenLosses(jnp.where(real_Bt, lse_Bt - label_Bt, 0.0), jnp.where(real_Bt, lse_Bt, 0.0))


def _start(labels_Bt: jax.Array, like: jax.Array) -> Sums:
    zero_Bt = zeros(labels_Bt.shape, jnp.float32, like=like)
    return zero_Bt - jnp.inf, zero_Bt, zero_Bt


def _visit(sums: Sums, x_BtD: jax.Array, labels_Bt: jax.Array, bucket: Bucket, rows: int) -> Sums:
    """Sums with the logits of a bucket (of shards of `rows` rows) in them."""
    top_Bt, sum_Bt, label_Bt = sums
    logits_Btp = matmul_t(x_BtD, bucket.arrays[0])
    new_Bt = jnp.maximum(top_Bt, logits_Btp.max(axis=-1))
    sum_Bt = sum_Bt * jnp.exp(top_Bt - new_Bt) + jnp.exp(logits_Btp - new_Bt[..., None]).sum(axis=-1)
    index_Bt, inside_Bt = bucket.find(labels_Bt, rows)
    here_Bt = jnp.take_along_axis(logits_Btp, index_Bt[..., None], axis=-1)[..., 0]
    return new_Bt, sum_Bt, jnp.where(inside_Bt, here_Bt, label_Bt)


def _finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """(log-partition, logit of the label)."""
    top_Bt, sum_Bt, label_Bt = sums
    return top_Bt + jnp.log(sum_Bt), label_Bt


def _visit_vjp(
    x_BtD: jax.Array,
    labels_Bt: jax.Array,
    lse_Bt: jax.Array,
    cotangents: Sequence[jax.Array],
    bucket: Bucket,
    rows: int,
) -> tuple[jax.Array, jax.Array]:
    """(dx, gradient of the bucket), float32; lse_Bt is that of all buckets."""
    dlse_Bt, dlabel_Bt = cotangents
    table_pD = bucket.arrays[0]
    index_Bt, inside_Bt = bucket.find(labels_Bt, rows)
    hit_Btp = jax.nn.one_hot(jnp.where(inside_Bt, index_Bt, -1), table_pD.shape[0], dtype=jnp.float32)
    p_Btp = jnp.exp(matmul_t(x_BtD, table_pD) - lse_Bt[..., None])
    dlogits_Btp = (dlse_Bt[..., None] * p_Btp + dlabel_Bt[..., None] * hit_Btp).astype(x_BtD.dtype)
    return matmul(dlogits_Btp, table_pD), outer(dlogits_Btp, x_BtD)


# ------------------------------------------------------------------------------------------------ weights move


@custom_vjp(3, 4)
def _streamed(x_BtD, table_vD, labels_Bt, folded, stream):
    return _streamed_forward(x_BtD, table_vD, labels_Bt, folded, stream)[0]


def _streamed_forward(x_BtD, table_vD, labels_Bt, folded, stream):
    def body(sums, bucket: Bucket):
        def chunk(sums, read):
            x_BcD, labels_Bc = read
            return _visit(sums, x_BcD, labels_Bc, bucket, table_vD.shape[0]), (), ()

        return over_chunks(chunk, sums, (x_BtD, labels_Bt), tokens=stream.tokens)[0], None

    sums = _start(labels_Bt, x_BtD)
    sums, _ = over_buckets(body, sums, (table_vD,), axes=folded, stream=stream, dtype=x_BtD.dtype)
    lse_Bt, label_Bt = _finish(sums)
    return (lse_Bt, label_Bt), (x_BtD, table_vD, labels_Bt, lse_Bt)


def _streamed_backward(folded, stream, residuals, cotangents):
    x_BtD, table_vD, labels_Bt, lse_Bt = residuals

    def body(dx_BtD, bucket: Bucket):
        def chunk(dx_BcD, read):
            x_BcD, labels_Bc, lse_Bc, *cotangents = read
            more_BcD, grad = _visit_vjp(x_BcD, labels_Bc, lse_Bc, cotangents, bucket, table_vD.shape[0])
            return dx_BcD + more_BcD, (), (grad,)

        read = x_BtD, labels_Bt, lse_Bt, *cotangents
        dx_BtD, _, grads = over_chunks(chunk, dx_BtD, read, tokens=stream.tokens)
        return dx_BtD, grads, None

    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=x_BtD)
    dx_BtD, (dtable_vD,), _ = over_buckets_with_grads(
        body, dx_BtD, (table_vD,), axes=folded, stream=stream, dtype=x_BtD.dtype
    )
    return dx_BtD.astype(x_BtD.dtype), dtable_vD, None


_streamed.defvjp(_streamed_forward, _streamed_backward)


# ------------------------------------------------------------------------------------------------ tokens move


@custom_vjp(3, 4)
def _moved(x_BtD, table_vD, labels_Bt, folded, stream):
    return _moved_forward(x_BtD, table_vD, labels_Bt, folded, stream)[0]


def _moved_forward(x_BtD, table_vD, labels_Bt, folded, stream):
    bucket = resident_bucket(table_vD, x_BtD.dtype)
    (labels_BT,) = gather_sequence(labels_Bt, axes=folded)
    labels_BT -= lax.axis_index(folded) * table_vD.shape[0]

    def body(carry, arrived, here):
        (x_BpD,), (labels_Bp,) = arrived, here
        sums = _visit(_start(labels_Bp, x_BpD), x_BpD, labels_Bp, bucket, table_vD.shape[0])
        return carry, (), _finish(sums)

    _, _, parts_BT = over_gathered_tokens(body, (), (x_BtD,), (labels_BT,), axes=folded, stream=stream)
    lse_RBt, label_RBt = _deal(*parts_BT, axes=folded)
    lse_Bt = jax.nn.logsumexp(lse_RBt, axis=0)
    return (lse_Bt, label_RBt.sum(axis=0)), (x_BtD, table_vD, labels_BT, lse_Bt)


def _deal(*parts_BT: jax.Array, axes: AxisNames) -> tuple[jax.Array, ...]:
    """What each rank knows of all tokens -> what all ranks know of this rank's, each [R, B, t]."""
    with jax.named_scope("deal_tokens"):
        message = jnp.stack(parts_BT, axis=1)
        mine = lax.all_to_all(message, axes, split_axis=2, concat_axis=2, tiled=True)
        return tuple(mine.reshape(*mine.shape[:2], lax.axis_size(axes), -1).transpose(1, 2, 0, 3))


def _moved_backward(folded, stream, residuals, cotangents):
    x_BtD, table_vD, labels_BT, lse_Bt = residuals
    bucket = resident_bucket(table_vD, x_BtD.dtype)
    told_BT = gather_sequence(lse_Bt, *cotangents, axes=folded)

    def body(dtable_vD, arrived, here):
        (x_BpD,), (labels_Bp, lse_Bp, *cotangents) = arrived, here
        dx_BpD, grad = _visit_vjp(x_BpD, labels_Bp, lse_Bp, cotangents, bucket, table_vD.shape[0])
        return dtable_vD + grad, (dx_BpD.astype(x_BtD.dtype),), ()

    dtable_vD = zeros(table_vD.shape, jnp.float32, like=x_BtD)
    arrive, here = (lax.optimization_barrier(x_BtD),), (labels_BT, *told_BT)  # see over_buckets_with_grads
    dtable_vD, (dx_BtD,), _ = over_gathered_tokens(body, dtable_vD, arrive, here, axes=folded, stream=stream)
    return dx_BtD, dtable_vD.astype(table_vD.dtype), None


_moved.defvjp(_moved_forward, _moved_backward)
