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

from tsp_jax.layout import Axes
from tsp_jax.ops.attention import (
    AttentionConfig,
    AttentionWeights,
    HeadNorms,
    _blocks,
    _kv_count,
    _kv_stream,
    _my_heads,
    _prepare,
    _project_out,
    _split,
    _Static,
    _static,
)
from tsp_jax.ops.kernels.blockwise import MASKED, Tokens, attend
from tsp_jax.ops.kv_cache import EMPTY, Claim, KeyValues, as_stored, row_major, write_slots
from tsp_jax.ops.linear import matmul_t
from tsp_jax.ops.sequence import gather_sequence
from tsp_jax.ops.stream import Piece, Stream, fold, largest_divisor, vary_alike, zeros


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
      config: static sizes; `buckets` also cuts the KV heads whose keys are gathered at a time.
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
        tokens_Bt = _tokens(arrays[4])
        static = _static(config, axes, stream._replace(movement="gather"), weights)
        norms = norms or HeadNorms(None, None)
        q_BtNH, k_BtKH, v_BtKH = _stream_heads(x_BtD, weights, norms, tokens_Bt.positions, static)
        cache = write_slots(cache, as_stored(k_BtKH, v_BtKH), layer, claim)
        out_BtNH = _attend_everywhere(q_BtNH, cache, layer, tokens_Bt, keys_BS, used, static)
        y_BtD = _project_out(_in_pieces(out_BtNH, static), weights.o_nHD, static)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD, cache


def _tokens(positions: jax.Array) -> Tokens:
    """One document a sequence."""
    return Tokens(positions, jnp.zeros_like(positions))


def _stream_heads(x_BtD, weights: AttentionWeights, norms: HeadNorms, positions_Bt, static: _Static):
    """-> (q [B, t, N, H], k, v [B, t, K, H]) of this device's tokens and this tensor shard's heads, in slot order."""
    dtype, head_dim = x_BtD.dtype, static.config.head_dim

    def query_body(carry, piece: Piece):
        return carry, _prepare(norms.q_H, positions_Bt, static, dtype, matmul_t(x_BtD, piece.arrays[0]))

    def kv_body(carry, piece: Piece):
        w_k, w_v = (_my_heads(static, w) for w in piece.arrays)
        k = _prepare(norms.k_H, positions_Bt, static, dtype, matmul_t(x_BtD, w_k))
        return carry, (k, _split(matmul_t(x_BtD, w_v), head_dim).astype(dtype))

    folded, stream = static.axes.folded, static.stream
    _, q = fold(query_body, (), (weights.q_nHD,), axes=folded, stream=stream, dtype=dtype)
    kv_slots = weights.k_kHD.shape[0] // head_dim
    buckets = largest_divisor(kv_slots, static.config.buckets) if kv_slots else 1
    kv_stream = stream._replace(buckets=buckets)
    _, kv = fold(
        kv_body, (), (weights.k_kHD, weights.v_kHD), dtype=dtype, axes=_kv_stream(static)["axes"], stream=kv_stream
    )
    return tuple(_in_order(pieces, static) for pieces in (q, *kv))


def _folded_ranks(static: _Static) -> int:
    return lax.axis_size(static.axes.folded) if static.axes.folded else 1


def _in_order(pieces_bBtNH: jax.Array, static: _Static) -> jax.Array:
    """Heads of all pieces (bucket; rank, head) -> heads in order of their slots (rank, bucket, head)."""
    buckets, *outer, heads, head_dim = pieces_bBtNH.shape
    if buckets == 1:
        return pieces_bBtNH[0]
    cut = pieces_bBtNH.reshape(buckets, *outer, _folded_ranks(static), -1, head_dim)
    return jnp.moveaxis(cut, 0, 3).reshape(*outer, buckets * heads, head_dim)


def _in_pieces(heads_BtNH: jax.Array, static: _Static) -> jax.Array:
    """Inverse of `_in_order`."""
    *outer, _, head_dim = heads_BtNH.shape
    cut = heads_BtNH.reshape(*outer, _folded_ranks(static), static.stream.buckets, -1, head_dim)
    return jnp.moveaxis(cut, 3, 0).reshape(static.stream.buckets, *outer, -1, head_dim)


def _attend_everywhere(q_BtNH, cache: KeyValues, layer, tokens_Bt: Tokens, keys_BS, used, static: _Static):
    """[B, t, N, H]: attention to all devices' slots, a bucket of KV heads at a time, a page of slots at a time."""
    batch, t, _, head_dim = q_BtNH.shape
    kv_heads, blocks = _kv_count(static), _blocks(static, tokens_Bt)
    buckets = largest_divisor(kv_heads, static.config.buckets)
    keys_BRc = keys_BS.reshape(batch, -1, cache.k_LBKcH.shape[3])
    q_bBtKGH = jnp.moveaxis(q_BtNH.reshape(batch, t, buckets, kv_heads // buckets, -1, head_dim), 2, 0)

    def bucket_of_heads(_, xs):
        q_BtKGH, bucket = xs

        def visit(page, carry):
            k_BpKH, v_BpKH = _gather_page(cache, layer, page, t, bucket, buckets, static)
            keys_Bp = _tokens(_page_positions(keys_BRc, page, t))
            return _merge(carry, attend(q_BtKGH, k_BpKH, v_BpKH, tokens_Bt, keys_Bp, blocks))

        zero = zeros(q_BtKGH.shape, jnp.float32, like=q_BtKGH)
        out, _ = lax.fori_loop(0, (used + t - 1) // t, visit, (zero, zero[..., 0] + MASKED))
        return (), out.astype(q_BtKGH.dtype)

    _, out_bBtKGH = lax.scan(bucket_of_heads, (), (q_bBtKGH, jnp.arange(buckets, dtype=jnp.int32)))
    return jnp.moveaxis(out_bBtKGH, 0, 2).reshape(q_BtNH.shape)


def _gather_page(cache: KeyValues, layer, page, size: int, bucket, buckets: int, static: _Static):
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
