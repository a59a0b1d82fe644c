"""Blockwise attention for TPUs: Pallas kernels that are compiled by way of Mosaic.

The scores of a pair of tiles stay in VMEM. The list of pairs to visit is made outside the kernels, in XLA
(`tsp_jax.ops.kernels.pairs`). A kernel's grid is as long as the list, so skipped pairs cost nothing. Pairs in which
every query may attend to every key have a body of their own, without a mask (`tsp_jax.ops.kernels.tpu_bodies`).

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head, N = K G; Q tokens of a query
tile, C tokens of a key tile.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tsp_jax.ops.kernels.kernel import Kernel, declare_products
from tsp_jax.ops.kernels.mask import Scores, Tokens
from tsp_jax.ops.kernels.pairs import FLAG_BITS, PairList
from tsp_jax.ops.kernels.tpu_bodies import backward_body, dkv_body, dq_body, forward_body
from tsp_jax.ops.kernels.tpu_tiles import CORES, LANES, Tile, Tiles, fit


@dataclasses.dataclass(frozen=True)
class TpuKernel(Kernel):
    """Attention with one kernel in forward and one or two in backward; scores are never written to main memory."""

    arch: str
    """TPU to compile for: a key of `CORES`; ``interpret`` runs anywhere, slowly"""
    tiles: Tiles | None = None
    """tile sizes; None: those of `arch`"""
    chunk: int = 0
    """length of a zigzag chunk, which tiles divide if it is a multiple of `LANES`; 0: not known"""

    @classmethod
    def for_arch(cls, arch: str) -> Self:
        return cls(arch)

    def not_here(self) -> str:
        known = ", ".join(arch for arch in CORES if arch != "interpret")
        return "" if self.arch in CORES else f"runs on {known}, not on {self.arch or 'unknown devices'}"

    def unsupported(self, head_dim: int, dtype: Any, scores: Scores = Scores()) -> str:
        dtype = jnp.dtype(dtype)
        if head_dim > 256 or dtype not in (jnp.bfloat16, jnp.float32):
            wide = f"heads have {head_dim} {dtype.name}; they may have at most 256 of bfloat16 or float32"
            return self.not_here() or wide
        return self.not_here()

    def within(self, tokens: int) -> Self:
        """This kernel with tiles that never span both zigzag chunks, if a chunk is a multiple of `LANES`."""
        return dataclasses.replace(self, chunk=tokens // 2)

    def attend(self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores=Scores()):
        """Attention within segments; see `Kernel.attend`.

        Keeps: copies of the arrays with heads before tokens; the list of pairs, 8 bytes for each pair of tiles.
        Source: Dao, arXiv 2307.08691 (FlashAttention-2).
        """
        grid = self._grid("forward", q_BTKGH, k_BSKH, queries, keys, scores)
        rows, size = grid.tile.query, q_BTKGH.shape[-1]
        out, lse = grid.call(
            forward_body, ("forward", 2), scores,
            inputs=[("Q", q_BTKGH), ("K", k_BSKH), ("K", v_BSKH)],
            outputs=[("Q", q_BTKGH.dtype), ("q", jnp.float32)],
            scratch=[(rows, LANES), (rows, LANES), (rows, size)],
        )  # fmt: skip
        return out, lse

    def attend_backward(
        self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores=Scores()
    ):
        """Gradients of `attend`; see `Kernel.attend_backward`.

        One kernel goes by key tiles. It has dk and dv of one tile, summed over the G query heads of a KV head, and dq
        of all T queries in VMEM, 4 G T H bytes, and needs 5 matrix products per pair of tiles. If VMEM has no room for
        dq, a second kernel computes dq, by query tiles; together they need 7.

        Keeps: as `attend`; dq in float32, from every core that has key tiles of its own.
        Source: Dao, arXiv 2307.08691, algorithm 2.
        """
        arrays = q_BTKGH, k_BSKH, queries, keys, scores
        inputs = [("Q", q_BTKGH), ("K", k_BSKH), ("K", v_BSKH), ("Q", dout_BTKGH), ("q", lse_BTKG), ("q", delta_BTKG)]
        grid, size = self._grid("dkv", *arrays), q_BTKGH.shape[-1]
        by_key = [("K", k_BSKH.dtype), ("K", v_BSKH.dtype)], [(grid.tile.key, size)] * 2
        if grid.dq_bytes <= CORES[self.arch].vmem_bytes // 2:
            outputs = [("D", jnp.float32), *by_key[0]]
            dq, dk, dv = grid.call(backward_body, ("backward", 5), scores, inputs, outputs, by_key[1])
            return (dq * scores.scale_of(size)).astype(q_BTKGH.dtype), dk, dv
        dk, dv = grid.call(dkv_body, ("backward", 4), scores, inputs, *by_key)
        grid = self._grid("dq", *arrays)
        scratch = [(grid.tile.query, LANES), (grid.tile.query, LANES), (grid.tile.query, size)]
        (dq,) = grid.call(dq_body, ("backward", 3), scores, inputs, [("Q", q_BTKGH.dtype)], scratch)
        return dq, dk, dv

    def _grid(self, name: str, q_BTKGH, k_BSKH, queries: Tokens, keys: Tokens, scores: Scores) -> "_Grid":
        """The grid of the kernel `name`, a field of `Tiles`."""
        by_key, core = name == "dkv", CORES[self.arch]
        unit = 1 if self.arch == "interpret" else LANES
        tile = getattr(self.tiles or core.tiles, name)
        tile = fit(tile, by_key, q_BTKGH.shape[1], k_BSKH.shape[1], self.chunk, unit)
        heads = q_BTKGH.shape[2] * (1 if by_key else q_BTKGH.shape[3])
        own_tiles = -(-k_BSKH.shape[1] // tile.key) if by_key else -(-q_BTKGH.shape[1] // tile.query)
        cores = core.cores if heads % core.cores and own_tiles >= core.cores else 1
        pairs = PairList.of(queries, keys, tile, by_key, scores, cores)
        return _Grid(self.arch, q_BTKGH.shape, k_BSKH.shape[1], tile, by_key, cores, pairs)


class _Grid(NamedTuple):
    """The steps of a kernel: (core, head, entry of the list, tile of the span, query head of the KV head).

    Heads are KV heads if own tiles are of keys, else query heads. Two cores of a device share the heads, or, if their
    number is odd, the own tiles.
    """

    arch: str
    q_shape: tuple[int, ...]
    """B, T, K, G, H"""
    k_len: int
    tile: Tile
    by_key: bool
    cores: int
    """cores with lists of their own"""
    pairs: PairList

    @property
    def dq_bytes(self) -> int:
        """VMEM for dq of a row of the batch and a KV head, float32, in two buffers."""
        lanes = -(-self.q_shape[4] // LANES) * LANES
        return 8 * self.q_shape[3] * self.pairs.queries.positions.shape[1] * lanes

    def call(
        self,
        body: Callable[..., None],
        products: tuple[Literal["forward", "backward"], int],
        scores: Scores,
        inputs,
        outputs,
        scratch,
    ):
        """Runs `body` in every step.

        Inputs are (dims, array), and outputs (dims, dtype). Dims are Q: [B, T, K, G, H]; K: [B, S, K, H]; q:
        [B, T, K, G]; D: as Q, all tokens of a row at once, summed over the cores. `scratch` has shapes of float32
        arrays. `products`, (direction, matrix products per pair of tiles), is written into the compiled program for
        `tsp_jax.inspect`, which cannot see into a kernel.
        """
        batch, _, kv_heads, group, size = self.q_shape
        number, heads = self.pairs.number, kv_heads * (1 if self.by_key else group)
        own_size = self.tile.key if self.by_key else self.tile.query
        step = functools.partial(self._step, body, part=self.tile.part, scores=scores)
        varying = jax.typeof(inputs[0][1]).mat
        call = pl.pallas_call(
            step,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.cores, heads, number, self.pairs.span, group if self.by_key else 1),
                in_specs=[self._spec(dims) for dims in ("tq", "tk", *(dims for dims, _ in inputs))],
                out_specs=[self._spec(dims) for dims, _ in outputs],
                scratch_shapes=[
                    pltpu.VMEM((2, own_size, LANES), jnp.int32), *(pltpu.VMEM(shape, jnp.float32) for shape in scratch)
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct(self._shape(dims), dtype, manual_axis_type=varying) for dims, dtype in outputs
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=tuple(
                    "parallel" if dim == (0 if self.cores > 1 else 1) else "arbitrary" for dim in range(5)
                ),
                vmem_limit_bytes=CORES[self.arch].vmem_bytes,
            ),
            interpret=self.arch == "interpret",
        )  # fmt: skip
        direction, number = products
        flops = 2.0 * number * batch * kv_heads * group * self.pairs.mean * self.tile.query * self.tile.key * size
        tokens = (jnp.stack([x.reshape(-1) for x in each]) for each in (self.pairs.queries, self.pairs.keys))
        lists = self.pairs.own_cE.reshape(-1), self.pairs.other_cE.reshape(-1)
        arrays = [self._heads_first(*each) for each in inputs]
        with declare_products("tpu", direction, size, flops):
            results = call(*lists, *tokens, *arrays)
        return [self._heads_last(dims, x) for (dims, _), x in zip(outputs, results, strict=True)]

    # -------------------------------------------------------------------------------------------- in a step

    def _step(self, body: Callable[..., None], own_ref, other_ref, *refs, **static) -> None:
        core, entry = pl.program_id(0), pl.program_id(2)
        if body is backward_body:
            first = self._row(core, entry, own_ref) * (self.pairs.queries.positions.shape[1] // self.tile.query)
            static["query_tile"] = self._other(core, entry, pl.program_id(3), other_ref) - first
        body(other_ref[self._entry(core, entry)] & ((1 << FLAG_BITS) - 1), *refs, **static)

    def _entry(self, core, entry):
        return entry if self.cores == 1 else core * self.pairs.own_cE.shape[1] + entry

    def _row(self, core, entry, own_ref):
        """Row of the batch of the own tile, which is of keys."""
        if self.q_shape[0] == 1:
            return 0
        tiles = self.pairs.keys.positions.shape[1] // self.tile.key
        return lax.div(own_ref[self._entry(core, entry)], jnp.int32(tiles))

    def _other(self, core, entry, tile, other_ref):
        return (other_ref[self._entry(core, entry)] >> FLAG_BITS) * self.pairs.span + tile

    def _spec(self, dims: str) -> pl.BlockSpec:
        """The block of an array, and its index in each step."""
        *_, group, size = self.q_shape
        tokens = self.tile.key if dims in ("K", "tk") else self.tile.query
        is_own = (dims in ("K", "tk")) == self.by_key

        def index(core, head, entry, tile, member, own_ref, other_ref):
            if dims == "D":
                return core, head, self._row(core, entry, own_ref), 0
            if is_own:
                token = own_ref[self._entry(core, entry)]
            else:
                token = self._other(core, entry, tile, other_ref)
            if dims in ("tq", "tk"):
                return 0, token
            if group > 1 and self.by_key and dims != "K":
                head = head * group + member
            elif group > 1 and not self.by_key and dims == "K":
                head = lax.div(head, jnp.int32(group))
            return (head, 0, token) if dims == "q" else (head, token, 0)

        blocks = {
            "tq": (2, tokens), "tk": (2, tokens), "q": (None, 1, tokens),
            "D": (None, group, self.pairs.queries.positions.shape[1], size),
        }  # fmt: skip
        return pl.BlockSpec(blocks.get(dims, (None, tokens, size)), index)

    # -------------------------------------------------------------------------------------------- around the kernel

    def _shape(self, dims: str) -> tuple[int, ...]:
        """Shape of an array in the kernel: [N, B T, H], [K, B S, H], [N, 1, B T] or [cores, N, B T, H]."""
        _, _, kv_heads, group, size = self.q_shape
        if dims == "K":
            return kv_heads, self.pairs.keys.positions.size, size
        heads, tokens = kv_heads * group, self.pairs.queries.positions.size
        return {"Q": (heads, tokens, size), "q": (heads, 1, tokens), "D": (self.cores, heads, tokens, size)}[dims]

    def _heads_first(self, dims: str, x: jax.Array) -> jax.Array:
        """An input as the kernel reads it, with zeros for padded tokens."""
        padded = (self.pairs.keys if dims == "K" else self.pairs.queries).positions.shape[1]
        x = jnp.pad(x, [(0, 0), (0, padded - x.shape[1]), *((0, 0) for _ in x.shape[2:])])
        if dims == "Q":
            x = x.reshape(*x.shape[:2], -1, x.shape[-1])
        return (x.transpose(2, 3, 0, 1) if dims == "q" else x.transpose(2, 0, 1, 3)).reshape(self._shape(dims))

    def _heads_last(self, dims: str, x: jax.Array) -> jax.Array:
        """An output as callers of the kernel have it."""
        batch, q_len, kv_heads, group, size = self.q_shape
        if dims == "D":
            x = x.sum(axis=0)
        if dims == "q":
            return x.reshape(kv_heads, group, batch, -1).transpose(2, 3, 0, 1)[:, :q_len]
        x = x.reshape(x.shape[0], batch, -1, size).transpose(1, 2, 0, 3)
        return x[:, : self.k_len] if dims == "K" else x[:, :q_len].reshape(self.q_shape)
