"""Projections of attention with streamed weights: tokens to queries, keys and values, and outputs of heads to tokens.

Arrays of heads are in the order of the heads, whatever the order in which buckets of the weights arrive: each bucket
writes, or reads, its own heads. Keys and values are projected before queries, so that their exchange over the sequence
can start while queries are projected.

With fewer KV heads than ranks each rank stores an equal part of a KV head's rows, and all KV heads are one bucket.

Dims: B batch, t this device's tokens, c tokens of a chunk, D model, N query heads and K KV heads of this tensor shard,
H head, w this device's rows of a weight, p rows and m heads of a bucket.
"""

from typing import Any, NamedTuple

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
from tsp_jax.ops.stream import Bucket, Stream, custom_vjp, over_buckets, over_buckets_with_grads, vary_alike, zeros


class AttentionWeights(NamedTuple):
    """This device's rows of each weight, stored [heads x H, D]. Query heads are in the order of their KV heads."""

    q_wD: jax.Array
    k_wD: jax.Array
    v_wD: jax.Array
    o_wD: jax.Array


class HeadNorms(NamedTuple):
    """Scales of RMSNorm over each query and key head; None: no norm."""

    q_H: jax.Array | None = None
    k_H: jax.Array | None = None


class AttentionConfig(NamedTuple):
    """Everything that does not depend on arrays; hashable."""

    padded_kv_heads: int
    """KV heads of all ranks, padding included"""
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
    """buckets of KV heads, at most, for the exchange of keys and values over the sequence"""


