"""Row-wise ops: the output is a sum over rows of the weights. They run on every layout.

An op gives the partial output of some rows of its weights, and its VJP. This module moves weights past
tokens, or tokens past stationary weights, and sums the partial outputs over buckets, folded axes and tensor
axes.

Dims: B batch, t this device's tokens, c tokens of a chunk, u tokens in one bucket (from all R folded ranks),
D model.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.stationary import add, moves_tokens, over_gathered_tokens, resident_bucket
from tsp_jax.ops.stream import (
    Arrays,
    Bucket,
    Stream,
    cast_like,
    custom_vjp,
    over_buckets,
    over_buckets_with_grads,
    vary_alike,
    zeros,
)

Grads = tuple[jax.Array | None, ...]
"""one for each input of an op; None for an integer input"""


class RowwiseOp(abc.ABC):
    """The mathematics of one row-wise op. It is static, and so must be hashable: use a frozen dataclass.

    Do not use a NamedTuple: tuples of different ops can compare equal, and JAX would confuse their programs.

    The sum over buckets of partial outputs, and that of the inputs' gradients, are arrays of the inputs' shapes, unless
    an op overrides `start`, `add` and `finish`, or `start_vjp`, `add_vjp` and `finish_vjp`.
    """

    dtype: Any
    """compute dtype: buckets are communicated in it, and the output has it"""
    accumulator_dtype: Any
    """dtype of partial outputs and of their sum over buckets"""
    chunked: bool
    """whether forward runs in chunks of tokens; for ops whose intermediate results are larger than their output"""

    @abc.abstractmethod
    def partial(self, inputs: Arrays, bucket: Bucket) -> jax.Array:
        """What a bucket's rows add to the output: inputs [B, t, ...] -> [B, t, D] in `accumulator_dtype`."""

    @abc.abstractmethod
    def partial_vjp(self, inputs: Arrays, dy_BtD: jax.Array, bucket: Bucket) -> tuple[Grads, Arrays]:
        """VJP of `partial`: (gradient of each input, gradient of each of the bucket's arrays), all float32."""

    def start(self, inputs: Arrays, width: int) -> Any:
        """The sum over no bucket, for outputs [B, t, width]."""
        return zeros((*inputs[0].shape[:2], width), self.accumulator_dtype, like=inputs[0])

    def add(self, total: Any, inputs: Arrays, bucket: Bucket) -> Any:
        """The sum with a bucket added."""
        return total + self.partial(inputs, bucket)

    def finish(self, total: Any, inputs: Arrays) -> jax.Array:
        """The output [B, t, D] of a sum over all buckets."""
        return total

    def start_vjp(self, inputs: Arrays, dy_BtD: jax.Array) -> Any:
        """The inputs' gradients, float32, for no bucket."""

        def zero(x: jax.Array) -> jax.Array | None:
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            return zeros(x.shape, jnp.float32, like=dy_BtD) if is_float else None

        return tuple(zero(x) for x in inputs)

    def add_vjp(self, total: Any, inputs: Arrays, dy_BtD: jax.Array, bucket: Bucket) -> tuple[Any, Arrays]:
        """(the inputs' gradients with a bucket's added, gradient of each of the bucket's arrays)."""
        more, grads = self.partial_vjp(inputs, dy_BtD, bucket)
        return add(total, more), grads

    def finish_vjp(self, total: Any, inputs: Arrays) -> Grads:
        """The gradient of each input, of a sum over all buckets."""
        return total


def rowwise(op: RowwiseOp, inputs: Arrays, weights: Arrays, *, axes: Axes, stream: Stream) -> jax.Array:
    """The sum of ``op.partial`` over all rows of the weights.

        forward:  y = sum_b partial(inputs, w_b)                                    over buckets b of all ranks
        dgrad:    dinputs = sum_b vjp_inputs(partial)(inputs, w_b)(dy)
        wgrad:    dw_b = sum_ranks vjp_weights(partial)(inputs, w_b)(dy)            on b's owner

    Args:
      op: the op.
      inputs: arrays [B, t, ...] of this device's tokens.
      weights: this device's rows of each weight, each [rows, D]; rows divisible by `stream.buckets`.
      axes: folded axes: weights move past tokens, or tokens past weights; tensor axes: partial outputs are summed.
      stream: movement, buckets and chunks.

    Returns:
      [B, t, D] in `op.dtype`.

    Moves: if weights move, what `over_buckets` moves forward and `over_buckets_with_grads` backward. If tokens move
      (`over_gathered_tokens`), forward all-gathers of the inputs and a reduce-scatter of y; backward all-gathers of the
      inputs and of dy, and reduce-scatters of the inputs' gradients. Over tensor axes one all-reduce of [B, t, D]
      forward, and one of each input's gradient backward.
    Keeps: the inputs and the weights.
    """
    arrays = vary_alike(*inputs, *weights)
    y_BtD = _rowwise(op, tuple(arrays[: len(inputs)]), tuple(arrays[len(inputs) :]), axes.folded, stream)
    return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD


