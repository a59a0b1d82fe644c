"""Gated MLP on streamed weights.

Dims: B batch, t this device's tokens, D model, F ffn, f this device's columns, p the columns of one piece.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.chunks import over_tokens
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.stream import Piece, Stream, custom_vjp, fold, fold_with_grads, vary_alike, zeros

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
      axes: folded axes: weights move past tokens; tensor axes: partial outputs are summed.
      stream: movement (gather or ring) and buckets; f divisible by the buckets.
      activation: silu (SwiGLU) or gelu (GeGLU, tanh form).

    Returns:
      [B, t, D] in x's dtype; sums in float32.

    Moves: forward 3 D F (R - 1) / R weights; backward the same again, and as many gradients to their owners. Over
      tensor axes one all-reduce of [B, t, D] forward, and one backward.
    Keeps: its inputs.
    Source: Shazeer, arXiv 2002.05202; streaming: arXiv 2604.26294.
    """
    with jax.named_scope("tsp/mlp"):
        x_BtD, *weights = vary_alike(x_BtD, w_gate_fD, w_up_fD, w_down_fD)
        y_BtD = _streamed(x_BtD, tuple(weights), axes.folded, stream, activation)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD


def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up


@custom_vjp(2, 3, 4)
def _streamed(x_BtD, weights, folded, stream, activation):
    return _forward(x_BtD, weights, folded, stream, activation)[0]


def _forward(x_BtD, weights, folded, stream, activation):
    def body(y_BtD, piece: Piece):
        gate_pD, up_pD, down_pD = piece.arrays

        def chunk(y_BcD, x_BcD):
            h_Bcp = _gated(activation, matmul_t(x_BcD, gate_pD), matmul_t(x_BcD, up_pD))
            return y_BcD + matmul(h_Bcp.astype(x_BcD.dtype), down_pD), (), ()

        return over_tokens(chunk, y_BtD, x_BtD, tokens=stream.tokens)[0], None

    y_BtD = zeros(x_BtD.shape, jnp.float32, like=x_BtD)
    y_BtD, _ = fold(body, y_BtD, weights, axes=folded, stream=stream, dtype=x_BtD.dtype)
    return y_BtD.astype(x_BtD.dtype), (x_BtD, weights)


def _backward(folded, stream, activation, residuals, dy_BtD) -> tuple[Any, Any]:
    x_BtD, weights = residuals
    dtype = x_BtD.dtype

    def body(dx_BtD, piece: Piece):
        gate_pD, up_pD, down_pD = piece.arrays

        def chunk(dx_BcD, read):
            x_BcD, dy_BcD = read
            h_Bcp, gated_vjp = jax.vjp(partial(_gated, activation), matmul_t(x_BcD, gate_pD), matmul_t(x_BcD, up_pD))
            dgate_Bcp, dup_Bcp = (d.astype(dtype) for d in gated_vjp(matmul_t(dy_BcD, down_pD)))
            dx_BcD += matmul(dgate_Bcp, gate_pD) + matmul(dup_Bcp, up_pD)
            grads = outer(dgate_Bcp, x_BcD), outer(dup_Bcp, x_BcD), outer(h_Bcp.astype(dtype), dy_BcD)
            return dx_BcD, (), grads

        dx_BtD, _, grads = over_tokens(chunk, dx_BtD, (x_BtD, dy_BtD), tokens=stream.tokens)
        return dx_BtD, grads, None

    dx_BtD = zeros(x_BtD.shape, jnp.float32, like=dy_BtD)
    dx_BtD, grads, _ = fold_with_grads(body, dx_BtD, weights, axes=folded, stream=stream, dtype=dtype)
    return dx_BtD.astype(dtype), grads


_streamed.defvjp(_forward, _backward)
