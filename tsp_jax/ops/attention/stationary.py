"""Projections of attention with stationary weights: all folded ranks' tokens to this rank's heads, and back to tokens.

The counterpart of `projections`, which computes all heads of this rank's tokens. Here each rank computes its own heads
for all tokens, so that no keys or values are exchanged over the folded axes. Where a rank does not store whole heads,
the ranks first exchange rows, so that each has those of its own heads.

Dims: B batch, t this device's tokens, T those of all R folded ranks, p tokens of a bucket (all ranks), D model, n query
heads and k KV heads of this device, H head, w this device's rows of a weight, u rows of Wq, Wk and Wv together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.heads import HeadRows
from tsp_jax.layout import AxisNames
from tsp_jax.ops.attention.projections import normalize_and_rotate, split_heads
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadNorms, HeadStream, ShardedHeads
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.stationary import add, over_gathered_tokens
from tsp_jax.ops.stream import Arrays, Stream, custom_vjp, zeros


class StationaryHeads(NamedTuple):
    """This device's heads, whose weights are stationary, and how tokens are gathered for them. Hashable."""

    config: AttentionConfig
    """static sizes, with the heads of this device"""
    folded: AxisNames
    """axes over which tokens are gathered and partial outputs reduce-scattered"""
    stream: Stream
    """only its `token_buckets` is used"""

    def over_tokens(self, body, carry, sharded: Arrays, gathered: Arrays):
        """`over_gathered_tokens` on the folded axes."""
        return over_gathered_tokens(body, carry, sharded, gathered, axes=self.folded, stream=self.stream)


# ------------------------------------------------------------------------------------------------ weights


def weights_of_own_heads(weights: AttentionWeights, heads: ShardedHeads) -> AttentionWeights:
    """The rows of this rank's own heads, with which it processes all folded ranks' tokens; zeros for padded heads.

    Ranks that store whole heads have these rows already. Otherwise ranks exchange units of heads: each receives the
    units that contain its heads. JAX derives the transpose, which adds up the gradients of heads that ranks share.

    Args:
      weights: this device's rows, as stored, any float dtype.
      heads: how the heads are sharded.

    Returns:
      Wq and Wo [n H, D], Wk and Wv [k H, D], in the dtypes of `weights`.

    Moves: nothing if ranks store whole heads. Otherwise one all-to-all for each weight, in which a rank receives
      (R - 1) / R of its units, in the dtype of the weight; backward as many gradients.
    """
    query_heads, kv_heads = heads.sharding.own_heads()

    def own(w: jax.Array, group: HeadStream, head_numbers: list[list[int]]) -> jax.Array:
        return w if group.rows.whole else _exchange_heads(w, group.rows, head_numbers, group.axes)

    with jax.named_scope("exchange_heads"):
        return AttentionWeights(
            own(weights.q_wD, heads.queries, query_heads), own(weights.k_wD, heads.keys_values, kv_heads),
            own(weights.v_wD, heads.keys_values, kv_heads), own(weights.o_wD, heads.queries, query_heads),
        )  # fmt: skip


def _exchange_heads(w_wD: jax.Array, rows: HeadRows, head_numbers: list[list[int]], axes: AxisNames) -> jax.Array:
    """[n H, D]: the rows of this rank's heads. `head_numbers` [R, n] lists the heads of every rank."""
    units_Ru, places_Rn = (jnp.asarray(f(head_numbers)) for f in (rows.units_of, rows.places_of))
    by_unit = w_wD.reshape(rows.units, rows.rows_of_unit, -1)
    received_RurD = lax.all_to_all(by_unit[units_Ru], axes, split_axis=0, concat_axis=0, tiled=True)
    units_uvD = received_RurD.swapaxes(0, 1).reshape(units_Ru.shape[1], -1, w_wD.shape[-1])
    heads_mHD = units_uvD[:, : rows.unit * rows.dim].reshape(-1, rows.dim, w_wD.shape[-1])
    places_n = places_Rn[lax.axis_index(axes)]
    own_nHD = jnp.where(places_n[:, None, None] >= 0, heads_mHD[places_n], 0)
    return own_nHD.reshape(-1, w_wD.shape[-1])


