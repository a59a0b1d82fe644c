"""Attention of one new token a sequence to a cache: queries move to the keys, and weights stay where they are.

The token is on every device. Each projects it by its own weight rows; queries are gathered, so that each device can
attend to its own slots for all heads of its tensor shard; the partial softmaxes are merged on the devices that hold the
heads' output weights. The cache is only read: new keys and values of all layers are written at once, afterwards.

Dims: B batch, c this device's slots, D model, N query heads and K KV heads of this tensor shard, n this device's query
heads, G query heads of a KV head, H head, R ranks of the sequence.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.attention.kv_cache import Claim, KeyValues, as_stored, row_major
from tsp_jax.ops.attention.projections import (
    AttentionConfig,
    AttentionWeights,
    HeadNorms,
    Projections,
    prepare,
    split_heads,
)
from tsp_jax.ops.kernels.mask import MASKED, Tokens, may_attend
from tsp_jax.ops.linear import matmul, matmul_t
from tsp_jax.ops.stream import Stream


def decode_attention(
    x_B1D: jax.Array,
    weights: AttentionWeights,
    norms: HeadNorms | None,
    cache: KeyValues,
    layer: jax.Array,
    positions_B1: jax.Array,
    claim: Claim,
    keys_Bc: jax.Array,
    *,
    config: AttentionConfig,
    axes: Axes = Axes(),
) -> tuple[jax.Array, KeyValues]:
    """Attention of one new token a sequence to itself and to all that the cache holds; no weight moves.

    Args:
      x_B1D: the new tokens, the same on all devices but those of other batch shards.
      weights: this device's rows, any float dtype.
      norms: scales of q/k RMSNorm, or None.
      cache: in the compute dtype.
      layer: [] int32, which layer of the cache.
      positions_B1: of the new tokens, `NO_TOKEN` where there is none.
      claim: of the ranks of the sequence one alone claims a slot for a token.
      keys_Bc: positions of this device's slots, without the new tokens.
      config: static sizes.
      axes: roles of the mesh axes of the heads. Folded axes act as tensor axes do.

    Returns:
      (y [B, 1, D] in x's dtype, the same on all devices but those of other batch shards; keys and values to be
      written, [1, B, K, 1, H]).

    Moves: over folded axes an all-gather of B (N + 2 K) H and a reduce-scatter of B N H, over the sequence a gather of
      R B N log-sum-exps, over weight axes an all-reduce of B D; all float32, none of weights or keys.
    Source: partial softmaxes merged by log-sum-exp: Dao et al., Flash-Decoding (2023); arXiv 2411.01783 (pass-Q).
    """
    with jax.named_scope("tsp/attention/decode"):
        static = Projections.of(config, axes, Stream(), weights)
        norms = norms or HeadNorms(None, None)
        q_B1NH, k_B1KH, v_B1KH = _gather_heads(x_B1D, weights, norms, positions_B1, static)
        new = as_stored(k_B1KH, v_B1KH)
        seen_Bc = may_attend(Tokens.one_document(positions_B1), Tokens.one_document(keys_Bc))
        seen = seen_Bc, claim.count_B1 > 0
        cache = KeyValues(*(row_major(lax.dynamic_slice_in_dim(array, layer, 1)) for array in cache))
        out_BNH, lse_BN = _attend_here(q_B1NH, cache, new, *seen)
        out_BnH = _merge_ranks(out_BNH, lse_BN, axes).astype(x_B1D.dtype)
        y_B1D = matmul(out_BnH.reshape(out_BnH.shape[0], 1, -1), weights.o_nHD.astype(x_B1D.dtype))
        weight_axes = axes.tensor + axes.folded
        return (lax.psum(y_B1D, weight_axes) if weight_axes else y_B1D).astype(x_B1D.dtype), new


def _gather_heads(x_B1D, weights: AttentionWeights, norms: HeadNorms, positions_B1, static: Projections):
    """As `_stream_heads`, but each device projects by its own rows, and the results are gathered."""
    dtype = x_B1D.dtype
    q, k, v = (matmul_t(x_B1D, w.astype(dtype)) for w in weights[:3])
    if static.split_by_tensor:
        (q,) = _gather_rows((q,), static.axes.folded)
        k, v = _gather_rows((k, v), static.axes.tensor + static.axes.folded)
        k, v = (lax.dynamic_slice_in_dim(a, static.first_row(), static.config.head_dim, axis=2) for a in (k, v))
    else:
        q, k, v = _gather_rows((q, k, v), static.axes.folded)
    q, k = (prepare(norm, positions_B1, static.config, dtype, a) for norm, a in ((norms.q_H, q), (norms.k_H, k)))
    return q, k, split_heads(v, static.config.head_dim).astype(dtype)


def _gather_rows(arrays_Btp: tuple[jax.Array, ...], axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Each [B, t, rows of this device] -> [B, t, rows of all devices], in one message."""
    if not axes:
        return arrays_Btp
    with jax.named_scope("gather_rows"):
        message_RBtp = lax.all_gather(jnp.concatenate(arrays_Btp, axis=-1), axes)
    parts, start = [], 0
    for array_Btp in arrays_Btp:
        part_RBtp = lax.slice_in_dim(message_RBtp, start, start + array_Btp.shape[-1], axis=3)
        parts.append(jnp.moveaxis(part_RBtp, 0, 2).reshape(*array_Btp.shape[:2], -1))
        start += array_Btp.shape[-1]
    return tuple(parts)


