"""Cross-entropy over a sharded vocabulary, without [B, T, V] logits in forward or backward.

Dims: B batch, t this device's tokens, D model, v this device's rows of the vocabulary, p the rows of one piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.embedding import local_ids
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.stream import Piece, Stream, custom_vjp, fold, fold_with_grads, vary_alike, zeros

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
    """``logsumexp(x table^T) - (x table^T)[label]``, by an online log-sum-exp over pieces of the vocabulary.

    Args:
      x_BtD: final hidden states, in the compute dtype.
      table_vD: this device's rows of the output head (or of a tied embedding).
      labels_Bt: next tokens, int32; negative: ignored.
      axes: folded axes: pieces of the head move past tokens; tensor axes: partial sums are combined.
      stream: movement (gather or ring) and buckets; v divisible by the buckets.

    Moves: forward V D (R - 1) / R; backward the same again and as many gradients. Over tensor axes all-reduces of
      [B, t] float32 (two sums, a maximum), and backward one of [B, t, D].
    Keeps: its inputs and one float32 a token.
    Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867.
    """
    with jax.named_scope("tsp/loss"):
        x_BtD, table_vD, labels_Bt = vary_alike(x_BtD, table_vD, labels_Bt)
        local_Bt = local_ids(labels_Bt, table_vD, axes)
        lse_Bt, label_Bt = _streamed(x_BtD, table_vD, local_Bt, axes.folded, stream)
        if axes.tensor:
            top_Bt = lax.pmax(lax.stop_gradient(lse_Bt), axes.tensor)
            lse_Bt = top_Bt + jnp.log(lax.psum(jnp.exp(lse_Bt - top_Bt), axes.tensor))
            label_Bt = lax.psum(label_Bt, axes.tensor)
            labels_Bt = lax.pmax(labels_Bt, axes.tensor)
        real_Bt = labels_Bt >= 0
        return TokenLosses(jnp.where(real_Bt, lse_Bt - label_Bt, 0.0), jnp.where(real_Bt, lse_Bt, 0.0))


@custom_vjp(3, 4)
def _streamed(x_BtD, table_vD, labels_Bt, folded, stream):
    return _forward(x_BtD, table_vD, labels_Bt, folded, stream)[0]


def _forward(x_BtD, table_vD, labels_Bt, folded, stream):
    def body(carry, piece: Piece):
        top_Bt, sum_Bt, label_Bt = carry
        logits_Btp = matmul_t(x_BtD, piece.arrays[0])
        new_Bt = jnp.maximum(top_Bt, logits_Btp.max(axis=-1))
        sum_Bt = sum_Bt * jnp.exp(top_Bt - new_Bt) + jnp.exp(logits_Btp - new_Bt[..., None]).sum(axis=-1)
        index_Bt, inside_Bt = piece.find(labels_Bt, table_vD.shape[0])
        here_Bt = jnp.take_along_axis(logits_Btp, index_Bt[..., None], axis=-1)[..., 0]
        return (new_Bt, sum_Bt, jnp.where(inside_Bt, here_Bt, label_Bt)), None

    zero_Bt = zeros(labels_Bt.shape, jnp.float32, like=x_BtD)
    carry = (zero_Bt - jnp.inf, zero_Bt, zero_Bt)
    (top_Bt, sum_Bt, label_Bt), _ = fold(body, carry, (table_vD,), axes=folded, stream=stream, dtype=x_BtD.dtype)
    lse_Bt = top_Bt + jnp.log(sum_Bt)
    return (lse_Bt, label_Bt), (x_BtD, table_vD, labels_Bt, lse_Bt)


def _backward(folded, stream, residuals, cotangents):
    x_BtD, table_vD, labels_Bt, lse_Bt = residuals
    dlse_Bt, dlabel_Bt = cotangents
    dtype = x_BtD.dtype

    def body(dx_BtD, piece: Piece):
        table_pD = piece.arrays[0]
        index_Bt, inside_Bt = piece.find(labels_Bt, table_vD.shape[0])
        hit_Btp = jax.nn.one_hot(jnp.where(inside_Bt, index_Bt, -1), table_pD.shape[0], dtype=jnp.float32)
        p_Btp = jnp.exp(matmul_t(x_BtD, table_pD) - lse_Bt[..., None])
        dlogits_Btp = dlse_Bt[..., None] * p_Btp + dlabel_Bt[..., None] * hit_Btp
        dlogits_Btp = dlogits_Btp.astype(dtype)
        return dx_BtD + matmul(dlogits_Btp, table_pD), (outer(dlogits_Btp, x_BtD),), None

    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=x_BtD)
    dx_BtD, (dtable_vD,), _ = fold_with_grads(body, dx_BtD, (table_vD,), axes=folded, stream=stream, dtype=dtype)
    return dx_BtD.astype(dtype), dtable_vD, None


_streamed.defvjp(_forward, _backward)
