"""Move weight shards past resident tokens, and weight gradients home.

Every streamed op is a fold over *buckets* of its weights. A bucket is some rows of every array of the op's shard, all
packed into one message; the op says what a bucket does to the tokens, this module how buckets travel:

gather: bucket b is slice b of every rank's shard, by all_gather; gradients return by reduce-scatter. On a full mesh or
  a switch it uses every link, and no bucket waits for another.
ring: the shards themselves travel from rank to rank by ppermute, R - 1 hops; gradients travel with them.

R is the number of ranks on the folded axes, D the trailing dimension of every weight.
Source: Shyam, Golubeva, Anthony, arXiv 2604.26294 (ring); gather is ours.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.ops.pipeline import Carry, joined, one, pipelined

Arrays = tuple[jax.Array, ...]


class Stream(NamedTuple):
    """How an op's weights travel; hashable, so that it can be static."""

    movement: str = "gather"
    """gather or ring; or activations, which `tsp_jax.ops.stationary` moves"""
    buckets: int = 1
    """buckets that a rank's shard is cut into (gather)"""
    grad_dtype: str = "float32"
    """dtype in which weight gradients travel"""
    tokens: int = 1 << 30
    """tokens that meet a bucket at a time, at most"""
    token_buckets: int = 1
    """buckets that a rank's tokens are cut into, at most, where they move instead of weights"""


