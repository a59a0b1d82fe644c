"""What attention ops share: their weights, static sizes, and how heads are sharded and streamed.

Dims: B batch, t this device's tokens, D model, N query heads and K KV heads of this tensor shard, H head, w this
device's rows of a weight, R ranks that share the rows of some heads, m heads of a bucket and p their rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config import NormWidth, RopeScaling, TokenOrder
from tsp_jax.heads import HeadRows, Heads, HeadSharding
from tsp_jax.layout import Axes, largest_divisor
from tsp_jax.ops.attention.exchange import Exchange
from tsp_jax.ops.kernels import Kernel, XlaKernel
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.ops.stream import Bucket, Stream, zeros


class AttentionWeights(NamedTuple):
    """This device's rows of each weight, in the order of `HeadRows`. Query heads are in the order of their KV heads."""

    q_wD: jax.Array
    k_wD: jax.Array
    v_wD: jax.Array
    o_wD: jax.Array


class HeadNorms(NamedTuple):
    """Scales of RMSNorm of queries and keys; None: no norm.

    Over each head: [H]. Over all heads together (`AttentionConfig.norm_width`): those of all heads of the model, [N H]
    and [K H].
    """

    q_H: jax.Array | None = None
    k_H: jax.Array | None = None


class HeadBiases(NamedTuple):
    """Biases of the projections to queries [N H], and to keys and values [K H], of all heads of the model."""

    q_N: jax.Array
    k_K: jax.Array
    v_K: jax.Array


class AttentionConfig(NamedTuple):
    """Everything about an attention op that does not depend on arrays; hashable."""

    heads: Heads
    """heads of all tensor shards"""
    rope_theta: float | None
    """base of the rotary frequencies; None: no RoPE"""
    norm_eps: float = 1e-6
    query_buckets: int = 1
    """most buckets for Wq, and for Wo; the actual number divides `HeadRows.parts`"""
    kv_buckets: int = 1
    """the same for Wk and Wv together"""
    kernel: Kernel = XlaKernel()
    """computes attention on one device"""
    rope_scaling: RopeScaling = RopeScaling()
    exchange_buckets: int = 1
    """most buckets of KV heads for the exchange of keys and values over the sequence"""
    scores: Scores = Scores()
    """scale, soft cap, causality and window"""
    token_order: TokenOrder = "any"
    """the order of a sequence's tokens over the ranks; if it is known, windows need not exchange all keys"""
    norm_width: NormWidth = "head"
    """what the norm of queries and keys takes its mean over"""

    @property
    def head_dim(self) -> int:
        """H."""
        return self.heads.dim


