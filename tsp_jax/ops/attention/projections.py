"""Heads of attention by streamed weights: tokens in, heads out, and back.

Arrays of heads stand in the order of the heads, whatever the order in which buckets of the weights come by: each bucket
writes, or reads, its own heads. Keys and values are projected before queries, so that their exchange over the sequence
may begin while queries are projected.

With fewer KV slots than ranks each rank stores equal parts of a KV head's columns, and the few heads come as one
bucket.

Dims: B batch, t this device's tokens, D model, N query heads and K KV heads of this device's tensor shard, n heads of
one bucket, H head, p columns of a bucket; nH and kH: this device's rows of Wq and Wk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config import RopeScaling
from tsp_jax.layout import Axes, largest_divisor
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.kernels import Kernel, XlaKernel
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.norm import rms_norm
from tsp_jax.ops.rope import rope
from tsp_jax.ops.stationary import add
from tsp_jax.ops.stream import Bucket, Stream, custom_vjp, over_buckets, over_buckets_with_grads, zeros


class AttentionWeights(NamedTuple):
    """This device's rows; all stored [heads x H, D]. Query slots are in order of their KV slots."""

    q_nHD: jax.Array
    k_kHD: jax.Array
    v_kHD: jax.Array
    o_nHD: jax.Array


class HeadNorms(NamedTuple):
    """RMSNorm scales over a head, [H], for queries and keys."""

    q_H: jax.Array | None = None
    k_H: jax.Array | None = None


class AttentionConfig(NamedTuple):
    """What does not depend on arrays; hashable."""

    kv_slots: int
    """K of all ranks, padded"""
    head_dim: int
    rope_theta: float
    norm_eps: float = 1e-6
    query_buckets: int = 1
    """buckets of a rank's query heads, at most: the largest divisor is used; `kv_buckets` likewise"""
    kv_buckets: int = 1
    kernel: Kernel = XlaKernel()
    """attention on one device"""
    rope_scaling: RopeScaling = RopeScaling()
    exchange_buckets: int = 1
    """buckets of KV heads whose keys and values are exchanged at a time, likewise"""


