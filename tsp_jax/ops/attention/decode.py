"""Attention of one new token per sequence to the KV cache, with stationary weights: queries are sent to the keys.

The new tokens are replicated over all mesh axes, except batch axes that shard no weights. Each device projects them
with its own rows of the weights. Queries are gathered, so that each device attends to its own cache entries, of its own
sequences, for all heads of its tensor shard. The partial softmaxes are merged on the devices that hold the output
weights. The cache is only read: the new keys and values of all layers are written at once, after the last layer.

Dims: B batch, b sequences whose cache this device has (fewer than B if folded axes shard the batch), s this device's
cache entries, D model, N query heads and K KV heads of this tensor shard, G = N / K, H head, w this device's rows of a
weight, R ranks of the sequence, or ranks that share the rows of weights.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.attention.all_heads import finish_heads
from tsp_jax.ops.attention.kv_cache import KeyValues, NewEntries, row_major, to_cache_order
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadBiases, HeadNorms, ShardedHeads
from tsp_jax.ops.attention.sinks import sinks_of_shard
from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens, may_attend
from tsp_jax.ops.linear import matmul, matmul_t
from tsp_jax.ops.stream import Stream, zeros


def decode_attention(
    x_B1D: jax.Array, weights: AttentionWeights, norms: HeadNorms | None, cache: KeyValues, layer: jax.Array,
    positions_b1: jax.Array, entries: NewEntries, entry_positions_bs: jax.Array, sinks_N: jax.Array | None = None,
    biases: HeadBiases | None = None, *, config: AttentionConfig, axes: Axes = Axes(),
) -> tuple[jax.Array, KeyValues]:  # fmt: skip
    """Attention of one new token per sequence to itself and to all cached tokens.

    Forward only: ``out = softmax(s) [V_cache; v]``, ``y = concat_h(out_h) Wo``, where the scores s follow from
    ``[q K_cache^T, q k^T]`` as `Scores` says. Device i computes (out_i, lse_i) over its own cache entries; merged,
    these give ``out = sum_i out_i exp(lse_i - logsumexp_i(lse_i))``, with the sink among the lse_i if there is one.

    Args:
      x_B1D: the new tokens in the compute dtype, replicated over all axes except batch axes that are not folded.
      weights: this device's rows, any float dtype.
      norms: scales of q/k RMSNorm, or None.
      cache: this device's shard, in the compute dtype.
      layer: [] int32, layer of the cache to read.
      positions_b1: int32, of the new tokens; `NO_TOKEN` where a sequence has none.
      entries: cache entries of the new tokens; exactly one rank of the sequence keeps each token.
      entry_positions_bs: int32, positions of this device's cache entries, without the new tokens.
      sinks_N: float32 [N], sinks of all query heads of the model (`tsp_jax.ops.attention.sinks`), or None.
      biases: of the projections to queries, keys and values, or None.
      config: static sizes.
      axes: the mesh axes by role. Folded axes act as tensor axes here.

    Returns:
      (y [B, 1, D] in x's dtype, replicated like x; keys and values to be written, [1, b, K, 1, H] in x's dtype).

    Moves: only float32 elements; no weights, and no cached keys or values. Over folded axes, one all-gather of
      B (N + 2 K) H and one reduce-scatter of B N H; over sequence axes, one all-gather of R b N log-sum-exps; over
      sequence axes that are not folded, one all-reduce of B w; over the axes that shard weights, one all-reduce of B D.
    Keeps: nothing.
    Source: partial softmaxes merged by log-sum-exp: Dao et al., Flash-Decoding (2023); arXiv 2411.01783 (pass-Q).
    """
    with jax.named_scope("tsp/attention/decode"):
        heads = ShardedHeads.of(config, axes, Stream())
        q_b1NH, k_b1KH, v_b1KH = _project_and_gather(x_B1D, weights, norms or HeadNorms(), biases, positions_b1, heads)
        new = to_cache_order(k_b1KH, v_b1KH)
        tokens = Tokens.one_document(positions_b1), Tokens.one_document(entry_positions_bs)
        attended_bs = may_attend(*tokens, config.scores)
        cache = KeyValues(*(row_major(lax.dynamic_slice_in_dim(array, layer, 1)) for array in cache))
        out_bNH, lse_bN = _attend_to_shard(q_b1NH, cache, new, attended_bs, entries.count_B1 > 0, config.scores)
        out_B1w = _merge_ranks(out_bNH, lse_bN, sinks_of_shard(sinks_N, heads), heads).astype(x_B1D.dtype)
        y_B1D = matmul(out_B1w, weights.o_wD.astype(x_B1D.dtype))
        weight_axes = axes.tensor + axes.folded
        return (lax.psum(y_B1D, weight_axes) if weight_axes else y_B1D).astype(x_B1D.dtype), new


def _project_and_gather(
    x_B1D, weights: AttentionWeights, norms: HeadNorms, biases: HeadBiases | None, positions_b1, heads: ShardedHeads
):
    """(q, k, v) of this device's sequences, for all heads of this tensor shard.

    Each device projects all tokens with its own rows; the results are gathered.
    """
    axes, dtype = heads.axes, x_B1D.dtype
    queries, keys_values = heads.queries, heads.keys_values
    q, k, v = (matmul_t(x_B1D, w.astype(dtype)) for w in weights[:3])
    if queries.axes == keys_values.axes:
        q, k, v = _gather_rows((q, k, v), queries.axes)
    else:
        (q,), (k, v) = _gather_rows((q,), queries.axes), _gather_rows((k, v), keys_values.axes)
    groups = (queries, q), (keys_values, k), (keys_values, v)
    q, k, v = (heads.select_rows(group, rows_B1w, axis=2) for group, rows_B1w in groups)
    q, k, v = (_own_sequences(a, positions_b1.shape[0], axes) for a in (q, k, v))
    return finish_heads((q, k, v), norms, biases, positions_b1, heads, dtype)


def _own_sequences(array_B: jax.Array, size: int, axes: Axes) -> jax.Array:
    """[B, ...] -> [b, ...]: the `size` sequences whose cache entries this device has."""
    if not axes.folded_batch:
        return array_B
    return lax.dynamic_slice_in_dim(array_B, lax.axis_index(axes.folded_batch) * size, size)


def _among_all_sequences(array_b: jax.Array, axes: Axes) -> jax.Array:
    """[b, ...] -> [B, ...]: zeros for sequences of other devices."""
    if not axes.folded_batch:
        return array_b
    size, ranks = array_b.shape[0], lax.axis_size(axes.folded_batch)
    zeros_B = zeros((size * ranks, *array_b.shape[1:]), array_b.dtype, like=array_b)
    return lax.dynamic_update_slice_in_dim(zeros_B, array_b, lax.axis_index(axes.folded_batch) * size, axis=0)


def _gather_rows(arrays_B1w: tuple[jax.Array, ...], axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Each [B, 1, w] -> [B, 1, R w], the rows of all ranks, rank after rank; all arrays in one message."""
    if not axes:
        return arrays_B1w
    with jax.named_scope("gather_rows"):
        message_RB1w = lax.all_gather(jnp.concatenate(arrays_B1w, axis=-1), axes)
    parts_RB1w = lax.split(message_RB1w, [array.shape[-1] for array in arrays_B1w], axis=3)
    return tuple(jnp.moveaxis(part, 0, 2).reshape(*arrays_B1w[0].shape[:2], -1) for part in parts_RB1w)