class HeadStream(NamedTuple):
    """How the weights of some heads are streamed, and which heads a bucket holds. Hashable."""

    axes: tuple[str, ...]
    """mesh axes that buckets are gathered over"""
    stream: Stream
    rows: HeadRows

    @classmethod
    def of(cls, rows: HeadRows, axes: tuple[str, ...], stream: Stream, buckets: int) -> "HeadStream":
        """A stream with at most `buckets` buckets. Only ranks that store whole heads can use a ring; others gather."""
        movement = stream.movement if rows.whole else "gather"
        return cls(axes, stream._replace(buckets=largest_divisor(rows.parts, buckets), movement=movement), rows)

    def _is_all(self, bucket: Bucket) -> bool:
        return self.stream.buckets == 1 and bucket.num_ranks == self.rows.ranks

    def _by_bucket(self, heads_BtNH: jax.Array, bucket: Bucket) -> jax.Array:
        """Heads as [B, t, groups of ranks, ranks per group, buckets per rank, heads per rank and bucket, H].

        A bucket has heads of all ranks of one group. Where ranks store parts of units instead of whole heads, the heads
        of a bucket are consecutive, as with one group of one rank.
        """
        shape, num_ranks = heads_BtNH.shape, bucket.num_ranks
        ranks = (self.rows.ranks // num_ranks, num_ranks) if self.rows.whole else (1, 1)
        return heads_BtNH.reshape(*shape[:2], *ranks, self.stream.buckets, -1, shape[-1])

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
    sharding: HeadSharding
    queries: HeadStream
    """stream of Wq, and of Wo; N heads"""
    keys_values: HeadStream
    """stream of Wk and Wv; K heads, or all tensor shards' KV heads if tensor shards share KV heads"""

    @classmethod
    def of(cls, config: AttentionConfig, axes: Axes, stream: Stream) -> "ShardedHeads":
        """The heads of `config`, sharded over these axes; the bucket counts of `config` replace `stream.buckets`."""
        sharding = HeadSharding(config.heads, _size(axes.tensor), _size(axes.folded))
        queries = HeadStream.of(sharding.queries, axes.folded, stream, config.query_buckets)
        # Where tensor shards share KV heads, each gathers all KV heads at once and uses one.
        spans = sharding.kv_head_spans_shards
        names, buckets = (axes.tensor + axes.folded, 1) if spans else (axes.folded, config.kv_buckets)
        return cls(config, axes, sharding, queries, HeadStream.of(sharding.keys_values, names, stream, buckets))

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.sharding.shard.kv

    @property
    def exchange_buckets(self) -> int:
        """Number of buckets in which KV heads are exchanged over the sequence axes."""
        return largest_divisor(self.num_kv_heads, self.config.exchange_buckets)

    def exchange(self, tokens: int) -> Exchange:
        """The exchange of keys and values over the sequence axes, for this many tokens of this device."""
        return Exchange.of(self.axes.sequence, tokens, self.config.scores, self.config.token_order)

    def of_shard(self, all_heads: jax.Array, queries: bool) -> jax.Array:
        """[heads, ...] of all real heads of the model -> those of this tensor shard's heads; 0 for padded heads.

        `queries`: the heads are query heads, not KV heads.
        """
        model, shard, (_, *rest) = self.config.heads, self.sharding.shard, all_heads.shape
        by_head = all_heads.reshape(model.num_kv_heads, model.real_group if queries else 1, *rest)
        more = model.kv - model.num_kv_heads, model.group - model.real_group if queries else 0
        padded = jnp.pad(by_head, [(0, zeros) for zeros in (*more, *(0 for _ in rest))]).reshape(-1, *rest)
        if not self.axes.tensor:
            return padded
        index, size = lax.axis_index(self.axes.tensor), shard.query if queries else shard.kv
        spans = not queries and self.sharding.kv_head_spans_shards
        start = index * self.config.heads.kv // self.sharding.tensor if spans else index * size
        return lax.dynamic_slice_in_dim(padded, start, size)

    def of_rank(self, shard_heads: jax.Array, queries: bool) -> jax.Array:
        """`of_shard` -> those of the heads that this folded rank computes for all folded ranks' tokens."""
        if not queries and self.sharding.kv_head_spans_shards:  # the one KV head of this tensor shard
            return shard_heads
        numbers_n = jnp.asarray(self.sharding.own_heads()[0 if queries else 1])[lax.axis_index(self.axes.folded)]
        real_n = (numbers_n >= 0).reshape(-1, *(1 for _ in shard_heads.shape[1:]))
        return jnp.where(real_n, shard_heads[numbers_n], 0)

    def first_kv_row(self) -> jax.Array:
        """Index, among the rows of all KV heads, of the first row of the one KV head that this tensor shard uses.

        Tensor shards must share KV heads (`kv_head_spans_shards`).
        """
        head = lax.axis_index(self.axes.tensor) * self.config.heads.kv // self.sharding.tensor
        return head * self.config.head_dim

    def select_rows(self, weights: HeadStream, rows: jax.Array, axis: int = 0) -> jax.Array:
        """The rows of a gathered bucket of `weights` that this tensor shard uses, head after head."""
        rows = weights.rows.by_head(rows, axis)
        if weights.axes == self.axes.folded:
            return rows
        return lax.dynamic_slice_in_dim(rows, self.first_kv_row(), self.config.head_dim, axis)

    def select_rows_transpose(self, weights: HeadStream, dw_pD: jax.Array) -> jax.Array:
        """Transpose of `select_rows`: gradient of the rows that this tensor shard uses -> gradient of the bucket."""
        if weights.axes != self.axes.folded:
            full = zeros((self.config.heads.kv * self.config.head_dim, dw_pD.shape[-1]), dw_pD.dtype, like=dw_pD)
            dw_pD = lax.dynamic_update_slice_in_dim(full, dw_pD, self.first_kv_row(), axis=0)
        return weights.rows.by_rank(dw_pD, 0)


def _size(axes: tuple[str, ...]) -> int:
    return lax.axis_size(axes) if axes else 1
