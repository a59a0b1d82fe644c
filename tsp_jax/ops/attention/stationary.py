"""Projections of attention with stationary weights: all folded ranks' tokens to this rank's heads, and back to tokens.

The counterpart of `projections`, which computes all heads of this rank's tokens. Here each rank computes its own heads
for all tokens, so that no keys or values are exchanged over the folded axes. With fewer KV heads than ranks the weights
of the few KV heads are still gathered.

Dims: B batch, t this device's tokens, T those of all R folded ranks, p tokens of a bucket (all ranks), D model, n query
heads and k KV heads of this device, H head, w this device's rows of a weight, u rows of Wq, Wk and Wv together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import AxisNames
from tsp_jax.ops.attention.projections import normalize_and_rotate, split_heads
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, HeadNorms, ShardedHeads
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.stationary import add, over_gathered_tokens
from tsp_jax.ops.stream import Arrays, Bucket, Stream, custom_vjp, over_buckets, over_buckets_with_grads, zeros


class StationaryHeads(NamedTuple):
    """Heads with stationary weights; the axes and buckets in which tokens are gathered to them. Hashable."""

    heads: ShardedHeads
    """with folded axes as tensor axes, and one bucket of weights in each op"""
    folded: AxisNames
    """axes over which tokens are gathered and partial outputs reduce-scattered"""
    stream: Stream
    """only its `token_buckets` is used"""

    def over_tokens(self, body, carry, sharded: Arrays, gathered: Arrays):
        """`over_gathered_tokens` on the folded axes."""
        return over_gathered_tokens(body, carry, sharded, gathered, axes=self.folded, stream=self.stream)


def _merge_heads(heads_BpnH: jax.Array) -> jax.Array:
    return heads_BpnH.reshape(*heads_BpnH.shape[:2], -1)


# ------------------------------------------------------------------------------------------------ in


@custom_vjp(4)
def stationary_project_in(
    x_BtD: jax.Array, weights, norms: HeadNorms, positions_BT: jax.Array, stationary: StationaryHeads
):
    """Queries, keys and values of all folded ranks' tokens, for this rank's heads.

    The equations of `project_in`, with x gathered over the folded axes (which shard both tokens and weights):
    dgrad is reduce-scattered over them; wgrad needs no sum over them.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: (q, k, v) of `AttentionWeights`, any float dtype.
      norms: scales of q/k RMSNorm.
      positions_BT: int32, of all folded ranks' tokens.
      stationary: axes and buckets; static.

    Returns:
      (q [B, T, n, H], k and v [B, T, k, H]), in x's dtype; sums in float32.

    Moves: forward an all-gather of x, B T D (R - 1) / R elements in x's dtype; backward that again and a reduce-scatter
      of as many elements of dx.
    Keeps: its inputs.
    Source: Megatron's sequence parallelism: Korthikanti et al., arXiv 2205.05198.
    """
    return _in_forward(x_BtD, weights, norms, positions_BT, stationary)[0]


def _split_projected(projected_Bpu, norms: HeadNorms, positions_Bp, ends, config: AttentionConfig, dtype):
    """(q, k, v) from a product with rows of Wq, Wk and Wv together."""
    q, k, v = jnp.split(projected_Bpu, ends, axis=-1)
    q, k = (normalize_and_rotate(a, norm, positions_Bp, config, dtype) for a, norm in zip((q, k), norms, strict=True))
    return q, k, split_heads(v, config.head_dim).astype(dtype)


def _concatenate_rows(w_q: jax.Array, kv: Bucket, heads: ShardedHeads, dtype) -> tuple[jax.Array, tuple[int, int]]:
    """(rows of Wq, Wk and Wv together, in the compute dtype; where those of Wq and of Wk end)."""
    w_q, w_k, w_v = w_q.astype(dtype), *(heads.select_rows(heads.keys_values, w) for w in kv.arrays)
    return jnp.concatenate([w_q, w_k, w_v]), (w_q.shape[0], w_q.shape[0] + w_k.shape[0])


def _in_forward(x_BtD, weights, norms: HeadNorms, positions_BT, stationary: StationaryHeads):
    heads, dtype = stationary.heads, x_BtD.dtype

    def project_all_tokens(_, kv: Bucket):
        w_uD, ends = _concatenate_rows(weights[0], kv, heads, dtype)

        def body(carry, sharded, gathered):
            (x_BpD,), (positions_Bp,) = sharded, gathered
            return carry, (), _split_projected(matmul_t(x_BpD, w_uD), norms, positions_Bp, ends, heads.config, dtype)

        return stationary.over_tokens(body, (), (x_BtD,), (positions_BT,))[2], None

    kv = heads.keys_values
    qkv, _ = over_buckets(project_all_tokens, (), weights[1:], axes=kv.axes, stream=kv.stream, dtype=dtype)
    return qkv, (x_BtD, weights, norms, positions_BT)


def _in_backward(stationary: StationaryHeads, residuals, cotangents):
    x_BtD, weights, norms, positions_BT = residuals
    heads, dtype = stationary.heads, x_BtD.dtype

    def all_tokens_vjp(_, kv: Bucket):
        w_uD, ends = _concatenate_rows(weights[0], kv, heads, dtype)

        def body(grads, sharded, gathered):
            (x_BpD,), (positions_Bp, *dqkv) = sharded, gathered

            def project(norms, projected_Bpu):
                return _split_projected(projected_Bpu, norms, positions_Bp, ends, heads.config, dtype)

            # Without norms nothing below reads the product, and it is never computed.
            dnorms, dprojected_Bpu = jax.vjp(project, norms, matmul_t(x_BpD, w_uD))[1](tuple(dqkv))
            dprojected_Bpu = dprojected_Bpu.astype(dtype)
            return add(grads, (outer(dprojected_Bpu, x_BpD), dnorms)), (matmul(dprojected_Bpu, w_uD).astype(dtype),), ()

        grads = jax.tree.map(lambda array: zeros(array.shape, jnp.float32, like=x_BtD), (w_uD, norms))
        sharded = (lax.optimization_barrier(x_BtD),)  # see over_buckets_with_grads
        (dw_uD, dnorms), (dx_BtD,), _ = stationary.over_tokens(body, grads, sharded, (positions_BT, *cotangents))
        dw_q, *dw_kv = jnp.split(dw_uD, ends)
        dw_kv = tuple(heads.select_rows_transpose(heads.keys_values, dw) for dw in dw_kv)
        return (dx_BtD, dw_q, dnorms), dw_kv, None

    kv = heads.keys_values
    (dx_BtD, dw_q, dnorms), dw_kv, _ = over_buckets_with_grads(
        all_tokens_vjp, (), weights[1:], axes=kv.axes, stream=kv.stream, dtype=dtype
    )
    return dx_BtD, (dw_q.astype(weights[0].dtype), *dw_kv), dnorms, None


stationary_project_in.defvjp(_in_forward, _in_backward)


# ------------------------------------------------------------------------------------------------ out


@custom_vjp(2)
def stationary_project_out(out_BTnH: jax.Array, wo_wD: jax.Array, stationary: StationaryHeads) -> jax.Array:
    """The output projection of this rank's tokens, summed over the heads of all folded ranks.

    Forward: ``y = concat_h(out_h) Wo``, summed over the folded ranks. With dy of all folded ranks, dgrad:
    ``dout = dy Wo^T``; wgrad: ``dWo = out^T dy``; neither needs a sum over ranks.

    Args:
      out_BTnH: outputs of this rank's heads, for all folded ranks' tokens, in the compute dtype.
      wo_wD: this device's rows, any float dtype.
      stationary: axes and buckets; static.

    Returns:
      [B, t, D] in out's dtype; sums over a rank's heads in float32, over ranks in out's dtype.

    Moves: forward a reduce-scatter of y, B T D (R - 1) / R elements in out's dtype; backward an all-gather of as many
      elements of dy.
    Keeps: its inputs.
    Source: as `stationary_project_in`.
    """
    return _out_forward(out_BTnH, wo_wD, stationary)[0]


def _out_forward(out_BTnH, wo_wD, stationary: StationaryHeads):

    w_o = wo_wD.astype(out_BTnH.dtype)

    def body(carry, _, gathered):
        return carry, (matmul(gathered[0], w_o).astype(out_BTnH.dtype),), ()

    _, (y_BtD,), _ = stationary.over_tokens(body, (), (), (_merge_heads(out_BTnH),))
    return y_BtD, (out_BTnH, wo_wD)


def _out_backward(stationary: StationaryHeads, residuals, dy_BtD):
    out_BTnH, wo_wD = residuals
    w_o = wo_wD.astype(out_BTnH.dtype)

    def body(dwo_wD, sharded, gathered):
        (dy_BpD,), (out_Bpw,) = sharded, gathered
        return dwo_wD + outer(out_Bpw, dy_BpD), (), (matmul_t(dy_BpD, w_o).astype(out_BTnH.dtype),)

    dwo_wD = zeros(wo_wD.shape, jnp.float32, like=out_BTnH)
    dwo_wD, _, (dout_BTw,) = stationary.over_tokens(body, dwo_wD, (dy_BtD,), (_merge_heads(out_BTnH),))
    return dout_BTw.reshape(out_BTnH.shape), dwo_wD.astype(wo_wD.dtype)


stationary_project_out.defvjp(_out_forward, _out_backward)