def _attend_to_shard(q_B1NH, cache: KeyValues, new: KeyValues, attended_Bs, keeps_new_B1, rule: Scores):
    """(out [B, N, H], lse [B, N]), float32: attention to this device's cache entries, and to new tokens that it keeps.

    Where a sequence has no key on this device, out is 0 and lse is `MASKED`.
    """
    batch, _, heads, head_dim = q_B1NH.shape
    (k_BKsH, v_BKsH), (k_BK1H, v_BK1H) = ((kv.k_LBKsH[0], kv.v_LBKsH[0]) for kv in (cache, new))
    q_BKGH = q_B1NH.reshape(batch, k_BKsH.shape[1], -1, head_dim)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def scores(k_BKsH, attended_Bs):
        s_BKGs = rule.cap(dot("bkgh,bksh->bkgs", q_BKGH, k_BKsH) * rule.scale_of(head_dim))
        return jnp.where(attended_Bs[:, None, None], s_BKGs, MASKED)

    s_BKGs, s_BKG1 = scores(k_BKsH, attended_Bs), scores(k_BK1H, keeps_new_B1)
    top_BKG1 = jnp.maximum(s_BKGs.max(axis=-1, keepdims=True), s_BKG1)
    p_BKGs, p_BKG1 = (jnp.exp(s - top_BKG1) for s in (s_BKGs, s_BKG1))
    total_BKG1 = p_BKGs.sum(axis=-1, keepdims=True) + p_BKG1
    out_BKGH = dot("bkgs,bksh->bkgh", p_BKGs.astype(v_BKsH.dtype), v_BKsH) + p_BKG1 * v_BK1H.astype(jnp.float32)
    lse_BKG1 = top_BKG1 + jnp.log(total_BKG1)
    is_empty_BKG1 = top_BKG1 <= MASKED / 2
    out_BKGH = jnp.where(is_empty_BKG1, 0.0, out_BKGH / total_BKG1)
    return out_BKGH.reshape(batch, heads, head_dim), jnp.where(is_empty_BKG1, MASKED, lse_BKG1).reshape(batch, heads)


def _merge_ranks(out_bNH, lse_bN, sinks_KG: jax.Array | None, heads: ShardedHeads) -> jax.Array:
    """[B, 1, w]: attention to all cache entries, for the rows of Wo that this device holds."""
    axes = heads.axes
    with jax.named_scope("merge_ranks"):
        total_bN = lse_bN
        if axes.sequence:
            total_bN = jax.nn.logsumexp(lax.all_gather(lse_bN, axes.sequence), axis=0)
        if sinks_KG is not None:
            total_bN = jnp.logaddexp(total_bN, sinks_KG.reshape(1, -1))
        if total_bN is not lse_bN:
            out_bNH = out_bNH * jnp.exp(lse_bN - total_bN)[..., None]
        out_BNH = _among_all_sequences(out_bNH, axes)
        out_Bw = heads.queries.rows.by_rank(out_BNH.reshape(out_BNH.shape[0], -1), axis=1)
        if axes.folded:
            out_Bw = lax.psum_scatter(out_Bw, axes.folded, scatter_dimension=1, tiled=True)
        if axes.unfolded_sequence:
            out_Bw = lax.psum(out_Bw, axes.unfolded_sequence)
        return out_Bw[:, None]
