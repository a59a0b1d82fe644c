"""Blockwise attention with online softmax in plain XLA: the portable kernel.

A table of (query block, key block) pairs says which pairs to visit (`mask.tiles_to_visit`). Others are never computed,
whatever the order of tokens, so a zigzag order costs each rank half of the pairs, and packed documents cost less.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head; Q tokens of a query block,
C tokens of a key block, M = G Q rows of a query block, n blocks.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.ops.kernels.kernel import Kernel
from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens, may_attend, mean_visits, tiles_to_visit
from tsp_jax.ops.stream import zeros


def block_size(length: int, target: int) -> int:
    """The divisor of `length` nearest to `target` by ratio, at most four times `target`.

    Lengths without a divisor near `target`, large primes above all, get small and therefore slow blocks.
    """
    divisors = [d for d in range(1, min(length, 4 * target) + 1) if length % d == 0]
    return min(divisors, key=lambda d: max(d / target, target / d))


@dataclasses.dataclass(frozen=True)
class XlaKernel(Kernel):
    """Blockwise attention that runs on every device."""

    query_block: int = 512
    """query tokens in a block; the nearest divisor of the sequence length is used, see `block_size`"""
    key_block: int = 512
    """key tokens in a block, likewise"""

    @classmethod
    def for_arch(cls, arch: str) -> Self:
        size = {"cpu": 256, "tpu": 1024}.get(arch.partition("_")[0], 512)
        return cls(size, size)

    def within(self, tokens: int) -> Self:
        """This kernel with block sizes that divide a zigzag chunk, which is half of the tokens."""
        chunk = max(1, tokens // 2)
        return type(self)(block_size(chunk, self.query_block), block_size(chunk, self.key_block))

    def attend(self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores=Scores()):
        """Attention within segments; see `Kernel.attend`.

        Keeps: the scores of one pair of blocks at a time; only the table of T/Q x S/C pairs grows as T S.
        Source: Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135.
        """
        blocks = _Blocks(q_BTKGH, k_BSKH, queries, keys, self, scores)
        q_nBKMH, k_nBKCH, v_nBKCH = blocks.split_queries(q_BTKGH), blocks.split_keys(k_BSKH), blocks.split_keys(v_BSKH)
        order_qk, count_q = _visited_first(blocks.visit_qk)

        def query_block(_, i):
            q_BKMH = q_nBKMH[i]

            def visit(step, carry):
                acc, top, total = carry
                j = order_qk[i, step]
                s_BKMC = jnp.where(blocks.mask(i, j), blocks.scores(q_BKMH, k_nBKCH[j]), MASKED)
                new = jnp.maximum(top, s_BKMC.max(axis=-1))
                p_BKMC = jnp.exp(s_BKMC - new[..., None])
                decay = jnp.exp(top - new)
                acc = acc * decay[..., None] + _dot("bkmc,bkch->bkmh", p_BKMC.astype(q_BKMH.dtype), v_nBKCH[j])
                return acc, new, total * decay + p_BKMC.sum(axis=-1)

            acc = zeros(q_BKMH.shape, jnp.float32, like=q_BTKGH)
            row = zeros(q_BKMH.shape[:-1], jnp.float32, like=q_BTKGH)
            with jax.named_scope(f"mean_trips[{blocks.mean_visits[0]:g}]"):
                acc, top, total = lax.fori_loop(0, count_q[i], visit, (acc, row + MASKED, row))
            empty = top <= MASKED / 2
            total = jnp.where(empty, 1.0, total)
            out_BKMH = jnp.where(empty[..., None], 0.0, acc / total[..., None])
            return (), (out_BKMH.astype(q_BKMH.dtype), jnp.where(empty, MASKED, top + jnp.log(total)))

        _, (out_nBKMH, lse_nBKM) = lax.scan(query_block, (), jnp.arange(blocks.num_q))
        return blocks.join_queries(out_nBKMH), blocks.join_queries(lse_nBKM[..., None])[..., 0]

    def attend_backward(
        self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores=Scores()
    ):
        """Gradients of `attend`; see `Kernel.attend_backward`.

        The outer loop is over key blocks, so that dk and dv are accumulated one block at a time.

        Keeps: dq in float32, and scores as `attend` does.
        """
        blocks = _Blocks(q_BTKGH, k_BSKH, queries, keys, self, scores)
        dtype = q_BTKGH.dtype
        q_nBKMH, dout_nBKMH = blocks.split_queries(q_BTKGH), blocks.split_queries(dout_BTKGH)
        k_nBKCH, v_nBKCH = blocks.split_keys(k_BSKH), blocks.split_keys(v_BSKH)
        lse_nBKM = blocks.split_queries(lse_BTKG[..., None])[..., 0]
        delta_nBKM = blocks.split_queries(delta_BTKG[..., None])[..., 0]
        order_kq, count_k = _visited_first(blocks.visit_qk.T)

        def key_block(dq_nBKMH, j):
            k_BKCH, v_BKCH = k_nBKCH[j], v_nBKCH[j]

            def visit(step, carry):
                dq_nBKMH, dk_BKCH, dv_BKCH = carry
                i = order_kq[j, step]
                q_BKMH, dout_BKMH = q_nBKMH[i], dout_nBKMH[i]
                s_BKMC = blocks.scores(q_BKMH, k_BKCH)
                p_BKMC = jnp.where(blocks.mask(i, j), jnp.exp(s_BKMC - lse_nBKM[i][..., None]), 0.0)
                dp_BKMC = _dot("bkmh,bkch->bkmc", dout_BKMH, v_BKCH)
                ds_BKMC = scores.uncap_grad(p_BKMC * (dp_BKMC - delta_nBKM[i][..., None]), s_BKMC)
                ds_BKMC = (ds_BKMC * blocks.scale).astype(dtype)
                dv_BKCH += _dot("bkmc,bkmh->bkch", p_BKMC.astype(dtype), dout_BKMH)
                dk_BKCH += _dot("bkmc,bkmh->bkch", ds_BKMC, q_BKMH)
                return dq_nBKMH.at[i].add(_dot("bkmc,bkch->bkmh", ds_BKMC, k_BKCH)), dk_BKCH, dv_BKCH

            zero = zeros(k_BKCH.shape, jnp.float32, like=q_BTKGH)
            with jax.named_scope(f"mean_trips[{blocks.mean_visits[1]:g}]"):
                dq_nBKMH, dk_BKCH, dv_BKCH = lax.fori_loop(0, count_k[j], visit, (dq_nBKMH, zero, zero))
            return dq_nBKMH, (dk_BKCH.astype(dtype), dv_BKCH.astype(dtype))

        dq_nBKMH = zeros(q_nBKMH.shape, jnp.float32, like=q_BTKGH)
        dq_nBKMH, (dk_nBKCH, dv_nBKCH) = lax.scan(key_block, dq_nBKMH, jnp.arange(blocks.num_k))
        return blocks.join_queries(dq_nBKMH).astype(dtype), blocks.join_keys(dk_nBKCH), blocks.join_keys(dv_nBKCH)


def _dot(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _visited_first(visit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[a, b] bool -> (columns [a, b]: True ones in order, then the rest; number of True ones [a])."""
    return jnp.argsort(~visit, axis=1, stable=True).astype(jnp.int32), visit.sum(axis=1, dtype=jnp.int32)


