"""Attention of many new tokens to themselves and to a KV cache: weights are streamed, keys and values gathered.

Three stages run one after another, so that their buffers are not in memory at the same time. The first streams
[Wq Wk Wv], projects this device's tokens, and writes keys and values into the cache. The second attends to all devices'
cache entries. The third streams Wo. New keys are read from the cache like old ones, so the same program serves a whole
prompt and a later chunk of a prompt.

Dims: B batch, t this device's new tokens, s this device's cache entries, S those of all ranks, p entries of a cache
chunk (t of every rank), b buckets of KV heads, D model, N query heads and K KV heads of this tensor shard (or of
one bucket of it), G = N / K, H head, R ranks of the sequence, w this device's rows of a weight.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.attention.all_heads import project_heads
from tsp_jax.ops.attention.kv_cache import EMPTY, KeyValues, NewEntries, row_major, to_cache_order, write_entries
from tsp_jax.ops.attention.projections import project_out, vary_inputs_alike
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadBiases, HeadNorms, ShardedHeads
from tsp_jax.ops.attention.sinks import add_sinks, sinks_of_shard
from tsp_jax.ops.kernels.kernel import merge
from tsp_jax.ops.kernels.mask import MASKED, Tokens
from tsp_jax.ops.sequence import gather_sequence
from tsp_jax.ops.stream import Stream, zeros


def prefill_attention(
    x_BtD: jax.Array, weights: AttentionWeights, norms: HeadNorms | None, cache: KeyValues, layer: jax.Array,
    positions_Bt: jax.Array, entries: NewEntries, entry_positions_BS: jax.Array, max_used: jax.Array,
    sinks_N: jax.Array | None = None, biases: HeadBiases | None = None, *, config: AttentionConfig,
    axes: Axes = Axes(), stream: Stream = Stream(),
) -> tuple[jax.Array, KeyValues]:  # fmt: skip
    """Causal attention of new tokens to themselves and to all cached tokens.

    Forward only: ``out_h = softmax(s_h) v_h`` over all cache entries, new tokens included; ``y = concat_h(out_h) Wo``.
    `Scores` says how the scores s follow from q and k.

    Args:
      x_BtD: this device's new tokens, in the compute dtype; tokens may be in any order over the ranks.
      weights: this device's rows, any float dtype.
      norms: scales of q/k RMSNorm, or None.
      cache: this device's shard, in the compute dtype.
      layer: [] int32, layer of the cache to read and write.
      positions_Bt: int32, of the new tokens; `NO_TOKEN` for padding.
      entries: cache entries of the new tokens.
      entry_positions_BS: int32, positions of all devices' cache entries, new tokens included, ranks in order.
      max_used: [] int32, the most entries that any device has in use; later entries are not read.
      sinks_N: float32 [N], sinks of all query heads of the model (`tsp_jax.ops.attention.sinks`), or None.
      biases: of the projections to queries, keys and values, or None.
      config: static sizes; `exchange_buckets`: number of buckets of KV heads, gathered one after another.
      axes: the mesh axes by role.
      stream: its movement is ignored: weights are always gathered; its buckets are replaced by those of `config`.

    Returns:
      (y [B, t, D] in x's dtype, the cache with the new tokens' keys and values).

    Moves:
      Weights: all-gathers of (2 N + 2 K) H D (F - 1) / F elements for F folded ranks.
      Keys and values: one all-gather for each cache chunk of each bucket of KV heads. In total 2 B U K H (R - 1) / R
      elements for U entries in use, those of all ranks.
      Over tensor axes: an all-reduce of [B, t, D].
    Keeps: nothing. In memory at a time: queries of all heads, [B, t, N, H], and one gathered cache chunk.
    Source: arXiv 2604.26294; chunks over a sharded cache: Yang et al., arXiv 2411.01783 (pass-KV).
    """
    with jax.named_scope("tsp/attention/prefill"):
        x_BtD, weights, norms, (positions_Bt, biases) = vary_inputs_alike(x_BtD, weights, norms, (positions_Bt, biases))
        tokens_Bt = Tokens.one_document(positions_Bt)
        heads = ShardedHeads.of(config, axes, stream._replace(movement="gather"))
        q_BtNH, k_BtKH, v_BtKH = project_heads(x_BtD, weights[:3], norms, biases, positions_Bt, heads)
        cache = write_entries(cache, to_cache_order(k_BtKH, v_BtKH), layer, entries)
        out_BtNH = _attend_to_cache(q_BtNH, cache, layer, tokens_Bt, entry_positions_BS, max_used, sinks_N, heads)
        y_BtD = project_out(out_BtNH, weights.o_wD, heads)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD, cache


def _attend_to_cache(
    q_BtNH, cache: KeyValues, layer, tokens_Bt, entry_positions_BS, max_used, sinks_N, heads: ShardedHeads
):
    """[B, t, N, H]: attention to all devices' entries, one bucket of KV heads and one cache chunk at a time."""
    batch, t, _, head_dim = q_BtNH.shape
    buckets, kernel, scores = heads.exchange_buckets, heads.config.kernel.within(t), heads.config.scores
    sinks_KG = sinks_of_shard(sinks_N, heads)
    sinks_bKG = None if sinks_KG is None else sinks_KG.reshape(buckets, -1, sinks_KG.shape[1])
    positions_BRs = entry_positions_BS.reshape(batch, -1, cache.k_LBKsH.shape[3])
    max_chunks = -(-positions_BRs.shape[2] // t)
    q_bBtKGH = jnp.moveaxis(q_BtNH.reshape(batch, t, buckets, heads.num_kv_heads // buckets, -1, head_dim), 2, 0)

    def attend_bucket(_, xs):
        q_BtKGH, sinks_KG, bucket = xs

        def attend_chunk(chunk, carry):
            k_BpKH, v_BpKH = _gather_chunk(cache, layer, chunk, t, bucket, heads)
            keys_Bp = Tokens.one_document(_chunk_positions(positions_BRs, chunk, t))
            return merge(carry, kernel.attend(q_BtKGH, k_BpKH, v_BpKH, tokens_Bt, keys_Bp, scores))

        zero = zeros(q_BtKGH.shape, jnp.float32, like=q_BtKGH)
        with jax.named_scope(f"mean_trips[{(max_chunks + 1) / 2:g}]"):  # over all prefills that fill the cache
            out, lse = lax.fori_loop(0, (max_used + t - 1) // t, attend_chunk, (zero, zero[..., 0] + MASKED))
        return (), add_sinks(out, lse, sinks_KG)[0].astype(q_BtKGH.dtype)

    _, out_bBtKGH = lax.scan(attend_bucket, (), (q_bBtKGH, sinks_bKG, jnp.arange(buckets, dtype=jnp.int32)))
    return jnp.moveaxis(out_bBtKGH, 0, 2).reshape(q_BtNH.shape)


def _gather_chunk(cache: KeyValues, layer, chunk, size: int, bucket, heads: ShardedHeads):
    """(k, v), each [B, p, K, H]: `size` entries of every rank, for one bucket of KV heads."""
    _, batch, kv_heads, s, head_dim = cache.k_LBKsH.shape
    bucket_heads, zero = kv_heads // heads.exchange_buckets, jnp.zeros((), jnp.int32)
    corner = layer, zero, bucket * bucket_heads, jnp.minimum(chunk * size, s - size), zero
    shape = 1, batch, bucket_heads, size, head_dim
    parts = (row_major(lax.dynamic_slice(array, corner, shape))[0] for array in cache)
    return gather_sequence(*(jnp.swapaxes(part_BKsH, 1, 2) for part_BKsH in parts), axes=heads.axes.sequence)


def _chunk_positions(positions_BRs: jax.Array, chunk, size: int) -> jax.Array:
    """[B, p]: positions of a cache chunk; `EMPTY` where the last chunk overlaps the one before it."""
    start = jnp.minimum(chunk * size, positions_BRs.shape[2] - size)
    is_new = start + jnp.arange(size, dtype=jnp.int32) >= chunk * size
    positions_BRs = lax.dynamic_slice_in_dim(positions_BRs, start, size, axis=2)
    return jnp.where(is_new[None, None], positions_BRs, EMPTY).reshape(positions_BRs.shape[0], -1)
