"""Move tokens past stationary weights and reduce-scatter the partial outputs: the counterpart of `stream`.

A folded axis shards both weights and tokens. `stream` moves weights past tokens. Here each rank keeps its weights and
processes the tokens of all ranks, one bucket of tokens at a time: it all-gathers bucket i of every rank's tokens and
multiplies them with its own weights. A reduce-scatter sums these partial outputs over ranks and returns each to the
rank that owns its tokens. A rank computes the gradient of its own weights from all tokens, so weight gradients are not
communicated.

Dims: B batch, t this device's tokens, R ranks of the folded axes, p tokens of a bucket per rank.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import largest_divisor
from tsp_jax.ops.pipeline import Carry, pipelined
from tsp_jax.ops.stream import Arrays, Bucket, Stream


def moves_tokens(folded: tuple[str, ...], stream: Stream) -> bool:
    """Whether an op moves its tokens rather than its weights."""
    return stream.movement == "activations" and bool(folded)


def over_gathered_tokens(
    body: Callable[[Carry, Arrays, Arrays], tuple[Carry, Any, Any]], carry: Carry, sharded: Arrays,
    gathered: Arrays = (), *, axes: tuple[str, ...], stream: Stream,
) -> tuple[Carry, Any, Any]:  # fmt: skip
    """Scans `body` over buckets of all ranks' tokens.

    While a bucket is used, the next bucket is gathered and the partial outputs of the previous one are scattered.

    Args:
      body: (carry, bucket of `sharded`, bucket of `gathered`) -> (carry, partial, local). Buckets are tuples
        of arrays [B, R p, ...], p tokens of each rank; partial and local are trees of such arrays.
      carry: initial value.
      sharded: arrays of this rank's tokens, each [B, t, ...]; all-gathered one bucket at a time.
      gathered: arrays of all ranks' tokens that this rank already has, each [B, R t, ...], ranks in order.
      axes: folded mesh axes, at least one.
      stream: `token_buckets`, lowered to the nearest divisor of t.

    Returns:
      (carry, reduced, local): reduced, each [B, t, ...], are the partials summed over ranks, for this rank's tokens;
      local, each [B, R t, ...], are the outputs of `body` that are not communicated.

    Moves: (R - 1) / R of all ranks' tokens for each array of `sharded` (all-gather) and of partial (reduce-scatter), in
      `token_buckets` messages each.
    """
    buckets = _TokenBuckets(sharded, gathered, axes, stream.token_buckets)

    def step(carry, sharded: Arrays, index):
        return body(carry, sharded, buckets.local(index))

    def fetch(_, index):
        return buckets.gather(index)

    def send(partial, _):
        return buckets.scatter(partial)

    carry, reduced, local = pipelined(step, fetch, send, carry, buckets.number, remote=True)
    return carry, _in_order(reduced, 1), _in_order(local, buckets.ranks)


class _TokenBuckets:
    """Splits tokens into buckets and communicates them."""

    def __init__(self, sharded: Arrays, gathered: Arrays, axes: tuple[str, ...], buckets: int):
        self.axes, self.ranks = axes, lax.axis_size(axes)
        tokens = sharded[0].shape[1] if sharded else gathered[0].shape[1] // self.ranks
        self.number = largest_divisor(tokens, buckets)
        self.sharded = tuple(a.reshape(a.shape[0], self.number, -1, *a.shape[2:]) for a in sharded)
        self.gathered = tuple(a.reshape(a.shape[0], self.ranks, self.number, -1, *a.shape[2:]) for a in gathered)

    def gather(self, index) -> Arrays:
        """One bucket of the sharded arrays, with all ranks' tokens."""
        mine = (lax.dynamic_index_in_dim(a, index, axis=1, keepdims=False) for a in self.sharded)
        with jax.named_scope("gather_tokens"):
            return tuple(lax.all_gather(a, self.axes, axis=1, tiled=True) for a in mine)

    def local(self, index) -> Arrays:
        """All ranks' tokens of a bucket, from arrays that need no gather: this rank already has them."""
        mine = (lax.dynamic_index_in_dim(a, index, axis=2, keepdims=False) for a in self.gathered)
        return tuple(a.reshape(a.shape[0], -1, *a.shape[3:]) for a in mine)

    def scatter(self, partial: Any) -> Any:
        """The sums of partial outputs over ranks, for this rank's tokens."""

        def reduced(array: jax.Array) -> jax.Array:
            mine = lax.psum_scatter(array, self.axes, scatter_dimension=1, tiled=True)
            return lax.optimization_barrier(mine)  # see scatter_sequence

        with jax.named_scope("scatter_tokens"):
            return jax.tree.map(reduced, partial)


def _in_order(stacks: Any, ranks: int) -> Any:
    """Joins buckets: each array [buckets, B, ranks * p, ...] -> [B, ranks * t, ...], ranks in order."""

    def join(stacked: jax.Array) -> jax.Array:
        buckets, batch, tokens, *rest = stacked.shape
        by_rank = stacked.reshape(buckets, batch, ranks, tokens // ranks, *rest)
        return jnp.moveaxis(by_rank, 0, 2).reshape(batch, -1, *rest)

    return jax.tree.map(join, stacks)


def add(total: Any, more: Any) -> Any:
    """Sums of two trees, leaf by leaf."""
    return jax.tree.map(jnp.add, total, more)


def resident_bucket(weights: Arrays, axes: tuple[str, ...], dtype: Any) -> Bucket:
    """This rank's whole shard of weights sharded over `axes`, as one bucket."""
    return Bucket(tuple(w.astype(dtype) for w in weights), index=0, first_rank=lax.axis_index(axes), num_ranks=1)
