"""Cross-entropy over a sharded vocabulary, without [B, T, V] logits in forward or backward.

Dims: B batch, t this device's tokens, D model, v this device's rows of the vocabulary, p the rows of one piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.chunks import over_tokens
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
        def chunk(carry, read):
            (top_Bc, sum_Bc, label_Bc), (x_BcD, labels_Bc) = carry, read
            logits_Bcp = matmul_t(x_BcD, piece.arrays[0])
            new_Bc = jnp.maximum(top_Bc, logits_Bcp.max(axis=-1))
            sum_Bc = sum_Bc * jnp.exp(top_Bc - new_Bc) + jnp.exp(logits_Bcp - new_Bc[..., None]).sum(axis=-1)
            index_Bc, inside_Bc = piece.find(labels_Bc, table_vD.shape[0])
            here_Bc = jnp.take_along_axis(logits_Bcp, index_Bc[..., None], axis=-1)[..., 0]
            return (new_Bc, sum_Bc, jnp.where(inside_Bc, here_Bc, label_Bc)), (), ()

        return over_tokens(chunk, carry, (x_BtD, labels_Bt), tokens=stream.tokens)[0], None

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

        def chunk(dx_BcD, read):
            x_BcD, labels_Bc, lse_Bc, dlse_Bc, dlabel_Bc = read
            index_Bc, inside_Bc = piece.find(labels_Bc, table_vD.shape[0])
            hit_Bcp = jax.nn.one_hot(jnp.where(inside_Bc, index_Bc, -1), table_pD.shape[0], dtype=jnp.float32)
            p_Bcp = jnp.exp(matmul_t(x_BcD, table_pD) - lse_Bc[..., None])
            dlogits_Bcp = (dlse_Bc[..., None] * p_Bcp + dlabel_Bc[..., None] * hit_Bcp).astype(dtype)
            return dx_BcD + matmul(dlogits_Bcp, table_pD), (), (outer(dlogits_Bcp, x_BcD),)

        read = x_BtD, labels_Bt, lse_Bt, dlse_Bt, dlabel_Bt
        dx_BtD, _, grads = over_tokens(chunk, dx_BtD, read, tokens=stream.tokens)
        return dx_BtD, grads, None

    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=x_BtD)
    dx_BtD, (dtable_vD,), _ = fold_with_grads(body, dx_BtD, (table_vD,), axes=folded, stream=stream, dtype=dtype)
    return dx_BtD.astype(dtype), dtable_vD, None


_streamed.defvjp(_forward, _backward)
