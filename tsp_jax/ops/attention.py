"""Attention with streamed weights: a piece of the heads at a time, over the whole sequence.

Two streamed functions with a VJP each. `_heads`: stream [Wq Wk Wv], project this device's tokens, gather keys and
values of the piece over the sequence, attend. `_project_out`: stream Wo, add into this device's tokens. What stands
between them, the heads' outputs and their log-sum-exps, is what the remat policy `save_attention` keeps.

Heads and pieces. A rank holds n query slots and k KV slots. If k > 1, or every query head has a KV head of its own,
a piece is some KV heads with all of their query heads. Else (grouped queries, at most one KV head a rank) keys and
values, which are few, are projected and gathered first, once, and pieces are query heads alone. With fewer KV slots
than ranks each rank stores equal parts of a KV head's columns.

Dims: B batch, t this device's tokens, S all tokens, D model, N heads of a piece, K KV heads of a piece, G query heads
of a KV head, H head; nH and kH: this device's rows of Wq and Wk; R ranks of folded and tensor axes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tsp_jax.config import RopeScaling
from tsp_jax.layout import Axes
from tsp_jax.ops import kernels
from tsp_jax.ops.kernels.blockwise import Blocks, Tokens, block_size
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.norm import rms_norm
from tsp_jax.ops.rope import rope
from tsp_jax.ops.sequence import gather_sequence, scatter_sequence
from tsp_jax.ops.stream import Piece, Stream, custom_vjp, fold, fold_with_grads, largest_divisor, vary_alike, zeros

SAVED_NAMES = ("attention_out", "attention_lse")
"""checkpoint names of what `save_attention` keeps"""


class AttentionWeights(NamedTuple):
    """This device's rows; all stored [heads x H, D]. Query slots are in order of their KV slots."""

    q_nHD: jax.Array
    k_kHD: jax.Array
    v_kHD: jax.Array
    o_nHD: jax.Array


class HeadNorms(NamedTuple):
    """RMSNorm scales over a head, [H], for queries and keys."""

    q_H: jax.Array | None
    k_H: jax.Array | None


class AttentionConfig(NamedTuple):
    """What does not depend on arrays; hashable."""

    kv_slots: int
    """K of all ranks, padded"""
    head_dim: int
    rope_theta: float
    norm_eps: float = 1e-6
    buckets: int = 1
    """upper bound; the largest divisor that fits is used"""
    blocks: Blocks = Blocks(512, 512)
    """tokens in a block, about; no block is longer than half of this device's tokens (a zigzag chunk)"""
    rope_scaling: RopeScaling = RopeScaling()
    arch: str = ""
    """GPU that the fused kernel is compiled for; empty: the XLA kernel"""


class _Static(NamedTuple):
    """Everything static that the two streamed functions share."""

    config: AttentionConfig
    axes: Axes
    stream: Stream
    kv_with_queries: bool


def attention(
    x_BtD: jax.Array,
    weights: AttentionWeights,
    tokens_Bt: Tokens,
    norms: HeadNorms | None = None,
    *,
    config: AttentionConfig,
    axes: Axes = Axes(),
    stream: Stream = Stream(),
) -> jax.Array:
    """Causal self-attention within segments: ``concat_h(softmax(q_h k_h^T / sqrt(H)) v_h) Wo``.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: this device's rows, any float dtype.
      tokens_Bt: positions and segments of this device's tokens; any order of tokens over ranks is legal.
      norms: scales of q/k RMSNorm (Qwen3), or None.
      config: static sizes.
      axes: folded axes: weights move past tokens; tensor axes: partial outputs are summed; sequence axes: keys and
        values are gathered.
      stream: movement (gather or broadcast); its buckets are replaced by `config.buckets`.

    Raises:
      ValueError: movement ring, under which ranks hold different heads at a time.

    Returns:
      [B, t, D] in x's dtype.

    Moves: forward (2 N + 2 K) H D (R - 1) / R weights and 2 B S K H (R - 1) / R keys and values (R of the sequence
      axes), and 8 B S (R - 1) / R bytes of positions and segments; backward the same again except that only what a
      remat policy drops is repeated, as many weight gradients, and gradients of keys and values. Over tensor axes one
      all-reduce of [B, t, D] forward, one backward.
    Keeps: its inputs, the heads' outputs [B, t, N H] and their lse.
    Source: arXiv 2604.26294, section on attention; buckets over every rank's heads (gather) are ours.
    """
    if stream.movement == "ring":
        raise ValueError("attention gathers keys and values of the heads that all ranks hold at once: not ring")
    with jax.named_scope("tsp/attention"):
        scales = jax.tree.leaves(norms)
        arrays = vary_alike(x_BtD, *weights, *tokens_Bt, *scales)
        x_BtD, weights, tokens_Bt = arrays[0], AttentionWeights(*arrays[1:5]), Tokens(*arrays[5:7])
        norms = HeadNorms(*arrays[7:]) if norms else None
        static = _static(config, axes, stream, weights)
        positions_BS, segments_BS = gather_sequence(*tokens_Bt, axes=axes.sequence)
        keys_BS = Tokens(positions_BS, segments_BS)
        out = _heads(x_BtD, weights[:3], norms, tokens_Bt, keys_BS, static)
        y_BtD = _project_out(out, weights.o_nHD, static)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD


