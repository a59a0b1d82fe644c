"""Projections to queries, keys and values with biases, or with a norm over all heads: after the buckets of the weights.

A bucket of the weights has only some heads, and a norm over all heads needs them all. So where a layer has biases or
such a norm, the projections end without norm and RoPE, and all of these follow here. JAX derives the gradients.

Dims: B batch, t this device's tokens, T those of all folded ranks, D model, N query heads, K KV heads, H head; n and k
the heads of this tensor shard, or of this device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import AxisNames
from tsp_jax.ops.attention.projections import normalize_and_rotate, project_in, split_heads
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, HeadBiases, HeadNorms, ShardedHeads
from tsp_jax.ops.attention.stationary import StationaryHeads, stationary_project_in

QKV = tuple[jax.Array, jax.Array, jax.Array]


def project_heads(
    x_BtD: jax.Array, weights: Any, norms: HeadNorms, biases: HeadBiases | None, positions_Bt: jax.Array,
    heads: ShardedHeads,
) -> QKV:  # fmt: skip
    """`project_in`, with biases if there are any: ``q = rope(norm(x Wq^T + bq))``, likewise k; ``v = x Wv^T + bv``.

    Moves: as `project_in`; for a norm over all heads also two all-reduces of [B, t] float32 over tensor axes.
    Keeps: as `project_in`; with biases or a norm over all heads, queries and keys before these too.
    """
    config = heads.config
    if not _after(config, biases):
        return project_in(x_BtD, weights, norms, positions_Bt, heads)
    raw = project_in(x_BtD, weights, HeadNorms(), positions_Bt, heads._replace(config=_without_rope(config)))
    return finish_heads(raw, norms, biases, positions_Bt, heads, x_BtD.dtype)


def stationary_project_heads(
    x_BtD: jax.Array, weights: Any, norms: HeadNorms, biases: HeadBiases | None, positions_BT: jax.Array,
    stationary: StationaryHeads, heads: ShardedHeads,
) -> QKV:  # fmt: skip
    """`stationary_project_in`, with biases if there are any. `heads`: how the model's heads are sharded.

    Moves: as `stationary_project_in`; for a norm over all heads also two all-reduces of [B, T] float32 over folded and
      tensor axes.
    """
    config = stationary.config
    if not _after(config, biases):
        return stationary_project_in(x_BtD, weights, norms, positions_BT, stationary)
    stationary = stationary._replace(config=_without_rope(config))
    raw = stationary_project_in(x_BtD, weights, HeadNorms(), positions_BT, stationary)
    return finish_heads(raw, norms, biases, positions_BT, heads, x_BtD.dtype, own=True)


def _after(config: AttentionConfig, biases: HeadBiases | None) -> bool:
    return biases is not None or config.norm_width == "all"


def _without_rope(config: AttentionConfig) -> AttentionConfig:
    return config._replace(rope_theta=None)


def finish_heads(
    projected: QKV, norms: HeadNorms, biases: HeadBiases | None, positions_Bt: jax.Array, heads: ShardedHeads,
    dtype: Any, own: bool = False,
) -> QKV:  # fmt: skip
    """(q, k, v) in `dtype` from products with Wq, Wk and Wv: biases, norms and RoPE.

    Args:
      projected: [B, t, n, H] and twice [B, t, k, H], any float dtype: this tensor shard's heads, or those of this
        device if `own`.
      norms: scales of q/k RMSNorm.
      biases: of all heads of the model, or None.
      positions_Bt: int32.
      heads: how the model's heads are sharded.
      dtype: of the result; everything is computed in float32.
      own: the heads are those that this folded rank computes for all folded ranks' tokens.
    """
    config = heads.config

    def here(of_model: jax.Array, queries: bool) -> jax.Array:
        """Biases or scales of all heads of the model -> those of these heads, [1, 1, n, H] float32."""
        of_shard_nH = heads.of_shard(of_model.reshape(-1, config.head_dim), queries)
        here_nH = heads.of_rank(of_shard_nH, queries) if own else of_shard_nH
        return here_nH[None, None].astype(jnp.float32)

    def finish(x_BtnH: jax.Array, norm: jax.Array | None, bias: jax.Array | None, queries: bool) -> jax.Array:
        x_BtnH = x_BtnH.astype(jnp.float32)
        if bias is not None:
            x_BtnH = x_BtnH + here(bias, queries)
        if norm is not None and config.norm_width == "all":
            x_BtnH, norm = _norm_over_all(x_BtnH, here(norm, queries), queries, heads, own), None
        return normalize_and_rotate(x_BtnH, norm, positions_Bt, config, dtype)

    q, k, v = (split_heads(array, config.head_dim) for array in projected)
    q_bias, k_bias, v_bias = biases or (None, None, None)
    with jax.named_scope("all_heads"):
        if v_bias is not None:
            v = v.astype(jnp.float32) + here(v_bias, False)
        return finish(q, norms.q_H, q_bias, True), finish(k, norms.k_H, k_bias, False), v.astype(dtype)


def _norm_over_all(
    x_BtnH: jax.Array, scale_11nH: jax.Array, queries: bool, heads: ShardedHeads, own: bool
) -> jax.Array:  # fmt: skip
    """RMSNorm over all heads of the model. Each rank has some heads; ranks may share KV heads. float32."""
    config, sharding, axes = heads.config, heads.sharding, heads.axes
    ranks: AxisNames = axes.tensor + axes.folded if own else axes.tensor
    copies = 1
    if not queries:
        copies = max(1, sharding.tensor // config.heads.kv)
        copies *= max(1, sharding.folded // sharding.by_rank.kv) if own else 1
    real = config.heads.num_kv_heads * (config.heads.real_group if queries else 1)
    sum_Bt11 = jnp.sum(x_BtnH * x_BtnH, axis=(2, 3), keepdims=True)
    sum_Bt11 = lax.psum(sum_Bt11, ranks) if ranks else sum_Bt11
    mean_Bt11 = sum_Bt11 / (copies * real * config.head_dim)
    return x_BtnH * lax.rsqrt(mean_Bt11 + config.norm_eps) * scale_11nH