class _Blocks:
    """Splits arrays into blocks, with the block dim first and the rows of a block as the matrix products need them."""

    def __init__(
        self, q_BTKGH: jax.Array, k_BSKH: jax.Array, queries: Tokens, keys: Tokens, kernel: XlaKernel, rule: Scores
    ):
        self.batch, q_len, self.kv_heads, self.group, head_dim = q_BTKGH.shape
        k_len = k_BSKH.shape[1]
        self.q_size, self.k_size = block_size(q_len, kernel.query_block), block_size(k_len, kernel.key_block)
        self.num_q, self.num_k = q_len // self.q_size, k_len // self.k_size
        self.rule, self.scale = rule, rule.scale_of(head_dim)
        self.q_tokens = Tokens(*(self._split_tokens(t, self.num_q) for t in queries))
        self.k_tokens = Tokens(*(self._split_tokens(t, self.num_k) for t in keys))
        visit_Bqk, _ = tiles_to_visit(queries, keys, self.q_size, self.k_size, rule)
        self.visit_qk = visit_Bqk.any(axis=0)
        self.mean_visits = mean_visits(q_len, k_len, self.q_size, self.k_size, rule)

    def _split_tokens(self, tokens_BT: jax.Array, num: int) -> jax.Array:
        return tokens_BT.reshape(self.batch, num, -1).swapaxes(0, 1)

    def mask(self, i, j) -> jax.Array:
        """[B, 1, M, C]: which pairs of tokens of two blocks may attend."""
        queries = Tokens(*(t[i][:, :, None] for t in self.q_tokens))
        keys = Tokens(*(t[j][:, None] for t in self.k_tokens))
        allowed_BQC = may_attend(queries, keys, self.rule)
        allowed_BGQC = jnp.broadcast_to(allowed_BQC[:, None], (self.batch, self.group, self.q_size, self.k_size))
        return allowed_BGQC.reshape(self.batch, 1, -1, self.k_size)

    def scores(self, q_BKMH: jax.Array, k_BKCH: jax.Array) -> jax.Array:
        return self.rule.cap(_dot("bkmh,bkch->bkmc", q_BKMH, k_BKCH) * self.scale)

    def split_queries(self, x_BTKGH: jax.Array) -> jax.Array:
        x = x_BTKGH.reshape(self.batch, self.num_q, self.q_size, self.kv_heads, self.group, -1)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(self.num_q, self.batch, self.kv_heads, -1, x.shape[-1])

    def join_queries(self, x_nBKMH: jax.Array) -> jax.Array:
        x = x_nBKMH.reshape(self.num_q, self.batch, self.kv_heads, self.group, self.q_size, -1)
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.batch, -1, self.kv_heads, self.group, x.shape[-1])

    def split_keys(self, x_BSKH: jax.Array) -> jax.Array:
        return x_BSKH.reshape(self.batch, self.num_k, self.k_size, self.kv_heads, -1).transpose(1, 0, 3, 2, 4)

    def join_keys(self, x_nBKCH: jax.Array) -> jax.Array:
        return x_nBKCH.transpose(1, 0, 3, 2, 4).reshape(self.batch, -1, self.kv_heads, x_nBKCH.shape[-1])