def _static(config: AttentionConfig, axes: Axes, stream: Stream, weights: AttentionWeights) -> _Static:
    query_slots = weights.q_nHD.shape[0] // config.head_dim
    weight_axes = axes.tensor + axes.folded
    ranks = lax.axis_size(weight_axes) if weight_axes else 1
    kv_slots = config.kv_slots // ranks
    kv_with_queries = kv_slots > 1 or kv_slots == query_slots
    buckets = largest_divisor(kv_slots if kv_with_queries else query_slots, config.buckets)
    return _Static(config, axes, stream._replace(buckets=buckets), kv_with_queries)


# ------------------------------------------------------------------------------------------------ projections


def _split(rows_Btp: jax.Array, head_dim: int) -> jax.Array:
    return rows_Btp.reshape(*rows_Btp.shape[:2], -1, head_dim)


def _prepare(norm_H, positions_Bt, static: _Static, dtype, rows_Btp: jax.Array) -> jax.Array:
    """Projected rows -> heads as attention wants them: q/k norm, RoPE, compute dtype."""
    x_BtNH = _split(rows_Btp, static.config.head_dim)
    if norm_H is not None:
        x_BtNH = rms_norm(x_BtNH, norm_H, static.config.norm_eps)
    return rope(x_BtNH, positions_Bt, static.config.rope_theta, static.config.rope_scaling).astype(dtype)


class _Projection:
    """``prepare(x w^T)`` and its VJP, with sums of every product in float32."""

    def __init__(self, x_BtD, w_pD, norm_H, tokens_Bt: Tokens, static: _Static):
        self.x_BtD, self.w_pD, self.norm_H = x_BtD, w_pD, norm_H
        rows_Btp = matmul_t(x_BtD, w_pD)

        def prepare(norm_H, rows_Btp):
            return _prepare(norm_H, tokens_Bt.positions, static, x_BtD.dtype, rows_Btp)

        self.heads_BtNH, self.prepare_vjp = jax.vjp(prepare, norm_H, rows_Btp)

    def vjp(self, dheads_BtNH: jax.Array):
        """-> (dx float32, dw float32, dnorm or None)."""
        dnorm_H, drows_Btp = self.prepare_vjp(dheads_BtNH)
        drows_Btp = drows_Btp.astype(self.x_BtD.dtype)
        return matmul(drows_Btp, self.w_pD), outer(drows_Btp, self.x_BtD), dnorm_H


class _Value:
    """As `_Projection`, for values: neither norm nor RoPE."""

    def __init__(self, x_BtD, w_pD, head_dim: int):
        self.x_BtD, self.w_pD = x_BtD, w_pD
        self.heads_BtNH = _split(matmul_t(x_BtD, w_pD), head_dim).astype(x_BtD.dtype)

    def vjp(self, dheads_BtNH: jax.Array):
        drows_Btp = dheads_BtNH.reshape(*dheads_BtNH.shape[:2], -1)
        return matmul(drows_Btp, self.w_pD), outer(drows_Btp, self.x_BtD)


def _group(q_BtNH: jax.Array, kv_heads: int) -> jax.Array:
    return q_BtNH.reshape(*q_BtNH.shape[:2], kv_heads, -1, q_BtNH.shape[-1])


def _ungroup(q_BtKGH: jax.Array) -> jax.Array:
    return q_BtKGH.reshape(*q_BtKGH.shape[:2], -1, q_BtKGH.shape[-1])