def _merge_heads(heads_BpnH: jax.Array) -> jax.Array:
    return heads_BpnH.reshape(*heads_BpnH.shape[:2], -1)


# ------------------------------------------------------------------------------------------------ in


@custom_vjp(4)
def stationary_project_in(
    x_BtD: jax.Array, weights, norms: HeadNorms, positions_BT: jax.Array, stationary: StationaryHeads
):
    """Queries, keys and values of all folded ranks' tokens, for this rank's heads.

    The equations are those of `project_in`, with x gathered over the folded axes (which shard both tokens and weights).
    dx is reduce-scattered over the folded axes; the weight gradients need no sum over them.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: (q, k, v) of `weights_of_own_heads`, any float dtype.
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


def _concatenate_rows(weights, dtype) -> tuple[jax.Array, tuple[int, int]]:
    """(the rows of Wq, Wk and Wv, joined in the compute dtype; (end of Wq's rows, end of Wk's rows))."""
    w_q, w_k, _ = weights
    return jnp.concatenate([w.astype(dtype) for w in weights]), (w_q.shape[0], w_q.shape[0] + w_k.shape[0])


def _in_forward(x_BtD, weights, norms: HeadNorms, positions_BT, stationary: StationaryHeads):
    dtype = x_BtD.dtype
    w_uD, ends = _concatenate_rows(weights, dtype)

    def body(carry, sharded, gathered):
        (x_BpD,), (positions_Bp,) = sharded, gathered
        projected_Bpu = matmul_t(x_BpD, w_uD)
        return carry, (), _split_projected(projected_Bpu, norms, positions_Bp, ends, stationary.config, dtype)

    qkv = stationary.over_tokens(body, (), (x_BtD,), (positions_BT,))[2]
    return qkv, (x_BtD, weights, norms, positions_BT)


def _in_backward(stationary: StationaryHeads, residuals, cotangents):
    x_BtD, weights, norms, positions_BT = residuals
    dtype = x_BtD.dtype
    w_uD, ends = _concatenate_rows(weights, dtype)

    def body(grads, sharded, gathered):
        (x_BpD,), (positions_Bp, *dqkv) = sharded, gathered

        def project(norms, projected_Bpu):
            return _split_projected(projected_Bpu, norms, positions_Bp, ends, stationary.config, dtype)

        # Without norms nothing below reads the product, and it is never computed.
        dnorms, dprojected_Bpu = jax.vjp(project, norms, matmul_t(x_BpD, w_uD))[1](tuple(dqkv))
        dprojected_Bpu = dprojected_Bpu.astype(dtype)
        return add(grads, (outer(dprojected_Bpu, x_BpD), dnorms)), (matmul(dprojected_Bpu, w_uD).astype(dtype),), ()

    grads = jax.tree.map(lambda array: zeros(array.shape, jnp.float32, like=x_BtD), (w_uD, norms))
    sharded = (lax.optimization_barrier(x_BtD),)  # see over_buckets_with_grads
    (dw_uD, dnorms), (dx_BtD,), _ = stationary.over_tokens(body, grads, sharded, (positions_BT, *cotangents))
    dw = (d.astype(w.dtype) for d, w in zip(jnp.split(dw_uD, ends), weights, strict=True))
    return dx_BtD, tuple(dw), dnorms, None


stationary_project_in.defvjp(_in_forward, _in_backward)


# ------------------------------------------------------------------------------------------------ out


@custom_vjp(2)
def stationary_project_out(out_BTnH: jax.Array, wo_wD: jax.Array, stationary: StationaryHeads) -> jax.Array:
    """The output projection of this rank's tokens, summed over the heads of all folded ranks.

    Forward: ``y = concat_h(out_h) Wo``, summed over the folded ranks. With dy of all folded ranks, dgrad:
    ``dout = dy Wo^T``; wgrad: ``dWo = out^T dy``; neither needs a sum over ranks.

    Args:
      out_BTnH: outputs of this rank's heads, for all folded ranks' tokens, in the compute dtype.
      wo_wD: o of `weights_of_own_heads`, any float dtype.
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
