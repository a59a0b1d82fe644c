"""Attention by pairs of chunks, for kernels that know neither positions nor segments.

If the sequence is one document, each pair of a query chunk and a key chunk is one of three kinds. A pair is *whole* if
every query may attend to every key. It is *diagonal* if both chunks are the same tokens in ascending order, so that a
query attends to keys of no higher index. It is *empty* if no query may attend to any key. Under a zigzag order over R
ranks, each rank has 2R - 1 whole pairs and two diagonal ones. Whole pairs need a kernel without a mask, diagonal pairs
one with a mask by index. Results of pairs are merged by log-sum-exp; gradients add up.

Which pair is of which kind is computed from positions and segments at run time (`PairLists.of`). If some pair is of no
kind, such as with documents that cross chunks, another kernel computes the attention.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head; C tokens of a chunk; n
chunks that have a list each, m chunks in a list.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.ops.kernels.kernel import Kernel, merge
from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens, tiles_to_visit
from tsp_jax.ops.kernels.xla import XlaKernel
from tsp_jax.ops.stream import zeros


@dataclasses.dataclass(frozen=True)
class PairKernel(Kernel):
    """Attention by pairs of chunks where the tokens allow it, else by another kernel."""

    others: tuple[Kernel, ...]
    """kernels for all other tokens; the first one that supports the heads is used, and the last one supports all"""
    chunk: int | None = None
    """C; None: all query tokens"""

    @abc.abstractmethod
    def pair(
        self, q_BCKGH: jax.Array, k_BCKH: jax.Array, v_BCKH: jax.Array, causal: bool, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """(out [B, C, K, G, H] in q's dtype, lse [B, C, K, G] float32) of a pair: causal by index, or unmasked."""

    @abc.abstractmethod
    def pair_backward(
        self, q_BCKGH: jax.Array, k_BCKH: jax.Array, v_BCKH: jax.Array, delta_BCKG: jax.Array, lse_BCKG: jax.Array,
        dout_BCKGH: jax.Array, causal: bool, scale: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """(dq, dk, dv) of a pair, from delta and lse of all keys; see `Kernel.attend_backward`."""

    def within(self, tokens: int) -> Self:
        """This kernel with zigzag chunks: half of the tokens. An odd number of tokens is one chunk."""
        chunk = tokens if tokens % 2 else tokens // 2
        others = tuple(kernel.within(tokens) for kernel in self.others)
        return dataclasses.replace(self, others=others, chunk=math.gcd(self.chunk or chunk, chunk))

    def other(self, head_dim: int, dtype: Any, scores: Scores = Scores()) -> Kernel:
        """The kernel that computes what pairs cannot."""
        return next(each for each in self.others if not each.unsupported(head_dim, dtype, scores))

    def attend(self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores=Scores()):
        """Attention within segments; see `Kernel.attend`.

        Keeps: outputs of one query chunk in float32, and results of one pair.
        Source: merging by log-sum-exp, Dao, arXiv 2307.08691; pairs of zigzag chunks, Brandon et al., arXiv 2311.09431.
        """
        other = self.other(q_BTKGH.shape[-1], q_BTKGH.dtype, scores)
        if not self._is_simple(q_BTKGH, k_BSKH, scores):
            return other.attend(q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores)
        chunk, lists, decomposes = self._lists(q_BTKGH, queries, keys)
        scale = scores.scale_of(q_BTKGH.shape[-1])

        def by_pairs(q_BTKGH, k_BSKH, v_BSKH):
            def query_chunk(_, i):
                q_BCKGH = _take(q_BTKGH, i, chunk)

                def step(j, carry, causal: bool):
                    pair = self.pair(q_BCKGH, _take(k_BSKH, j, chunk), _take(v_BSKH, j, chunk), causal, scale)
                    return merge(carry, pair)

                zero = zeros(q_BCKGH.shape, jnp.float32, like=q_BTKGH)
                out, lse = lists.fold(i, step, (zero, zero[..., 0] + MASKED))
                return (), (out.astype(q_BTKGH.dtype), lse)

            _, parts = lax.scan(query_chunk, (), jnp.arange(lists.num, dtype=jnp.int32))
            return tuple(map(_join, parts))

        def by_other(q_BTKGH, k_BSKH, v_BSKH):
            return other.attend(q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores)

        return _either(decomposes, by_pairs, by_other, q_BTKGH, k_BSKH, v_BSKH)

    def attend_backward(
        self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores=Scores()
    ):
        """Gradients of `attend`; see `Kernel.attend_backward`. The outer loop is over key chunks.

        Keeps: dq in float32, dk and dv of one key chunk in float32, and results of one pair.
        """
        other = self.other(q_BTKGH.shape[-1], q_BTKGH.dtype, scores)
        if not self._is_simple(q_BTKGH, k_BSKH, scores):
            return other.attend_backward(
                q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores
            )
        chunk, lists, decomposes = self._lists(q_BTKGH, queries, keys, by_key=True)
        scale = scores.scale_of(q_BTKGH.shape[-1])

        def by_pairs(q_BTKGH, k_BSKH, v_BSKH, delta_BTKG, lse_BTKG, dout_BTKGH):
            def key_chunk(dq_BTKGH, j):
                k_BCKH, v_BCKH = _take(k_BSKH, j, chunk), _take(v_BSKH, j, chunk)

                def step(i, carry, causal: bool):
                    dq_BTKGH, dk_BCKH, dv_BCKH = carry
                    q, delta, lse, dout = (
                        _take(array, i, chunk) for array in (q_BTKGH, delta_BTKG, lse_BTKG, dout_BTKGH)
                    )
                    dq, dk, dv = self.pair_backward(q, k_BCKH, v_BCKH, delta, lse, dout, causal, scale)
                    dq = _take(dq_BTKGH, i, chunk) + dq.astype(jnp.float32)
                    dq_BTKGH = lax.dynamic_update_slice_in_dim(dq_BTKGH, dq, i * chunk, axis=1)
                    return dq_BTKGH, dk_BCKH + dk.astype(jnp.float32), dv_BCKH + dv.astype(jnp.float32)

                zero = zeros(k_BCKH.shape, jnp.float32, like=q_BTKGH)
                dq_BTKGH, *grads = lists.fold(j, step, (dq_BTKGH, zero, zero))
                return dq_BTKGH, tuple(grad.astype(k_BSKH.dtype) for grad in grads)

            dq_BTKGH = zeros(q_BTKGH.shape, jnp.float32, like=q_BTKGH)
            dq_BTKGH, grads = lax.scan(key_chunk, dq_BTKGH, jnp.arange(lists.num, dtype=jnp.int32))
            return dq_BTKGH.astype(q_BTKGH.dtype), *map(_join, grads)

        def by_other(q_BTKGH, k_BSKH, v_BSKH, delta_BTKG, lse_BTKG, dout_BTKGH):
            return other.attend_backward(
                q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores
            )

        arrays = q_BTKGH, k_BSKH, v_BSKH, delta_BTKG, lse_BTKG, dout_BTKGH
        return _either(decomposes, by_pairs, by_other, *arrays)

    def _is_simple(self, q_BTKGH: jax.Array, k_BSKH: jax.Array, scores: Scores) -> bool:
        """Whether lengths are whole chunks and the scores causal without a window or cap."""
        chunk = self.chunk or q_BTKGH.shape[1]
        whole = q_BTKGH.shape[1] % chunk == 0 and k_BSKH.shape[1] % chunk == 0
        return whole and scores._replace(scale=None, total=None) == Scores()

    def _lists(self, q_BTKGH, queries: Tokens, keys: Tokens, by_key: bool = False):
        chunk = self.chunk or q_BTKGH.shape[1]
        return chunk, *PairLists.of(queries, keys, chunk, by_key)


@dataclasses.dataclass(frozen=True)
class XlaPairKernel(PairKernel):
    """Attention by pairs of chunks, in plain XLA: shows on any device what the decomposition computes."""

    others: tuple[Kernel, ...] = (XlaKernel(),)

    @classmethod
    def for_arch(cls, arch: str) -> Self:
        return cls((XlaKernel.for_arch(arch),))

    def pair(self, q_BCKGH, k_BCKH, v_BCKH, causal, scale):
        return self._xla.attend(q_BCKGH, k_BCKH, v_BCKH, *_tokens_of_pair(q_BCKGH, causal), Scores(scale=scale))

    def pair_backward(self, q_BCKGH, k_BCKH, v_BCKH, delta_BCKG, lse_BCKG, dout_BCKGH, causal, scale):
        queries, keys = _tokens_of_pair(q_BCKGH, causal)
        return self._xla.attend_backward(
            q_BCKGH, k_BCKH, v_BCKH, queries, keys, delta_BCKG, lse_BCKG, dout_BCKGH, Scores(scale=scale)
        )

    @property
    def _xla(self) -> Kernel:
        return self.others[-1]


def _tokens_of_pair(q_BCKGH: jax.Array, causal: bool) -> tuple[Tokens, Tokens]:
    """(queries, keys) of a chunk with itself, or of a chunk that is later than all keys."""
    batch, chunk = q_BCKGH.shape[:2]
    keys = zeros((batch, chunk), jnp.int32, like=q_BCKGH) + jnp.arange(chunk, dtype=jnp.int32)[None]
    return Tokens.one_document(keys if causal else keys + chunk), Tokens.one_document(keys)


# ------------------------------------------------------------------------------------------------ lists of pairs


class PairLists(NamedTuple):
    """For each of n chunks, the chunks that it makes pairs with, int32."""

    order_nm: jax.Array
    """those of whole pairs, then of diagonal pairs, then of empty pairs"""
    whole_n: jax.Array
    """number of whole pairs"""
    visited_n: jax.Array
    """number of whole and diagonal pairs"""
    mean_whole: float
    """mean of `whole_n` over all ranks if the sequence is one document; see `mask.mean_visits`"""
    mean_diagonal: float

    @classmethod
    def of(cls, queries: Tokens, keys: Tokens, chunk: int, by_key: bool = False) -> tuple["PairLists", jax.Array]:
        """(lists of key chunks for each query chunk, whether every pair is whole, diagonal or empty).

        A pair must be of the same kind in each row of the batch. `by_key`: lists of query chunks for each key chunk.
        """
        visit_Bqk, unmasked_Bqk = tiles_to_visit(queries, keys, chunk, chunk)
        diagonal_Bqk = _same_run(queries, keys, chunk)
        decomposes = (unmasked_Bqk | diagonal_Bqk | ~visit_Bqk).all()
        kind_Bqk = jnp.where(diagonal_Bqk, 1, jnp.where(visit_Bqk, 0, 2)).astype(jnp.int32)
        decomposes &= (kind_Bqk == kind_Bqk[:1]).all()
        kind_nm = kind_Bqk[0].T if by_key else kind_Bqk[0]
        num_q, num_k = kind_Bqk.shape[1:]
        mean = num_q * (num_k - 1) / 2 / kind_nm.shape[0], num_q / kind_nm.shape[0]
        order_nm = jnp.argsort(kind_nm, axis=1, stable=True).astype(jnp.int32)
        counts = (kind_nm == 0).sum(axis=1, dtype=jnp.int32), (kind_nm < 2).sum(axis=1, dtype=jnp.int32)
        return cls(order_nm, *counts, *mean), decomposes

    @property
    def num(self) -> int:
        """n"""
        return self.order_nm.shape[0]

    def fold(self, chunk: Any, step: Callable, carry: Any) -> Any:
        """Folds ``step(other chunk, carry, causal)`` over the pairs of a chunk, the diagonal one last."""
        bounds = (0, self.whole_n[chunk]), (self.whole_n[chunk], self.visited_n[chunk])
        for (start, stop), mean, causal in zip(
            bounds, (self.mean_whole, self.mean_diagonal), (False, True), strict=True
        ):

            def body(index, carry, causal=causal):
                return step(self.order_nm[chunk, index], carry, causal)

            with jax.named_scope(f"mean_trips[{max(mean, 1e-9):g}]"):
                carry = lax.fori_loop(start, stop, body, carry)
        return carry


def _same_run(queries: Tokens, keys: Tokens, chunk: int) -> jax.Array:
    """[B, n, m] bool: whether a query chunk and a key chunk are the same consecutive tokens of one document."""

    def runs(tokens: Tokens) -> tuple[jax.Array, ...]:
        positions, segments = (x.reshape(x.shape[0], -1, chunk) for x in tokens)
        is_run = (positions[..., 1:] == positions[..., :-1] + 1) & (segments[..., 1:] == segments[..., :-1])
        return is_run.all(axis=-1), positions[..., 0], segments[..., 0]

    (is_run_q, *first_q), (is_run_k, *first_k) = runs(queries), runs(keys)
    same = is_run_q[:, :, None] & is_run_k[:, None]
    for q_Bn, k_Bm in zip(first_q, first_k, strict=True):
        same &= q_Bn[:, :, None] == k_Bm[:, None]
    return same


def _either(decomposes: jax.Array, by_pairs: Callable, by_other: Callable, *arrays: jax.Array) -> Any:
    """``by_pairs(*arrays)`` or ``by_other(*arrays)``; costs are estimated for sequences of one document."""
    with jax.named_scope("likely_branch[1]"):
        return lax.cond(decomposes, by_pairs, by_other, *arrays)


def _take(x_BT: jax.Array, index: Any, chunk: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_BT, index * chunk, chunk, axis=1)


def _join(x_nBC: jax.Array) -> jax.Array:
    """[n, B, C, ...] -> [B, n C, ...]"""
    return jnp.moveaxis(x_nBC, 0, 1).reshape(x_nBC.shape[1], -1, *x_nBC.shape[3:])
