"""Cross-entropy over a sharded vocabulary, without [B, T, V] logits in forward or backward.

Not a `rowwise` op: partial results of buckets are merged by an online log-sum-exp rather than summed.

Dims: B batch, t this device's tokens, c tokens of a chunk, u tokens of one bucket of all R folded ranks, S tokens of
all sequence ranks, D model, V vocabulary, v this device's rows of it, p rows of one bucket.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes, AxisNames
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.embedding import local_ids
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.padding import RealRows
from tsp_jax.ops.stationary import moves_tokens, over_gathered_tokens, resident_bucket
from tsp_jax.ops.stream import Bucket, Stream, custom_vjp, over_buckets, over_buckets_with_grads, vary_alike, zeros

Sums = tuple[jax.Array, jax.Array, jax.Array]
"""per token, over the logits so far: their maximum, the sum of their exponentials relative to it, the label's logit"""
IGNORE = -1
"""marks a token without a label; the loss skips it"""
PADDED = -1e30
"""logit of a padded row; finite, as all rows of a bucket may be padding"""


@dataclasses.dataclass(frozen=True)
class Logits:
    """How logits follow from products of tokens and rows of the output head.

    ``z = cap(scale x w^T)``, where ``cap(z) = softcap tanh(z / softcap)``, or z without a soft cap.
    """

    scale: float = 1.0
    softcap: float | None = None
    """bound of the absolute logit; None: no bound"""

    def of(self, products: jax.Array) -> jax.Array:
        """Logits, float32."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else self.softcap * jnp.tanh(scaled * (1.0 / self.softcap))

    def products_grad(self, grad: jax.Array, logits: jax.Array) -> jax.Array:
        """Gradient of products, from that of their logits: ``grad scale (1 - (logits / softcap)^2)``."""
        if self.softcap is not None:  # logits of padding are far below the bound
            grad = grad * (1.0 - jnp.square(jnp.maximum(logits * (1.0 / self.softcap), -1.0)))
        return grad if self.scale == 1.0 else grad * self.scale


class TokenLosses(NamedTuple):
    """Losses per token, float32. Both are 0 where the label is ignored, NaN where it is the vocabulary size or more."""

    nll_Bt: jax.Array
    """negative log-likelihood of the label, nats"""
    lse_Bt: jax.Array
    """log-sum-exp of the logits (its square is the z-loss)"""


def cross_entropy(
    x_BtD: jax.Array, table_vD: jax.Array, labels_Bt: jax.Array, *, axes: Axes = Axes(), stream: Stream = Stream(),
    vocab_size: int | None = None, logits: Logits = Logits(),
) -> TokenLosses:  # fmt: skip
    """``logsumexp(z) - z[label]`` of the logits z, by an online log-sum-exp over buckets of the vocabulary.

        forward:  z = cap(scale x table^T)    lse = logsumexp(z)    nll = lse - z[label]
        dgrad:    dz = (dlse softmax(z) + dz_label onehot(label)) scale cap'    dx = dz table
        wgrad:    dtable = dz^T x

    Args:
      x_BtD: final hidden states, in the compute dtype.
      table_vD: this device's rows of the output head (or of a tied embedding), any float dtype.
      labels_Bt: next tokens, int32; negative: ignored; V or more: NaN, so that no loss is finite by mistake.
      axes: over folded axes, either buckets of the head move or tokens do; over tensor axes, partial sums are combined.
      stream: movement (gather, ring or activations), buckets and chunks; the number of buckets divides v.
      vocab_size: V; rows from V on are padding, and have no probability. None: all rows of all ranks are real.
      logits: scale and soft cap of logits.

    Returns:
      `TokenLosses`, each [B, t].

    Moves: forward all-gathers of V D (R - 1) / R elements; backward the same again, and reduce-scatters of as
      many gradients. If activations move: forward an all-gather of x, B S D (R - 1) / R elements; backward an
      all-gather of x and a reduce-scatter of dx. Each token then also moves seven numbers. Forward: its label and two
      partial sums. Backward: its label, lse and two cotangents.
      Over tensor axes all-reduces of [B, t] float32 (two sums, a maximum), and one of [B, t, D] backward.
    Keeps: its inputs and one float32 per token.
    Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867.
    """
    with jax.named_scope("tsp/loss"):
        x_BtD, table_vD, labels_Bt = vary_alike(x_BtD, table_vD, labels_Bt)
        real = RealRows.of(table_vD, axes, vocab_size)
        head, ids_Bt = _Head(real, logits), local_ids(labels_Bt, table_vD, axes)
        lse_Bt, label_Bt = _local_sums(x_BtD, table_vD, ids_Bt, head, stream)
        if axes.tensor:
            top_Bt = lax.pmax(lax.stop_gradient(lse_Bt), axes.tensor)
            lse_Bt = top_Bt + jnp.log(lax.psum(jnp.exp(lse_Bt - top_Bt), axes.tensor))
            label_Bt = lax.psum(label_Bt, axes.tensor)
            labels_Bt = lax.pmax(labels_Bt, axes.tensor)
        no_label_Bt = jnp.where(labels_Bt < 0, 0.0, jnp.nan)
        real_Bt = (labels_Bt >= 0) & (labels_Bt < real.rows)
        return TokenLosses(*(jnp.where(real_Bt, loss_Bt, no_label_Bt) for loss_Bt in (lse_Bt - label_Bt, lse_Bt)))


@dataclasses.dataclass(frozen=True)
class _Head:
    """The output head: what the VJP below must know of it besides its rows. Static."""

    real: RealRows
    rule: Logits

    @property
    def axes(self) -> Axes:
        return self.real.axes

    def logits(self, x_BtD: jax.Array, bucket: Bucket) -> jax.Array:
        """[B, t, p] float32; `PADDED` for rows of padding."""
        return self.real.keep(self.rule.of(matmul_t(x_BtD, bucket.arrays[0])), bucket, PADDED)


@custom_vjp(3, 4)
def _local_sums(x_BtD, table_vD, labels_Bt, head, stream):
    """(log-sum-exp, logit of the label) over the rows of all folded ranks."""
    return _forward(x_BtD, table_vD, labels_Bt, head, stream)[0]


def _forward(x_BtD, table_vD, labels_Bt, head, stream):
    forward = _tokens_forward if moves_tokens(head.axes.folded, stream) else _weights_forward
    lse_Bt, label_Bt = forward(x_BtD, table_vD, labels_Bt, head, stream)
    return (lse_Bt, label_Bt), (x_BtD, table_vD, labels_Bt, lse_Bt)


def _backward(head, stream, residuals, cotangents):
    backward = _tokens_backward if moves_tokens(head.axes.folded, stream) else _weights_backward
    x_BtD, table_vD, labels_Bt, lse_Bt = residuals
    dx_BtD, dtable_vD = backward(x_BtD, table_vD, labels_Bt, lse_Bt, cotangents, head, stream)
    return dx_BtD.astype(x_BtD.dtype), dtable_vD.astype(table_vD.dtype), None


_local_sums.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------------ one bucket


def _no_logits(labels_Bt: jax.Array, like: jax.Array) -> Sums:
    zero_Bt = zeros(labels_Bt.shape, jnp.float32, like=like)
    return zero_Bt - jnp.inf, zero_Bt, zero_Bt


def _add_logits(sums: Sums, x_BtD: jax.Array, labels_Bt: jax.Array, bucket: Bucket, head: _Head) -> Sums:
    """`sums` with the logits of a bucket added."""
    max_Bt, sum_Bt, label_Bt = sums
    logits_Btp = head.logits(x_BtD, bucket)
    new_max_Bt = jnp.maximum(max_Bt, logits_Btp.max(axis=-1))
    sum_Bt = sum_Bt * jnp.exp(max_Bt - new_max_Bt) + jnp.exp(logits_Btp - new_max_Bt[..., None]).sum(axis=-1)
    index_Bt, inside_Bt = bucket.find(labels_Bt)
    found_Bt = jnp.take_along_axis(logits_Btp, index_Bt[..., None], axis=-1)[..., 0]
    return new_max_Bt, sum_Bt, jnp.where(inside_Bt, found_Bt, label_Bt)


def _finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """(log-sum-exp, logit of the label)."""
    max_Bt, sum_Bt, label_Bt = sums
    return max_Bt + jnp.log(sum_Bt), label_Bt


def _bucket_vjp(
    x_BtD: jax.Array,
    labels_Bt: jax.Array,
    lse_Bt: jax.Array,
    cotangents: Sequence[jax.Array],
    bucket: Bucket,
    head: _Head,
) -> tuple[jax.Array, jax.Array]:
    """(dx, gradient of the bucket), float32; lse_Bt is over all buckets."""
    dlse_Bt, dlabel_Bt = cotangents
    table_pD = bucket.arrays[0]
    index_Bt, inside_Bt = bucket.find(labels_Bt)
    onehot_Btp = jax.nn.one_hot(jnp.where(inside_Bt, index_Bt, -1), table_pD.shape[0], dtype=jnp.float32)
    logits_Btp = head.logits(x_BtD, bucket)
    softmax_Btp = jnp.exp(logits_Btp - lse_Bt[..., None])
    dlogits_Btp = dlse_Bt[..., None] * softmax_Btp + dlabel_Bt[..., None] * onehot_Btp
    dproducts_Btp = head.rule.products_grad(dlogits_Btp, logits_Btp).astype(x_BtD.dtype)
    return matmul(dproducts_Btp, table_pD), outer(dproducts_Btp, x_BtD)


# ------------------------------------------------------------------------------------------------ weights past tokens


def _weights_forward(x_BtD, table_vD, labels_Bt, head, stream):
    def body(sums, bucket: Bucket):
        def chunk(sums, read):
            x_BcD, labels_Bc = read
            return _add_logits(sums, x_BcD, labels_Bc, bucket, head), (), ()

        chunk_tokens = stream.chunk(bucket.num_rows)
        return over_chunks(chunk, sums, (x_BtD, labels_Bt), chunk_tokens=chunk_tokens)[0], None

    sums = _no_logits(labels_Bt, x_BtD)
    sums, _ = over_buckets(body, sums, (table_vD,), axes=head.axes.folded, stream=stream, dtype=x_BtD.dtype)
    return _finish(sums)


def _weights_backward(x_BtD, table_vD, labels_Bt, lse_Bt, cotangents, head, stream):
    def body(dx_BtD, bucket: Bucket):
        def chunk(dx_BcD, read):
            x_BcD, labels_Bc, lse_Bc, *cotangents = read
            more_BcD, grad = _bucket_vjp(x_BcD, labels_Bc, lse_Bc, cotangents, bucket, head)
            return dx_BcD + more_BcD, (), (grad,)

        read = x_BtD, labels_Bt, lse_Bt, *cotangents
        dx_BtD, _, grads = over_chunks(chunk, dx_BtD, read, chunk_tokens=stream.chunk(bucket.num_rows))
        return dx_BtD, grads, None

    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=x_BtD)
    dx_BtD, (dtable_vD,), _ = over_buckets_with_grads(
        body, dx_BtD, (table_vD,), axes=head.axes.folded, stream=stream, dtype=x_BtD.dtype
    )
    return dx_BtD, dtable_vD


# ------------------------------------------------------------------------------------------------ tokens past weights


def _tokens_forward(x_BtD, table_vD, labels_Bt, head, stream):
    bucket = resident_bucket((table_vD,), head.axes.folded, x_BtD.dtype)

    def body(carry, gathered, _):
        x_BuD, labels_Bu = gathered
        return carry, (), _finish(_add_logits(_no_logits(labels_Bu, x_BuD), x_BuD, labels_Bu, bucket, head))

    _, _, sums_BT = over_gathered_tokens(body, (), (x_BtD, labels_Bt), axes=head.axes.folded, stream=stream)
    lse_RBt, label_RBt = _exchange(*sums_BT, axes=head.axes.folded)
    return jax.nn.logsumexp(lse_RBt, axis=0), label_RBt.sum(axis=0)


def _exchange(*arrays_BT: jax.Array, axes: AxisNames) -> tuple[jax.Array, ...]:
    """This rank's results for the tokens of all ranks -> all ranks' results for this rank's tokens, each [R, B, t]."""
    with jax.named_scope("exchange_tokens"):
        message = jnp.stack(arrays_BT, axis=1)
        mine = lax.all_to_all(message, axes, split_axis=2, concat_axis=2, tiled=True)
        return tuple(mine.reshape(*mine.shape[:2], lax.axis_size(axes), -1).transpose(1, 2, 0, 3))


def _tokens_backward(x_BtD, table_vD, labels_Bt, lse_Bt, cotangents, head, stream):
    bucket = resident_bucket((table_vD,), head.axes.folded, x_BtD.dtype)

    def body(dtable_vD, gathered, _):
        x_BuD, labels_Bu, lse_Bu, *cotangents = gathered
        dx_BuD, grad = _bucket_vjp(x_BuD, labels_Bu, lse_Bu, cotangents, bucket, head)
        return dtable_vD + grad, (dx_BuD.astype(x_BtD.dtype),), ()

    dtable_vD = zeros(table_vD.shape, jnp.float32, like=x_BtD)
    tokens = lax.optimization_barrier(x_BtD), labels_Bt, lse_Bt, *cotangents  # see over_buckets_with_grads
    dtable_vD, (dx_BtD,), _ = over_gathered_tokens(body, dtable_vD, tokens, axes=head.axes.folded, stream=stream)
    return dx_BtD, dtable_vD
