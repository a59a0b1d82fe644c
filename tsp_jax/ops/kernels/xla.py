"""Blockwise attention with online softmax in plain XLA: the portable kernel.

A table of (query block, key block) pairs, from the blocks' least and greatest position and segment, says which pairs
can hold an allowed pair of tokens. Others are never computed, whatever the order of tokens, so a zigzag order costs a
rank half of the pairs, and packed documents cost less.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads of each, H head; Q, C tokens of one query and
key block, M = G Q rows of a query block, n blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.ops.stream import zeros

MASKED = -1e30
"""score of a pair that is not allowed; finite, so that a row without any allowed key stays a number"""


class Tokens(NamedTuple):
    """What decides who attends to whom: same segment, and key position not after the query's."""

    positions: jax.Array
    """[B, T] int32"""
    segments: jax.Array
    """[B, T] int32"""


class Blocks(NamedTuple):
    """Tokens in one block."""

    query: int
    key: int


def block_size(length: int, target: int) -> int:
    """The divisor of `length` nearest to `target` by ratio, and at most four times as large.

    Lengths without such a divisor, large primes above all, get small and therefore slow blocks.
    """
    divisors = [d for d in range(1, min(length, 4 * target) + 1) if length % d == 0]
    return min(divisors, key=lambda d: max(d / target, target / d))


