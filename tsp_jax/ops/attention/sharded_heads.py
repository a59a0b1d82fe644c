"""What attention ops share: their weights, static sizes, and how heads are sharded and streamed.

With fewer KV heads than ranks each rank stores an equal part of a KV head's rows, and all KV heads are one bucket.

Dims: B batch, t this device's tokens, D model, N query heads and K KV heads of this tensor shard, H head, w this
device's rows of a weight, p rows and m heads of a bucket.
"""

from typing import NamedTuple

import jax
from jax import lax

from tsp_jax.config import RopeScaling
from tsp_jax.layout import Axes, largest_divisor
from tsp_jax.ops.kernels import Kernel, XlaKernel
from tsp_jax.ops.stream import Bucket, Stream, zeros


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
    """Everything about an attention op that does not depend on arrays; hashable."""

    padded_kv_heads: int
    """KV heads of all ranks, padding included"""
    head_dim: int
    rope_theta: float
    norm_eps: float = 1e-6
    query_buckets: int = 1
    """upper bound: a rank's query heads have as many buckets as their largest divisor up to it; so do KV heads"""
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
    num_heads: int
    """of this tensor shard"""

    def _is_all(self, bucket: Bucket) -> bool:
        return self.stream.buckets == 1 and bucket.num_ranks == self.ranks

    def _by_bucket(self, heads_BtNH: jax.Array, bucket: Bucket) -> jax.Array:
        """[B, t, groups of ranks, ranks per group (bucket), buckets per rank, heads per rank and bucket, H]."""
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
    """of Wq and Wo; N heads"""
    keys_values: HeadStream
    """of Wk and Wv; K heads"""

    @classmethod
    def of(cls, config: AttentionConfig, axes: Axes, stream: Stream, weights: AttentionWeights) -> "ShardedHeads":
        """From the shapes of this device's weights; the bucket counts of `config` replace `stream.buckets`."""
        head_dim, folded, tensor = config.head_dim, _size(axes.folded), _size(axes.tensor)
        query_heads, kv_heads = weights.q_wD.shape[0] // head_dim, max(1, config.padded_kv_heads // tensor)
        buckets = largest_divisor(query_heads, config.query_buckets)
        queries = HeadStream(axes.folded, stream._replace(buckets=buckets), folded, query_heads * folded)
        if config.padded_kv_heads < folded * tensor:
            # A rank has part of a KV head. Where that head spans tensor shards, each shard gathers all KV heads.
            names = axes.tensor + axes.folded if config.padded_kv_heads < tensor else axes.folded
            stream = stream._replace(buckets=1, movement="gather")
            return cls(config, axes, queries, HeadStream(names, stream, _size(names), kv_heads))
        buckets = largest_divisor(weights.k_wD.shape[0] // head_dim, config.kv_buckets)
        return cls(config, axes, queries, HeadStream(axes.folded, stream._replace(buckets=buckets), folded, kv_heads))

    @property
    def exchange_buckets(self) -> int:
        """Number of buckets in which KV heads are exchanged over the sequence axes."""
        return largest_divisor(self.keys_values.num_heads, self.config.exchange_buckets)

    @property
    def kv_head_spans_shards(self) -> bool:
        """Whether a KV head's rows are on several tensor shards, so that each gathers all KV heads and selects one."""
        return self.keys_values.axes != self.axes.folded

    def first_kv_row(self) -> jax.Array:
        """First of all KV heads' rows that belongs to this shard's one head; needs `kv_head_spans_shards`."""
        head = lax.axis_index(self.axes.tensor) * self.config.padded_kv_heads // _size(self.axes.tensor)
        return head * self.config.head_dim

    def select_rows(self, weights: HeadStream, w_pD: jax.Array) -> jax.Array:
        """The rows of a bucket of `weights` that this tensor shard uses."""
        if weights.axes == self.axes.folded:
            return w_pD
        return lax.dynamic_slice_in_dim(w_pD, self.first_kv_row(), self.config.head_dim)

    def select_rows_transpose(self, weights: HeadStream, dw_pD: jax.Array) -> jax.Array:
        """Gradient of the rows that this tensor shard uses -> gradient of the bucket."""
        if weights.axes == self.axes.folded:
            return dw_pD
        full = zeros((self.config.padded_kv_heads * self.config.head_dim, dw_pD.shape[-1]), dw_pD.dtype, like=dw_pD)
        return lax.dynamic_update_slice_in_dim(full, dw_pD, self.first_kv_row(), axis=0)


def _size(axes: tuple[str, ...]) -> int:
    return lax.axis_size(axes) if axes else 1
