"""A mixture of experts, a row-wise op: each token is the input of k gated MLPs, whose outputs are summed with weights.

An expert is F rows of each of three weights, and of biases if there are any. Folded axes shard the experts, so that a
bucket holds whole experts of every rank; tensor axes shard the rows of each expert. Whatever the router chooses, no
token is dropped.

A device sorts its choices by expert, once if experts move, else for each bucket of tokens. It cuts each expert's
choices into tiles; an expert's last tile is filled with zeros. `tsp_jax.ops.grouped` multiplies tiles with their
experts' weights, one at a time or many at once.

If experts move past tokens, a device has the same work whatever the router chooses: that of its own tokens. If tokens
move past experts, a device has the work of its own experts, and the fullest one sets the pace.

Dims: B batch, t this device's tokens, D model, E experts, F ffn, f this device's rows of an expert, k experts of a
token, T = B t tokens, A = T k choices, m experts of one bucket, n choices of one tile, r this device's rows, c its rows
of biases, R folded ranks. Products have a leading dim of 1.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config.experts import mean_tiles
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Axes, AxisNames
from tsp_jax.ops.grouped import Grouped, OneByOne, Slab
from tsp_jax.ops.mlp import GATED
from tsp_jax.ops.router import Choices
from tsp_jax.ops.rowwise import Grads, RowwiseOp, rowwise
from tsp_jax.ops.stationary import moves_tokens
from tsp_jax.ops.stream import Arrays, Bucket, Stream, vary_alike, zeros


class ExpertBiases(NamedTuple):
    """Biases of the experts' projections, any float dtype."""

    gate_cD: Any
    """this device's, stored as `tsp_jax.stored.ExpertBiasPadding` says"""
    up_cD: Any
    """likewise"""
    down_ED: Any
    """of all experts, the same on every device"""


