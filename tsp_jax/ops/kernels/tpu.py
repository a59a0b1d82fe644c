"""Blockwise attention for TPUs: three Pallas kernels that are compiled by way of Mosaic.

The scores of a pair of tiles stay in VMEM. The list of pairs to visit is made outside the kernels, in XLA
(`tsp_jax.ops.kernels.pairs`). A kernel's grid is as long as the list, so skipped pairs cost nothing. Pairs in which
every query may attend to every key have a body of their own, without a mask.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head, N = K G; Q tokens of a query
tile, C tokens of a key tile or of a part of it; L lanes of a vector register, in which a row's value is repeated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tsp_jax.ops.kernels.kernel import Kernel
from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens, may_attend
from tsp_jax.ops.kernels.pairs import FIRST, FLAG_BITS, LAST, MASK, RUN, PairList
from tsp_jax.ops.kernels.tpu_tiles import LANES, TILES, Tile, Tiles

VMEM_BYTES = 48 << 20
"""limit of a kernel's VMEM; the compiler's own default is 16 MiB"""


@dataclasses.dataclass(frozen=True)
class TpuKernel(Kernel):
    """Attention with one kernel in forward and two in backward; scores are never written to main memory."""

    arch: str
    """TPU to compile for: a key of `TILES`; ``interpret`` runs anywhere, slowly"""
    tiles: Tiles | None = None
    """tile sizes; None: those of `arch`"""
    chunk: int = 0
    """length of a zigzag chunk, which tiles divide if `LANES` do; 0: not known"""

    @classmethod
    def for_arch(cls, arch: str) -> Self:
        return cls(arch)

    def unsupported(self, head_dim: int, dtype: Any, scores: Scores = Scores()) -> str:
        if self.arch not in TILES:
            known = ", ".join(arch for arch in TILES if arch != "interpret")
            return f"runs on {known}, not on {self.arch or 'unknown devices'}"
        if head_dim > 256 or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
            return f"heads have {head_dim} {jnp.dtype(dtype).name}; they may have at most 256 of float32 or bfloat16"
        return ""

    def within(self, tokens: int) -> Self:
        """This kernel with tiles that never span both zigzag chunks, if a chunk is a multiple of `LANES`."""
        return dataclasses.replace(self, chunk=tokens // 2)

    def _tile(self, name: str, q_len: int, k_len: int) -> Tile:
        """The tile of one kernel, no longer than the tokens."""
        tile = getattr(self.tiles or TILES[self.arch], name)
        unit = 1 if self.arch == "interpret" else LANES

        def fit(size: int, length: int) -> int:
            size = min(size, -(-length // unit) * unit)
            return math.gcd(size, self.chunk) if self.chunk and self.chunk % unit == 0 else size

        query, key = fit(tile.query, q_len), fit(tile.key, k_len)
        return Tile(query, key, math.gcd(tile.part, query if name == "dkv" else key))

    def attend(self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores=Scores()):
        """Attention within segments; see `Kernel.attend`.

        Keeps: copies of the arrays with tokens next to H; the list of pairs, 8 bytes for each pair of tiles; where Q
          does not divide T, or C does not divide S, padding.
        Source: Dao, arXiv 2307.08691 (FlashAttention-2).
        """
        tile = self._tile("forward", q_BTKGH.shape[1], k_BSKH.shape[1])
        out, lse = self._call(
            _forward_kernel, ("attention_forward", 2), tile, False, scores, queries, keys,
            inputs=[("Q", q_BTKGH), ("K", k_BSKH), ("K", v_BSKH)], outputs=[("Q", q_BTKGH.dtype), ("q", jnp.float32)],
            scratch=[(tile.query, LANES), (tile.query, LANES), (tile.query, q_BTKGH.shape[-1])],
        )  # fmt: skip
        return out, lse

    def attend_backward(
        self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores=Scores()
    ):
        """Gradients of `attend`; see `Kernel.attend_backward`.

        There are two kernels. One computes dq, by query tiles; the other computes dk and dv, by key tiles, summed over
        the G query heads of a KV head. Together they need 7 matrix products per pair of tiles; one kernel would need 5.

        Keeps: as `attend`.
        Source: Dao, arXiv 2307.08691, algorithm 2.
        """
        size = q_BTKGH.shape[-1]
        lengths = q_BTKGH.shape[1], k_BSKH.shape[1]
        inputs = [
            ("Q", q_BTKGH), ("K", k_BSKH), ("K", v_BSKH), ("Q", dout_BTKGH), ("q", lse_BTKG), ("q", delta_BTKG)
        ]  # fmt: skip
        tile = self._tile("dq", *lengths)
        (dq,) = self._call(
            _dq_kernel, ("attention_backward", 3), tile, False, scores, queries, keys, inputs=inputs,
            outputs=[("Q", q_BTKGH.dtype)], scratch=[(tile.query, LANES), (tile.query, LANES), (tile.query, size)],
        )  # fmt: skip
        tile = self._tile("dkv", *lengths)
        dk, dv = self._call(
            _dkv_kernel, ("attention_backward", 4), tile, True, scores, queries, keys, inputs=inputs,
            outputs=[("K", k_BSKH.dtype), ("K", v_BSKH.dtype)], scratch=[(tile.key, size), (tile.key, size)],
        )  # fmt: skip
        return dq, dk, dv

    def _call(
        self, kernel: Callable[..., None], products: tuple[str, int], tile: Tile, by_key: bool, scores: Scores,
        queries: Tokens, keys: Tokens, inputs, outputs, scratch,
    ) -> list[jax.Array]:  # fmt: skip
        """Runs one step for every pair of tiles and every query head.

        Inputs are (dims, array) and outputs are (dims, dtype), where the dims are Q: [B, T, K, G, H], K: [B, S, K, H],
        or q: [B, T, K, G]. `scratch` has the shapes of float32 arrays in VMEM. `products`, (kind, matrix products per
        pair of tiles), is written into the compiled program for `tsp_jax.inspect`, which cannot see into a kernel.
        """
        batch, q_len, kv_heads, group, size = inputs[0][1].shape
        pairs = PairList.of(queries, keys, tile, by_key, scores)
        lengths = {"Q": batch * pairs.queries.positions.shape[1], "K": batch * pairs.keys.positions.shape[1]}
        own_size, other_size = (tile.key, tile.query) if by_key else (tile.query, tile.key)

        def spec(dims: str) -> pl.BlockSpec:
            is_query = dims in "Qq"
            tokens = tile.query if is_query else tile.key

            def index(head, entry, step, member, own_ref, other_ref):
                if is_query:
                    head = head * group + member if by_key else head
                elif not by_key and group > 1:
                    head = lax.div(head, jnp.int32(group))
                token = own_ref[entry] if by_key != is_query else (other_ref[entry] >> FLAG_BITS) * pairs.span + step
                return (head, 0, token) if dims == "q" else (head, token, 0)

            return pl.BlockSpec((None, 1, tokens) if dims == "q" else (None, tokens, size), index)

        def tokens_spec(of_queries: bool) -> pl.BlockSpec:
            index = spec("q" if of_queries else "K").index_map
            pick = (lambda *args: (0, index(*args)[2])) if of_queries else (lambda *args: (0, index(*args)[1]))
            return pl.BlockSpec((2, tile.query if of_queries else tile.key), pick)

        def shape(dims: str, dtype: Any) -> jax.ShapeDtypeStruct:
            heads = kv_heads if dims == "K" else kv_heads * group
            shape = (heads, 1, lengths["Q"]) if dims == "q" else (heads, lengths[dims], size)
            return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(inputs[0][1]).mat)

        grid = (kv_heads if by_key else kv_heads * group, pairs.number, pairs.span, group if by_key else 1)
        call = pl.pallas_call(
            functools.partial(kernel, part=tile.part, scores=scores._replace(scale=scores.scale_of(size))),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=[tokens_spec(True), tokens_spec(False), *(spec(dims) for dims, _ in inputs)],
                out_specs=[spec(dims) for dims, _ in outputs],
                scratch_shapes=[
                    pltpu.VMEM((2, own_size, LANES), jnp.int32),
                    *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
                ],
            ),
            out_shape=[shape(*each) for each in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=self.arch == "interpret",
        )
        kind, number = products
        flops = 2.0 * number * batch * kv_heads * group * pairs.mean * tile.query * tile.key * size
        padding = {"Q": -q_len % tile.query, "q": -q_len % tile.query, "K": -inputs[1][1].shape[1] % tile.key}
        arrays = [_heads_first(dims, x, padding[dims]) for dims, x in inputs]
        with jax.named_scope(f"mean_flops[{kind}={flops:.0f}]"):
            results = call(
                pairs.own_E, pairs.other_E, _flat(pairs.queries), _flat(pairs.keys), *arrays
            )
        return [
            _heads_last(dims, x, batch, group, padding[dims]) for (dims, _), x in zip(outputs, results, strict=True)
        ]


# ------------------------------------------------------------------------------------------------ around the kernels


def _flat(tokens: Tokens) -> jax.Array:
    """[2, B T] int32: positions and segments."""
    return jnp.stack([x.reshape(-1) for x in tokens])


def _heads_first(dims: str, x: jax.Array, padding: int) -> jax.Array:
    """[N, B T, H], [K, B S, H] or, for one value per row, [N, 1, B T]; tokens padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, padding), *((0, 0) for _ in x.shape[2:])])
    if dims == "q":
        return x.transpose(2, 3, 0, 1).reshape(x.shape[2] * x.shape[3], 1, -1)
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[-1])


