"""Projections of attention with streamed weights: tokens to queries, keys and values, and outputs of heads to tokens.

Arrays of heads are in the order of the heads, not of the buckets: each bucket writes, or reads, its own heads. Keys and
values are projected before queries, so that their exchange over the sequence can start while queries are projected.

Dims: B batch, t this device's tokens, c tokens of a chunk, D model, N query heads and K KV heads of this tensor shard,
H head, w this device's rows of a weight, p rows of a bucket.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadNorms, HeadStream, ShardedHeads
from tsp_jax.ops.chunks import over_chunks
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.norm import rms_norm
from tsp_jax.ops.rope import rope
from tsp_jax.ops.stationary import add
from tsp_jax.ops.stream import Arrays, Bucket, custom_vjp, over_buckets, over_buckets_with_grads, vary_alike, zeros


def vary_inputs_alike(
    x_BtD: jax.Array, weights: AttentionWeights, norms: HeadNorms | None, tokens: Any
) -> tuple[jax.Array, AttentionWeights, HeadNorms, Any]:
    """The inputs, marked as varying over the same mesh axes. If `norms` is None, `HeadNorms()` replaces it."""
    leaves, structure = jax.tree.flatten((x_BtD, weights, norms or HeadNorms(), tokens))
    return jax.tree.unflatten(structure, vary_alike(*leaves))


def split_heads(rows_Btp: jax.Array, head_dim: int) -> jax.Array:
    """[B, t, p] -> [B, t, p / H, H]."""
    return rows_Btp.reshape(*rows_Btp.shape[:2], -1, head_dim)


def normalize_and_rotate(rows_Btp: jax.Array, norm_H, positions_Bt, config: AttentionConfig, dtype) -> jax.Array:
    """Splits projected queries or keys into heads, applies q/k norm and RoPE if there are any, and casts to `dtype`."""
    x_BtNH = split_heads(rows_Btp, config.head_dim)
    if norm_H is not None:
        x_BtNH = rms_norm(x_BtNH, norm_H, config.norm_eps)
    if config.rope_theta is not None:
        x_BtNH = rope(x_BtNH, positions_Bt, config.rope_theta, config.rope_scaling)
    return x_BtNH.astype(dtype)


# ------------------------------------------------------------------------------------------------ in


@custom_vjp(4)
def project_in(x_BtD: jax.Array, weights, norms: HeadNorms, positions_Bt: jax.Array, heads: ShardedHeads):
    """Queries, keys and values of this device's tokens, for all heads of its tensor shard.

    Forward: ``q = rope(norm(x Wq^T))``, ``k = rope(norm(x Wk^T))``, ``v = x Wv^T``. With dq' and dk' the gradients
    before rope and norm, dgrad: ``dx = dq' Wq + dk' Wk + dv Wv``; wgrad: ``dWq = dq'^T x``, ``dWk = dk'^T x``,
    ``dWv = dv^T x``, each summed over the folded ranks.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: (q, k, v) of `AttentionWeights`, any float dtype.
      norms: scales of q/k RMSNorm.
      positions_Bt: int32.
      heads: how the heads are sharded and streamed; static.

    Returns:
      (q [B, t, N, H], k and v [B, t, K, H]), in x's dtype; sums in float32.

    Moves: forward (N + 2 K) H D (R - 1) / R elements of weights (R folded ranks), in the compute dtype; backward the
      same again, and a reduce-scatter of as many gradients in the stream's `grad_dtype`.
    Keeps: its inputs. Backward repeats a projection of forward only if a q/k norm follows it.
    Source: arXiv 2604.26294, except that it sends a bucket's four weights in one message, and we send
      [Wk Wv], Wq and Wo separately.
    """
    return _in_forward(x_BtD, weights, norms, positions_Bt, heads)[0]


def _in_forward(x_BtD, weights, norms, positions_Bt, heads: ShardedHeads):
    tokens = x_BtD, positions_Bt
    num_heads = heads.sharding.shard
    keys_values = _project("keys_values", heads, heads.keys_values, num_heads.kv, weights[1:], norms.k_H, tokens)
    queries = _project("queries", heads, heads.queries, num_heads.query, weights[:1], norms.q_H, tokens)
    return (*queries, *keys_values), (x_BtD, weights, norms, positions_Bt)


def _in_backward(heads: ShardedHeads, residuals, cotangents):
    x_BtD, weights, norms, positions_Bt = residuals
    tokens, dx_BtD = (x_BtD, positions_Bt), zeros(x_BtD.shape, jnp.float32, like=cotangents[0])
    dx_BtD, dnorm_q, dw_q = _project_vjp(
        "queries", heads, heads.queries, weights[:1], norms.q_H, tokens, dx_BtD, cotangents[:1]
    )
    dx_BtD, dnorm_k, dw_kv = _project_vjp(
        "keys_values", heads, heads.keys_values, weights[1:], norms.k_H, tokens, dx_BtD, cotangents[1:]
    )
    return dx_BtD.astype(x_BtD.dtype), (*dw_q, *dw_kv), HeadNorms(dnorm_q, dnorm_k), None


def _project(
    name: str, heads: ShardedHeads, group: HeadStream, num_heads: int, weights, norm_H, tokens
) -> Arrays:  # fmt: skip
    """Projects tokens (x, positions) with [Wq] or [Wk Wv]. Norm and RoPE follow for Wq and Wk, but not for Wv."""
    config, dtype = heads.config, tokens[0].dtype

    def body(projected, bucket: Bucket):
        w_pD, *more_pD = (heads.select_rows(group, w) for w in bucket.arrays)

        def chunk(_, read):
            x_BcD, positions_Bc = read
            first = normalize_and_rotate(matmul_t(x_BcD, w_pD), norm_H, positions_Bc, config, dtype)
            return (), (first, *(matmul_t(x_BcD, w).astype(dtype) for w in more_pD)), ()

        new = over_chunks(chunk, (), tokens, chunk_tokens=group.stream.chunk(bucket.num_rows))[1]
        return tuple(group.put(a, bucket, part) for a, part in zip(projected, new, strict=True)), None

    shape = *tokens[0].shape[:2], num_heads, config.head_dim
    projected = tuple(zeros(shape, dtype, like=tokens[0]) for _ in weights)
    with jax.named_scope(name):
        return over_buckets(body, projected, weights, axes=group.axes, stream=group.stream, dtype=dtype)[0]


def _project_vjp(name: str, heads: ShardedHeads, group: HeadStream, weights, norm_H, tokens, dx_BtD, dprojected):
    """VJP of `_project`: (dx_BtD with this group's part added, gradient of the norm or None, gradients of weights)."""
    config, dtype = heads.config, tokens[0].dtype

    def body(carry, bucket: Bucket):
        w_pD = tuple(heads.select_rows(group, w) for w in bucket.arrays)

        def chunk(dx_BcD, read):
            x_BcD, positions_Bc, dfirst_Bcp, *dmore_Bcp = read

            def finish(norm_H, rows_Bcp):
                return normalize_and_rotate(rows_Bcp, norm_H, positions_Bc, config, dtype)

            # Without a norm nothing below reads the product, and it is never computed.
            _, vjp = jax.vjp(finish, norm_H, matmul_t(x_BcD, w_pD[0]))
            dnorm_H, drows_Bcp = vjp(split_heads(dfirst_Bcp, config.head_dim))
            drows = drows_Bcp.astype(dtype), *dmore_Bcp
            dx_BcD += matmul(jnp.concatenate(drows, axis=-1), jnp.concatenate(w_pD))  # one product, added once
            return dx_BcD, (), (tuple(outer(d_Bcp, x_BcD) for d_Bcp in drows), dnorm_H)

        dx_BtD, dnorm_H = carry
        read = *tokens, *(group.take(d_BtNH, bucket) for d_BtNH in dprojected)
        dx_BtD, _, (dw, more) = over_chunks(chunk, dx_BtD, read, chunk_tokens=group.stream.chunk(bucket.num_rows))
        return (dx_BtD, add(dnorm_H, more)), tuple(heads.select_rows_transpose(group, d) for d in dw), None

    carry = dx_BtD, None if norm_H is None else zeros(norm_H.shape, norm_H.dtype, like=norm_H)
    with jax.named_scope(name):
        carry, dw, _ = over_buckets_with_grads(body, carry, weights, axes=group.axes, stream=group.stream, dtype=dtype)
    return *carry, dw


project_in.defvjp(_in_forward, _in_backward)


# ------------------------------------------------------------------------------------------------ out


@custom_vjp(2)
def project_out(out_BtNH: jax.Array, wo_wD: jax.Array, heads: ShardedHeads) -> jax.Array:
    """The output projection, summed over this tensor shard's heads.

    Forward: ``y = concat_h(out_h) Wo``. dgrad: ``dout = dy Wo^T``; wgrad: ``dWo = out^T dy``, summed over the folded
    ranks.

    Args:
      out_BtNH: outputs of heads, in the compute dtype.
      wo_wD: this device's rows, any float dtype.
      heads: how the heads are sharded and streamed; static.

    Returns:
      [B, t, D] in out's dtype; sums in float32.

    Moves: forward N H D (R - 1) / R elements of weights (R folded ranks), in the compute dtype; backward the same
      again, and a reduce-scatter of as many gradients in the stream's `grad_dtype`.
    Keeps: its inputs.
    Source: as `project_in`.
    """
    return _out_forward(out_BtNH, wo_wD, heads)[0]


def _out_forward(out_BtNH, wo_wD, heads: ShardedHeads):
    queries = heads.queries

    def body(y_BtD, bucket: Bucket):
        w_pD = queries.rows.by_head(bucket.arrays[0], 0)

        def chunk(y_BcD, out_Bcp):
            return y_BcD + matmul(out_Bcp, w_pD), (), ()

        out_Btp = queries.take(out_BtNH, bucket)
        return over_chunks(chunk, y_BtD, out_Btp, chunk_tokens=queries.stream.chunk(bucket.num_rows))[0], None

    y_BtD = zeros((*out_BtNH.shape[:2], wo_wD.shape[-1]), jnp.float32, like=out_BtNH)
    with jax.named_scope("out"):
        y_BtD, _ = over_buckets(body, y_BtD, (wo_wD,), axes=queries.axes, stream=queries.stream, dtype=out_BtNH.dtype)
    return y_BtD.astype(out_BtNH.dtype), (out_BtNH, wo_wD)


def _out_backward(heads: ShardedHeads, residuals, dy_BtD):
    out_BtNH, wo_wD = residuals
    queries, dtype = heads.queries, out_BtNH.dtype

    def body(dout_BtNH, bucket: Bucket):
        w_pD = queries.rows.by_head(bucket.arrays[0], 0)

        def chunk(_, read):
            out_Bcp, dy_BcD = read
            return (), matmul_t(dy_BcD, w_pD).astype(dtype), outer(out_Bcp, dy_BcD)

        read = queries.take(out_BtNH, bucket), dy_BtD
        _, dout_Btp, grad_pD = over_chunks(chunk, (), read, chunk_tokens=queries.stream.chunk(bucket.num_rows))
        return queries.put(dout_BtNH, bucket, dout_Btp), (queries.rows.by_rank(grad_pD, 0),), None

    dout_BtNH = zeros(out_BtNH.shape, dtype, like=dy_BtD)
    with jax.named_scope("out"):
        dout_BtNH, (dwo_wD,), _ = over_buckets_with_grads(
            body, dout_BtNH, (wo_wD,), axes=queries.axes, stream=queries.stream, dtype=dtype
        )
    return dout_BtNH, dwo_wD


project_out.defvjp(_out_forward, _out_backward)