def experts(
    x_BtD: jax.Array, choices: Choices, w_gate_rD: jax.Array, w_up_rD: jax.Array, w_down_rD: jax.Array, *,
    num_experts: int, axes: Axes = Axes(), stream: Stream = Stream(), activation: str = "silu",
    d_ff: int | None = None, tile: int | None = None, expert_axes: AxisNames | None = None,
    grouped: Grouped = OneByOne(), biases: ExpertBiases | None = None,
) -> jax.Array:  # fmt: skip
    """``sum_j w_j MLP_e(x)`` over the k chosen experts e = chosen_j of each token.

        forward:  g = x gate_e^T    u = x up_e^T    h = act(g, u)    y = sum_j w_j h down_e
        dgrad:    dh = dy down_e^T    dw_j = h . dh    dg, du = vjp(act(g, u))(w_j dh)
                  dx = sum_j dg gate_e + du up_e
        wgrad:    dgate_e = dg^T x    dup_e = du^T x    ddown_e = (w_j h)^T dy      over the tokens that chose e

    Biases are added to g, to u and to ``h down_e``; the gradients of the first two are the sums of dg and of du. The
    third needs no tile: ``sum_j w_j bias_e`` is a product of the weights, as [T, E], with the biases of all experts.

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
      activation: as in `tsp_jax.ops.mlp.mlp`.
      d_ff: F; an expert's rows from F on are padding. None: all are real.
      grouped: how a bucket's tiles are multiplied.
      expert_axes: axes that shard whole experts; they are all folded, or all tensor axes. None: the folded axes.
      tile: n. An expert with a choices takes ceil(a / n) tiles. None: that of `grouped`.
      biases: of gate, up and down, or None.

    Returns:
      [B, t, D] in x's dtype; accumulated in float32.

    Operations: 6 D f n for each tile in forward, 16 D f n in backward, which computes g and u again. If experts move, a
      device has between A / n and A / n + E tiles, whatever the router does, in the same compiled program. Reports
      count A / n + E / 2: an expert's last tile is half full on average (`_mean_tiles`). If tokens move, it has between
      none and all R A / n tiles of all ranks. The biases of down take 2 T E D more in forward, twice as many backward.
    Moves: as `tsp_jax.ops.mlp.mlp` with E F rows, padded experts included, and the stored rows of both biases. If
      activations move, weights and numbers of the chosen experts move with x: 2 k elements a token. An all-to-all of
      fixed size that drops no token receives as much: all tokens of a rank may choose the experts of one other, so its
      buffers hold R t D elements too. Backward, one all-reduce of [E, D] over the token axes for the biases of down.
    Keeps: its inputs, and A int32. While it runs, forward and backward, outputs or gradients of all choices,
      [B, t, k, D] in the compute dtype; if activations move, those of one bucket of tokens of all ranks.
    Raises:
      ConfigError: the weights' rows are not those of these experts.
    """
    with jax.named_scope("tsp/experts"):
        whole = axes.folded if expert_axes is None else expert_axes
        ranks = lax.axis_size(whole) if whole else 1
        local = -(-num_experts // ranks)
        rows, rest = divmod(w_up_rD.shape[0], local)
        sorted_once = not moves_tokens(axes.folded, stream)
        split = tuple(name for name in axes.tensor if name not in whole)
        most, resident = rows * (lax.axis_size(split) if split else 1), () if axes.folded else whole
        if rest or not most or (d_ff or 0) > most or not (tile is None or tile > 0):
            raise ConfigError(
                f"experts: {w_up_rD.shape[0]} rows on a device do not suit num_experts={num_experts}, d_ff={d_ff}, "
                f"tile={tile}; use {local} times the rows of an expert, and a positive tile"
            )
        op = _Experts(
            activation, num_experts, local * ranks, rows, d_ff or most, split, resident, grouped, tile, sorted_once,
            x_BtD.dtype,
        )  # fmt: skip
        chosen = _by_expert(choices.experts_Btk) if sorted_once else (choices.experts_Btk,)
        stream = stream._replace(chunk_tokens=Stream().chunk_tokens, product_bytes=math.inf)
        inputs, weights = (x_BtD, choices.weights_Btk, *chosen), (w_gate_rD, w_up_rD, w_down_rD)
        if biases is None:
            return rowwise(op, inputs, weights, axes=axes, stream=stream)
        y_BtD = rowwise(op, inputs, (*weights, biases.gate_cD, biases.up_cD), axes=axes, stream=stream)
    return _add_down_biases(y_BtD, choices, biases.down_ED)


def _add_down_biases(y_BtD: jax.Array, choices: Choices, bias_ED: jax.Array) -> jax.Array:
    """``y + sum_j w_j bias_e``, in y's dtype."""
    with jax.named_scope("tsp/expert_biases"):
        y_BtD, weights_Btk, bias_ED = vary_alike(y_BtD, choices.weights_Btk, bias_ED)
        chosen_BtkE = jax.nn.one_hot(choices.experts_Btk, len(bias_ED), dtype=weights_Btk.dtype)
        mix_BtE = (chosen_BtkE * weights_Btk[..., None]).sum(axis=2).astype(y_BtD.dtype)
        added = jnp.einsum("bte,ed->btd", mix_BtE, bias_ED.astype(y_BtD.dtype), preferred_element_type=jnp.float32)
        return (y_BtD.astype(jnp.float32) + added).astype(y_BtD.dtype)


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

    def slab(self, first: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
        """(expert's place in the bucket of each tile [q], numbers of the tiles' choices [N]), from tile `first` on.

        A number is A where a tile has no choice left, and the place is m where there is no tile left.
        """
        index_q = first + lax.iota(jnp.int32, number)
        experts_q = (self.ends_m[None] <= index_q[:, None]).sum(axis=1, dtype=jnp.int32)
        ends, counts, firsts = (
            a.at[experts_q].get(mode="fill", fill_value=0) for a in (self.ends_m, self.counts_m, self.first_m)
        )
        before = (index_q - ends) * self.size + -(-counts // self.size) * self.size
        places_qn = before[:, None] + lax.iota(jnp.int32, self.size)[None]
        choices_qn = self.order_A[jnp.minimum(firsts[:, None] + places_qn, len(self.order_A) - 1)]
        return experts_q, jnp.where(places_qn < counts[:, None], choices_qn, len(self.order_A)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Experts(RowwiseOp):
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
    grouped: Grouped
    tile: int | None
    sorted_once: bool
    """the inputs hold choices that are sorted already; else each bucket of tokens is sorted"""
    dtype: Any
    accumulator_dtype: Any = jnp.float32
    chunked: bool = False

    def _gated(self, gate_Nf: jax.Array, up_Nf: jax.Array) -> jax.Array:
        return GATED[self.activation](gate_Nf, up_Nf)

    def _real(self, h_Nf: jax.Array) -> jax.Array:
        """Without the columns that are padding."""
        if not self.split or self.real_rows == self.rows * lax.axis_size(self.split):
            return h_Nf
        real_f = lax.axis_index(self.split) * self.rows + lax.iota(jnp.int32, self.rows) < self.real_rows
        return jnp.where(real_f[None], h_Nf, jnp.zeros((), h_Nf.dtype))

    def _tiles(self, inputs: Arrays, bucket: Bucket) -> _Tiles:
        order_Btk, sorted_Btk = inputs[2:] if self.sorted_once else _by_expert(inputs[2])
        experts_m = bucket.rows()[:: self.rows] // self.rows
        if self.resident:
            experts_m += lax.axis_index(self.resident) * (self.stored_experts // lax.axis_size(self.resident))
        return _Tiles.of(order_Btk, sorted_Btk, experts_m, self._tile(order_Btk.size))

    def _tile(self, choices: int) -> int:
        return self.tile or self.grouped.slabs.tile(choices, self.num_experts)

    def _over_slabs(self, body, carry: Any, inputs: Arrays, bucket: Bucket) -> Any:
        """Runs ``body(carry, slab, choices [N])`` on all tiles of a bucket, a slab at a time.

        If slabs hold many tiles, the first one stands before the loop over the others: mostly there are no others.
        """
        tiles, experts = self._tiles(inputs, bucket), bucket.num_rows // self.rows
        mean = self._mean_tiles(inputs[1].size, experts)
        size = self.grouped.slabs.tiles(mean, tiles.size)
        begun = int(self.grouped.slabs.many)
        trips = math.ceil(mean / size) if begun else mean

        def step(index, carry):
            experts_q, choices_N = tiles.slab(index * size, size)
            filled = jnp.minimum(size, tiles.ends_m[-1] - index * size)
            slab = Slab(experts_q, experts, filled, tiles.size, mean / trips, mean / experts * tiles.size)
            return body(carry, slab, choices_N)

        carry = step(jnp.int32(0), carry) if begun else carry
        # Reports read how often a loop runs whose end depends on data from the scope around it.
        with jax.named_scope(f"mean_trips[{max(trips - begun, 1e-9):.9g}]"):
            return lax.fori_loop(begun, -(-tiles.ends_m[-1] // size), step, carry)

    def _mean_tiles(self, choices: int, experts: int) -> float:
        """Mean number of tiles of a bucket of so many experts, if all experts are chosen equally often."""
        real = experts * self.num_experts / self.stored_experts
        return real * mean_tiles(choices, self.num_experts, self._tile(choices))

    def _weights(self, bucket: Bucket) -> tuple[Arrays, Arrays]:
        """(weights, each [m, f, D]; biases of gate and up, each [m, f], or none)."""
        weights, biases, experts = bucket.arrays[:3], bucket.arrays[3:], bucket.num_rows // self.rows
        return (
            tuple(array.reshape(experts, self.rows, -1) for array in weights),
            tuple(array.reshape(experts, -1)[:, : self.rows] for array in biases),
        )

    # A sum over buckets holds the outputs of all choices, [B, t, k, D]: each is written once, so the order does not
    # matter, as it would if a slab that holds several choices of a token added them up.

    def start(self, inputs: Arrays, width: int) -> jax.Array:
        return zeros((*inputs[1].shape, width), self.dtype, like=inputs[0])

    def add(self, total: jax.Array, inputs: Arrays, bucket: Bucket) -> jax.Array:
        (gate_mfD, up_mfD, down_mfD), biases = self._weights(bucket)
        x_TD, per_token = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1].shape[-1]

        def slab(total_AD, slab: Slab, choices_N):
            x_ND = _rows(x_TD, choices_N // per_token)
            (h_Nf,) = self.grouped.matmul_t(x_ND, (gate_mfD, up_mfD), slab, biases=biases, combine=self._gated)
            out_ND = self.grouped.matmul((self._real(h_Nf),), (down_mfD,), slab)
            return _set_rows(total_AD, choices_N, out_ND)

        total_AD = total.reshape(-1, total.shape[-1])
        return self._over_slabs(slab, total_AD, inputs, bucket).reshape(total.shape)

    def finish(self, total: jax.Array, inputs: Arrays) -> jax.Array:
        return jnp.einsum("btkd,btk->btd", total, inputs[1], preferred_element_type=jnp.float32)

    def partial(self, inputs: Arrays, bucket: Bucket) -> jax.Array:
        total = self.start(inputs, bucket.arrays[0].shape[-1])
        return self.finish(self.add(total, inputs, bucket), inputs)

    def start_vjp(self, inputs: Arrays, dy_BtD: jax.Array) -> Arrays:
        shape = inputs[1].shape
        return zeros((*shape, inputs[0].shape[-1]), self.dtype, dy_BtD), zeros(shape, jnp.float32, dy_BtD)

    def add_vjp(self, total: Arrays, inputs: Arrays, dy_BtD: jax.Array, bucket: Bucket) -> tuple[Arrays, Arrays]:
        (gate_mfD, up_mfD, down_mfD), biases = self._weights(bucket)
        x_TD, dy_TD = (array.reshape(-1, array.shape[-1]) for array in (inputs[0], dy_BtD))
        weights_A, per_token = inputs[1].reshape(-1), inputs[1].shape[-1]
        grouped = self.grouped

        def slab(carry, slab: Slab, choices_N):
            dx_AD, dweights_A, dgate_mfD, dup_mfD, ddown_mfD, *dbiases = carry
            tokens_N = choices_N // per_token
            x_ND, dy_ND = _rows(x_TD, tokens_N), _rows(dy_TD, tokens_N)
            weight_N1 = _rows(weights_A, choices_N)[:, None]
            products = grouped.matmul_t(x_ND, (gate_mfD, up_mfD), slab, biases=biases)
            h_Nf, hidden_vjp = jax.vjp(lambda *products: self._real(self._gated(*products)), *products)
            (dh_Nf,) = grouped.matmul_t(dy_ND, (down_mfD,), slab)
            dgate_Nf, dup_Nf = (d.astype(self.dtype) for d in hidden_vjp(dh_Nf * weight_N1))
            weighted_Nf = (h_Nf * weight_N1).astype(self.dtype)
            return (
                _set_rows(dx_AD, choices_N, grouped.matmul((dgate_Nf, dup_Nf), (gate_mfD, up_mfD), slab)),
                _set_rows(dweights_A, choices_N, (h_Nf * dh_Nf).sum(axis=-1)),
                grouped.outer(dgate_mfD, dgate_Nf, x_ND, slab),
                grouped.outer(dup_mfD, dup_Nf, x_ND, slab),
                grouped.outer(ddown_mfD, weighted_Nf, dy_ND, slab),
                *(grouped.sums(d_mf, d_Nf, slab) for d_mf, d_Nf in zip(dbiases, (dgate_Nf, dup_Nf), strict=False)),
            )

        dx, dweights = total
        grads = (grouped.start(array.shape, dy_BtD) for array in (gate_mfD, up_mfD, down_mfD, *biases))
        carry = dx.reshape(-1, dx.shape[-1]), dweights.reshape(-1), *grads
        dx_AD, dweights_A, *grads = self._over_slabs(slab, carry, inputs, bucket)
        total = dx_AD.reshape(dx.shape), dweights_A.reshape(dweights.shape)
        return total, tuple(_to_rows(grad, array) for grad, array in zip(grads, bucket.arrays, strict=True))

    def finish_vjp(self, total: Arrays, inputs: Arrays) -> Grads:
        return total[0].sum(axis=2, dtype=jnp.float32), total[1], *[None] * len(inputs[2:])

    def partial_vjp(self, inputs: Arrays, dy_BtD: jax.Array, bucket: Bucket) -> tuple[Grads, Arrays]:
        total, grads = self.add_vjp(self.start_vjp(inputs, dy_BtD), inputs, dy_BtD, bucket)
        return self.finish_vjp(total, inputs), grads


def _to_rows(grad_m: jax.Array, like: jax.Array) -> jax.Array:
    """[m, ...] -> the shape of one of the bucket's arrays: rows that biases fill only in part end with zeros."""
    flat_me = grad_m.reshape(len(grad_m), -1)
    missing = like.size // len(grad_m) - flat_me.shape[1]
    return jnp.pad(flat_me, ((0, 0), (0, missing))).reshape(like.shape) if missing else flat_me.reshape(like.shape)


def _rows(array: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of an array; zeros for indices past its end."""
    return jnp.asarray(array).at[indices].get(mode="fill", fill_value=0)


def _set_rows(array: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """The array with `rows` at these indices, which differ; those past its end are left out."""
    return array.at[indices].set(rows, mode="drop", unique_indices=True)
