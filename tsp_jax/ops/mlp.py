"""Gated MLP: streamed weights past tokens, or tokens past resident weights.

Dims: B batch, t this device's tokens, D model, F ffn, f this device's columns, p the columns of one bucket.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.stationary import add, cast_all, moves_tokens, over_gathered_tokens
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

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=True)}


def mlp(
    x_BtD: jax.Array,
    w_gate_fD: jax.Array,
    w_up_fD: jax.Array,
    w_down_fD: jax.Array,
    *,
    axes: Axes = Axes(),
    stream: Stream = Stream(),
    activation: str = "silu",
) -> jax.Array:
    """``(act(x gate^T) * (x up^T)) down``, summed over all F columns.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      w_gate_fD: this device's columns, any float dtype; likewise up and down (all stored [F, D]).
      axes: folded axes: weights move past tokens, or tokens past weights; tensor axes: partial outputs are summed.
      stream: movement (gather, ring or activations) and buckets; f divisible by the buckets.
      activation: silu (SwiGLU) or gelu (GeGLU, tanh form).

    Returns:
      [B, t, D] in x's dtype; sums in float32.

    Moves: forward 3 D F (R - 1) / R weights; backward the same again, and as many gradients to their owners. Or
      activations: forward 2 B S D (R - 1) / R (x here, y home), backward 3 B S D (R - 1) / R (x, dy, dx). Over tensor
      axes one all-reduce of [B, t, D] forward, and one backward.
    Keeps: its inputs.
    Source: Shazeer, arXiv 2002.05202; streaming: arXiv 2604.26294.
    """
    with jax.named_scope("tsp/mlp"):
        x_BtD, *weights = vary_alike(x_BtD, w_gate_fD, w_up_fD, w_down_fD)
        run = _moved if moves_tokens(axes.folded, stream) else _streamed
        y_BtD = run(x_BtD, tuple(weights), axes.folded, stream, activation)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD


def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up


def _partial(activation: str, x_BtD: jax.Array, weights: Arrays) -> jax.Array:
    """What some columns add to the output, float32."""
    gate_pD, up_pD, down_pD = weights
    h_Btp = _gated(activation, matmul_t(x_BtD, gate_pD), matmul_t(x_BtD, up_pD))
    return matmul(h_Btp.astype(x_BtD.dtype), down_pD)


def _partial_vjp(activation: str, x_BtD: jax.Array, dy_BtD: jax.Array, weights: Arrays) -> tuple[jax.Array, Arrays]:
    """(dx, gradients of the weights), float32."""
    gate_pD, up_pD, down_pD = weights
    dtype = x_BtD.dtype
    h_Btp, gated_vjp = jax.vjp(partial(_gated, activation), matmul_t(x_BtD, gate_pD), matmul_t(x_BtD, up_pD))
    dgate_Btp, dup_Btp = (d.astype(dtype) for d in gated_vjp(matmul_t(dy_BtD, down_pD)))
    dx_BtD = matmul(dgate_Btp, gate_pD) + matmul(dup_Btp, up_pD)
    return dx_BtD, (outer(dgate_Btp, x_BtD), outer(dup_Btp, x_BtD), outer(h_Btp.astype(dtype), dy_BtD))


# ------------------------------------------------------------------------------------------------ weights move


@custom_vjp(2, 3, 4)
def _streamed(x_BtD, weights, folded, stream, activation):
    return _streamed_forward(x_BtD, weights, folded, stream, activation)[0]


def _streamed_forward(x_BtD, weights, folded, stream, activation):
    def body(y_BtD, bucket: Bucket):
        def chunk(y_BcD, x_BcD):
            return y_BcD + _partial(activation, x_BcD, bucket.arrays), (), ()

        return over_chunks(chunk, y_BtD, x_BtD, tokens=stream.tokens)[0], None

    y_BtD = zeros(x_BtD.shape, jnp.float32, like=x_BtD)
    y_BtD, _ = over_buckets(body, y_BtD, weights, axes=folded, stream=stream, dtype=x_BtD.dtype)
    return y_BtD.astype(x_BtD.dtype), (x_BtD, weights)


def _streamed_backward(folded, stream, activation, residuals, dy_BtD) -> tuple[Any, Any]:
    x_BtD, weights = residuals

    def body(dx_BtD, bucket: Bucket):
        def chunk(dx_BcD, read):
            x_BcD, dy_BcD = read
            more_BcD, grads = _partial_vjp(activation, x_BcD, dy_BcD, bucket.arrays)
            return dx_BcD + more_BcD, (), grads

        dx_BtD, _, grads = over_chunks(chunk, dx_BtD, (x_BtD, dy_BtD), tokens=stream.tokens)
        return dx_BtD, grads, None

    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=dy_BtD)
    dx_BtD, grads, _ = over_buckets_with_grads(body, dx_BtD, weights, axes=folded, stream=stream, dtype=x_BtD.dtype)
    return dx_BtD.astype(x_BtD.dtype), grads


_streamed.defvjp(_streamed_forward, _streamed_backward)


# ------------------------------------------------------------------------------------------------ tokens move


@custom_vjp(2, 3, 4)
def _moved(x_BtD, weights, folded, stream, activation):
    return _moved_forward(x_BtD, weights, folded, stream, activation)[0]


def _moved_forward(x_BtD, weights, folded, stream, activation):
    resident = cast_all(weights, x_BtD.dtype)

    def body(carry, arrived, _):
        return carry, (_partial(activation, arrived[0], resident).astype(x_BtD.dtype),), ()

    _, (y_BtD,), _ = over_gathered_tokens(body, (), (x_BtD,), axes=folded, stream=stream)
    return y_BtD, (x_BtD, weights)


def _moved_backward(folded, stream, activation, residuals, dy_BtD) -> tuple[Any, Any]:
    x_BtD, weights = residuals
    resident = cast_all(weights, x_BtD.dtype)

    def body(grads, arrived, _):
        x_BpD, dy_BpD = arrived
        dx_BpD, more = _partial_vjp(activation, x_BpD, dy_BpD, resident)
        return add(grads, more), (dx_BpD.astype(x_BtD.dtype),), ()

    grads = tuple(zeros(weight.shape, jnp.float32, like=x_BtD) for weight in weights)
    arrive = lax.optimization_barrier((x_BtD, dy_BtD))  # see over_buckets_with_grads
    grads, (dx_BtD,), _ = over_gathered_tokens(body, grads, arrive, axes=folded, stream=stream)
    return dx_BtD, cast_like(grads, weights)


_moved.defvjp(_moved_forward, _moved_backward)
