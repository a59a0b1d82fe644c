"""Move tokens past stationary weights, and reduce-scatter the partial outputs: the other half of `stream`.

A folded axis shards weights and tokens. `stream` moves weights past tokens. Here each rank keeps its weights and sees
the tokens of all ranks, one bucket at a time: an all-gather of slice i of every rank's tokens. The product with the
rank's own weights is a partial output, which a reduce-scatter sums over ranks and returns to the tokens' owners. A
weight gradient sums over tokens that the rank has gathered itself, so gradients are not communicated.

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
    body: Callable[[Carry, Arrays, Arrays], tuple[Carry, Arrays, Arrays]],
    carry: Carry,
    arrive: Arrays,
    here: Arrays = (),
    *,
    axes: tuple[str, ...],
    stream: Stream,
) -> tuple[Carry, Arrays, Arrays]:
    """Folds `body` over buckets of all ranks' tokens.

    While a bucket is used, the next one is on its way here and the partial outputs of the last on their way home.

    Args:
      body: (carry, arrived, here) -> (carry, partial, kept); each a tuple of arrays [B, R p, ...], ranks in order.
      carry: initial value.
      arrive: this rank's tokens, each [B, t, ...]; gathered a bucket at a time.
      here: what this rank has of all ranks' tokens already, each [B, R t, ...], ranks in order.
      axes: folded mesh axes, at least one.
      stream: `token_buckets`; the largest divisor of t that fits is used.

    Returns:
      (carry, home, kept): home, each [B, t, ...], are this rank's tokens of the partials' sums over ranks; kept, each
      [B, R t, ...], stay where they were made.

    Moves: (R - 1) / R of all ranks' tokens for each of `arrive` (all-gather) and of the partials (reduce-scatter).
    """
    buckets = _Pieces(arrive, here, axes, stream.token_buckets)

    def turn(carry, arrived: Arrays, index):
        return body(carry, arrived, buckets.local(index))

    carry, home, kept = pipelined(
        turn,
        lambda _, index: buckets.fetch(index),
        lambda partial, _: buckets.send_home(partial),
        carry,
        buckets.number,
        remote=True,
    )
    return carry, _in_order(home, 1), _in_order(kept, buckets.ranks)


class _Pieces:
    """Cuts and moves tokens."""

    def __init__(self, arrive: Arrays, here: Arrays, axes: tuple[str, ...], buckets: int):
        self.axes, self.ranks = axes, lax.axis_size(axes)
        tokens = arrive[0].shape[1] if arrive else here[0].shape[1] // self.ranks
        self.number = largest_divisor(tokens, buckets)
        self.arrive = tuple(a.reshape(a.shape[0], self.number, -1, *a.shape[2:]) for a in arrive)
        self.here = tuple(a.reshape(a.shape[0], self.ranks, self.number, -1, *a.shape[2:]) for a in here)

    def fetch(self, index) -> Arrays:
        """All ranks' tokens of a bucket."""
        mine = (lax.dynamic_index_in_dim(a, index, axis=1, keepdims=False) for a in self.arrive)
        with jax.named_scope("gather_tokens"):
            return tuple(lax.all_gather(a, self.axes, axis=1, tiled=True) for a in mine)

    def local(self, index) -> Arrays:
        """What is here of a bucket."""
        mine = (lax.dynamic_index_in_dim(a, index, axis=2, keepdims=False) for a in self.here)
        return tuple(a.reshape(a.shape[0], -1, *a.shape[3:]) for a in mine)

    def send_home(self, partial: Arrays) -> Arrays:
        """This rank's tokens of the sum over ranks."""
        with jax.named_scope("scatter_tokens"):
            home = (lax.psum_scatter(a, self.axes, scatter_dimension=1, tiled=True) for a in partial)
            return tuple(lax.optimization_barrier(a) for a in home)  # see scatter_sequence


def _in_order(buckets: Arrays, ranks: int) -> Arrays:
    """Each array [buckets, B, ranks p, ...] -> [B, ranks t, ...], ranks in order."""

    def join(stacked: jax.Array) -> jax.Array:
        buckets, batch, tokens, *rest = stacked.shape
        cut = stacked.reshape(buckets, batch, ranks, tokens // ranks, *rest)
        return jnp.moveaxis(cut, 0, 2).reshape(batch, -1, *rest)

    return tuple(join(stacked) for stacked in buckets)


def add(total: Any, more: Any) -> Any:
    """Sums of two trees, leaf by leaf."""
    return jax.tree.map(jnp.add, total, more)


def cast_all(weights: Arrays, dtype: Any) -> Arrays:
    """Resident weights in the compute dtype."""
    return tuple(weight.astype(dtype) for weight in weights)


def resident_bucket(weight: jax.Array, dtype: Any) -> Bucket:
    """This rank's shard as the one bucket there is."""
    return Bucket(cast_all((weight,), dtype), 0, 0, 1, 0)
