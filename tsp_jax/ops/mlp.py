"""Gated MLP, a row-wise op: each of the three weights has one row for each ffn column.

Dims: B batch, t this device's tokens, D model, F ffn, f this device's columns, p columns of one bucket, R folded ranks,
S tokens of all sequence ranks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tsp_jax.layout import Axes
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.padding import RealRows
from tsp_jax.ops.rowwise import Grads, RowwiseOp, rowwise
from tsp_jax.ops.stream import Arrays, Bucket, Stream


def _clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1.0) * gate * jax.nn.sigmoid(1.702 * gate)


GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "clamped_swiglu": _clamped_swiglu,
}
"""activation -> h of the products of gate and up, elementwise"""


def mlp(
    x_BtD: jax.Array, w_gate_fD: jax.Array, w_up_fD: jax.Array, w_down_fD: jax.Array, *, axes: Axes = Axes(),
    stream: Stream = Stream(), activation: str = "silu", d_ff: int | None = None,
) -> jax.Array:  # fmt: skip
    """``act(x gate^T, x up^T) down``, summed over all F rows.

        forward:  g = x gate^T    u = x up^T    h = act(g, u)    y = h down
        dgrad:    dh = dy down^T    dg, du = vjp(act(g, u))(dh)    dx = dg gate + du up
        wgrad:    dgate = dg^T x    dup = du^T x    ddown = h^T dy

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      w_gate_fD: this device's rows, any float dtype.
      w_up_fD: likewise.
      w_down_fD: likewise; all three are stored [F, D].
      axes: folded axes: weights move past tokens, or tokens past weights; tensor axes: partial outputs are summed.
      stream: movement (gather, ring or activations), buckets and chunks; the number of buckets divides f.
      activation: silu (SwiGLU, ``silu(g) u``), gelu (GeGLU, tanh form) or clamped_swiglu (gpt-oss,
        ``(u + 1) g sigmoid(1.702 g)`` with g at most 7 and u within 7 of 0).
      d_ff: F; rows from F on are padding. None: all rows of all ranks are real.

    Returns:
      [B, t, D] in x's dtype; accumulated in float32.

    Moves: forward all-gathers of 3 D F (R - 1) / R weight elements; backward the same again, and reduce-scatters of as
      many gradients. If activations move: forward an all-gather of x and a reduce-scatter of y, each of
      B S D (R - 1) / R elements; backward all-gathers of x and dy, and a reduce-scatter of dx. Over tensor axes one
      all-reduce of [B, t, D] forward, and one backward.
    Keeps: its inputs.
    Source: Shazeer, arXiv 2002.05202; clamped: arXiv 2508.10925; streaming: arXiv 2604.26294.
    """
    with jax.named_scope("tsp/mlp"):
        op = _GatedMlp(activation, RealRows.of(w_up_fD, axes, d_ff), x_BtD.dtype)
        return rowwise(op, (x_BtD,), (w_gate_fD, w_up_fD, w_down_fD), axes=axes, stream=stream)


@dataclasses.dataclass(frozen=True)
class _GatedMlp(RowwiseOp):
    """The gated MLP as a row-wise op: operands are in the compute dtype, sums in float32."""

    activation: str
    real: RealRows
    dtype: Any
    accumulator_dtype: Any = jnp.float32
    chunked: bool = True

    def _hidden(self, bucket: Bucket, gate_Btp: jax.Array, up_Btp: jax.Array) -> jax.Array:
        return self.real.keep(GATED[self.activation](gate_Btp, up_Btp), bucket, 0.0)

    def partial(self, inputs: Arrays, bucket: Bucket) -> jax.Array:
        (x_BtD,), (gate_pD, up_pD, down_pD) = inputs, bucket.arrays
        h_Btp = self._hidden(bucket, matmul_t(x_BtD, gate_pD), matmul_t(x_BtD, up_pD))
        return matmul(h_Btp.astype(self.dtype), down_pD)

    def partial_vjp(self, inputs: Arrays, dy_BtD: jax.Array, bucket: Bucket) -> tuple[Grads, Arrays]:
        (x_BtD,), (gate_pD, up_pD, down_pD) = inputs, bucket.arrays
        hidden = partial(self._hidden, bucket)
        h_Btp, hidden_vjp = jax.vjp(hidden, matmul_t(x_BtD, gate_pD), matmul_t(x_BtD, up_pD))
        dgate_Btp, dup_Btp = (d.astype(self.dtype) for d in hidden_vjp(matmul_t(dy_BtD, down_pD)))
        # One product, so that it is added to the other buckets' once.
        dx_BtD = matmul(jnp.concatenate([dgate_Btp, dup_Btp], axis=-1), jnp.concatenate([gate_pD, up_pD]))
        grads = outer(dgate_Btp, x_BtD), outer(dup_Btp, x_BtD), outer(h_Btp.astype(self.dtype), dy_BtD)
        return (dx_BtD,), grads