class HeadStream(NamedTuple):
    """How the weights of some heads are streamed, and which heads a bucket holds. Hashable."""

    axes: tuple[str, ...]
    """mesh axes that buckets are gathered over"""
    stream: Stream
    ranks: int
    """of those axes"""

    def _is_all(self, bucket: Bucket) -> bool:
        return self.stream.buckets == 1 and bucket.num_ranks == self.ranks

    def _by_bucket(self, heads_BtNH: jax.Array, bucket: Bucket) -> jax.Array:
        """[B, t, ranks / ranks of a bucket, ranks of a bucket, buckets per rank, heads per rank and bucket, H]."""
        shape, num_ranks = heads_BtNH.shape, bucket.num_ranks
        return heads_BtNH.reshape(*shape[:2], self.ranks // num_ranks, num_ranks, self.stream.buckets, -1, shape[-1])

    def take(self, heads_BtNH: jax.Array, bucket: Bucket) -> jax.Array:
        """The heads of a bucket, [B, t, p]."""
        if self._is_all(bucket):
            return heads_BtNH.reshape(*heads_BtNH.shape[:2], -1)
        by_bucket = self._by_bucket(heads_BtNH, bucket)
        part = lax.dynamic_index_in_dim(by_bucket, bucket.first_rank // bucket.num_ranks, axis=2, keepdims=False)
        part = lax.dynamic_index_in_dim(part, bucket.index_in_shard, axis=3, keepdims=False)
        return part.reshape(*heads_BtNH.shape[:2], -1)

    def put(self, heads_BtNH: jax.Array, bucket: Bucket, new_BtmH: jax.Array) -> jax.Array:
        """`heads_BtNH` with the heads of a bucket replaced."""
        if self._is_all(bucket):
            return new_BtmH.reshape(heads_BtNH.shape).astype(heads_BtNH.dtype)
        by_bucket = self._by_bucket(heads_BtNH, bucket)
        batch, t, _, num_ranks, _, *rest = by_bucket.shape
        new = new_BtmH.reshape(batch, t, 1, num_ranks, 1, *rest).astype(by_bucket.dtype)
        start = (0, 0, bucket.first_rank // bucket.num_ranks, 0, bucket.index_in_shard, 0, 0)
        return lax.dynamic_update_slice(by_bucket, new, start).reshape(heads_BtNH.shape)


class ShardedHeads(NamedTuple):
    """How the heads of an attention op are sharded and streamed; shared by all its parts. Hashable."""

    config: AttentionConfig
    axes: Axes
    queries: HeadStream
    """of Wq and Wo"""
    keys_values: HeadStream
    """of Wk and Wv"""
    query_heads: int
    """N"""
    kv_heads: int
    """K"""

    @classmethod
    def of(cls, config: AttentionConfig, axes: Axes, stream: Stream, weights: AttentionWeights) -> "ShardedHeads":
        """From the shapes of this device's rows; `stream.buckets` are replaced by those of `config`."""
        head_dim, folded, tensor = config.head_dim, _size(axes.folded), _size(axes.tensor)
        query_heads = weights.q_wD.shape[0] // head_dim

        def head_stream(names: tuple[str, ...], buckets: int, movement: str = stream.movement) -> HeadStream:
            return HeadStream(names, stream._replace(buckets=buckets, movement=movement), _size(names))

        queries = head_stream(axes.folded, largest_divisor(query_heads, config.query_buckets))
        if config.padded_kv_heads < folded * tensor:
            # A rank has part of a KV head. Where that head spans tensor shards, each shard gathers all KV heads.
            spanned = axes.tensor if config.padded_kv_heads < tensor else ()
            keys_values = head_stream(spanned + axes.folded, 1, "gather")
        else:
            kv_heads = weights.k_wD.shape[0] // head_dim
            keys_values = head_stream(axes.folded, largest_divisor(kv_heads, config.kv_buckets))
        return cls(config, axes, queries, keys_values, query_heads * folded, max(1, config.padded_kv_heads // tensor))

    @property
    def exchange_buckets(self) -> int:
        """Buckets of the KV heads for the exchange of keys and values over the sequence."""
        return largest_divisor(self.kv_heads, self.config.exchange_buckets)

    @property
    def kv_head_spans_shards(self) -> bool:
        """Whether a KV head's rows are on several tensor shards, so that each gathers all KV heads and selects one."""
        return self.config.padded_kv_heads < _size(self.axes.tensor)

    def first_kv_row(self) -> jax.Array:
        """Row, among all KV heads', at which this tensor shard's one KV head starts (`kv_head_spans_shards`)."""
        head = lax.axis_index(self.axes.tensor) * self.config.padded_kv_heads // _size(self.axes.tensor)
        return head * self.config.head_dim

    def select_kv_rows(self, w_pD: jax.Array) -> jax.Array:
        """The rows of gathered KV weights that this tensor shard uses."""
        if not self.kv_head_spans_shards:
            return w_pD
        return lax.dynamic_slice_in_dim(w_pD, self.first_kv_row(), self.config.head_dim)

    def select_kv_rows_transpose(self, dw_pD: jax.Array) -> jax.Array:
        """Gradient of the rows that this tensor shard uses -> gradient of the gathered KV weights."""
        if not self.kv_head_spans_shards:
            return dw_pD
        full = zeros((self.config.padded_kv_heads * self.config.head_dim, dw_pD.shape[-1]), dw_pD.dtype, like=dw_pD)
        return lax.dynamic_update_slice_in_dim(full, dw_pD, self.first_kv_row(), axis=0)


def _size(axes: tuple[str, ...]) -> int:
    return lax.axis_size(axes) if axes else 1


def vary_inputs_alike(
    x_BtD: jax.Array, weights: AttentionWeights, norms: HeadNorms | None, tokens: Any
) -> tuple[jax.Array, AttentionWeights, HeadNorms, Any]:
    """An attention op's inputs, marked by `vary_alike`; `HeadNorms()` for no norms."""
    leaves, structure = jax.tree.flatten((x_BtD, weights, norms or HeadNorms(), tokens))
    return jax.tree.unflatten(structure, vary_alike(*leaves))


def split_heads(rows_Btp: jax.Array, head_dim: int) -> jax.Array:
    """[B, t, p] -> [B, t, p / H, H]."""
    return rows_Btp.reshape(*rows_Btp.shape[:2], -1, head_dim)


def normalize_and_rotate(rows_Btp: jax.Array, norm_H, positions_Bt, config: AttentionConfig, dtype) -> jax.Array:
    """Projected queries or keys -> what attention takes: q/k norm (unless None), RoPE, compute dtype."""
    x_BtmH = split_heads(rows_Btp, config.head_dim)
    if norm_H is not None:
        x_BtmH = rms_norm(x_BtmH, norm_H, config.norm_eps)
    return rope(x_BtmH, positions_Bt, config.rope_theta, config.rope_scaling).astype(dtype)


# ------------------------------------------------------------------------------------------------ in


@custom_vjp(4)
def project_in(x_BtD: jax.Array, weights, norms: HeadNorms, positions_Bt: jax.Array, heads: ShardedHeads):
    """Queries, keys and values of this device's tokens, for all heads of its tensor shard.

    Forward: ``q = rope(norm(x Wq^T))``, ``k = rope(norm(x Wk^T))``, ``v = x Wv^T``. With dq' and dk' the gradients
    before rope and norm, dgrad: ``dx = dq' Wq + dk' Wk + dv Wv``; wgrad: ``dWq = dq'^T x``, ``dWk = dk'^T x``,
    ``dWv = dv^T x``, each summed over the folded ranks.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: (q, k, v) of `AttentionWeights`, any float dtype.
      norms: scales of q/k RMSNorm.
      positions_Bt: int32.
      heads: how the heads are sharded and streamed; static.

    Returns:
      (q [B, t, N, H], k and v [B, t, K, H]), in x's dtype; sums in float32.

    Moves: forward (N + 2 K) H D (R - 1) / R elements of weights (R folded ranks), in the compute dtype; backward the
      same again, and a reduce-scatter of as many gradients in the stream's `grad_dtype`.
    Keeps: its inputs. Backward repeats a product only where there is a q/k norm.
    Source: arXiv 2604.26294; it sends the four weights of a bucket in one message, sending [Wk Wv], Wq and Wo apart is
      ours.
    """
    return _in_forward(x_BtD, weights, norms, positions_Bt, heads)[0]


def _in_forward(x_BtD, weights, norms, positions_Bt, heads: ShardedHeads):
    config, dtype = heads.config, x_BtD.dtype
    w_q, w_k, w_v = weights

    def empty(count: int) -> jax.Array:
        return zeros((*x_BtD.shape[:2], count, config.head_dim), dtype, like=x_BtD)

    def project(chunk):
        return over_chunks(chunk, (), (x_BtD, positions_Bt), chunk_tokens=heads.keys_values.stream.chunk_tokens)[1]

    def project_keys_values(kv, bucket: Bucket):
        wk_pD, wv_pD = (heads.select_kv_rows(w) for w in bucket.arrays)

        def chunk(_, read):
            x_BcD, positions_Bc = read
            k_BcmH = normalize_and_rotate(matmul_t(x_BcD, wk_pD), norms.k_H, positions_Bc, config, dtype)
            return (), (k_BcmH, matmul_t(x_BcD, wv_pD).astype(dtype)), ()

        return tuple(heads.keys_values.put(a, bucket, new) for a, new in zip(kv, project(chunk), strict=True)), None

    def project_queries(q_BtNH, bucket: Bucket):
        def chunk(_, read):
            x_BcD, positions_Bc = read
            q_Bcp = matmul_t(x_BcD, bucket.arrays[0])
            return (), normalize_and_rotate(q_Bcp, norms.q_H, positions_Bc, config, dtype), ()

        return heads.queries.put(q_BtNH, bucket, project(chunk)), None

    def run(name: str, body, carry, shard, weights: HeadStream):
        with jax.named_scope(name):
            return over_buckets(body, carry, shard, axes=weights.axes, stream=weights.stream, dtype=dtype)[0]

    kv = empty(heads.kv_heads), empty(heads.kv_heads)
    kv = run("keys_values", project_keys_values, kv, (w_k, w_v), heads.keys_values)
    q_BtNH = run("queries", project_queries, empty(heads.query_heads), (w_q,), heads.queries)
    return (q_BtNH, *kv), (x_BtD, weights, norms, positions_Bt)


def _in_backward(heads: ShardedHeads, residuals, cotangents):
    x_BtD, (w_q, *w_kv), norms, positions_Bt = residuals
    dq_BtNH, *dkv_BtKH = cotangents
    tokens = x_BtD, positions_Bt
    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=dq_BtNH)
    dx_BtD, dnorm_q, dw_q = _queries_backward(heads, dx_BtD, (w_q,), norms.q_H, tokens, dq_BtNH)
    dx_BtD, dnorm_k, dw_kv = _keys_values_backward(heads, dx_BtD, tuple(w_kv), norms.k_H, tokens, dkv_BtKH)
    return dx_BtD.astype(x_BtD.dtype), (*dw_q, *dw_kv), HeadNorms(dnorm_q, dnorm_k), None


def _queries_backward(heads: ShardedHeads, dx_BtD, shard, norm_H, tokens, dq_BtNH):
    """(dx_BtD with the queries' part added, gradient of the norm, gradients of the shard)."""

    def body(carry, bucket: Bucket):
        def chunk(dx_BcD, read):
            x_BcD, positions_Bc, dq_Bcp = read
            dx_q, dw, dnorm = _heads_vjp(dq_Bcp, x_BcD, bucket.arrays[0], norm_H, positions_Bc, heads.config)
            return dx_BcD + dx_q, (), (dw, dnorm)

        dx_BtD, dnorm_H = carry
        read = *tokens, heads.queries.take(dq_BtNH, bucket)
        dx_BtD, _, (dw, dnorm) = over_chunks(chunk, dx_BtD, read, chunk_tokens=heads.queries.stream.chunk_tokens)
        return (dx_BtD, add(dnorm_H, dnorm)), (dw,), None

    return _weights_backward("queries", body, dx_BtD, norm_H, shard, heads.queries, tokens[0].dtype)


def _keys_values_backward(heads: ShardedHeads, dx_BtD, shard, norm_H, tokens, dkv_BtKH):
    """(dx_BtD with the keys' and values' part added, gradient of the norm, gradients of the shard)."""

    def body(carry, bucket: Bucket):
        wk_pD, wv_pD = (heads.select_kv_rows(w) for w in bucket.arrays)

        def chunk(dx_BcD, read):
            x_BcD, positions_Bc, dk_Bcp, dv_Bcp = read
            dx_k, dwk, dnorm = _heads_vjp(dk_Bcp, x_BcD, wk_pD, norm_H, positions_Bc, heads.config)
            dx_v, dwv = _product_vjp(dv_Bcp, x_BcD, wv_pD)
            return dx_BcD + dx_k + dx_v, (), (dwk, dwv, dnorm)

        dx_BtD, dnorm_H = carry
        read = *tokens, *(heads.keys_values.take(d_BtKH, bucket) for d_BtKH in dkv_BtKH)
        dx_BtD, _, (*dw_kv, dnorm) = over_chunks(
            chunk, dx_BtD, read, chunk_tokens=heads.keys_values.stream.chunk_tokens
        )
        return (dx_BtD, add(dnorm_H, dnorm)), tuple(heads.select_kv_rows_transpose(dw) for dw in dw_kv), None

    return _weights_backward("keys_values", body, dx_BtD, norm_H, shard, heads.keys_values, tokens[0].dtype)


def _weights_backward(name: str, body, dx_BtD, norm_H, shard, weights: HeadStream, dtype):
    """Folds `body` over the buckets of the shard, from dx_BtD and a zero gradient of the norm."""
    dnorm_H = None if norm_H is None else zeros(norm_H.shape, norm_H.dtype, like=norm_H)
    with jax.named_scope(name):
        (dx_BtD, dnorm_H), dw, _ = over_buckets_with_grads(
            body, (dx_BtD, dnorm_H), shard, axes=weights.axes, stream=weights.stream, dtype=dtype
        )
    return dx_BtD, dnorm_H, dw


def _heads_vjp(dheads_Btp, x_BtD, w_pD, norm_H, positions_Bt, config: AttentionConfig):
    """VJP of ``normalize_and_rotate(x w^T)``: (dx float32, dw float32, dnorm or None)."""
    dtype = x_BtD.dtype

    def heads(norm_H, rows_Btp):
        return normalize_and_rotate(rows_Btp, norm_H, positions_Bt, config, dtype)

    # Without a norm nothing below reads the product, and it is never computed.
    _, vjp = jax.vjp(heads, norm_H, matmul_t(x_BtD, w_pD))
    dnorm_H, drows_Btp = vjp(split_heads(dheads_Btp, config.head_dim))
    return *_product_vjp(drows_Btp.astype(dtype), x_BtD, w_pD), dnorm_H


def _product_vjp(drows_Btp, x_BtD, w_pD) -> tuple[jax.Array, jax.Array]:
    """VJP of ``x w^T``: (dx, dw), float32."""
    return matmul(drows_Btp, w_pD), outer(drows_Btp, x_BtD)


project_in.defvjp(_in_forward, _in_backward)


# ------------------------------------------------------------------------------------------------ out


@custom_vjp(2)
def project_out(out_BtNH: jax.Array, wo_wD: jax.Array, heads: ShardedHeads) -> jax.Array:
    """The output projection, summed over this tensor shard's heads.

    Forward: ``y = concat_h(out_h) Wo``. dgrad: ``dout = dy Wo^T``; wgrad: ``dWo = out^T dy``, summed over the folded
    ranks.

    Args:
      out_BtNH: outputs of heads, in the compute dtype.
      wo_wD: this device's rows, any float dtype.
      heads: how the heads are sharded and streamed; static.

    Returns:
      [B, t, D] in out's dtype; sums in float32.

    Moves: forward N H D (R - 1) / R elements of weights (R folded ranks), in the compute dtype; backward the same
      again, and a reduce-scatter of as many gradients in the stream's `grad_dtype`.
    Keeps: its inputs.
    Source: as `project_in`.
    """
    return _out_forward(out_BtNH, wo_wD, heads)[0]


def _out_forward(out_BtNH, wo_wD, heads: ShardedHeads):
    queries = heads.queries

    def body(y_BtD, bucket: Bucket):
        def chunk(y_BcD, out_Bcp):
            return y_BcD + matmul(out_Bcp, bucket.arrays[0]), (), ()

        return over_chunks(chunk, y_BtD, queries.take(out_BtNH, bucket), chunk_tokens=queries.stream.chunk_tokens)[
            0
        ], None

    y_BtD = zeros((*out_BtNH.shape[:2], wo_wD.shape[-1]), jnp.float32, like=out_BtNH)
    with jax.named_scope("out"):
        y_BtD, _ = over_buckets(body, y_BtD, (wo_wD,), axes=queries.axes, stream=queries.stream, dtype=out_BtNH.dtype)
    return y_BtD.astype(out_BtNH.dtype), (out_BtNH, wo_wD)


def _out_backward(heads: ShardedHeads, residuals, dy_BtD):
    out_BtNH, wo_wD = residuals
    queries, dtype = heads.queries, out_BtNH.dtype

    def body(dout_BtNH, bucket: Bucket):
        def chunk(_, read):
            out_Bcp, dy_BcD = read
            return (), matmul_t(dy_BcD, bucket.arrays[0]).astype(dtype), (outer(out_Bcp, dy_BcD),)

        read = queries.take(out_BtNH, bucket), dy_BtD
        _, dout_Btp, grads = over_chunks(chunk, (), read, chunk_tokens=queries.stream.chunk_tokens)
        return queries.put(dout_BtNH, bucket, dout_Btp), grads, None

    dout_BtNH = zeros(out_BtNH.shape, dtype, like=dy_BtD)
    with jax.named_scope("out"):
        dout_BtNH, (dwo_wD,), _ = over_buckets_with_grads(
            body, dout_BtNH, (wo_wD,), axes=queries.axes, stream=queries.stream, dtype=dtype
        )
    return dout_BtNH, dwo_wD


project_out.defvjp(_out_forward, _out_backward)
