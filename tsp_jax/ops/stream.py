"""Move weight shards past resident tokens, and reduce weight gradients to the ranks that own them.

Every streamed op is a fold over *buckets* of its weights. A bucket holds some rows of each of the op's weights, packed
into one message. The op says what it does with a bucket; this module communicates the buckets, in one of two ways:

gather: bucket b is the b-th part of every rank's shard, all-gathered; its gradients are reduce-scattered. If the links
  form a full mesh or meet in a switch, an all-gather uses all of them, and no bucket waits for another.
ring: a bucket is one rank's whole shard. Shards go from rank to rank by ppermute, R - 1 hops; so do their gradients.

Dims: R ranks of the folded axes (which shard both tokens and weights), D trailing dimension of every weight.
Source: Shyam, Golubeva, Anthony, arXiv 2604.26294 (ring); gather is ours.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.ops.pipeline import Carry, concatenated, pipelined, stack_of_one

Arrays = tuple[jax.Array, ...]
FLOAT32 = 4
"""size of a float32, in bytes"""


class Stream(NamedTuple):
    """How an op communicates over its folded axes. Hashable, since it is static. Bucket counts are per device."""

    movement: str = "gather"
    """gather and ring move weights past tokens; activations moves tokens past weights (`tsp_jax.ops.stationary`)"""
    buckets: int = 1
    """gather: number of buckets that a device's shard of the weights is split into"""
    grad_dtype: str = "float32"
    """dtype in which weight gradients are communicated"""
    chunk_tokens: int = 1 << 30
    """largest number of tokens that are multiplied with a bucket at once (a chunk); bounds activation memory"""
    product_bytes: float = math.inf
    """largest float32 product of a chunk with one weight of a bucket, in bytes; lowers `chunk_tokens` if needed"""
    token_buckets: int = 1
    """activations: largest number of buckets that a device's tokens are split into"""

    def chunk(self, rows: int) -> int:
        """Largest number of tokens to multiply at once with `rows` rows of a weight."""
        return max(1, int(min(self.chunk_tokens, self.product_bytes / (FLOAT32 * rows))))