@custom_vjp(0, 3, 4)
def _rowwise(op, inputs, weights, folded, stream):
    return _forward(op, inputs, weights, folded, stream)[0]


def _forward(op, inputs, weights, folded, stream):
    forward = _tokens_forward if moves_tokens(folded, stream) else _weights_forward
    return forward(op, inputs, weights, folded, stream), (inputs, weights)


def _backward(op, folded, stream, residuals, dy_BtD):
    backward = _tokens_backward if moves_tokens(folded, stream) else _weights_backward
    inputs, weights = residuals
    dinputs, grads = backward(op, inputs, weights, dy_BtD, folded, stream)
    return dinputs, cast_like(grads, weights)


_rowwise.defvjp(_forward, _backward)


def _cast_dinputs(dinputs: Grads, inputs: Arrays) -> Grads:
    return tuple(None if d is None else d.astype(x.dtype) for d, x in zip(dinputs, inputs, strict=True))


# ------------------------------------------------------------------------------------------------ weights past tokens


def _weights_forward(op: RowwiseOp, inputs: Arrays, weights: Arrays, folded, stream: Stream) -> jax.Array:
    def body(total, bucket: Bucket):
        def chunk(total, inputs):
            return op.add(total, inputs, bucket), (), ()

        chunk_tokens = stream.chunk(bucket.num_rows) if op.chunked else inputs[0].size
        return over_chunks(chunk, total, inputs, chunk_tokens=chunk_tokens)[0], None

    total = op.start(inputs, weights[0].shape[-1])
    total, _ = over_buckets(body, total, weights, axes=folded, stream=stream, dtype=op.dtype)
    return op.finish(total, inputs).astype(op.dtype)


def _weights_backward(op: RowwiseOp, inputs: Arrays, weights: Arrays, dy_BtD, folded, stream: Stream):
    def body(total, bucket: Bucket):
        def chunk(total, read):
            *inputs, dy_BcD = read
            total, grads = op.add_vjp(total, tuple(inputs), dy_BcD, bucket)
            return total, (), grads

        chunk_tokens = stream.chunk(bucket.num_rows)
        total, _, grads = over_chunks(chunk, total, (*inputs, dy_BtD), chunk_tokens=chunk_tokens)
        return total, grads, None

    total = op.start_vjp(inputs, dy_BtD)
    total, grads, _ = over_buckets_with_grads(body, total, weights, axes=folded, stream=stream, dtype=op.dtype)
    return _cast_dinputs(op.finish_vjp(total, inputs), inputs), grads


# ------------------------------------------------------------------------------------------------ tokens past weights


def _tokens_forward(op: RowwiseOp, inputs: Arrays, weights: Arrays, folded, stream: Stream) -> jax.Array:
    bucket = resident_bucket(weights, folded, op.dtype)

    def body(carry, inputs, _):
        return carry, op.partial(inputs, bucket).astype(op.dtype), ()

    return over_gathered_tokens(body, (), inputs, axes=folded, stream=stream)[1]


def _tokens_backward(op: RowwiseOp, inputs: Arrays, weights: Arrays, dy_BtD, folded, stream: Stream):
    bucket = resident_bucket(weights, folded, op.dtype)

    def body(grads, gathered, _):
        *inputs, dy_BuD = gathered
        dinputs, more = op.partial_vjp(tuple(inputs), dy_BuD, bucket)
        return add(grads, more), _cast_dinputs(dinputs, tuple(inputs)), ()

    grads = tuple(zeros(weight.shape, jnp.float32, like=dy_BtD) for weight in weights)
    tokens = lax.optimization_barrier((*inputs, dy_BtD))  # see over_buckets_with_grads
    grads, dinputs, _ = over_gathered_tokens(body, grads, tokens, axes=folded, stream=stream)
    return dinputs, grads
