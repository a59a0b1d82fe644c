"""The bodies of the TPU kernels: what a step of a grid does with a pair of tiles. `tsp_jax.ops.kernels.tpu` runs them.

References to arrays come in this order: the list of pairs; positions and segments of queries, then of keys; inputs;
outputs; scratch in VMEM, of which `own` has positions and segments of the own tile's tokens in rows.

Dims: H head; Q tokens of a query tile or of a part of it, C of a key tile or of a part of it; L lanes of a vector
register, in which a row's value is repeated.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens, may_attend
from tsp_jax.ops.kernels.pairs import FIRST, FIRST_OF_ROW, LAST, MASK, RUN
from tsp_jax.ops.kernels.tpu_tiles import LANES


def forward_body(
    flags, queries, keys, q_ref, k_ref, v_ref, out_ref, lse_ref, own, top_ref, sum_ref, acc_ref, *,
    part: int, scores: Scores,
) -> None:  # fmt: skip
    """out and lse of a query tile, by online softmax. Sums are kept per lane, and added up at the end."""
    size = acc_ref.shape[1]

    def start():
        _set_columns(own, queries)
        top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(at: pl.Slice, masked: bool):
        s_QC = scores.cap(_dot(q_ref[...], k_ref[at, :], transposed=True) * scores.scale_of(q_ref.shape[1]))
        if masked:
            s_QC = jnp.where(_allowed(own, keys, at, False, scores), s_QC, MASKED)
        top_QL = jnp.maximum(top_ref[...], s_QC.max(axis=1, keepdims=True))
        p_QC = jnp.exp(s_QC - _spread(top_QL, part))
        decay_QL = jnp.exp(top_ref[...] - top_QL)
        sum_ref[...] = sum_ref[...] * decay_QL + _sum_registers(p_QC)
        acc_ref[...] = acc_ref[...] * _spread(decay_QL, size) + _dot(p_QC.astype(v_ref.dtype), v_ref[at, :])
        top_ref[...] = top_QL

    def finish():
        empty_QL = top_ref[...] <= MASKED / 2
        sum_QL = jnp.broadcast_to(sum_ref[...].sum(axis=1, keepdims=True), sum_ref.shape)
        out_QH = acc_ref[...] * _spread(1.0 / sum_QL, size)
        out_ref[...] = jnp.where(_spread(empty_QL, size), 0.0, out_QH).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty_QL, MASKED, top_ref[...] + jnp.log(sum_QL)).T[:1]

    _run(flags, start, _over_parts(k_ref, part, step), finish)


def dq_body(
    flags, queries, keys, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, own, lse_QL, delta_QL, acc_ref, *,
    part: int, scores: Scores,
) -> None:  # fmt: skip
    """dq of a query tile."""

    def start():
        _set_columns(own, queries)
        lse_QL[...], delta_QL[...] = _column(lse_ref[...]), _column(delta_ref[...])
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(at: pl.Slice, masked: bool):
        s_QC = scores.cap(_dot(q_ref[...], k_ref[at, :], transposed=True) * scores.scale_of(q_ref.shape[1]))
        p_QC = jnp.exp(s_QC - _spread(lse_QL[...], part))
        if masked:
            p_QC = jnp.where(_allowed(own, keys, at, False, scores), p_QC, 0.0)
        dp_QC = _dot(dout_ref[...], v_ref[at, :], transposed=True)
        ds_QC = scores.uncap_grad(p_QC * (dp_QC - _spread(delta_QL[...], part)), s_QC)
        acc_ref[...] += _dot(ds_QC.astype(k_ref.dtype), k_ref[at, :])

    def finish():
        dq_ref[...] = (acc_ref[...] * scores.scale_of(q_ref.shape[1])).astype(dq_ref.dtype)

    _run(flags, start, _over_parts(k_ref, part, step), finish)


def dkv_body(
    flags, queries, keys, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, own, dk_acc, dv_acc, *,
    part: int, scores: Scores, add_dq: Callable[..., None] | None = None,
) -> None:  # fmt: skip
    """dk and dv of a key tile. Scores are transposed, so that their products with queries are not.

    ``add_dq(slice of the query tile, dq without scale)`` takes the pair's part of dq, if it is given.
    """

    def start():
        _set_columns(own, keys)
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def step(at: pl.Slice, masked: bool):
        s_CQ = scores.cap(_dot(k_ref[...], q_ref[at, :], transposed=True) * scores.scale_of(q_ref.shape[1]))
        p_CQ = jnp.exp(s_CQ - lse_ref[:, at])
        if masked:
            p_CQ = jnp.where(_allowed(own, queries, at, True, scores), p_CQ, 0.0)
        dv_acc[...] += _dot(p_CQ.astype(dout_ref.dtype), dout_ref[at, :])
        dp_CQ = _dot(v_ref[...], dout_ref[at, :], transposed=True)
        ds_CQ = scores.uncap_grad(p_CQ * (dp_CQ - delta_ref[:, at]), s_CQ).astype(q_ref.dtype)
        dk_acc[...] += _dot(ds_CQ, q_ref[at, :])
        if add_dq:
            dims = (((0,), (0,)), ((), ()))
            add_dq(at, lax.dot_general(ds_CQ, k_ref[...], dims, preferred_element_type=jnp.float32))

    def finish():
        dk_ref[...] = (dk_acc[...] * scores.scale_of(q_ref.shape[1])).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    _run(flags, start, _over_parts(q_ref, part, step), finish)


def backward_body(
    flags, queries, keys, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref, own, dk_acc,
    dv_acc, *, part: int, scores: Scores, query_tile: Any,
) -> None:  # fmt: skip
    """dk and dv of a key tile, and dq without scale of all query tiles of its row of the batch, [G, T, H] float32.

    `query_tile` is the query tile of this step, counted from the start of the row.
    """
    head, first = pl.program_id(4), query_tile * q_ref.shape[0]

    @pl.when((flags & FIRST_OF_ROW != 0) & _at_start())
    def _():
        dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)

    def add_dq(at: pl.Slice, dq_QH: jax.Array):
        dq_ref[head, pl.ds(pl.multiple_of(first + at.start, part), part), :] += dq_QH

    rest = q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, own, dk_acc, dv_acc
    dkv_body(flags, queries, keys, *rest, part=part, scores=scores, add_dq=add_dq)


# ------------------------------------------------------------------------------------------------ parts of bodies


def _at_start() -> Any:
    """Whether this is the first tile of the span, and the first query head of the KV head."""
    return (pl.program_id(3) == 0) & (pl.program_id(4) == 0)


def _run(flags: Any, start: Callable, step: Callable, finish: Callable) -> None:
    """Runs ``step(masked)``, after `start` in the first and before `finish` in the last step of an own tile."""
    at_end = (pl.program_id(3) == pl.num_programs(3) - 1) & (pl.program_id(4) == pl.num_programs(4) - 1)
    run_mask = flags & (RUN | MASK)
    pl.when((flags & FIRST != 0) & _at_start())(start)
    pl.when(run_mask == RUN)(functools.partial(step, False))
    pl.when(run_mask == RUN | MASK)(functools.partial(step, True))
    pl.when((flags & LAST != 0) & at_end)(finish)


def _over_parts(tile_ref: Any, part: int, step: Callable) -> Callable[[bool], None]:
    """``step(slice, masked)`` for all parts of a tile. The loop is not unrolled: compilation takes half as long."""

    def over(masked: bool):
        def body(i, _):
            step(pl.ds(pl.multiple_of(i * part, part), part), masked)

        lax.fori_loop(0, tile_ref.shape[0] // part, body, None)

    return over


def _dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a b, or a b^T if `transposed`, in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _spread(x_QL: jax.Array, width: int) -> jax.Array:
    """Values of rows, repeated over `width` lanes instead of L."""
    if width <= x_QL.shape[1]:
        return x_QL[:, :width]
    return jnp.tile(x_QL, (1, -(-width // x_QL.shape[1])))[:, :width]


def _sum_registers(x_QC: jax.Array) -> jax.Array:
    """[Q, L]: sums of the values in each lane, whose total is the sum of the row. C is below L or a multiple of it."""
    if x_QC.shape[1] % LANES:
        return jnp.pad(x_QC, ((0, 0), (0, -x_QC.shape[1] % LANES)))
    first, *others = (x_QC[:, lane : lane + LANES] for lane in range(0, x_QC.shape[1], LANES))
    return sum(others, first)


def _column(row_1Q: jax.Array) -> jax.Array:
    """[Q, L]: values that lie in lanes, in rows."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T


def _set_columns(own: Any, tokens_2Q: Any) -> None:
    for i in (0, 1):
        own[i] = _column(tokens_2Q[i : i + 1])


def _allowed(own: Any, other: Any, at: pl.Slice, by_key: bool, scores: Scores) -> jax.Array:
    """Which own tokens, in rows, may attend to some of the other tokens, in lanes, or be attended to by them."""
    lanes = Tokens(*(other[i : i + 1, at] for i in (0, 1)))
    rows = Tokens(*(_spread(own[i], lanes.positions.shape[1]) for i in (0, 1)))
    return may_attend(lanes, rows, scores) if by_key else may_attend(rows, lanes, scores)