def mean_visits(q_len: int, k_len: int, q_size: int, k_size: int) -> tuple[float, float]:
    """How many blocks causality leaves on average: (key blocks of a query block, query blocks of a key block).

    From shapes alone: this device's queries are taken as a fair sample of all positions, as in a zigzag order or on one
    rank, and the tokens as one document. No result depends on it, only what readers of compiled programs believe.

    Args:
      q_len: this device's query tokens.
      k_len: key tokens, all of the sequence.
      q_size: tokens of a query block, contiguous in the sequence; likewise k_size.
    """
    num_q, num_k = max(1, k_len // q_size), k_len // k_size
    visits = sum(min(num_k, -(-(a + 1) * q_size // k_size)) for a in range(num_q))
    return visits / num_q, visits / num_k * (q_len / k_len)


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: Tokens, keys: Tokens, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Causal attention within segments, scores over sqrt(H).

    Args:
      q_BTKGH: queries, grouped by KV head, in the compute dtype.
      k_BSKH: keys; likewise values.
      queries: positions and segments of the T query tokens.
      keys: of the S key tokens, in any order.
      blocks: sizes to aim at; see `block_size`.

    Returns:
      (out [B, T, K, G, H] in q's dtype, lse [B, T, K, G] float32). A query without any key gets
      zeros, and an lse that weighs nothing.

    Keeps: one block pair of scores at a time; nothing of size T x S but the table of T/Q x S/C pairs.
    Source: Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135.
    """
    cut = _Cut(q_BTKGH, k_BSKH, queries, keys, blocks)
    q_nBKMH, k_nBKCH, v_nBKCH = cut.queries(q_BTKGH), cut.keys(k_BSKH), cut.keys(v_BSKH)
    order_qk, count_q = _needed_first(cut.needed_qk)

    def query_block(_, i):
        q_BKMH = q_nBKMH[i]

        def visit(turn, carry):
            acc, top, total = carry
            j = order_qk[i, turn]
            s_BKMC = jnp.where(cut.mask(i, j), cut.scores(q_BKMH, k_nBKCH[j]), MASKED)
            new = jnp.maximum(top, s_BKMC.max(axis=-1))
            p_BKMC = jnp.exp(s_BKMC - new[..., None])
            decay = jnp.exp(top - new)
            acc = acc * decay[..., None] + _dot("bkmc,bkch->bkmh", p_BKMC.astype(q_BKMH.dtype), v_nBKCH[j])
            return acc, new, total * decay + p_BKMC.sum(axis=-1)

        acc = zeros(q_BKMH.shape, jnp.float32, like=q_BTKGH)
        row = zeros(q_BKMH.shape[:-1], jnp.float32, like=q_BTKGH)
        with jax.named_scope(f"mean_trips[{cut.mean_visits[0]:g}]"):
            acc, top, total = lax.fori_loop(0, count_q[i], visit, (acc, row + MASKED, row))
        empty = top <= MASKED / 2
        total = jnp.where(empty, 1.0, total)
        out_BKMH = jnp.where(empty[..., None], 0.0, acc / total[..., None])
        return (), (out_BKMH.astype(q_BKMH.dtype), jnp.where(empty, MASKED, top + jnp.log(total)))

    _, (out_nBKMH, lse_nBKM) = lax.scan(query_block, (), jnp.arange(cut.num_q))
    return cut.uncut_queries(out_nBKMH), cut.uncut_queries(lse_nBKM[..., None])[..., 0]


def delta(out_BTKGH: jax.Array, dout_BTKGH: jax.Array) -> jax.Array:
    """``sum_H(out dout)``, [B, T, K, G] float32: all that backward needs of the outputs.

    Source: Dao et al., arXiv 2205.14135, appendix B.
    """
    return (dout_BTKGH.astype(jnp.float32) * out_BTKGH.astype(jnp.float32)).sum(axis=-1)


def attend_backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries: Tokens,
    keys: Tokens,
    delta_BTKG: jax.Array,
    lse_BTKG: jax.Array,
    dout_BTKGH: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `attend`: (dq, dk, dv), each like its primal, accumulated in float32.

    Key blocks are outermost, so that dk and dv are accumulated a block at a time, and only dq, as long as this
    device's queries, is held in float32.
    """
    cut = _Cut(q_BTKGH, k_BSKH, queries, keys, blocks)
    dtype = q_BTKGH.dtype
    q_nBKMH, dout_nBKMH = cut.queries(q_BTKGH), cut.queries(dout_BTKGH)
    k_nBKCH, v_nBKCH = cut.keys(k_BSKH), cut.keys(v_BSKH)
    lse_nBKM = cut.queries(lse_BTKG[..., None])[..., 0]
    delta_nBKM = cut.queries(delta_BTKG[..., None])[..., 0]
    order_kq, count_k = _needed_first(cut.needed_qk.T)

    def key_block(dq_nBKMH, j):
        k_BKCH, v_BKCH = k_nBKCH[j], v_nBKCH[j]

        def visit(turn, carry):
            dq_nBKMH, dk_BKCH, dv_BKCH = carry
            i = order_kq[j, turn]
            q_BKMH, dout_BKMH = q_nBKMH[i], dout_nBKMH[i]
            p_BKMC = jnp.exp(cut.scores(q_BKMH, k_BKCH) - lse_nBKM[i][..., None])
            p_BKMC = jnp.where(cut.mask(i, j), p_BKMC, 0.0)
            dp_BKMC = _dot("bkmh,bkch->bkmc", dout_BKMH, v_BKCH)
            ds_BKMC = (p_BKMC * (dp_BKMC - delta_nBKM[i][..., None]) * cut.scale).astype(dtype)
            dv_BKCH += _dot("bkmc,bkmh->bkch", p_BKMC.astype(dtype), dout_BKMH)
            dk_BKCH += _dot("bkmc,bkmh->bkch", ds_BKMC, q_BKMH)
            return dq_nBKMH.at[i].add(_dot("bkmc,bkch->bkmh", ds_BKMC, k_BKCH)), dk_BKCH, dv_BKCH

        zero = zeros(k_BKCH.shape, jnp.float32, like=q_BTKGH)
        with jax.named_scope(f"mean_trips[{cut.mean_visits[1]:g}]"):
            dq_nBKMH, dk_BKCH, dv_BKCH = lax.fori_loop(0, count_k[j], visit, (dq_nBKMH, zero, zero))
        return dq_nBKMH, (dk_BKCH.astype(dtype), dv_BKCH.astype(dtype))

    dq_nBKMH = zeros(q_nBKMH.shape, jnp.float32, like=q_BTKGH)
    dq_nBKMH, (dk_nBKCH, dv_nBKCH) = lax.scan(key_block, dq_nBKMH, jnp.arange(cut.num_k))
    return cut.uncut_queries(dq_nBKMH).astype(dtype), cut.uncut_keys(dk_nBKCH), cut.uncut_keys(dv_nBKCH)


def _dot(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _needed_first(needed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[a, b] bool -> for each row the needed columns, first to last, and how many they are."""
    return jnp.argsort(~needed, axis=1, stable=True).astype(jnp.int32), needed.sum(axis=1, dtype=jnp.int32)


class _Cut:
    """Arrays cut in blocks, block number first, and rows of a block as the matrix products want them."""

    def __init__(self, q_BTKGH, k_BSKH, queries: Tokens, keys: Tokens, blocks: Blocks):
        self.batch, q_len, self.kv_heads, self.group, head_dim = q_BTKGH.shape
        k_len = k_BSKH.shape[1]
        self.q_size, self.k_size = block_size(q_len, blocks.query), block_size(k_len, blocks.key)
        self.num_q, self.num_k = q_len // self.q_size, k_len // self.k_size
        self.scale = head_dim**-0.5
        self.q_tokens = Tokens(*(self._rows(t, self.num_q) for t in queries))
        self.k_tokens = Tokens(*(self._rows(t, self.num_k) for t in keys))
        self.needed_qk = self._needed()
        self.mean_visits = mean_visits(q_len, k_len, self.q_size, self.k_size)

    def _rows(self, tokens_BT: jax.Array, num: int) -> jax.Array:
        return tokens_BT.reshape(self.batch, num, -1).swapaxes(0, 1)

    def _needed(self) -> jax.Array:
        def ends(tokens_nBQ: jax.Array):
            return tokens_nBQ.min(axis=-1), tokens_nBQ.max(axis=-1)

        (_, last_q), (first_k, _) = ends(self.q_tokens.positions), ends(self.k_tokens.positions)
        (low_q, high_q), (low_k, high_k) = ends(self.q_tokens.segments), ends(self.k_tokens.segments)
        causal = first_k[None] <= last_q[:, None]
        same = (low_k[None] <= high_q[:, None]) & (low_q[:, None] <= high_k[None])
        return (causal & same).any(axis=-1)

    def mask(self, i, j) -> jax.Array:
        """[B, 1, M, C]: which pairs of two blocks are allowed."""
        (q_pos, q_seg), (k_pos, k_seg) = (t[i] for t in self.q_tokens), (t[j] for t in self.k_tokens)
        allowed_BQC = (k_pos[:, None] <= q_pos[:, :, None]) & (k_seg[:, None] == q_seg[:, :, None])
        allowed_BGQC = jnp.broadcast_to(allowed_BQC[:, None], (self.batch, self.group, self.q_size, self.k_size))
        return allowed_BGQC.reshape(self.batch, 1, -1, self.k_size)

    def scores(self, q_BKMH: jax.Array, k_BKCH: jax.Array) -> jax.Array:
        return _dot("bkmh,bkch->bkmc", q_BKMH, k_BKCH) * self.scale

    def queries(self, x_BTKGH: jax.Array) -> jax.Array:
        x = x_BTKGH.reshape(self.batch, self.num_q, self.q_size, self.kv_heads, self.group, -1)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(self.num_q, self.batch, self.kv_heads, -1, x.shape[-1])

    def uncut_queries(self, x_nBKMH: jax.Array) -> jax.Array:
        x = x_nBKMH.reshape(self.num_q, self.batch, self.kv_heads, self.group, self.q_size, -1)
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.batch, -1, self.kv_heads, self.group, x.shape[-1])

    def keys(self, x_BSKH: jax.Array) -> jax.Array:
        return x_BSKH.reshape(self.batch, self.num_k, self.k_size, self.kv_heads, -1).transpose(1, 0, 3, 2, 4)

    def uncut_keys(self, x_nBKCH: jax.Array) -> jax.Array:
        return x_nBKCH.transpose(1, 0, 3, 2, 4).reshape(self.batch, -1, self.kv_heads, x_nBKCH.shape[-1])
