"""Attention of many new tokens to themselves and to a cache: weights move past tokens, keys and values to the queries.

Three stages, none of which holds what another needs: stream [Wq Wk Wv] and project this device's tokens, write keys and
values into the cache, then attend to all devices' slots, and stream Wo. Since new keys are read where old ones are, a
whole prompt and a later chunk of it are one program.

Dims: B batch, t this device's new tokens, c this device's slots, S all slots, p slots of a page (in keys and values, of
all ranks), b buckets of heads, D model, N query heads and K KV heads of this tensor shard, G query heads of a KV head,
H head, R ranks of the sequence.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes, largest_divisor
from tsp_jax.ops.attention.kv_cache import EMPTY, Claim, KeyValues, as_stored, row_major, write_slots
from tsp_jax.ops.attention.projections import (
    AttentionConfig,
    AttentionWeights,
    HeadNorms,
    Projections,
    project_in,
    project_out,
)
from tsp_jax.ops.kernels.mask import MASKED, Tokens
from tsp_jax.ops.sequence import gather_sequence
from tsp_jax.ops.stream import Stream, vary_alike, zeros


def prefill_attention(
    x_BtD: jax.Array,
    weights: AttentionWeights,
    norms: HeadNorms | None,
    cache: KeyValues,
    layer: jax.Array,
    positions_Bt: jax.Array,
    claim: Claim,
    keys_BS: jax.Array,
    used: jax.Array,
    *,
    config: AttentionConfig,
    axes: Axes = Axes(),
    stream: Stream = Stream(),
) -> tuple[jax.Array, KeyValues]:
    """Causal attention of new tokens to themselves and to all that the cache holds.

    Args:
      x_BtD: this device's new tokens, in the compute dtype, in any order over ranks.
      weights: this device's rows, any float dtype.
      norms: scales of q/k RMSNorm, or None.
      cache: in the compute dtype.
      layer: [] int32, which layer of the cache.
      positions_Bt: of the new tokens, `NO_TOKEN` for padding.
      claim: slots of the new tokens.
      keys_BS: positions of all devices' slots, new tokens included, ranks in order.
      used: [] int32, the most slots that a device has in use; slots after them are not looked at.
      config: static sizes; `exchange_buckets` cuts the KV heads whose keys are gathered at a time.
      axes: roles of the mesh axes of the heads.
      stream: movement is always gather; its buckets are replaced by those of `config`.

    Returns:
      (y [B, t, D] in x's dtype, the cache with the new tokens' keys and values).

    Moves: weights (2 N + 2 K) H D (R - 1) / R; keys and values of slots in use, 2 B S K H (R - 1) / R, in messages of
      a bucket of heads and t slots of every rank. Over tensor axes one all-reduce of [B, t, D].
    Keeps: queries of all heads [B, t, N, H], and keys and values of one message.
    Source: arXiv 2604.26294; chunks over a sharded cache: Yang et al., arXiv 2411.01783 (pass-KV).
    """
    with jax.named_scope("tsp/attention/prefill"):
        x_BtD, *arrays = vary_alike(x_BtD, *weights, positions_Bt)
        weights = AttentionWeights(*arrays[:4])
        tokens_Bt = Tokens.one_document(arrays[4])
        static = Projections.of(config, axes, stream._replace(movement="gather"), weights)
        q_BtNH, k_BtKH, v_BtKH = project_in(x_BtD, weights[:3], norms or HeadNorms(), tokens_Bt.positions, static)
        cache = write_slots(cache, as_stored(k_BtKH, v_BtKH), layer, claim)
        out_BtNH = _attend_everywhere(q_BtNH, cache, layer, tokens_Bt, keys_BS, used, static)
        y_BtD = project_out(out_BtNH, weights.o_nHD, static)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD, cache


def _attend_everywhere(q_BtNH, cache: KeyValues, layer, tokens_Bt: Tokens, keys_BS, used, static: Projections):
    """[B, t, N, H]: attention to all devices' slots, a bucket of KV heads at a time, a page of slots at a time."""
    batch, t, _, head_dim = q_BtNH.shape
    kv_heads, kernel = static.kv_heads, static.config.kernel.within(t)
    buckets = largest_divisor(kv_heads, static.config.exchange_buckets)
    keys_BRc = keys_BS.reshape(batch, -1, cache.k_LBKcH.shape[3])
    pages = -(-keys_BRc.shape[2] // t)
    q_bBtKGH = jnp.moveaxis(q_BtNH.reshape(batch, t, buckets, kv_heads // buckets, -1, head_dim), 2, 0)

    def bucket_of_heads(_, xs):
        q_BtKGH, bucket = xs

        def visit(page, carry):
            k_BpKH, v_BpKH = _gather_page(cache, layer, page, t, bucket, buckets, static)
            keys_Bp = Tokens.one_document(_page_positions(keys_BRc, page, t))
            return _merge(carry, kernel.attend(q_BtKGH, k_BpKH, v_BpKH, tokens_Bt, keys_Bp))

        zero = zeros(q_BtKGH.shape, jnp.float32, like=q_BtKGH)
        with jax.named_scope(f"mean_trips[{(pages + 1) / 2:g}]"):  # of all chunks that fill the cache
            out, _ = lax.fori_loop(0, (used + t - 1) // t, visit, (zero, zero[..., 0] + MASKED))
        return (), out.astype(q_BtKGH.dtype)

    _, out_bBtKGH = lax.scan(bucket_of_heads, (), (q_bBtKGH, jnp.arange(buckets, dtype=jnp.int32)))
    return jnp.moveaxis(out_bBtKGH, 0, 2).reshape(q_BtNH.shape)


def _gather_page(cache: KeyValues, layer, page, size: int, bucket, buckets: int, static: Projections):
    """(k, v), each [B, p, K, H]: `size` slots of every rank, and a bucket of heads."""
    _, batch, kv_heads, slots, head_dim = cache.k_LBKcH.shape
    heads, zero = kv_heads // buckets, jnp.zeros((), jnp.int32)
    corner = layer, zero, bucket * heads, jnp.minimum(page * size, slots - size), zero
    parts = (row_major(lax.dynamic_slice(array, corner, (1, batch, heads, size, head_dim)))[0] for array in cache)
    return gather_sequence(*(jnp.swapaxes(part_BKcH, 1, 2) for part_BKcH in parts), axes=static.axes.sequence)


def _page_positions(keys_BRc: jax.Array, page, size: int) -> jax.Array:
    """[B, p]: positions of a page's tokens; `EMPTY` where the last page overlaps the one before it."""
    start = jnp.minimum(page * size, keys_BRc.shape[2] - size)
    fresh_c = start + jnp.arange(size, dtype=jnp.int32) >= page * size
    keys_BRc = lax.dynamic_slice_in_dim(keys_BRc, start, size, axis=2)
    return jnp.where(fresh_c[None, None], keys_BRc, EMPTY).reshape(keys_BRc.shape[0], -1)


def _merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of attention over the union of two sets of keys, float32."""
    lse = jnp.logaddexp(a[1], b[1])
    out_a, out_b = (out.astype(jnp.float32) * jnp.exp(part - lse)[..., None] for out, part in (a, b))
    return out_a + out_b, lse