class Bucket(NamedTuple):
    """Some rows of each weight, from one or more ranks' shards.

    Each array holds ``rows = array.shape[0] // num_ranks`` rows of each rank's shard, rank after rank. Row i of the
    array is row ``index_in_shard * rows + i % rows`` of the shard of rank ``first_rank + i // rows``.
    """

    arrays: Arrays
    """each [num_ranks * rows, D], in the compute dtype"""
    index: Any
    """index of the loop step that processes the bucket"""
    first_rank: Any
    num_ranks: int
    index_in_shard: Any = 0
    buckets_per_shard: int = 1

    @property
    def num_rows(self) -> int:
        """Number of rows of the first weight in this bucket."""
        return self.arrays[0].shape[0]

    def find(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Looks up a row of the first weight in this bucket; returns (index, inside).

        `row` is numbered as if the shards of all ranks were joined, in rank order. `inside` says whether this bucket
        has the row. `index` is its place in the bucket's first array, or 0 if the bucket does not have it.
        """
        rows = self.arrays[0].shape[0] // self.num_ranks
        shard_rows = rows * self.buckets_per_shard
        rank, offset = row // shard_rows - self.first_rank, row % shard_rows
        inside = (rank >= 0) & (rank < self.num_ranks) & (offset // rows == self.index_in_shard)
        return jnp.where(inside, rank * rows + offset % rows, 0), inside

    def rows(self) -> jax.Array:
        """Inverse of `find`: for each place in the bucket's first array, the number of the row that is there; int32."""
        places = jnp.arange(self.arrays[0].shape[0], dtype=jnp.int32)
        rows = len(places) // self.num_ranks
        shard = self.first_rank + places // rows
        return (shard * self.buckets_per_shard + self.index_in_shard) * rows + places % rows


def custom_vjp(*static_argnums: int) -> Callable[[Callable], Any]:
    """`jax.custom_vjp` for a function whose arguments at positions `static_argnums` are static."""
    return lambda function: jax.custom_vjp(function, nondiff_argnums=static_argnums)


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Marks arrays as varying over every mesh axis that any of them varies over.

    In backward, the mark becomes a psum over the axes that it added. That sums the gradients of weights that are
    replicated over token axes, and of activations that are replicated over tensor axes.
    """
    axes = frozenset[str]().union(*(jax.typeof(array).mat.varying for array in arrays))
    return [_vary(array, axes) for array in arrays]


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(array).mat.varying))
    return lax.pcast(array, missing, to="varying") if missing else array


def zeros(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`, as the initial value of a loop's carry must.

    The zeros are computed from `like`, so that the compiler does not see a constant. It would make a constant
    once, outside all loops, keep it as long as the program runs, and copy it to each use.
    """
    bits = jnp.dtype(f"uint{8 * like.dtype.itemsize}")
    first = lax.bitcast_convert_type(like[(0,) * like.ndim], bits)
    zero = lax.shift_right_logical(lax.shift_right_logical(first, bits.type(8 * bits.itemsize - 1)), bits.type(1))
    return _vary(jnp.broadcast_to(zero.astype(dtype), shape), jax.typeof(like).mat.varying)


def over_buckets(
    body: Callable[[Carry, Bucket], tuple[Carry, Any]], carry: Carry, shard: Arrays, *, axes: tuple[str, ...],
    stream: Stream, dtype: Any,
) -> tuple[Carry, Any]:  # fmt: skip
    """Scans `body` over all buckets of a group of sharded weights.

    Args:
      body: (carry, bucket) -> (carry, y).
      carry: initial value.
      shard: this rank's rows of each weight, each [rows, D]; `stream.buckets` divides rows.
      axes: folded mesh axes. If empty, nothing is communicated, and the buckets are parts of this device's shard.
      stream: how buckets move, and how many there are.
      dtype: compute dtype; each bucket is cast to it before it is sent.

    Returns:
      (carry, ys): the ys of all buckets are stacked, [buckets, ...], in the order of the buckets.

    Moves: (R - 1) / R of all ranks' rows x D x itemsize(dtype), in `buckets` all-gathers or R - 1 collective-permutes.
    Keeps: nothing.
    """

    def step(carry, bucket):
        carry, y = body(carry, bucket)
        return carry, (), y

    carry, _, ys = _fold(step, carry, shard, axes, stream, dtype, sends=False)
    return carry, ys


def over_buckets_with_grads(
    body: Callable[[Carry, Bucket], tuple[Carry, Arrays, Any]], carry: Carry, shard: Arrays, *, axes: tuple[str, ...],
    stream: Stream, dtype: Any,
) -> tuple[Carry, Arrays, Any]:  # fmt: skip
    """`over_buckets` for backward: `body` also returns the gradient of each of the bucket's arrays.

    Args:
      body: (carry, bucket) -> (carry, gradients, y).
      carry, shard, axes, stream, dtype: as in `over_buckets`.

    Returns:
      (carry, grads, ys): grads are summed over ranks and have the shapes and dtypes of `shard`.

    Moves: the weights as in `over_buckets`, and as many gradient elements in `stream.grad_dtype`, by reduce-scatters or
      collective-permutes.
    """
    # Without a barrier the compiler may find that rematerialised forward has fetched the same buckets, and keep them.
    return _fold(body, carry, lax.optimization_barrier(shard), axes, stream, dtype, sends=True)


def _fold(step, carry: Carry, shard: Arrays, axes: tuple[str, ...], stream: Stream, dtype: Any, sends: bool):
    fold = _ring if stream.movement == "ring" and axes else _gather
    return fold(step, carry, shard, axes, stream, dtype, sends)


# ------------------------------------------------------------------------------------------------ packing


def _pack(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    return jnp.concatenate([array.astype(dtype) for array in arrays], axis=-2)


def _unpack(message: jax.Array, rows: Sequence[int]) -> Arrays:
    """[..., sum(rows), D] -> each [prod(...) * rows, D]."""
    parts = lax.split(message, rows, axis=message.ndim - 2)
    return tuple(part.reshape(-1, message.shape[-1]) for part in parts)


def _pack_grads(grads: Arrays, ranks: int, dtype: Any) -> jax.Array:
    """Each [ranks * rows, D] -> [ranks, sum(rows), D]."""
    return _pack([grad.reshape(ranks, -1, grad.shape[-1]) for grad in grads], dtype)


def cast_like(arrays: Sequence[jax.Array], shard: Arrays) -> Arrays:
    """Casts each of `arrays`, the gradients of `shard`, to the dtype of its weight."""
    return tuple(array.astype(own.dtype) for array, own in zip(arrays, shard, strict=True))


# ------------------------------------------------------------------------------------------------ gather


class _ShardBuckets:
    """Splits shards into buckets, gathers a bucket and reduce-scatters its gradients."""

    def __init__(self, shard: Arrays, axes: tuple[str, ...], stream: Stream, dtype: Any):
        self.shard, self.axes, self.dtype, self.grad_dtype = shard, axes, dtype, stream.grad_dtype
        self.ranks = lax.axis_size(axes) if axes else 1
        self.number = stream.buckets
        self.split = [array.reshape(self.number, -1, array.shape[-1]) for array in shard]
        self.rows = [array.shape[1] for array in self.split]

    def gather(self, index) -> jax.Array:
        """Bucket `index`, gathered from all ranks in one message."""
        with jax.named_scope("gather"):
            mine = [lax.dynamic_index_in_dim(array, index, keepdims=False) for array in self.split]
            message = _pack(mine, self.dtype)
            return lax.all_gather(message, self.axes) if self.axes else message

    def bucket(self, message: jax.Array, index) -> Bucket:
        return Bucket(_unpack(message, self.rows), index, 0, self.ranks, index, self.number)

    def pack_grads(self, grads: Arrays) -> jax.Array | Arrays:
        """Packs a bucket's gradients into one message; without axes, only casts them."""
        return _pack_grads(grads, self.ranks, self.grad_dtype) if self.axes else cast_like(grads, self.shard)

    def scatter(self, message: Any) -> Arrays:
        """Reduce-scatters a message of gradients; returns this rank's part of their sum over ranks, each [rows, D]."""
        if not self.axes:
            return message
        with jax.named_scope("scatter"):
            mine = lax.optimization_barrier(lax.psum_scatter(message, self.axes))  # see scatter_sequence
            return cast_like(_unpack(mine, self.rows), self.shard)

    def join(self, reduced: Arrays) -> Arrays:
        """Joins stacks of buckets, each [buckets, rows, D], to arrays of the shard's shapes."""
        return tuple(stack.reshape(own.shape) for stack, own in zip(reduced, self.shard, strict=True))


def _gather(step, carry, shard, axes, stream, dtype, sends: bool):
    """While a bucket is used, the next bucket is gathered, and the previous bucket's gradients are reduce-scattered."""
    buckets = _ShardBuckets(shard, axes, stream, dtype)

    def use(carry, message, index):
        carry, grads, y = step(carry, buckets.bucket(message, index))
        if sends and axes:
            # Without a barrier the compiler adds up several buckets' results at once, and keeps them all until then.
            carry, grads = lax.optimization_barrier((carry, grads))
        return carry, buckets.pack_grads(grads) if grads else (), y

    def fetch(_, index):
        return buckets.gather(index)

    def send(message, _):
        return buckets.scatter(message)

    num_steps, remote = buckets.number, bool(axes)
    carry, reduced, ys = pipelined(use, fetch, send if sends else None, carry, num_steps, remote=remote)
    return carry, buckets.join(reduced) if sends else (), ys


# ------------------------------------------------------------------------------------------------ ring


def permute_ranks(axes: tuple[str, ...]) -> tuple[tuple[str, ...], list[int]]:
    """(the axes for a `lax.ppermute` over `axes`, the number that it gives to each rank of `axes`).

    `lax.ppermute` numbers ranks in the mesh's order of axes, whatever the order of the axes that it is given.
    """
    in_mesh = tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name in axes)
    sizes = {name: lax.axis_size(name) for name in axes}
    ranks = []
    for indices in itertools.product(*map(range, sizes.values())):
        index = dict(zip(axes, indices, strict=True))
        ranks.append(functools.reduce(lambda rank, name: rank * sizes[name] + index[name], in_mesh, 0))
    return in_mesh, ranks


def _ring(step, carry, shard, axes, stream, dtype, sends: bool):
    """In step i, each rank r uses the shard of rank r - i.

    The sum of a shard's gradients starts at the next rank, follows the shard around the ring, and reaches the owner
    with the last hop; the owner then adds its own gradient.
    """
    ranks, me = lax.axis_size(axes), lax.axis_index(axes)
    rows = [array.shape[0] for array in shard]
    ring_axes, numbers = permute_ranks(axes)
    route = list(zip(numbers, numbers[1:] + numbers[:1], strict=True))

    def hop(message):
        with jax.named_scope("ring"):
            return lax.ppermute(message, ring_axes, route)

    def use(carry, message, index):
        bucket = Bucket(_unpack(message, rows), index, (me - index) % ranks, 1)
        carry, grads, y = step(carry, bucket)
        return carry, _pack_grads(grads, 1, stream.grad_dtype)[0] if sends else (), y

    def scan_step(state, index):
        carry, message, grad_sum = state
        message = hop(message)
        carry, grads, y = use(carry, message, index)
        grad_sum = hop(jax.tree.map(jnp.add, grad_sum, grads)) if sends else ()
        return (carry, message, grad_sum), y

    message = _pack(shard, dtype)
    carry, own_grads, y = use(carry, message, 0)
    state = carry, message, jax.tree.map(jnp.zeros_like, own_grads)
    (carry, _, grad_sum), ys = lax.scan(scan_step, state, jnp.arange(1, ranks))
    ys = concatenated([stack_of_one(y), ys])
    return carry, cast_like(_unpack(own_grads + grad_sum, rows), shard) if sends else (), ys