def _heads_last(dims: str, x: jax.Array, batch: int, group: int, padding: int) -> jax.Array:
    """The inverse of `_heads_first`."""
    x = x.reshape(x.shape[0], batch, -1, 1 if dims == "q" else x.shape[-1]).transpose(1, 2, 0, 3)
    x = x[:, : x.shape[1] - padding]
    if dims == "K":
        return x
    x = x.reshape(*x.shape[:2], -1, group, x.shape[-1])
    return x[..., 0] if dims == "q" else x


# ------------------------------------------------------------------------------------------------ in the kernels


def _dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a b, or a b^T if `transposed`, in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _spread(x_QL: jax.Array, width: int) -> jax.Array:
    """Values of rows, repeated over `width` lanes instead of L."""
    if width <= x_QL.shape[1]:
        return x_QL[:, :width]
    return jnp.tile(x_QL, (1, -(-width // x_QL.shape[1])))[:, :width]


def _column(row_1Q: jax.Array) -> jax.Array:
    """[Q, L]: values of rows that lie in lanes."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T


def _may_attend(own: Any, other: Any, at: pl.Slice, by_key: bool, scores: Scores) -> jax.Array:
    """Which own tokens, in rows, may attend to some of the other tokens, in lanes, or be attended to by them."""
    own, other = Tokens(*(_spread(own[i], at.size) for i in (0, 1))), Tokens(*(other[i : i + 1, at] for i in (0, 1)))
    return may_attend(other, own, scores) if by_key else may_attend(own, other, scores)


def _visit(other_ref, start: Callable, step: Callable, finish: Callable) -> None:
    """Runs one step of the grid: `start` before and `finish` after the pairs of an own tile, ``step(masked)`` between."""
    flags = other_ref[pl.program_id(1)]
    at_start = at_end = True
    for dim in (2, 3):
        at_start &= pl.program_id(dim) == 0
        at_end &= pl.program_id(dim) == pl.num_programs(dim) - 1
    masked = flags & (RUN | MASK)
    pl.when((flags & FIRST != 0) & at_start)(start)
    pl.when(masked == RUN)(functools.partial(step, False))
    pl.when(masked == RUN | MASK)(functools.partial(step, True))
    pl.when((flags & LAST != 0) & at_end)(finish)


def _parts(length: int, part: int) -> list[pl.Slice]:
    return [pl.ds(start, part) for start in range(0, length, part)]


def _forward_kernel(
    own_ref, other_ref, queries, keys, q_ref, k_ref, v_ref, out_ref, lse_ref, own, top_ref, sum_ref, acc_ref, *,
    part: int, scores: Scores,
):  # fmt: skip
    """out and lse of a query tile, by online softmax."""

    def start():
        for i in (0, 1):
            own[i] = _column(queries[i : i + 1])
        top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(masked: bool):
        top_QL, sum_QL, acc_QH = top_ref[...], sum_ref[...], acc_ref[...]
        for at in _parts(k_ref.shape[0], part):
            s_QC = scores.cap(_dot(q_ref[...], k_ref[at, :], transposed=True) * scores.scale)
            if masked:
                s_QC = jnp.where(_may_attend(own, keys, at, False, scores), s_QC, MASKED)
            new_QL = jnp.maximum(top_QL, s_QC.max(axis=1, keepdims=True))
            p_QC = jnp.exp(s_QC - _spread(new_QL, part))
            decay_QL = jnp.exp(top_QL - new_QL)
            sum_QL = sum_QL * decay_QL + p_QC.sum(axis=1, keepdims=True)
            acc_QH = acc_QH * _spread(decay_QL, acc_QH.shape[1]) + _dot(p_QC.astype(v_ref.dtype), v_ref[at, :])
            top_QL = new_QL
        top_ref[...], sum_ref[...], acc_ref[...] = top_QL, sum_QL, acc_QH

    def finish():
        empty_QL = top_ref[...] <= MASKED / 2
        inverse_QL = jnp.where(empty_QL, 0.0, 1.0 / sum_ref[...])
        out_QH = acc_ref[...] * _spread(inverse_QL, acc_ref.shape[1])
        out_ref[...] = jnp.where(_spread(empty_QL, acc_ref.shape[1]), 0.0, out_QH).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty_QL, MASKED, top_ref[...] + jnp.log(sum_ref[...])).T[:1]

    _visit(other_ref, start, step, finish)


def _dq_kernel(
    own_ref, other_ref, queries, keys, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, own, lse_QL, delta_QL,
    acc_ref, *, part: int, scores: Scores,
):  # fmt: skip
    """dq of a query tile."""

    def start():
        for i in (0, 1):
            own[i] = _column(queries[i : i + 1])
        lse_QL[...], delta_QL[...] = _column(lse_ref[...]), _column(delta_ref[...])
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(masked: bool):
        dq_QH = acc_ref[...]
        for at in _parts(k_ref.shape[0], part):
            s_QC = scores.cap(_dot(q_ref[...], k_ref[at, :], transposed=True) * scores.scale)
            p_QC = jnp.exp(s_QC - _spread(lse_QL[...], part))
            if masked:
                p_QC = jnp.where(_may_attend(own, keys, at, False, scores), p_QC, 0.0)
            dp_QC = _dot(dout_ref[...], v_ref[at, :], transposed=True)
            ds_QC = scores.uncap_grad(p_QC * (dp_QC - _spread(delta_QL[...], part)), s_QC)
            dq_QH += _dot(ds_QC.astype(k_ref.dtype), k_ref[at, :])
        acc_ref[...] = dq_QH

    def finish():
        dq_ref[...] = (acc_ref[...] * scores.scale).astype(dq_ref.dtype)

    _visit(other_ref, start, step, finish)


def _dkv_kernel(
    own_ref, other_ref, queries, keys, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, own, dk_acc,
    dv_acc, *, part: int, scores: Scores,
):  # fmt: skip
    """dk and dv of a key tile. Scores are transposed, so that no product transposes them."""

    def start():
        for i in (0, 1):
            own[i] = _column(keys[i : i + 1])
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def step(masked: bool):
        dk_CH, dv_CH = dk_acc[...], dv_acc[...]
        for at in _parts(q_ref.shape[0], part):
            s_CQ = scores.cap(_dot(k_ref[...], q_ref[at, :], transposed=True) * scores.scale)
            p_CQ = jnp.exp(s_CQ - lse_ref[:, at])
            if masked:
                p_CQ = jnp.where(_may_attend(own, queries, at, True, scores), p_CQ, 0.0)
            dv_CH += _dot(p_CQ.astype(dout_ref.dtype), dout_ref[at, :])
            dp_CQ = _dot(v_ref[...], dout_ref[at, :], transposed=True)
            ds_CQ = scores.uncap_grad(p_CQ * (dp_CQ - delta_ref[:, at]), s_CQ)
            dk_CH += _dot(ds_CQ.astype(q_ref.dtype), q_ref[at, :])
        dk_acc[...], dv_acc[...] = dk_CH, dv_CH

    def finish():
        dk_ref[...] = (dk_acc[...] * scores.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    _visit(other_ref, start, step, finish)