def _attend_here(q_B1NH, cache: KeyValues, new: KeyValues, seen_Bc, mine_B1) -> tuple[jax.Array, jax.Array]:
    """Over this device's slots, and the new token itself where it is this device's to keep.

    Returns:
      (out [B, N, H], lse [B, N]), float32; an lse that weighs nothing where there is no key.
    """
    batch, _, heads, head_dim = q_B1NH.shape
    (k_BKcH, v_BKcH), (k_BK1H, v_BK1H) = ((kv.k_LBKcH[0], kv.v_LBKcH[0]) for kv in (cache, new))
    q_BKGH = q_B1NH.reshape(batch, k_BKcH.shape[1], -1, head_dim)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def scores(k_BKcH, seen_Bc):
        return jnp.where(seen_Bc[:, None, None], dot("bkgh,bkch->bkgc", q_BKGH, k_BKcH) * head_dim**-0.5, MASKED)

    s_BKGc, s_BKG1 = scores(k_BKcH, seen_Bc), scores(k_BK1H, mine_B1)
    top_BKG1 = jnp.maximum(s_BKGc.max(axis=-1, keepdims=True), s_BKG1)
    p_BKGc, p_BKG1 = (jnp.exp(s - top_BKG1) for s in (s_BKGc, s_BKG1))
    total_BKG1 = p_BKGc.sum(axis=-1, keepdims=True) + p_BKG1
    out_BKGH = dot("bkgc,bkch->bkgh", p_BKGc.astype(v_BKcH.dtype), v_BKcH) + p_BKG1 * v_BK1H.astype(jnp.float32)
    lse_BKG1 = top_BKG1 + jnp.log(total_BKG1)
    empty_BKG1 = top_BKG1 <= MASKED / 2
    out_BKGH = jnp.where(empty_BKG1, 0.0, out_BKGH / total_BKG1)
    return out_BKGH.reshape(batch, heads, head_dim), jnp.where(empty_BKG1, MASKED, lse_BKG1).reshape(batch, heads)


def _merge_ranks(out_BNH, lse_BN, axes: Axes) -> jax.Array:
    """[B, n, H]: of attention over every device's slots, the heads whose output weights this device holds."""
    if not axes.sequence:
        return out_BNH
    with jax.named_scope("merge_ranks"):
        lse_RBN = lax.all_gather(lse_BN, axes.sequence)
        weight_BN = jnp.exp(lse_BN - jax.nn.logsumexp(lse_RBN, axis=0))
        out_BNH = out_BNH * weight_BN[..., None]
        if axes.folded:
            out_BNH = lax.psum_scatter(out_BNH, axes.folded, scatter_dimension=1, tiled=True)
        others = tuple(name for name in axes.sequence if name not in axes.folded)
        return lax.psum(out_BNH, others) if others else out_BNH