def _blocks(static: _Static, tokens_Bt: Tokens) -> Blocks:
    half = max(1, tokens_Bt.positions.shape[1] // 2)
    return Blocks(*(block_size(half, block) for block in static.config.blocks))


# ------------------------------------------------------------------------------------------------ heads


@custom_vjp(5)
def _heads(x_BtD, weights, norms, tokens_Bt, keys_BS, static):
    return _heads_forward(x_BtD, weights, norms, tokens_Bt, keys_BS, static)[0]


def _heads_forward(x_BtD, weights, norms, tokens_Bt, keys_BS, static: _Static):
    run = _joint_forward if static.kv_with_queries else _grouped_forward
    out, lse = run(x_BtD, weights, norms or HeadNorms(None, None), tokens_Bt, keys_BS, static)
    out, lse = (checkpoint_name(array, name) for array, name in zip((out, lse), SAVED_NAMES, strict=True))
    return out, (x_BtD, weights, norms, tokens_Bt, keys_BS, out, lse)


def _heads_backward(static: _Static, residuals, dout):
    run = _joint_backward if static.kv_with_queries else _grouped_backward
    x_BtD, weights, norms, tokens_Bt, keys_BS, out, lse = residuals
    saved = (out, lse, dout)
    dx, dweights, dnorms = run(x_BtD, weights, norms or HeadNorms(None, None), tokens_Bt, keys_BS, saved, static)
    return dx.astype(x_BtD.dtype), dweights, dnorms if norms else None, None, None


_heads.defvjp(_heads_forward, _heads_backward)


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


def _zero_grads(x_BtD, norms: HeadNorms):
    """Accumulators of dx and of the norms' gradients."""
    dnorms = jax.tree.map(lambda norm_H: zeros(norm_H.shape, norm_H.dtype, like=norm_H), norms)
    return zeros(x_BtD.shape, jnp.float32, like=x_BtD), dnorms


def _joint_forward(x_BtD, weights, norms, tokens_Bt, keys_BS, static: _Static):
    def body(carry, piece: Piece):
        q, k, v = _joint_projections(x_BtD, piece, norms, tokens_Bt, static)
        k_BSKH, v_BSKH = gather_sequence(k.heads_BtNH, v.heads_BtNH, axes=static.axes.sequence)
        q_BtKGH = _group(q.heads_BtNH, k_BSKH.shape[2])
        out, lse = kernels.attend(
            static.config.arch, q_BtKGH, k_BSKH, v_BSKH, tokens_Bt, keys_BS, _blocks(static, tokens_Bt)
        )
        return carry, (_ungroup(out), lse)

    axes, stream = static.axes.folded, static.stream
    return fold(body, (), weights, axes=axes, stream=stream, dtype=x_BtD.dtype)[1]


def _joint_projections(x_BtD, piece: Piece, norms, tokens_Bt, static: _Static):
    wq_pD, wk_pD, wv_pD = piece.arrays
    q = _Projection(x_BtD, wq_pD, norms.q_H, tokens_Bt, static)
    k = _Projection(x_BtD, wk_pD, norms.k_H, tokens_Bt, static)
    return q, k, _Value(x_BtD, wv_pD, static.config.head_dim)


def _joint_backward(x_BtD, weights, norms, tokens_Bt, keys_BS, saved, static: _Static):
    def body(carry, piece: Piece):
        dx_BtD, dnorms = carry
        out, lse, dout = (array[piece.index] for array in saved)
        q, k, v = _joint_projections(x_BtD, piece, norms, tokens_Bt, static)
        k_BSKH, v_BSKH = gather_sequence(k.heads_BtNH, v.heads_BtNH, axes=static.axes.sequence)
        group = partial(_group, kv_heads=k_BSKH.shape[2])
        dq_BtKGH, dk_BSKH, dv_BSKH = kernels.attend_backward(
            static.config.arch,
            group(q.heads_BtNH), k_BSKH, v_BSKH, tokens_Bt, keys_BS, group(out), lse, group(dout),
            _blocks(static, tokens_Bt),
        )  # fmt: skip
        dk_BtKH, dv_BtKH = scatter_sequence(dk_BSKH, dv_BSKH, axes=static.axes.sequence)
        dx_q, dwq, dnorm_q = q.vjp(_ungroup(dq_BtKGH))
        dx_k, dwk, dnorm_k = k.vjp(dk_BtKH)
        dx_v, dwv = v.vjp(dv_BtKH)
        carry = dx_BtD + dx_q + dx_k + dx_v, _add(dnorms, HeadNorms(dnorm_q, dnorm_k))
        return carry, (dwq, dwk, dwv), None

    carry = _zero_grads(x_BtD, norms)
    (dx_BtD, dnorms), grads, _ = fold_with_grads(
        body, carry, weights, axes=static.axes.folded, stream=static.stream, dtype=x_BtD.dtype
    )
    return dx_BtD, grads, dnorms


# ------------------------------------------------------------------------------------------------ grouped heads


def _tensor_shards(static: _Static) -> int:
    return lax.axis_size(static.axes.tensor) if static.axes.tensor else 1


def _kv_count(static: _Static) -> int:
    """KV heads that this device's tensor shard uses."""
    return max(1, static.config.kv_slots // _tensor_shards(static))


def _split_by_tensor(static: _Static) -> bool:
    """Whether a KV head's columns lie on several tensor shards, so that each gathers all and takes its own."""
    return static.config.kv_slots < _tensor_shards(static)


def _kv_stream(static: _Static) -> dict[str, Any]:
    axes = (static.axes.tensor if _split_by_tensor(static) else ()) + static.axes.folded
    return {"axes": axes, "stream": Stream(grad_dtype=static.stream.grad_dtype)}


def _first_row(static: _Static) -> jax.Array:
    head = lax.axis_index(static.axes.tensor) * static.config.kv_slots // _tensor_shards(static)
    return head * static.config.head_dim


def _my_heads(static: _Static, w_KHD: jax.Array) -> jax.Array:
    if not _split_by_tensor(static):
        return w_KHD
    return lax.dynamic_slice_in_dim(w_KHD, _first_row(static), static.config.head_dim)


def _all_heads(static: _Static, dw_HD: jax.Array) -> jax.Array:
    """Transpose of `_my_heads`."""
    if not _split_by_tensor(static):
        return dw_HD
    full = zeros((static.config.kv_slots * static.config.head_dim, dw_HD.shape[-1]), dw_HD.dtype, like=dw_HD)
    return lax.dynamic_update_slice_in_dim(full, dw_HD, _first_row(static), axis=0)


def _kv_projections(x_BtD, piece: Piece, norms, tokens_Bt, static: _Static):
    wk_KHD, wv_KHD = (_my_heads(static, w) for w in piece.arrays)
    return (
        _Projection(x_BtD, wk_KHD, norms.k_H, tokens_Bt, static),
        _Value(x_BtD, wv_KHD, static.config.head_dim),
    )


def _kv_of(piece: Piece, static: _Static) -> tuple[int, int]:
    """(first, number) of the KV heads that a piece of query heads attends to."""
    count = _kv_count(static)
    folded = static.axes.folded
    ranks = lax.axis_size(folded) if folded else 1
    if piece.num_ranks == ranks:
        return 0, count
    return piece.first_rank * count // ranks, 1


def _grouped_forward(x_BtD, weights, norms, tokens_Bt, keys_BS, static: _Static):
    def kv_body(_, piece: Piece):
        k, v = _kv_projections(x_BtD, piece, norms, tokens_Bt, static)
        return gather_sequence(k.heads_BtNH, v.heads_BtNH, axes=static.axes.sequence), None

    def query_body(carry, piece: Piece):
        q = _Projection(x_BtD, piece.arrays[0], norms.q_H, tokens_Bt, static)
        first, count = _kv_of(piece, static)
        k, v = (lax.slice_in_dim(heads, first, first + count, axis=2) for heads in (k_BSKH, v_BSKH))
        q_BtKGH = _group(q.heads_BtNH, count)
        out, lse = kernels.attend(static.config.arch, q_BtKGH, k, v, tokens_Bt, keys_BS, _blocks(static, tokens_Bt))
        return carry, (_ungroup(out), lse)

    (k_BSKH, v_BSKH), _ = fold(kv_body, None, weights[1:], dtype=x_BtD.dtype, **_kv_stream(static))
    axes, stream = static.axes.folded, static.stream
    return fold(query_body, (), weights[:1], axes=axes, stream=stream, dtype=x_BtD.dtype)[1]


def _grouped_backward(x_BtD, weights, norms, tokens_Bt, keys_BS, saved, static: _Static):
    def kv_body(carry, piece: Piece):
        """All of it: keys and values have one piece, around every piece of the queries."""
        dx_BtD, dnorms = carry
        k, v = _kv_projections(x_BtD, piece, norms, tokens_Bt, static)
        keys_values = gather_sequence(k.heads_BtNH, v.heads_BtNH, axes=static.axes.sequence)
        carry = dx_BtD, dnorms.q_H
        (dx_BtD, dnorm_q), dkv_BSKH, dwq = _grouped_queries_backward(
            x_BtD, weights[:1], norms, tokens_Bt, keys_BS, saved, keys_values, carry, static
        )
        dkv_BSKH = (d.astype(x_BtD.dtype) for d in dkv_BSKH)
        dk_BtKH, dv_BtKH = scatter_sequence(*dkv_BSKH, axes=static.axes.sequence)
        dx_k, dwk, dnorm_k = k.vjp(dk_BtKH)
        dx_v, dwv = v.vjp(dv_BtKH)
        dnorms = HeadNorms(dnorm_q, _add(dnorms.k_H, dnorm_k))
        return (dx_BtD + dx_k + dx_v, dnorms), (_all_heads(static, dwk), _all_heads(static, dwv)), dwq

    carry = _zero_grads(x_BtD, norms)
    (dx_BtD, dnorms), dwkv, dwq = fold_with_grads(kv_body, carry, weights[1:], dtype=x_BtD.dtype, **_kv_stream(static))
    return dx_BtD, (*(dw[0] for dw in dwq), *dwkv), dnorms


def _grouped_queries_backward(x_BtD, weights, norms, tokens_Bt, keys_BS, saved, keys_values, carry, static: _Static):
    """-> ((dx, dnorm of queries), (dk, dv) [B, S, K, H] float32, gradient of Wq)."""

    def body(carry, piece: Piece):
        (dx_BtD, dnorm_H), dk_BSKH, dv_BSKH = carry
        out, lse, dout = (array[piece.index] for array in saved)
        q = _Projection(x_BtD, piece.arrays[0], norms.q_H, tokens_Bt, static)
        first, count = _kv_of(piece, static)
        here = slice(first, first + count)
        group = partial(_group, kv_heads=count)
        k, v = (heads[:, :, here] for heads in keys_values)
        dq_BtKGH, dk, dv = kernels.attend_backward(
            static.config.arch,
            group(q.heads_BtNH),
            k,
            v,
            tokens_Bt,
            keys_BS,
            group(out),
            lse,
            group(dout),
            _blocks(static, tokens_Bt),
        )
        dx, dwq, dnorm = q.vjp(_ungroup(dq_BtKGH))
        dk_BSKH = dk_BSKH.at[:, :, here].add(dk.astype(jnp.float32))
        dv_BSKH = dv_BSKH.at[:, :, here].add(dv.astype(jnp.float32))
        return ((dx_BtD + dx, _add(dnorm_H, dnorm)), dk_BSKH, dv_BSKH), (dwq,), None

    zero = zeros(keys_values[0].shape, jnp.float32, like=x_BtD)
    axes, stream = static.axes.folded, static.stream
    (carry, dk_BSKH, dv_BSKH), dwq, _ = fold_with_grads(
        body, (carry, zero, zero), weights, axes=axes, stream=stream, dtype=x_BtD.dtype
    )
    return carry, (dk_BSKH, dv_BSKH), dwq


# ------------------------------------------------------------------------------------------------ output


@custom_vjp(2)
def _project_out(out, wo_nHD, static):
    return _project_out_forward(out, wo_nHD, static)[0]


def _flat(heads_BtNH: jax.Array) -> jax.Array:
    return heads_BtNH.reshape(*heads_BtNH.shape[:2], -1)


def _project_out_forward(out, wo_nHD, static: _Static):
    def body(y_BtD, piece: Piece):
        return y_BtD + matmul(_flat(out[piece.index]), piece.arrays[0]), None

    y_BtD = zeros((*out.shape[1:3], wo_nHD.shape[-1]), jnp.float32, like=out)
    axes, stream = static.axes.folded, static.stream
    y_BtD, _ = fold(body, y_BtD, (wo_nHD,), axes=axes, stream=stream, dtype=out.dtype)
    return y_BtD.astype(out.dtype), (out, wo_nHD)


def _project_out_backward(static: _Static, residuals, dy_BtD):
    out, wo_nHD = residuals

    def body(carry, piece: Piece):
        dout_Btp = matmul_t(dy_BtD, piece.arrays[0]).astype(out.dtype)
        dwo_pD = outer(_flat(out[piece.index]), dy_BtD)
        return carry, (dwo_pD,), _split(dout_Btp, static.config.head_dim)

    axes, stream = static.axes.folded, static.stream
    _, (dwo_nHD,), dout = fold_with_grads(body, (), (wo_nHD,), axes=axes, stream=stream, dtype=out.dtype)
    return dout, dwo_nHD


_project_out.defvjp(_project_out_forward, _project_out_backward)
