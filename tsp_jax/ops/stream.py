"""Move weight shards past resident tokens, and weight gradients home.

Every streamed op is a fold over *pieces* of its weights. A piece is some rows of every array of the op's shard, all
packed into one message; the op says what a piece does to the tokens, this module how pieces travel:

gather: piece b is slice b of every rank's shard, by all_gather; gradients return by reduce-scatter. On a full mesh or
  a switch it uses every link, and no piece waits for another.
ring: the shards themselves travel from rank to rank by ppermute, R - 1 hops; gradients travel with them.
rings: parts of the shards travel by rings of different strides, over different links at once.
broadcast: slice b of one rank's shard at a time, by a tree of ppermutes; gradients are summed up the same tree.

R is the number of ranks on the folded axes, D the trailing dimension of every weight.
Source: Shyam, Golubeva, Anthony, arXiv 2604.26294 (ring and broadcast); gather is ours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import coprime_strides, largest_divisor
from tsp_jax.ops.pipeline import Carry, joined, one, pipelined

Arrays = tuple[jax.Array, ...]


class Stream(NamedTuple):
    """How an op's weights travel; hashable, so that it can be static."""

    movement: str = "gather"
    """gather, ring, rings or broadcast; or activations, which `tsp_jax.ops.tokens` moves"""
    buckets: int = 1
    """pieces that a rank's shard is cut into (gather, broadcast)"""
    unroll: bool = False
    """unroll the loop, so that a scheduler may overlap messages with work"""
    grad_dtype: str = "float32"
    """dtype in which weight gradients travel"""
    tokens: int = 1 << 30
    """tokens that meet a piece at a time, at most"""
    token_buckets: int = 1
    """pieces that a rank's tokens are cut into, at most, where they move instead of weights"""


