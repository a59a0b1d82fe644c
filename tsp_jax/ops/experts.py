"""A mixture of experts, a row-wise op: each token is the input of k gated MLPs, whose outputs are summed with weights.

An expert is F rows of each of three weights. Folded axes shard the experts, so that a bucket holds whole experts of
every rank; tensor axes shard the rows of each expert. Whatever the router chooses, no token is dropped.

A device sorts its choices by expert, once, and cuts each expert's choices into tiles. One product takes the tokens of
one tile. So an expert is multiplied with the tokens that chose it, and with zeros that fill its last tile.

If experts move past tokens, a device has the same work whatever the router chooses: that of its own tokens. If tokens
move past experts, a device has the work of its own experts, and the fullest one sets the pace.

Dims: B batch, t this device's tokens, D model, E experts, F ffn, f this device's rows of an expert, k experts of a
token, T = B t tokens, A = T k choices, m experts of one bucket, n choices of one tile, r this device's rows, R folded
ranks. Products have a leading dim of 1.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config.experts import mean_tiles, tile_size
from tsp_jax.layout import Axes, AxisNames
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.mlp import ACTIVATIONS
from tsp_jax.ops.router import Choices
from tsp_jax.ops.rowwise import Grads, rowwise
from tsp_jax.ops.stationary import moves_tokens
from tsp_jax.ops.stream import Arrays, Bucket, Stream, zeros


def experts(
    x_BtD: jax.Array, choices: Choices, w_gate_rD: jax.Array, w_up_rD: jax.Array, w_down_rD: jax.Array, *,
    num_experts: int, axes: Axes = Axes(), stream: Stream = Stream(), activation: str = "silu",
    d_ff: int | None = None, tile: int | None = None, expert_axes: AxisNames | None = None,
) -> jax.Array:  # fmt: skip
    """``sum_j w_j MLP_e(x)`` over the k chosen experts e = chosen_j of each token.

        forward:  g = x gate_e^T    u = x up_e^T    h = act(g) * u    y = sum_j w_j h down_e
        dgrad:    dh = dy down_e^T    dw_j = h . dh    dg, du = vjp(act(g) * u)(w_j dh)
                  dx = sum_j dg gate_e + du up_e
        wgrad:    dgate_e = dg^T x    dup_e = du^T x    ddown_e = (w_j h)^T dy      over the tokens that chose e

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      choices: chosen experts (a token's differ) and their weights, of this device's tokens.
      w_gate_rD: this device's rows, stored as `tsp_jax.stored.ExpertPadding` says, any float dtype.
      w_up_rD: likewise.
      w_down_rD: likewise.
      num_experts: E.
      axes: folded axes: experts move past tokens, or tokens past experts; tensor axes: partial outputs are summed.
      stream: movement (gather, ring or activations) and buckets, whose number divides this device's experts. Chunks
        have no effect.
      activation: silu (SwiGLU) or gelu (GeGLU, tanh form).
      d_ff: F; an expert's rows from F on are padding. None: all are real.
      expert_axes: axes that shard whole experts; they are all folded, or all tensor axes. None: the folded axes.
      tile: n. An expert with c choices takes ceil(c / n) tiles. None: `tile_size`.

    Returns:
      [B, t, D] in x's dtype; accumulated in float32.

    Operations: 6 D f n for each tile in forward, 16 D f n in backward, which computes g and u again. If experts move, a
      device has between A / n and A / n + E tiles, whatever the router does, in the same compiled program. Reports
      count A / n + E / 2: an expert's last tile is half full on average (`_mean_tiles`). If tokens move, it has between
      none and all R A / n tiles of all ranks.
    Moves: as `tsp_jax.ops.mlp.mlp` with E F rows, padded experts included. If activations move, weights and numbers of
      the chosen experts move with x: 2 k elements a token.
    Keeps: its inputs, and A int32.
    """
    with jax.named_scope("tsp/experts"):
        whole = axes.folded if expert_axes is None else expert_axes
        ranks = lax.axis_size(whole) if whole else 1
        local = -(-num_experts // ranks)
        rows = w_up_rD.shape[0] // local
        sorted_once = not moves_tokens(axes.folded, stream)
        split = tuple(name for name in axes.tensor if name not in whole)
        resident = () if axes.folded else whole
        op = _Experts(
            activation, num_experts, local * ranks, rows, d_ff or rows, split, resident, tile, sorted_once, x_BtD.dtype
        )  # fmt: skip
        chosen = _by_expert(choices.experts_Btk) if sorted_once else (choices.experts_Btk,)
        stream = stream._replace(chunk_tokens=Stream().chunk_tokens, product_bytes=math.inf)
        inputs = x_BtD, choices.weights_Btk, *chosen
        return rowwise(op, inputs, (w_gate_rD, w_up_rD, w_down_rD), axes=axes, stream=stream)


def _by_expert(experts_Btk: jax.Array) -> Arrays:
    """(numbers of all choices, in the order of their experts; these experts), each [B, t, k] int32."""
    experts_A = experts_Btk.reshape(-1)
    order = lax.sort((experts_A, lax.iota(jnp.int32, len(experts_A))), num_keys=1)
    return tuple(array.reshape(experts_Btk.shape) for array in reversed(order))


class _Tiles(NamedTuple):
    """The choices of one bucket's experts, cut into tiles."""

    order_A: jax.Array
    """numbers of all choices, in the order of their experts"""
    first_m: jax.Array
    """for each expert, the place of its first choice in this order"""
    counts_m: jax.Array
    """for each expert, how many choices it has"""
    size: int
    """choices of a tile"""

    @classmethod
    def of(cls, order_Btk: jax.Array, sorted_Btk: jax.Array, experts_m: jax.Array, size: int) -> "_Tiles":
        sorted_1A, experts_m1 = sorted_Btk.reshape(1, -1), experts_m[:, None]
        first_m = (sorted_1A < experts_m1).sum(axis=1, dtype=jnp.int32)
        return cls(order_Btk.reshape(-1), first_m, (sorted_1A == experts_m1).sum(axis=1, dtype=jnp.int32), size)

    @property
    def ends_m(self) -> jax.Array:
        """For each expert, the number of tiles of it and of all before it."""
        return jnp.cumsum(-(-self.counts_m // self.size))

    def tile(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(expert's place in the bucket, numbers of the tile's choices [1, n]); A where the tile has none left."""
        expert = (self.ends_m <= index).sum(dtype=jnp.int32)
        ends, counts, first = (array_m[expert] for array_m in (self.ends_m, self.counts_m, self.first_m))
        before = (index - ends) * self.size + -(-counts // self.size) * self.size
        places_n = before + lax.iota(jnp.int32, self.size)
        choices_n = self.order_A[jnp.minimum(first + places_n, len(self.order_A) - 1)]
        return expert, jnp.where(places_n < counts, choices_n, len(self.order_A))[None]


@dataclasses.dataclass(frozen=True)
class _Experts:
    """The mixture as a row-wise op: operands are in the compute dtype, sums in float32."""

    activation: str
    num_experts: int
    stored_experts: int
    """of all ranks, padding included"""
    rows: int
    """f"""
    real_rows: int
    """F"""
    split: AxisNames
    """tensor axes that shard the rows of each expert"""
    resident: AxisNames
    """tensor axes that shard whole experts"""
    tile: int | None
    sorted_once: bool
    """the inputs hold choices that are sorted already; else each bucket of tokens is sorted"""
    dtype: Any
    accumulator_dtype: Any = jnp.float32
    chunked: bool = False

    def _hidden(self, gate_1nf: jax.Array, up_1nf: jax.Array) -> jax.Array:
        h_1nf = ACTIVATIONS[self.activation](gate_1nf) * up_1nf
        if not self.split or self.real_rows == self.rows * lax.axis_size(self.split):
            return h_1nf
        real_f = lax.axis_index(self.split) * self.rows + lax.iota(jnp.int32, self.rows) < self.real_rows
        return jnp.where(real_f, h_1nf, 0.0)

    def _tiles(self, inputs: Arrays, bucket: Bucket) -> _Tiles:
        order_Btk, sorted_Btk = inputs[2:] if self.sorted_once else _by_expert(inputs[2])
        experts_m = bucket.rows()[:: self.rows] // self.rows
        if self.resident:
            experts_m += lax.axis_index(self.resident) * (self.stored_experts // lax.axis_size(self.resident))
        return _Tiles.of(order_Btk, sorted_Btk, experts_m, self._tile(order_Btk.size))

    def _tile(self, choices: int) -> int:
        return self.tile or tile_size(choices, self.num_experts)

    def _over_tiles(self, body, carry: Any, inputs: Arrays, bucket: Bucket) -> Any:
        """Runs ``body(carry, expert's place, its weights each [f, D], choices [1, n])`` on every tile of a bucket."""
        tiles, width = self._tiles(inputs, bucket), bucket.arrays[0].shape[-1]
        weights = [array.reshape(-1, self.rows, width) for array in bucket.arrays]

        def step(index, carry):
            expert, choices_1n = tiles.tile(index)
            mine = (lax.dynamic_index_in_dim(array, expert, keepdims=False) for array in weights)
            return body(carry, expert, tuple(mine), choices_1n)

        # Reports read how often a loop runs whose end depends on data from the scope around it.
        with jax.named_scope(f"mean_trips[{self._mean_tiles(inputs[1].size, len(weights[0])):.9g}]"):
            return lax.fori_loop(0, tiles.ends_m[-1], step, carry)

    def _mean_tiles(self, choices: int, experts: int) -> float:
        """Mean number of tiles of a bucket of so many experts, if all experts are chosen equally often."""
        real = experts * self.num_experts / self.stored_experts
        return real * mean_tiles(choices, self.num_experts, self._tile(choices))

    def partial(self, inputs: Arrays, bucket: Bucket) -> jax.Array:
        x_BtD, weights_Btk, *_ = inputs
        x_TD, weights_A = x_BtD.reshape(-1, x_BtD.shape[-1]), weights_Btk.reshape(-1)

        def add_tile(y_TD, _, weights, choices_1n):
            gate_fD, up_fD, down_fD = weights
            tokens_1n = choices_1n // weights_Btk.shape[-1]
            x_1nD = _rows(x_TD, tokens_1n)
            h_1nf = self._hidden(matmul_t(x_1nD, gate_fD), matmul_t(x_1nD, up_fD))
            out_1nD = matmul(h_1nf.astype(self.dtype), down_fD)
            return _add_rows(y_TD, tokens_1n, out_1nD * _rows(weights_A, choices_1n)[..., None])

        y_TD = zeros(x_TD.shape, jnp.float32, like=x_BtD)
        return self._over_tiles(add_tile, y_TD, inputs, bucket).reshape(x_BtD.shape)

    def partial_vjp(self, inputs: Arrays, dy_BtD: jax.Array, bucket: Bucket) -> tuple[Grads, Arrays]:
        x_BtD, weights_Btk, *_ = inputs
        x_TD, dy_TD = (array.reshape(-1, x_BtD.shape[-1]) for array in (x_BtD, dy_BtD))
        weights_A = weights_Btk.reshape(-1)

        def add_tile(carry, expert, weights, choices_1n):
            (dx_TD, dweights_A, *grads), (gate_fD, up_fD, down_fD) = carry, weights
            tokens_1n = choices_1n // weights_Btk.shape[-1]
            x_1nD, dy_1nD = _rows(x_TD, tokens_1n), _rows(dy_TD, tokens_1n)
            weight_1n1 = _rows(weights_A, choices_1n)[..., None]
            h_1nf, hidden_vjp = jax.vjp(self._hidden, matmul_t(x_1nD, gate_fD), matmul_t(x_1nD, up_fD))
            dh_1nf = matmul_t(dy_1nD, down_fD)
            dgate_1nf, dup_1nf = (d.astype(self.dtype) for d in hidden_vjp(dh_1nf * weight_1n1))
            weighted_1nf = (h_1nf * weight_1n1).astype(self.dtype)
            more = outer(dgate_1nf, x_1nD), outer(dup_1nf, x_1nD), outer(weighted_1nf, dy_1nD)
            dx_1nD = matmul(jnp.concatenate([dgate_1nf, dup_1nf], axis=-1), jnp.concatenate([gate_fD, up_fD]))
            return (
                _add_rows(dx_TD, tokens_1n, dx_1nD),
                dweights_A.at[choices_1n].set((h_1nf * dh_1nf).sum(axis=-1), mode="drop"),
                *(grad.at[expert].add(d_fD) for grad, d_fD in zip(grads, more, strict=True)),
            )

        zero = partial(zeros, dtype=jnp.float32, like=dy_BtD)
        shape = -1, self.rows, x_TD.shape[-1]
        grads = [zero(jax.eval_shape(lambda a: a.reshape(shape), array).shape) for array in bucket.arrays]
        carry = zero(x_TD.shape), zero(weights_A.shape), *grads
        dx_TD, dweights_A, *grads = self._over_tiles(add_tile, carry, inputs, bucket)
        dinputs = dx_TD.reshape(x_BtD.shape), dweights_A.reshape(weights_Btk.shape), *[None] * len(inputs[2:])
        return dinputs, tuple(grad.reshape(-1, grad.shape[-1]) for grad in grads)


def _rows(array: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of an array; zeros for indices past its end."""
    return array.at[indices].get(mode="fill", fill_value=0)


def _add_rows(array: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """The array with `rows` added at these indices; those past its end are left out."""
    return array.at[indices].add(rows, mode="drop")
