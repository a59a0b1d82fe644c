"""Attention sinks: one more score for each query head, learned, that has no value.

``out = sum_j exp(s_j) v_j / (exp(sink) + sum_j exp(s_j))``. A sink enters after the kernel, through the log-sum-exp, so
no kernel knows of sinks.

Source: gpt-oss, arXiv 2508.10925; the name is from Xiao et al., arXiv 2309.17453.

Dims: B batch, t this device's tokens, N query heads, K KV heads, G = N / K, H head; k, g the same of one rank.
"""

import jax
import jax.numpy as jnp

from tsp_jax.errors import ConfigError
from tsp_jax.ops.attention.sharded_heads import ShardedHeads


def sinks_of_shard(sinks_N: jax.Array | None, heads: ShardedHeads) -> jax.Array | None:
    """[K, G]: the sinks of this tensor shard's query heads, from those of all real heads; 0 for padded heads.

    Raises:
      ConfigError: there is not one sink for each query head.
    """
    if sinks_N is None:
        return None
    model, shard = heads.config.heads, heads.sharding.shard
    num_heads = model.num_kv_heads * model.real_group
    if sinks_N.shape != (num_heads,):
        raise ConfigError(f"attention: sinks_N is {list(sinks_N.shape)}; use [{num_heads}], one for each query head")
    return heads.of_shard(sinks_N, queries=True).reshape(shard.kv, shard.group)


def sinks_of_rank(sinks_KG: jax.Array | None, heads: ShardedHeads) -> jax.Array | None:
    """[k, g]: the sinks of the heads that this folded rank computes for all folded ranks' tokens."""
    if sinks_KG is None:
        return None
    own = heads.sharding.own
    return heads.of_rank(sinks_KG.reshape(-1), queries=True).reshape(own.kv, own.group)


def add_sinks(
    out_BtKGH: jax.Array, lse_BtKG: jax.Array, sinks_KG: jax.Array | None
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out, lse) with the sinks among the scores, from those without; unchanged if there are no sinks."""
    if sinks_KG is None:
        return out_BtKGH, lse_BtKG
    total_BtKG = jnp.logaddexp(lse_BtKG, sinks_KG[None, None])
    return (out_BtKGH * jnp.exp(lse_BtKG - total_BtKG)[..., None]).astype(out_BtKGH.dtype), total_BtKG


def sinks_grad(delta_BtKG: jax.Array, lse_BtKG: jax.Array, sinks_KG: jax.Array | None) -> jax.Array | None:
    """Gradient of the sinks, ``-sum_Bt(exp(sink - lse) delta)``, from delta and lse with the sinks among the scores."""
    if sinks_KG is None:
        return None
    return -(jnp.exp(sinks_KG[None, None] - lse_BtKG) * delta_BtKG).sum(axis=(0, 1))