class Piece(NamedTuple):
    """What has arrived: rows of each weight, and whose they are.

    Row i of an array is row ``bucket * rows + i % rows`` of the shard of rank ``first_rank + i // rows``.
    """

    arrays: Arrays
    """each [num_ranks * rows, D], in the compute dtype"""
    index: Any
    """number of this piece in the fold"""
    first_rank: Any
    num_ranks: int
    bucket: Any

    def find(self, row: jax.Array, rows_per_rank: int) -> tuple[jax.Array, jax.Array]:
        """Where a row of the gathered weight (ranks in order) stands in this piece.

        Returns:
          (index, inside): index is legal where inside is true.
        """
        rows = self.arrays[0].shape[0] // self.num_ranks
        rank, offset = row // rows_per_rank - self.first_rank, row % rows_per_rank
        inside = (rank >= 0) & (rank < self.num_ranks) & (offset // rows == self.bucket)
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


def fold(
    body: Callable[[Carry, Piece], tuple[Carry, Any]],
    carry: Carry,
    shard: Arrays,
    *,
    axes: tuple[str, ...],
    stream: Stream,
    dtype: Any,
) -> tuple[Carry, Any]:
    """Folds `body` over all pieces of a sharded group of weights.

    Args:
      body: (carry, piece) -> (carry, y).
      carry: initial value.
      shard: this rank's rows of each weight, each [rows, D]; rows divisible by `stream.buckets`.
      axes: folded mesh axes; empty: no messages, the pieces are the shard's own buckets.
      stream: movement, buckets and unrolling.
      dtype: pieces are cast to it before they travel, slice by slice.

    Returns:
      (carry, ys): ys stacked [pieces, ...] in the order of pieces.

    Moves: (R - 1) / R of all rows x D x itemsize(dtype), in `buckets` all-gathers, R - 1 collective-permutes, or R x
      buckets trees of ceil(log2 R) collective-permutes.
    Keeps: nothing.
    """

    def step(carry, piece):
        carry, y = body(carry, piece)
        return carry, (), y

    carry, _, ys = _run(step, carry, shard, axes, stream, dtype, sends=False)
    return carry, ys


def fold_with_grads(
    body: Callable[[Carry, Piece], tuple[Carry, Arrays, Any]],
    carry: Carry,
    shard: Arrays,
    *,
    axes: tuple[str, ...],
    stream: Stream,
    dtype: Any,
) -> tuple[Carry, Arrays, Any]:
    """As `fold`, for backward: `body` also returns the gradient of each of the piece's arrays.

    Returns:
      (carry, grads, ys): grads like `shard`, summed over the ranks that the pieces visited, in the shard's dtype.

    Moves: the weights as in `fold`, and as many bytes of gradients in `stream.grad_dtype` (in the tree and the ring,
      as many messages).
    """
    # Without a barrier the compiler may find that rematerialised forward has fetched the same pieces, and keep them.
    return _run(body, carry, lax.optimization_barrier(shard), axes, stream, dtype, sends=True)


def _run(step, carry, shard, axes, stream, dtype, sends: bool):
    if stream.movement in ("ring", "rings") and axes:
        return _ring(step, carry, shard, axes, stream, dtype)
    carrier = _Broadcast if stream.movement == "broadcast" and axes else _Gather
    return _buckets(step, carry, carrier(shard, axes, stream, dtype), stream, sends)


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


def like(arrays: Sequence[jax.Array], shard: Arrays) -> Arrays:
    """Arrays in the dtypes of what they are the gradients of."""
    return tuple(array.astype(own.dtype) for array, own in zip(arrays, shard, strict=True))


# ------------------------------------------------------------------------------------------------ buckets


class _Gather:
    """Slice b of every rank's shard."""

    def __init__(self, shard: Arrays, axes: tuple[str, ...], stream: Stream, dtype: Any):
        self.shard, self.axes, self.dtype, self.grad_dtype = shard, axes, dtype, stream.grad_dtype
        self.ranks = lax.axis_size(axes) if axes else 1
        self.steps = self.buckets = stream.buckets
        self.slices = [array.reshape(self.buckets, -1, array.shape[-1]) for array in shard]
        self.rows = [array.shape[1] for array in self.slices]

    def _slice(self, bucket) -> jax.Array:
        return _pack([lax.dynamic_index_in_dim(s, bucket, keepdims=False) for s in self.slices], self.dtype)

    def fetch(self, index) -> jax.Array:
        """The message of piece `index`."""
        with jax.named_scope("gather"):
            message = self._slice(index)
            return lax.all_gather(message, self.axes) if self.axes else message

    def piece(self, message: jax.Array, index) -> Piece:
        return Piece(_unpack(message, self.rows), index, 0, self.ranks, index)

    def outgoing(self, grads: Arrays) -> jax.Array | Arrays:
        """The message of a piece's gradients."""
        return _pack_grads(grads, self.ranks, self.grad_dtype) if self.axes else like(grads, self.shard)

    def home(self, message: Any, index) -> Arrays:
        """A piece's gradients -> this rank's share of their sum, each [rows, D]."""
        del index
        if not self.axes:
            return message
        with jax.named_scope("scatter"):
            mine = lax.optimization_barrier(lax.psum_scatter(message, self.axes))  # see scatter_sequence
            return like(_unpack(mine, self.rows), self.shard)

    def collect(self, homes: Arrays) -> Arrays:
        """Stacked homes, each [steps, rows, D] -> like the shard."""
        return tuple(home.reshape(own.shape) for home, own in zip(homes, self.shard, strict=True))


class _Broadcast(_Gather):
    """Slice b of one rank's shard; ranks in turn. The root of a tree is static, so the loop is unrolled."""

    def __init__(self, shard: Arrays, axes: tuple[str, ...], stream: Stream, dtype: Any):
        super().__init__(shard, axes, stream, dtype)
        self.steps = self.ranks * self.buckets

    def fetch(self, index: int) -> jax.Array:
        root, bucket = divmod(index, self.buckets)
        with jax.named_scope("broadcast"):
            return _tree_broadcast(self._slice(bucket), self.axes, root, self.ranks)

    def piece(self, message: jax.Array, index: int) -> Piece:
        root, bucket = divmod(index, self.buckets)
        return Piece(_unpack(message, self.rows), index, root, 1, bucket)

    def outgoing(self, grads: Arrays) -> jax.Array:
        return _pack_grads(grads, 1, self.grad_dtype)[0]

    def home(self, message: jax.Array, index: int) -> Arrays:
        root = index // self.buckets
        with jax.named_scope("reduce"):
            total = _tree_reduce(message, self.axes, root, self.ranks)
            mine = jnp.where(lax.axis_index(self.axes) == root, total, jnp.zeros_like(total))
        return like(_unpack(mine, self.rows), self.shard)

    def collect(self, homes: Arrays) -> Arrays:
        # Of a bucket's R homes all but one are zero on this rank.
        return tuple(
            home.reshape(self.ranks, *own.shape).sum(axis=0) for home, own in zip(homes, self.shard, strict=True)
        )


def _buckets(step, carry: Carry, carrier: _Gather, stream: Stream, sends: bool):
    """Each piece is under way while the one before it is used, and its gradients while the one after it is."""

    def turn(carry, message, index):
        carry, grads, y = step(carry, carrier.piece(message, index))
        return carry, carrier.outgoing(grads) if grads else (), y

    carry, homes, ys = pipelined(
        turn, lambda _, index: carrier.fetch(index), carrier.home if sends else None, carry, carrier.steps,
        remote=bool(carrier.axes), unroll=stream.unroll or isinstance(carrier, _Broadcast),
    )  # fmt: skip
    return carry, carrier.collect(homes) if sends else (), ys


def _rounds(ranks: int, root: int, axes: tuple[str, ...]):
    """Rounds of a binomial tree: pairs (from, to), and whether this rank receives."""
    me = (lax.axis_index(axes) - root) % ranks
    span = 1
    while span < ranks:
        pairs = [((r + root) % ranks, (r + span + root) % ranks) for r in range(min(span, ranks - span))]
        yield pairs, (me >= span) & (me < 2 * span)
        span *= 2


def _tree_broadcast(message: jax.Array, axes: tuple[str, ...], root: int, ranks: int) -> jax.Array:
    """The root's message, on every rank; each receives once."""
    for pairs, receives in _rounds(ranks, root, axes):
        message = jnp.where(receives, lax.ppermute(message, axes, pairs), message)
    return message


def _tree_reduce(message: jax.Array, axes: tuple[str, ...], root: int, ranks: int) -> jax.Array:
    """The sum of all ranks' messages, on the root; each sends once. Other ranks get partial sums."""
    for pairs, _ in reversed(list(_rounds(ranks, root, axes))):
        message = message + lax.ppermute(message, axes, [(to, source) for source, to in pairs])
    return message


# ------------------------------------------------------------------------------------------------ ring


def _ring(step, carry: Carry, shard: Arrays, axes: tuple[str, ...], stream: Stream, dtype: Any):
    """At turn i this rank holds, of each part of the shards, the one of rank me - i x the part's stride.

    A ring has one part and stride 1; of several rings each has its own part and stride, so that their messages take
    different links. A part's gradient starts at the first rank that it visits, and is at home after as many hops as the
    part made; what the owner itself adds waits there.
    """
    ranks, me = lax.axis_size(axes), lax.axis_index(axes)
    strides = coprime_strides(ranks) if stream.movement == "rings" and ranks > 1 else (1,)
    count = largest_divisor(math.gcd(*(array.shape[0] for array in shard)), len(strides))
    parts = [[array.reshape(count, -1, array.shape[-1])[k] for array in shard] for k in range(count)]
    rows = [array.shape[0] for array in parts[0]]
    routes = [[(rank, (rank + stride) % ranks) for rank in range(ranks)] for stride in strides[:count]]

    def hop(messages):
        with jax.named_scope("ring"):
            return tuple(lax.ppermute(message, axes, route) for message, route in zip(messages, routes, strict=True))

    def turn(carry, messages, index):
        packed, ys = [], []
        for k, (message, stride) in enumerate(zip(messages, strides, strict=False)):
            piece = Piece(_unpack(message, rows), index * count + k, (me - index * stride) % ranks, 1, k)
            carry, grads, y = step(carry, piece)
            packed += [_pack_grads(grads, 1, stream.grad_dtype)[0]] if grads else []
            ys.append(one(y))
        return carry, tuple(packed), joined(ys)

    def visit(carry, messages, travelling, index):
        carry, grads, y = turn(carry, messages, index)
        return carry, hop(tuple(map(jnp.add, travelling, grads))) if grads else (), y

    def scan_visit(state, index):
        carry, messages, travelling = state
        messages = hop(messages)
        carry, travelling, y = visit(carry, messages, travelling, index)
        return (carry, messages, travelling), y

    messages = tuple(_pack(part, dtype) for part in parts)
    ahead = hop(messages) if stream.unroll and ranks > 1 else messages
    carry, own, y = turn(carry, messages, 0)
    travelling, ys = tuple(map(jnp.zeros_like, own)), [y]
    if stream.unroll:
        for index in range(1, ranks):
            messages, ahead = ahead, hop(ahead) if index < ranks - 1 else ahead
            carry, travelling, y = visit(carry, messages, travelling, index)
            ys.append(y)
    else:
        (carry, _, travelling), later = lax.scan(scan_visit, (carry, messages, travelling), jnp.arange(1, ranks))
        ys.append(jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), later))
    if not own:
        return carry, (), joined(ys)
    homes = [_unpack(mine + grads, rows) for mine, grads in zip(own, travelling, strict=True)]
    return carry, like([jnp.concatenate(arrays) for arrays in zip(*homes, strict=True)], shard), joined(ys)
