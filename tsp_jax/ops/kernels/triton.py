"""Blockwise attention for AMD and NVIDIA GPUs: three Pallas kernels that are compiled by way of Triton.

The scores of a pair of tiles stay in registers. The list of tiles that a program visits is made outside the kernels, in
XLA (`tsp_jax.ops.kernels.visits`). A program first visits, without a mask, the tiles in which every query may attend to
every key; then, with a mask, the tiles in which some may. It skips the others, whatever the order of tokens.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head; Q tokens of a query tile,
C tokens of a key tile; n tiles that have a program each, m spans that a program may visit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tsp_jax.ops.kernels.kernel import Kernel, declare_products
from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens, may_attend
from tsp_jax.ops.kernels.tiles import TILES, Tile, Tiles, find_tiles, padded_head_dim
from tsp_jax.ops.kernels.visits import Plan, Visits

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class TritonKernel(Kernel):
    """Attention with one kernel in forward and two in backward; scores are never written to memory."""

    backward_products = 7

    arch: str
    """GPU to compile for: a key of `TILES`; ``interpret`` runs anywhere, slowly"""
    tiles: Tiles | None = None
    """tile sizes; None: those of `arch` for the heads at hand"""

    @classmethod
    def for_arch(cls, arch: str) -> Self:
        return cls(arch)

    def not_here(self) -> str:
        known = ", ".join(arch for arch in TILES if arch != "interpret")
        return "" if self.arch in TILES else f"runs on {known}, not on {self.arch or 'unknown devices'}"

    def unsupported(self, head_dim: int, dtype: Any, scores: Scores = Scores()) -> str:
        dtype = jnp.dtype(dtype)
        if dtype in (jnp.bfloat16, jnp.float32) and find_tiles(self.arch, head_dim, dtype):
            return ""
        wide = f"heads have {head_dim} {dtype.name}; they may have at most 512 bytes, of float32 or bfloat16"
        return self.not_here() or wide

    def _tiles(self, q_BTKGH: jax.Array) -> Tiles:
        tiles = self.tiles or find_tiles(self.arch, q_BTKGH.shape[-1], q_BTKGH.dtype)
        if tiles is None:
            raise ValueError(self.unsupported(q_BTKGH.shape[-1], q_BTKGH.dtype))
        return tiles

    def attend(self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores=Scores()):
        """Attention within segments; see `Kernel.attend`.

        Keeps: visit lists, int32 [B, T/Q, S/C] or smaller (`visits.MOST_ENTRIES`). Where Q does not divide T, C does
          not divide S, or H is no power of two, also padded copies of the arrays.
        Raises:
          ValueError: there are no tiles for these heads.
        Source: Dao, arXiv 2307.08691 (FlashAttention-2).
        """
        tile = self._tiles(q_BTKGH).forward
        plan = Plan.of(queries, keys, tile, by_key=False, scores=scores)
        q, k, v = _pad(q_BTKGH, tile.query), _pad(k_BSKH, tile.key), _pad(v_BSKH, tile.key)
        batch, length, kv_heads, group, _ = q.shape
        out, lse_BKGT = _call(
            functools.partial(_forward_kernel, tile=tile, scores=_with_scale(scores, q_BTKGH)), plan, self.arch,
            products=("forward", 2),
            inputs=[("BTKGH", q), ("BSKH", k), ("BSKH", v)],
            outputs=[("BTKGH", q), ("BKGT", jax.ShapeDtypeStruct((batch, kv_heads, group, length), jnp.float32))],
        )  # fmt: skip
        return _crop(out, q_BTKGH), lse_BKGT.transpose(0, 3, 1, 2)[:, : q_BTKGH.shape[1]]

    def attend_backward(
        self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores=Scores()
    ):
        """Gradients of `attend`; see `Kernel.attend_backward`.

        There are two kernels. One computes dq, by query tiles; the other computes dk and dv, by key tiles, summed over
        the G query heads of a KV head. Both compute the scores and their gradients, so together they
        need 7 matrix products per pair of tiles; one kernel would need 5. Neither needs atomics or a float32
        accumulator in memory.

        Keeps: as `attend`, for both kernels.
        Source: Dao, arXiv 2307.08691, algorithm 2.
        """
        tiles = self._tiles(q_BTKGH)
        lse_BTKG = lse_BTKG * jnp.float32(LOG2_E)

        def run(kernel, products: int, tile: Tile, by_key: bool, outputs: Sequence[str]):
            q, dout = _pad(q_BTKGH, tile.query), _pad(dout_BTKGH, tile.query)
            k, v = _pad(k_BSKH, tile.key), _pad(v_BSKH, tile.key)
            lse, delta = (
                _pad(x[..., None], tile.query, 1)[..., 0].transpose(0, 2, 3, 1) for x in (lse_BTKG, delta_BTKG)
            )
            return _call(
                functools.partial(kernel, tile=tile, scores=_with_scale(scores, q_BTKGH)),
                Plan.of(queries, keys, tile, by_key, scores), self.arch,
                products=("backward", products),
                inputs=[("BTKGH", q), ("BSKH", k), ("BSKH", v), ("BTKGH", dout), ("BKGT", lse), ("BKGT", delta)],
                outputs=[(dims, {"BTKGH": q, "BSKH": k}[dims]) for dims in outputs],
            )  # fmt: skip

        (dq,) = run(_dq_kernel, 3, tiles.dq, False, ["BTKGH"])
        dk, dv = run(_dkv_kernel, 4, tiles.dkv, True, ["BSKH", "BSKH"])
        return _crop(dq, q_BTKGH), _crop(dk, k_BSKH), _crop(dv, v_BSKH)


# ------------------------------------------------------------------------------------------------ around the kernels


def _pad(x: jax.Array, tile: int, size: int | None = None) -> jax.Array:
    """Pads with zeros: the tokens to a multiple of `tile`, the last dim to `size` (None: `padded_head_dim`)."""
    widths = [(0, 0)] * x.ndim
    widths[1], widths[-1] = (0, -x.shape[1] % tile), (0, (size or padded_head_dim(x.shape[-1])) - x.shape[-1])
    return jnp.pad(x, widths)


def _with_scale(scores: Scores, q_BTKGH: jax.Array) -> Scores:
    """Scores with an explicit scale: inside the kernels, heads are padded."""
    return scores._replace(scale=scores.scale_of(q_BTKGH.shape[-1]))


def _crop(x: jax.Array, like: jax.Array) -> jax.Array:
    return x[:, : like.shape[1], ..., : like.shape[-1]]


def _call(
    kernel: Callable[..., None],
    plan: Plan,
    arch: str,
    products: tuple[Literal["forward", "backward"], int],
    inputs,
    outputs,
):
    """Runs one program per tile, head and row of the batch.

    A program's head is a KV head if tiles are of keys, else a query head; the program sees all tokens of that head. The
    kernel reads the visits and tokens of `plan`, then `inputs`: (dims, array) pairs, the queries first. It writes
    `outputs`: (dims, shape and dtype) pairs. `products`, (direction, matrix products per pair of tiles), is written
    into the compiled program for `tsp_jax.inspect`, which cannot see into a kernel; XLA drops Pallas' own
    cost estimate.
    """
    batch, _, kv_heads, group, size = inputs[0][1].shape
    direction, number = products
    flops = 2.0 * number * batch * kv_heads * group * plan.mean_pairs() * plan.tile.query * plan.tile.key * size

    def indices(_, head, row) -> dict[str, Any]:
        if plan.by_key:
            return {"B": row, "K": head}
        return {"B": row, "K": lax.div(head, jnp.int32(group)), "G": lax.rem(head, jnp.int32(group))}

    def spec(dims: str, array: Any) -> pl.BlockSpec:
        own = "BK" if plan.by_key else "BKG"
        block = tuple(None if dim in own else size for dim, size in zip(dims, array.shape, strict=True))
        return pl.BlockSpec(block, lambda *program: tuple(indices(*program).get(dim, 0) for dim in dims))

    varying = jax.typeof(inputs[0][1]).mat
    dims = Visits("Bn", "Bnm", "Bn", "Bn"), Tokens("BT", "BT"), Tokens("BS", "BS")
    tokens = plan.visits, plan.queries, plan.keys
    call = pl.pallas_call(
        functools.partial(kernel, span=plan.span),
        grid=(plan.visits.programs.shape[1], kv_heads if plan.by_key else kv_heads * group, batch),
        in_specs=[*jax.tree.map(spec, dims, tokens), *(spec(*each) for each in inputs)],
        out_specs=[spec(*each) for each in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for _, x in outputs],
        compiler_params=triton.CompilerParams(num_warps=plan.tile.warps, num_stages=plan.tile.stages),
        interpret=arch == "interpret",
    )
    with declare_products("triton", direction, size, flops):
        return call(*tokens, *(array for _, array in inputs))


# ------------------------------------------------------------------------------------------------ in the kernels


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _scores(product: jax.Array, scores: Scores) -> jax.Array:
    """Scores in units of log 2, from products of queries and keys."""
    if scores.softcap is None:
        return product * (_scale(scores) * LOG2_E)
    return scores.cap(product * _scale(scores)) * LOG2_E


def _scale(scores: Scores) -> float:
    """The scale that `_with_scale` has set."""
    assert scores.scale is not None
    return scores.scale


def _score_grads(grads: jax.Array, scores_in_log2: jax.Array, scores: Scores) -> jax.Array:
    """Gradients of scaled products, from those of the scores."""
    return grads if scores.softcap is None else scores.uncap_grad(grads, scores_in_log2 * (1 / LOG2_E))


def _rows(tokens: Tokens, rows: Any, dim: int) -> Tokens:
    """Some tokens, with a dim of size 1 inserted so that they broadcast over a tile of scores."""
    return Tokens(*(jnp.expand_dims(ref[rows], dim) for ref in tokens))


def _visit(visits: Visits, span: int, tile, step: Callable, carry: Any) -> Any:
    """Folds ``step(other tile, carry, masked)`` over the tiles that the program of `tile` visits."""
    unmasked, visited = visits.unmasked[tile], visits.visited[tile]

    def body(index, carry, masked: bool):
        if span == 1:
            return step(visits.order[tile, index], carry, masked)
        first = visits.order[tile, lax.div(index, jnp.int32(span))] * span
        return step(first + lax.rem(index, jnp.int32(span)), carry, masked)

    carry = lax.fori_loop(0, unmasked, functools.partial(body, masked=False), carry)
    return lax.fori_loop(unmasked, visited, functools.partial(body, masked=True), carry)


def _forward_kernel(
    visits, queries, keys, q_ref, k_ref, v_ref, out_ref, lse_ref, *, tile: Tile, scores: Scores, span: int
):
    """out and lse of a query tile. Online softmax uses exp2 (one instruction), and divides by the sum at the end."""
    i = visits.programs[pl.program_id(0)]
    rows = pl.ds(i * tile.query, tile.query)
    q_QH, q_tokens = q_ref[rows, :], _rows(queries, rows, 1)

    def step(j, carry, masked: bool):
        acc_QH, top_Q, sum_Q = carry
        rows = pl.ds(j * tile.key, tile.key)
        k_CH, v_CH = k_ref[rows, :], v_ref[rows, :]
        s_QC = _scores(_dot(q_QH, k_CH.T), scores)
        if masked:
            s_QC = jnp.where(may_attend(q_tokens, _rows(keys, rows, 0), scores), s_QC, MASKED)
        new_Q = jnp.maximum(top_Q, s_QC.max(axis=1))
        p_QC = jnp.exp2(s_QC - new_Q[:, None])
        decay_Q = jnp.exp2(top_Q - new_Q)
        acc_QH = acc_QH * decay_Q[:, None] + _dot(p_QC.astype(v_CH.dtype), v_CH)
        return acc_QH, new_Q, sum_Q * decay_Q + p_QC.sum(axis=1)

    row = jnp.zeros((tile.query,), jnp.float32)
    acc_QH, top_Q, sum_Q = _visit(visits, span, i, step, (jnp.zeros(q_QH.shape, jnp.float32), row + MASKED, row))
    empty_Q = top_Q <= MASKED / 2
    inverse_Q = jnp.where(empty_Q, 0.0, 1.0 / sum_Q)
    out_ref[rows, :] = (acc_QH * inverse_Q[:, None]).astype(out_ref.dtype)
    lse_ref[rows] = jnp.where(empty_Q, MASKED, top_Q * (1 / LOG2_E) + jnp.log(sum_Q))


def _dq_kernel(
    visits, queries, keys, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, *, tile: Tile, scores: Scores,
    span: int,
):  # fmt: skip
    """dq of a query tile."""
    i = visits.programs[pl.program_id(0)]
    rows = pl.ds(i * tile.query, tile.query)
    q_QH, dout_QH, q_tokens = q_ref[rows, :], dout_ref[rows, :], _rows(queries, rows, 1)
    lse_Q1, delta_Q1 = lse_ref[rows][:, None], delta_ref[rows][:, None]

    def step(j, dq_QH, masked: bool):
        rows = pl.ds(j * tile.key, tile.key)
        k_CH, v_CH = k_ref[rows, :], v_ref[rows, :]
        s_QC = _scores(_dot(q_QH, k_CH.T), scores)
        p_QC = jnp.exp2(s_QC - lse_Q1)
        if masked:
            p_QC = jnp.where(may_attend(q_tokens, _rows(keys, rows, 0), scores), p_QC, 0.0)
        ds_QC = _score_grads(p_QC * (_dot(dout_QH, v_CH.T) - delta_Q1), s_QC, scores)
        return dq_QH + _dot(ds_QC.astype(k_CH.dtype), k_CH)

    dq_QH = _visit(visits, span, i, step, jnp.zeros(q_QH.shape, jnp.float32))
    dq_ref[rows, :] = (dq_QH * _scale(scores)).astype(dq_ref.dtype)


def _dkv_kernel(
    visits, queries, keys, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, tile: Tile,
    scores: Scores, span: int,
):  # fmt: skip
    """dk and dv of a key tile. Scores are transposed, so that no product transposes an array in registers."""
    j = visits.programs[pl.program_id(0)]
    cols = pl.ds(j * tile.key, tile.key)
    k_CH, v_CH, k_tokens = k_ref[cols, :], v_ref[cols, :], _rows(keys, cols, 1)

    def step(head, i, carry, masked: bool):
        dk_CH, dv_CH = carry
        rows = pl.ds(i * tile.query, tile.query)
        q_QH, dout_QH = q_ref[rows, head, :], dout_ref[rows, head, :]
        lse_1Q, delta_1Q = lse_ref[head, rows][None, :], delta_ref[head, rows][None, :]
        s_CQ = _scores(_dot(k_CH, q_QH.T), scores)
        p_CQ = jnp.exp2(s_CQ - lse_1Q)
        if masked:
            p_CQ = jnp.where(may_attend(_rows(queries, rows, 0), k_tokens, scores), p_CQ, 0.0)
        dv_CH += _dot(p_CQ.astype(dout_QH.dtype), dout_QH)
        ds_CQ = _score_grads(p_CQ * (_dot(v_CH, dout_QH.T) - delta_1Q), s_CQ, scores)
        return dk_CH + _dot(ds_CQ.astype(q_QH.dtype), q_QH), dv_CH

    def head(index, carry):
        return _visit(visits, span, j, functools.partial(step, index), carry)

    zero = jnp.zeros(k_CH.shape, jnp.float32)
    dk_CH, dv_CH = lax.fori_loop(0, q_ref.shape[1], head, (zero, zero))
    dk_ref[cols, :] = (dk_CH * _scale(scores)).astype(dk_ref.dtype)
    dv_ref[cols, :] = dv_CH.astype(dv_ref.dtype)