class HeadStream(NamedTuple):
    """How the weights of some heads travel, and which heads a bucket of them holds. Hashable."""

    axes: tuple[str, ...]
    """mesh axes that the buckets are gathered over"""
    stream: Stream
    ranks: int
    """of those axes"""

    def _is_all(self, bucket: Bucket) -> bool:
        return self.stream.buckets == 1 and bucket.num_ranks == self.ranks

    def _cut(self, heads_BtNH: jax.Array, bucket: Bucket) -> jax.Array:
        """[B, t, senders, ranks of a bucket, buckets, n, H]."""
        size, num_ranks = heads_BtNH.shape, bucket.num_ranks
        return heads_BtNH.reshape(*size[:2], self.ranks // num_ranks, num_ranks, self.stream.buckets, -1, size[-1])

    def take(self, heads_BtNH: jax.Array, bucket: Bucket) -> jax.Array:
        """The heads of a bucket, as columns [B, t, p]."""
        if self._is_all(bucket):
            return heads_BtNH.reshape(*heads_BtNH.shape[:2], -1)
        cut = self._cut(heads_BtNH, bucket)
        mine = lax.dynamic_index_in_dim(cut, bucket.first_rank // bucket.num_ranks, axis=2, keepdims=False)
        mine = lax.dynamic_index_in_dim(mine, bucket.index_in_shard, axis=3, keepdims=False)
        return mine.reshape(*heads_BtNH.shape[:2], -1)

    def put(self, heads_BtNH: jax.Array, bucket: Bucket, mine_BtnH: jax.Array) -> jax.Array:
        """`heads_BtNH` with the heads of a bucket replaced."""
        if self._is_all(bucket):
            return mine_BtnH.reshape(heads_BtNH.shape).astype(heads_BtNH.dtype)
        cut = self._cut(heads_BtNH, bucket)
        mine = mine_BtnH.reshape(*cut.shape[:2], 1, cut.shape[3], 1, *cut.shape[5:]).astype(cut.dtype)
        start = (0, 0, bucket.first_rank // bucket.num_ranks, 0, bucket.index_in_shard, 0, 0)
        return lax.dynamic_update_slice(cut, mine, start).reshape(heads_BtNH.shape)


class Projections(NamedTuple):
    """Everything static that an attention op shares among its parts."""

    config: AttentionConfig
    axes: Axes
    queries: HeadStream
    keys_values: HeadStream
    query_heads: int
    """N"""
    kv_heads: int
    """K"""

    @classmethod
    def of(cls, config: AttentionConfig, axes: Axes, stream: Stream, weights: AttentionWeights) -> "Projections":
        """From the shapes of this device's rows; `stream.buckets` are replaced by those of `config`."""
        head_dim, folded, tensor = config.head_dim, _size(axes.folded), _size(axes.tensor)
        query_slots = weights.q_nHD.shape[0] // head_dim

        def heads(names: tuple[str, ...], buckets: int, movement: str = stream.movement) -> HeadStream:
            return HeadStream(names, stream._replace(buckets=buckets, movement=movement), _size(names))

        queries = heads(axes.folded, largest_divisor(query_slots, config.query_buckets))
        shared = config.kv_slots < folded * tensor
        if shared:
            # A KV head on several tensor shards: each gathers all KV heads and takes its own.
            keys_values = heads((axes.tensor if config.kv_slots < tensor else ()) + axes.folded, 1, "gather")
        else:
            kv_slots = weights.k_kHD.shape[0] // head_dim
            keys_values = heads(axes.folded, largest_divisor(kv_slots, config.kv_buckets))
        return cls(config, axes, queries, keys_values, query_slots * folded, max(1, config.kv_slots // tensor))

    @property
    def split_by_tensor(self) -> bool:
        """Whether a KV head's columns lie on several tensor shards, so that each gathers all and takes its own."""
        return self.config.kv_slots < _size(self.axes.tensor)

    def first_row(self) -> jax.Array:
        """Of this tensor shard's one KV head among all, where `split_by_tensor`."""
        head = lax.axis_index(self.axes.tensor) * self.config.kv_slots // _size(self.axes.tensor)
        return head * self.config.head_dim

    def my_heads(self, w_KHD: jax.Array) -> jax.Array:
        """Of gathered KV weights, the rows that this tensor shard uses."""
        if not self.split_by_tensor:
            return w_KHD
        return lax.dynamic_slice_in_dim(w_KHD, self.first_row(), self.config.head_dim)

    def all_heads(self, dw_HD: jax.Array) -> jax.Array:
        """Transpose of `my_heads`."""
        if not self.split_by_tensor:
            return dw_HD
        full = zeros((self.config.kv_slots * self.config.head_dim, dw_HD.shape[-1]), dw_HD.dtype, like=dw_HD)
        return lax.dynamic_update_slice_in_dim(full, dw_HD, self.first_row(), axis=0)


def _size(axes: tuple[str, ...]) -> int:
    return lax.axis_size(axes) if axes else 1


def split_heads(rows_Btp: jax.Array, head_dim: int) -> jax.Array:
    """[B, t, p] -> [B, t, p / H, H]."""
    return rows_Btp.reshape(*rows_Btp.shape[:2], -1, head_dim)


def prepare(norm_H, positions_Bt, config: AttentionConfig, dtype, rows_Btp: jax.Array) -> jax.Array:
    """Projected columns -> queries or keys as attention wants them: q/k norm, RoPE, compute dtype."""
    x_BtNH = split_heads(rows_Btp, config.head_dim)
    if norm_H is not None:
        x_BtNH = rms_norm(x_BtNH, norm_H, config.norm_eps)
    return rope(x_BtNH, positions_Bt, config.rope_theta, config.rope_scaling).astype(dtype)


# ------------------------------------------------------------------------------------------------ in


@custom_vjp(4)
def project_in(x_BtD: jax.Array, weights, norms: HeadNorms, positions_Bt: jax.Array, static: Projections):
    """``(rope(norm(x Wq^T)), rope(norm(x Wk^T)), x Wv^T)``.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: (q, k, v) of `AttentionWeights`, any float dtype.
      norms: scales of q/k RMSNorm.
      positions_Bt: int32.
      static: how the weights travel.

    Returns:
      Queries [B, t, N, H], keys and values [B, t, K, H], in x's dtype; sums in float32.

    Moves: (N + 2 K) H D (R - 1) / R weights forward; backward the same again, and as many gradients.
    Keeps: its inputs. Backward projects again only where there is a q/k norm.
    """
    return _in_forward(x_BtD, weights, norms, positions_Bt, static)[0]


def _in_forward(x_BtD, weights, norms, positions_Bt, static: Projections):
    config, how, dtype = static.config, static.keys_values, x_BtD.dtype
    w_q, w_k, w_v = weights

    def empty(heads: int) -> jax.Array:
        return zeros((*x_BtD.shape[:2], heads, config.head_dim), dtype, like=x_BtD)

    def made(chunk):
        return over_chunks(chunk, (), (x_BtD, positions_Bt), chunk_tokens=how.stream.chunk_tokens)[1]

    def kv_body(carry, bucket: Bucket):
        wk_pD, wv_pD = (static.my_heads(w) for w in bucket.arrays)

        def chunk(_, read):
            x_BcD, positions_Bc = read
            k = prepare(norms.k_H, positions_Bc, config, dtype, matmul_t(x_BcD, wk_pD))
            return (), (k, matmul_t(x_BcD, wv_pD).astype(dtype)), ()

        return tuple(how.put(heads, bucket, mine) for heads, mine in zip(carry, made(chunk), strict=True)), None

    def query_body(q_BtNH, bucket: Bucket):
        def chunk(_, read):
            x_BcD, positions_Bc = read
            return (), prepare(norms.q_H, positions_Bc, config, dtype, matmul_t(x_BcD, bucket.arrays[0])), ()

        return static.queries.put(q_BtNH, bucket, made(chunk)), None

    def run(name: str, body, carry, shard, how: HeadStream):
        with jax.named_scope(name):
            return over_buckets(body, carry, shard, axes=how.axes, stream=how.stream, dtype=dtype)[0]

    kv = run("keys_values", kv_body, (empty(static.kv_heads), empty(static.kv_heads)), (w_k, w_v), static.keys_values)
    q_BtNH = run("queries", query_body, empty(static.query_heads), (w_q,), static.queries)
    return (q_BtNH, *kv), (x_BtD, weights, norms, positions_Bt)


class _Projected:
    """VJP of ``prepare(x w^T)``, with sums of every product in float32."""

    def __init__(self, x_BtD, w_pD, norm_H, positions_Bt, config: AttentionConfig):
        self.x_BtD, self.w_pD = x_BtD, w_pD
        dtype = x_BtD.dtype
        # Without a norm nothing below reads the product, and it is never computed.
        _, self.prepare_vjp = jax.vjp(
            lambda norm_H, rows_Btp: prepare(norm_H, positions_Bt, config, dtype, rows_Btp),
            norm_H, matmul_t(x_BtD, w_pD),
        )  # fmt: skip

    def vjp(self, dheads_BtnH: jax.Array):
        """-> (dx float32, dw float32, dnorm or None)."""
        dnorm_H, drows_Btp = self.prepare_vjp(dheads_BtnH)
        return *_product_vjp(self.x_BtD, self.w_pD, drows_Btp.astype(self.x_BtD.dtype)), dnorm_H


def _product_vjp(x_BtD, w_pD, drows_Btp) -> tuple[jax.Array, jax.Array]:
    return matmul(drows_Btp, w_pD), outer(drows_Btp, x_BtD)


def _in_backward(static: Projections, residuals, cotangents):
    x_BtD, (w_q, w_k, w_v), norms, positions_Bt = residuals
    dq_BtNH, dk_BtKH, dv_BtKH = cotangents
    config, head_dim, how = static.config, static.config.head_dim, static.keys_values

    def query_body(carry, bucket: Bucket):
        def chunk(dx_BcD, read):
            x_BcD, positions_Bc, dq_Bcp = read
            projected = _Projected(x_BcD, bucket.arrays[0], norms.q_H, positions_Bc, config)
            dx_q, dw, dnorm = projected.vjp(split_heads(dq_Bcp, head_dim))
            return dx_BcD + dx_q, (), (dw, dnorm)

        dx_BtD, dnorm_H = carry
        read = x_BtD, positions_Bt, static.queries.take(dq_BtNH, bucket)
        dx_BtD, _, (dw, dnorm) = over_chunks(chunk, dx_BtD, read, chunk_tokens=how.stream.chunk_tokens)
        return (dx_BtD, add(dnorm_H, dnorm)), (dw,), None

    def kv_body(carry, bucket: Bucket):
        wk_pD, wv_pD = (static.my_heads(w) for w in bucket.arrays)

        def chunk(dx_BcD, read):
            x_BcD, positions_Bc, dk_Bcp, dv_Bcp = read
            projected = _Projected(x_BcD, wk_pD, norms.k_H, positions_Bc, config)
            dx_k, dwk, dnorm = projected.vjp(split_heads(dk_Bcp, head_dim))
            dx_v, dwv = _product_vjp(x_BcD, wv_pD, dv_Bcp)
            return dx_BcD + dx_k + dx_v, (), (dwk, dwv, dnorm)

        dx_BtD, dnorm_H = carry
        read = x_BtD, positions_Bt, how.take(dk_BtKH, bucket), how.take(dv_BtKH, bucket)
        dx_BtD, _, (dwk, dwv, dnorm) = over_chunks(chunk, dx_BtD, read, chunk_tokens=how.stream.chunk_tokens)
        return (dx_BtD, add(dnorm_H, dnorm)), (static.all_heads(dwk), static.all_heads(dwv)), None

    def run(name: str, body, carry, shard, how: HeadStream):
        with jax.named_scope(name):
            return over_buckets_with_grads(body, carry, shard, axes=how.axes, stream=how.stream, dtype=x_BtD.dtype)[:2]

    def none(norm_H):
        return None if norm_H is None else zeros(norm_H.shape, norm_H.dtype, like=norm_H)

    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=dq_BtNH)
    (dx_BtD, dnorm_q), dw_q = run("queries", query_body, (dx_BtD, none(norms.q_H)), (w_q,), static.queries)
    (dx_BtD, dnorm_k), dw_kv = run("keys_values", kv_body, (dx_BtD, none(norms.k_H)), (w_k, w_v), static.keys_values)
    return dx_BtD.astype(x_BtD.dtype), (*dw_q, *dw_kv), HeadNorms(dnorm_q, dnorm_k), None


project_in.defvjp(_in_forward, _in_backward)


# ------------------------------------------------------------------------------------------------ out


@custom_vjp(2)
def project_out(out_BtNH: jax.Array, wo_nHD: jax.Array, static: Projections) -> jax.Array:
    """``concat_h(out_h) Wo``, summed over this tensor shard's heads.

    Args:
      out_BtNH: outputs of heads, in the compute dtype.
      wo_nHD: this device's rows, any float dtype.
      static: how the weights travel.

    Returns:
      [B, t, D] in out's dtype; sums in float32.

    Moves: N H D (R - 1) / R weights forward; backward the same again, and as many gradients.
    Keeps: its inputs.
    """
    return _out_forward(out_BtNH, wo_nHD, static)[0]


def _out_forward(out_BtNH, wo_nHD, static: Projections):
    how = static.queries

    def body(y_BtD, bucket: Bucket):
        def chunk(y_BcD, out_Bcp):
            return y_BcD + matmul(out_Bcp, bucket.arrays[0]), (), ()

        return over_chunks(chunk, y_BtD, how.take(out_BtNH, bucket), chunk_tokens=how.stream.chunk_tokens)[0], None

    y_BtD = zeros((*out_BtNH.shape[:2], wo_nHD.shape[-1]), jnp.float32, like=out_BtNH)
    with jax.named_scope("out"):
        y_BtD, _ = over_buckets(body, y_BtD, (wo_nHD,), axes=how.axes, stream=how.stream, dtype=out_BtNH.dtype)
    return y_BtD.astype(out_BtNH.dtype), (out_BtNH, wo_nHD)


def _out_backward(static: Projections, residuals, dy_BtD):
    out_BtNH, wo_nHD = residuals
    how, dtype = static.queries, out_BtNH.dtype

    def body(dout_BtNH, bucket: Bucket):
        def chunk(_, read):
            out_Bcp, dy_BcD = read
            return (), matmul_t(dy_BcD, bucket.arrays[0]).astype(dtype), (outer(out_Bcp, dy_BcD),)

        read = how.take(out_BtNH, bucket), dy_BtD
        _, dout_Btp, grads = over_chunks(chunk, (), read, chunk_tokens=how.stream.chunk_tokens)
        return how.put(dout_BtNH, bucket, dout_Btp), grads, None

    dout_BtNH = zeros(out_BtNH.shape, dtype, like=dy_BtD)
    with jax.named_scope("out"):
        dout_BtNH, (dwo_nHD,), _ = over_buckets_with_grads(
            body, dout_BtNH, (wo_nHD,), axes=how.axes, stream=how.stream, dtype=dtype
        )
    return dout_BtNH, dwo_nHD


project_out.defvjp(_out_forward, _out_backward)