class Bucket(NamedTuple):
    """What has arrived: rows of each weight, and whose they are.

    Row i of an array is row ``slice_index * rows + i % rows`` of the shard of rank ``first_rank + i // rows``.
    """

    arrays: Arrays
    """each [num_ranks * rows, D], in the compute dtype"""
    index: Any
    """number of this bucket in the fold"""
    first_rank: Any
    num_ranks: int
    slice_index: Any

    def find(self, row: jax.Array, rows_per_rank: int) -> tuple[jax.Array, jax.Array]:
        """Where a row of the gathered weight (ranks in order) stands in this bucket.

        Returns:
          (index, inside): index is legal where inside is true.
        """
        rows = self.arrays[0].shape[0] // self.num_ranks
        rank, offset = row // rows_per_rank - self.first_rank, row % rows_per_rank
        inside = (rank >= 0) & (rank < self.num_ranks) & (offset // rows == self.slice_index)
        return jnp.where(inside, rank * rows + offset % rows, 0), inside


def custom_vjp(*static: int) -> Callable[[Callable], Any]:
    """`jax.custom_vjp` for a function whose arguments at these positions are static."""
    return lambda function: jax.custom_vjp(function, nondiff_argnums=static)


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Marks arrays as varying over every mesh axis that any of them varies over.

    The transpose of the mark is a psum over the axes that were added: how gradients of replicated weights, and of
    activations that a tensor axis replicates, become whole.
    """
    axes = frozenset[str]().union(*(jax.typeof(array).mat.varying for array in arrays))
    return [_vary(array, axes) for array in arrays]


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(array).mat.varying))
    return lax.pcast(array, missing, to="varying") if missing else array


def zeros(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh axes that `like` varies over (loop carries must not change in that).

    They are made after `like`. Zeros that depend on no array are made once by the compiler, outside of all loops, kept
    as long as the program runs, and copied to each place that wants them.
    """
    bits = jnp.dtype(f"uint{8 * like.dtype.itemsize}")
    first = lax.bitcast_convert_type(like[(0,) * like.ndim], bits)
    zero = lax.shift_right_logical(lax.shift_right_logical(first, bits.type(8 * bits.itemsize - 1)), bits.type(1))
    return _vary(jnp.broadcast_to(zero.astype(dtype), shape), jax.typeof(like).mat.varying)


def over_buckets(
    body: Callable[[Carry, Bucket], tuple[Carry, Any]],
    carry: Carry,
    shard: Arrays,
    *,
    axes: tuple[str, ...],
    stream: Stream,
    dtype: Any,
) -> tuple[Carry, Any]:
    """Folds `body` over all buckets of a sharded group of weights.

    Args:
      body: (carry, bucket) -> (carry, y).
      carry: initial value.
      shard: this rank's rows of each weight, each [rows, D]; rows divisible by `stream.buckets`.
      axes: folded mesh axes; empty: no messages, the buckets are the shard's own buckets.
      stream: movement and buckets.
      dtype: buckets are cast to it before they travel, slice by slice.

    Returns:
      (carry, ys): ys stacked [buckets, ...] in the order of buckets.

    Moves: (R - 1) / R of all rows x D x itemsize(dtype), in `buckets` all-gathers or R - 1
      collective-permutes.
    Keeps: nothing.
    """

    def step(carry, bucket):
        carry, y = body(carry, bucket)
        return carry, (), y

    carry, _, ys = _run(step, carry, shard, axes, stream, dtype, sends=False)
    return carry, ys


def over_buckets_with_grads(
    body: Callable[[Carry, Bucket], tuple[Carry, Arrays, Any]],
    carry: Carry,
    shard: Arrays,
    *,
    axes: tuple[str, ...],
    stream: Stream,
    dtype: Any,
) -> tuple[Carry, Arrays, Any]:
    """As `fold`, for backward: `body` also returns the gradient of each of the bucket's arrays.

    Returns:
      (carry, grads, ys): grads like `shard`, summed over the ranks that the buckets visited, in the shard's dtype.

    Moves: the weights as in `fold`, and as many bytes of gradients in `stream.grad_dtype` (in a ring, as
      many messages).
    """
    # Without a barrier the compiler may find that rematerialised forward has fetched the same buckets, and keep them.
    return _run(body, carry, lax.optimization_barrier(shard), axes, stream, dtype, sends=True)


def _run(step, carry, shard, axes, stream, dtype, sends: bool):
    if stream.movement == "ring" and axes:
        return _ring(step, carry, shard, axes, stream, dtype, sends)
    return _buckets(step, carry, _Gather(shard, axes, stream, dtype), sends)


# ------------------------------------------------------------------------------------------------ packing


def _pack(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    return jnp.concatenate([array.astype(dtype) for array in arrays], axis=-2)


def _unpack(message: jax.Array, rows: Sequence[int]) -> Arrays:
    """[..., sum(rows), D] -> each [prod(...) * rows, D]."""
    parts, start = [], 0
    for count in rows:
        part = lax.slice_in_dim(message, start, start + count, axis=message.ndim - 2)
        parts.append(part.reshape(-1, message.shape[-1]))
        start += count
    return tuple(parts)


def _pack_grads(grads: Arrays, ranks: int, dtype: Any) -> jax.Array:
    """Each [ranks * rows, D] -> [ranks, sum(rows), D]."""
    return _pack([grad.reshape(ranks, -1, grad.shape[-1]) for grad in grads], dtype)


def cast_like(arrays: Sequence[jax.Array], shard: Arrays) -> Arrays:
    """Arrays in the dtypes of what they are the gradients of."""
    return tuple(array.astype(own.dtype) for array, own in zip(arrays, shard, strict=True))


# ------------------------------------------------------------------------------------------------ buckets


class _Gather:
    """Slice b of every rank's shard."""

    def __init__(self, shard: Arrays, axes: tuple[str, ...], stream: Stream, dtype: Any):
        self.shard, self.axes, self.dtype, self.grad_dtype = shard, axes, dtype, stream.grad_dtype
        self.ranks = lax.axis_size(axes) if axes else 1
        self.buckets = stream.buckets
        self.slices = [array.reshape(self.buckets, -1, array.shape[-1]) for array in shard]
        self.rows = [array.shape[1] for array in self.slices]

    def _slice(self, bucket) -> jax.Array:
        return _pack([lax.dynamic_index_in_dim(s, bucket, keepdims=False) for s in self.slices], self.dtype)

    def fetch(self, index) -> jax.Array:
        """The message of bucket `index`."""
        with jax.named_scope("gather"):
            message = self._slice(index)
            return lax.all_gather(message, self.axes) if self.axes else message

    def bucket(self, message: jax.Array, index) -> Bucket:
        return Bucket(_unpack(message, self.rows), index, 0, self.ranks, index)

    def outgoing(self, grads: Arrays) -> jax.Array | Arrays:
        """The message of a bucket's gradients."""
        return _pack_grads(grads, self.ranks, self.grad_dtype) if self.axes else cast_like(grads, self.shard)

    def home(self, message: Any, index) -> Arrays:
        """A bucket's gradients -> this rank's share of their sum, each [rows, D]."""
        del index
        if not self.axes:
            return message
        with jax.named_scope("scatter"):
            mine = lax.optimization_barrier(lax.psum_scatter(message, self.axes))  # see scatter_sequence
            return cast_like(_unpack(mine, self.rows), self.shard)

    def collect(self, homes: Arrays) -> Arrays:
        """Stacked homes, each [steps, rows, D] -> like the shard."""
        return tuple(home.reshape(own.shape) for home, own in zip(homes, self.shard, strict=True))


def _buckets(step, carry: Carry, carrier: _Gather, sends: bool):
    """Each bucket is under way while the one before it is used, and its gradients while the one after it is."""

    def turn(carry, message, index):
        carry, grads, y = step(carry, carrier.bucket(message, index))
        return carry, carrier.outgoing(grads) if grads else (), y

    carry, homes, ys = pipelined(
        turn, lambda _, index: carrier.fetch(index), carrier.home if sends else None, carry, carrier.buckets,
        remote=bool(carrier.axes),
    )  # fmt: skip
    return carry, carrier.collect(homes) if sends else (), ys


# ------------------------------------------------------------------------------------------------ ring


def _ring(step, carry: Carry, shard: Arrays, axes: tuple[str, ...], stream: Stream, dtype: Any, sends: bool):
    """In iteration i this rank holds the shard of rank me - i.

    A shard's gradient starts at the first rank that the shard visits, and reaches its owner after as many hops as the
    shard made; the owner adds its own part there.
    """
    ranks, me = lax.axis_size(axes), lax.axis_index(axes)
    rows = [array.shape[0] for array in shard]
    route = [(rank, (rank + 1) % ranks) for rank in range(ranks)]

    def hop(message):
        with jax.named_scope("ring"):
            return lax.ppermute(message, axes, route)

    def visit(carry, message, index):
        bucket = Bucket(_unpack(message, rows), index, (me - index) % ranks, 1, 0)
        carry, grads, y = step(carry, bucket)
        return carry, _pack_grads(grads, 1, stream.grad_dtype)[0] if sends else (), y

    def scan_visit(state, index):
        carry, message, travelling = state
        message = hop(message)
        carry, grads, y = visit(carry, message, index)
        travelling = hop(jax.tree.map(jnp.add, travelling, grads)) if sends else ()
        return (carry, message, travelling), y

    message = _pack(shard, dtype)
    carry, own, y = visit(carry, message, 0)
    state = carry, message, jax.tree.map(jnp.zeros_like, own)
    (carry, _, travelling), later = lax.scan(scan_visit, state, jnp.arange(1, ranks))
    ys = joined([one(y), later])
    return carry, cast_like(_unpack(own + travelling, rows), shard) if sends else (), ys
