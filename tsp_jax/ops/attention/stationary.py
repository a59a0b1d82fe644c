"""Heads of attention by resident weights: tokens of all folded ranks in, this rank's heads out, and back.

`projections` with the movement turned round: instead of all heads of this rank's tokens these make this rank's heads of
all tokens, so that no keys or values need be exchanged over the folded axes. With fewer KV slots than ranks the weights
of the few KV heads are still gathered.

Dims: B batch, t this device's tokens, T those of all R folded ranks, p tokens of a bucket, D model, n query heads and k
KV heads of this device, H head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import AxisNames
from tsp_jax.ops.attention.projections import AttentionConfig, HeadNorms, Projections, prepare, split_heads
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.stationary import add, cast_all, over_gathered_tokens
from tsp_jax.ops.stream import Bucket, Stream, custom_vjp, over_buckets, over_buckets_with_grads, zeros


class Moved(NamedTuple):
    """How tokens move past heads. Hashable."""

    static: Projections
    """folded axes act as tensor axes, and each op has one bucket of weights"""
    folded: AxisNames
    stream: Stream
    """token_buckets"""


def _columns(heads_BpnH: jax.Array) -> jax.Array:
    return heads_BpnH.reshape(*heads_BpnH.shape[:2], -1)


# ------------------------------------------------------------------------------------------------ in


@custom_vjp(4)
def moved_in(x_BtD: jax.Array, weights, norms: HeadNorms, positions_BT: jax.Array, how: Moved):
    """``(rope(norm(x Wq^T)), rope(norm(x Wk^T)), x Wv^T)`` of all tokens, for this rank's heads.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: (q, k, v) of `AttentionWeights`, any float dtype.
      norms: scales of q/k RMSNorm.
      positions_BT: int32, of all tokens.
      how: axes and buckets.

    Returns:
      Queries [B, T, n, H], keys and values [B, T, k, H], in x's dtype; sums in float32.

    Moves: forward B T D (R - 1) / R (x here); backward twice that (x here, dx home).
    Keeps: its inputs.
    """
    return _in_forward(x_BtD, weights, norms, positions_BT, how)[0]


def _heads(norms: HeadNorms, columns_Bp: jax.Array, positions_Bp: jax.Array, rows, config: AttentionConfig, dtype):
    """(q, k, v) of products with weights of so many rows each, packed."""
    q, k, v = jnp.split(columns_Bp, [rows[0], rows[0] + rows[1]], axis=-1)
    q, k = (prepare(norm, positions_Bp, config, dtype, part) for norm, part in zip(norms, (q, k), strict=True))
    return q, k, split_heads(v, config.head_dim).astype(dtype)


def _packed(w_q: jax.Array, bucket: Bucket, static: Projections, dtype) -> tuple[jax.Array, tuple[int, ...]]:
    """(rows of all three weights in the compute dtype, how many of each)."""
    weights = (w_q.astype(dtype), *(static.my_heads(w) for w in bucket.arrays))
    return jnp.concatenate(weights), tuple(w.shape[0] for w in weights)


def _in_forward(x_BtD, weights, norms: HeadNorms, positions_BT, how: Moved):
    static, dtype = how.static, x_BtD.dtype

    def all_tokens(_, bucket: Bucket):
        w_pD, rows = _packed(weights[0], bucket, static, dtype)

        def body(carry, arrived, here):
            (x_BpD,), (positions_Bp,) = arrived, here
            return carry, (), _heads(norms, matmul_t(x_BpD, w_pD), positions_Bp, rows, static.config, dtype)

        return over_gathered_tokens(body, (), (x_BtD,), (positions_BT,), axes=how.folded, stream=how.stream)[2], None

    kv = static.keys_values
    heads, _ = over_buckets(all_tokens, (), weights[1:], axes=kv.axes, stream=kv.stream, dtype=dtype)
    return heads, (x_BtD, weights, norms, positions_BT)


def _in_backward(how: Moved, residuals, cotangents):
    x_BtD, weights, norms, positions_BT = residuals
    static, dtype = how.static, x_BtD.dtype

    def all_tokens(_, bucket: Bucket):
        w_pD, rows = _packed(weights[0], bucket, static, dtype)

        def body(grads, arrived, here):
            (x_BpD,), (positions_Bp, *dheads) = arrived, here

            def heads(norms, columns_Bp):
                return _heads(norms, columns_Bp, positions_Bp, rows, static.config, dtype)

            # Without norms nothing below reads the product, and it is never computed.
            dnorms, dcolumns_Bp = jax.vjp(heads, norms, matmul_t(x_BpD, w_pD))[1](tuple(dheads))
            dcolumns_Bp = dcolumns_Bp.astype(dtype)
            more = outer(dcolumns_Bp, x_BpD), dnorms
            return add(grads, more), (matmul(dcolumns_Bp, w_pD).astype(dtype),), ()

        grads = jax.tree.map(lambda array: zeros(array.shape, jnp.float32, like=x_BtD), (w_pD, norms))
        arrive = (lax.optimization_barrier(x_BtD),)  # see over_buckets_with_grads
        (dw_pD, dnorms), (dx_BtD,), _ = over_gathered_tokens(
            body, grads, arrive, (positions_BT, *cotangents), axes=how.folded, stream=how.stream
        )
        dw_q, *dw_kv = jnp.split(dw_pD, [rows[0], rows[0] + rows[1]])
        return (dx_BtD, dw_q, dnorms), tuple(static.all_heads(dw) for dw in dw_kv), None

    kv = static.keys_values
    (dx_BtD, dw_q, dnorms), dw_kv, _ = over_buckets_with_grads(
        all_tokens, (), weights[1:], axes=kv.axes, stream=kv.stream, dtype=dtype
    )
    return dx_BtD, (dw_q.astype(weights[0].dtype), *dw_kv), dnorms, None


moved_in.defvjp(_in_forward, _in_backward)


# ------------------------------------------------------------------------------------------------ out


@custom_vjp(2)
def moved_out(out_BTnH: jax.Array, wo_nHD: jax.Array, how: Moved) -> jax.Array:
    """``concat_h(out_h) Wo`` of this rank's tokens, summed over the heads of all folded ranks.

    Args:
      out_BTnH: outputs of this rank's heads, in the compute dtype.
      wo_nHD: this device's rows, any float dtype.
      how: axes and buckets.

    Returns:
      [B, t, D] in out's dtype; sums of a rank in float32, of ranks in out's dtype.

    Moves: forward B T D (R - 1) / R (y home), backward as much (dy here).
    Keeps: its inputs.
    """
    return _out_forward(out_BTnH, wo_nHD, how)[0]


def _out_forward(out_BTnH, wo_nHD, how: Moved):
    (w_o,) = cast_all((wo_nHD,), out_BTnH.dtype)

    def body(carry, _, here):
        return carry, (matmul(here[0], w_o).astype(out_BTnH.dtype),), ()

    _, (y_BtD,), _ = over_gathered_tokens(body, (), (), (_columns(out_BTnH),), axes=how.folded, stream=how.stream)
    return y_BtD, (out_BTnH, wo_nHD)


def _out_backward(how: Moved, residuals, dy_BtD):
    out_BTnH, wo_nHD = residuals
    (w_o,) = cast_all((wo_nHD,), out_BTnH.dtype)

    def body(dwo_nHD, arrived, here):
        (dy_BpD,), (out_Bp,) = arrived, here
        return dwo_nHD + outer(out_Bp, dy_BpD), (), (matmul_t(dy_BpD, w_o).astype(out_BTnH.dtype),)

    dwo_nHD = zeros(wo_nHD.shape, jnp.float32, like=out_BTnH)
    dwo_nHD, _, (dout,) = over_gathered_tokens(
        body, dwo_nHD, (dy_BtD,), (_columns(out_BTnH),), axes=how.folded, stream=how.stream
    )
    return dout.reshape(out_BTnH.shape), dwo_nHD.astype(wo_nHD.dtype)


moved_out.defvjp(_out_forward, _out_backward)
