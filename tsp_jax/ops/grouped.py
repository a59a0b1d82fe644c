"""Matrix products of rows that are grouped by expert: each tile of rows is multiplied with the weights of one expert.

A slab is a number of tiles, one after another: its rows, the expert of each tile, and how many of the tiles hold rows.
A table names the ways to multiply a slab; `auto` takes the first one that its devices support.

Dims: m experts, f rows of an expert, D model, q tiles of a slab, n rows of a tile, N = q n rows of a slab.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractMesh, Mesh

from tsp_jax.config.experts import KERNEL_MULTIPLE, SLABS, Slabs
from tsp_jax.errors import ConfigError
from tsp_jax.ops.kernels.kernel import arch_of
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.stream import Arrays, zeros


class Slab(NamedTuple):
    """The tiles of a slab, ordered by their experts."""

    experts_q: jax.Array
    """int32: of each tile, its expert's place among the m experts; any if the tile holds no row"""
    number: int
    """m"""
    filled: jax.Array
    """int32 []: tiles from this one on hold no row"""
    tile: int
    """n"""
    mean_filled: float
    """mean of `filled`, for reports"""
    expert_rows: float
    """mean number of rows of an expert, for reports"""

    def tiles(self) -> jax.Array:
        """[m, q]: whether a tile is one of an expert's."""
        places_m, tiles_q = (lax.iota(jnp.int32, size) for size in (self.number, len(self.experts_q)))
        return (self.experts_q[None] == places_m[:, None]) & (tiles_q < self.filled)[None]

    def of_experts(self) -> tuple[jax.Array, jax.Array]:
        """(first tile, number of tiles) of each of the m experts, int32 [m]; 0 and 0 for an expert without tiles."""
        mine_mq = self.tiles()
        return jnp.argmax(mine_mq, axis=1).astype(jnp.int32), mine_mq.sum(axis=1, dtype=jnp.int32)

    @property
    def mean_rows(self) -> float:
        """Mean number of rows in filled tiles."""
        return self.mean_filled * self.tile

    @staticmethod
    def declare(m: float, n: float, k: float, products: float = 1) -> Any:
        """A named scope that tells `tsp_jax.inspect` what one kernel computes: so many products [m, k] x [k, n]."""
        kind = f"grouped.{m:.0f}x{n:.0f}x{k:.0f}"
        return jax.named_scope(f"mean_flops[{kind}={2.0 * products * m * n * k:.0f}]")


class Grouped(abc.ABC):
    """Products of a slab's rows with their experts' weights. Hashable: a static argument of jitted code.

    Rows of tiles without rows are undefined in every result. Operands are in the compute dtype; products accumulate in
    float32.
    """

    name: ClassVar[str]
    """a key of `SLABS`"""
    slabs: ClassVar[Slabs]

    @abc.abstractmethod
    def matmul_t(
        self, x_ND: jax.Array, weights: Arrays, slab: Slab, *, biases: Arrays = (),
        combine: Callable[..., jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:  # fmt: skip
        """``x w_e^T`` for each of the weights w [m, f, D]: each [N, f] float32.

        With `biases` [m, f], one for each of the weights, ``x w_e^T + b_e``.
        With `combine`, an elementwise function of all of these products, only its result, in the compute dtype.
        """

    @abc.abstractmethod
    def matmul(self, rows: Arrays, weights: Arrays, slab: Slab) -> jax.Array:
        """``sum of h w_e`` over pairs of rows h [N, f] and weights w [m, f, D]: [N, D] in the compute dtype."""

    def start(self, shape: tuple[int, ...], like: jax.Array) -> jax.Array | None:
        """What the first slab adds to: nothing where it stands before the loop, else zeros that vary as `like`."""
        return None if self.slabs.many else zeros(shape, jnp.float32, like)

    @abc.abstractmethod
    def outer(self, total_mfD: jax.Array | None, a_Nf: jax.Array, b_ND: jax.Array, slab: Slab) -> jax.Array:
        """``total_e + a^T b`` over the rows of each expert: [m, f, D] float32."""

    @abc.abstractmethod
    def sums(self, total_mf: jax.Array | None, a_Nf: jax.Array, slab: Slab) -> jax.Array:
        """``total_e + the sum of the rows a`` of each expert: [m, f] float32."""


@dataclasses.dataclass(frozen=True)
class OneByOne(Grouped):
    """One product a tile, by XLA, on any device: a slab is one tile."""

    name, slabs = "xla", SLABS["xla"]

    def matmul_t(self, x_ND, weights, slab, *, biases=(), combine=None):
        products = [matmul_t(x_ND[None], self._of(w, slab))[0] for w in weights]
        if biases:
            added = (self._of(bias, slab).astype(jnp.float32)[None] for bias in biases)
            products = [product + bias for product, bias in zip(products, added, strict=True)]
        return (combine(*products).astype(x_ND.dtype),) if combine else tuple(products)

    def matmul(self, rows, weights, slab):
        # One product of concatenated operands, so that one sum is written.
        h_1Nf = jnp.concatenate(rows, axis=-1)[None]
        w_fD = jnp.concatenate([self._of(w, slab) for w in weights])
        return matmul(h_1Nf, w_fD)[0].astype(rows[0].dtype)

    def outer(self, total_mfD, a_Nf, b_ND, slab):
        assert total_mfD is not None
        return total_mfD.at[slab.experts_q[0]].add(outer(a_Nf[None], b_ND[None]))

    def sums(self, total_mf, a_Nf, slab):
        assert total_mf is not None
        return total_mf.at[slab.experts_q[0]].add(a_Nf.sum(axis=0, dtype=jnp.float32))

    def _of(self, array_m: jax.Array, slab: Slab) -> jax.Array:
        return lax.dynamic_index_in_dim(array_m, slab.experts_q[0], keepdims=False)


class Blocks(NamedTuple):
    """Blocks of a Triton kernel: of rows and columns of the result, and of the dim that is summed over."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    together: int = 8
    """rows of blocks that programs one after another compute, so that caches keep what all of them read"""

    def fit(self, rows: int, columns: int, inner: int) -> "Blocks":
        """The largest blocks that divide these dims, at most these blocks."""
        return self._replace(
            rows=math.gcd(self.rows, rows), columns=math.gcd(self.columns, columns), inner=math.gcd(self.inner, inner)
        )

    def position(self, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
        """(row, column) of the block of this program, of a result of so many elements."""
        rows, columns, index = rows // self.rows, columns // self.columns, pl.program_id(0)
        first = index // (self.together * columns) * self.together
        together = jnp.minimum(self.together, rows - first)
        within = index - first * columns
        return first + within % together, within // together


class KernelBlocks(NamedTuple):
    """Blocks of the Triton kernels: of a tile times weights, whose `rows` are the tile's at most, and of `outer`."""

    pair: Blocks
    """of two products at once"""
    one: Blocks
    """of one product"""
    total: Blocks
    """of the sum of two products"""
    outer: Blocks
    """its `inner` is the tile's at most"""


@dataclasses.dataclass(frozen=True)
class TritonGrouped(Grouped):
    """One Pallas kernel for all tiles of a slab, compiled by way of Triton for AMD and NVIDIA GPUs."""

    arch: str
    """a key of `BLOCKS`; ``interpret`` runs anywhere, slowly"""
    blocks: KernelBlocks | None = None
    """None: those of `arch`"""

    name, slabs = "triton", SLABS["triton"]

    def matmul_t(self, x_ND, weights, slab, *, biases=(), combine=None):
        _, columns, inner = weights[0].shape
        shape = jax.ShapeDtypeStruct((x_ND.shape[0], columns), x_ND.dtype if combine else jnp.float32)
        body = functools.partial(
            _rows_kernel, number=len(weights), transposed=True, biased=bool(biases), combine=combine
        )
        outputs = [shape] if combine else [shape] * len(weights)
        return self._call(body, slab, (x_ND, *weights, *biases), outputs, columns, inner, len(weights))

    def matmul(self, rows, weights, slab):
        _, inner, columns = weights[0].shape
        shape = jax.ShapeDtypeStruct((rows[0].shape[0], columns), rows[0].dtype)
        body = functools.partial(_rows_kernel, number=len(weights), transposed=False, biased=False, combine=_sum)
        return self._call(body, slab, (*rows, *weights), [shape], columns, inner, len(weights))[0]

    def outer(self, total_mfD, a_Nf, b_ND, slab):
        rows, columns = a_Nf.shape[1], b_ND.shape[1]
        totals = () if total_mfD is None else (total_mfD,)
        block = self._blocks.outer.fit(rows, columns, slab.tile)
        call = pl.pallas_call(
            functools.partial(_outer_kernel, tile=slab.tile, block=block),
            grid=(rows // block.rows * (columns // block.columns), slab.number),
            out_shape=jax.ShapeDtypeStruct(
                (slab.number, rows, columns), jnp.float32, manual_axis_type=jax.typeof(a_Nf).mat
            ),
            input_output_aliases={4: 0} if totals else {},
            compiler_params=triton.CompilerParams(num_warps=block.warps, num_stages=block.stages),
            interpret=self.arch == "interpret",
        )  # fmt: skip
        each = min(slab.expert_rows, slab.mean_rows)  # of all experts as one product over the rows of each
        with slab.declare(rows * slab.mean_rows / each, columns, each):
            return call(*slab.of_experts(), a_Nf, b_ND, *totals)

    def sums(self, total_mf, a_Nf, slab):
        # No scatter: a GPU would add the tiles of an expert in any order.
        mine_mq = slab.tiles()
        sums_qf = a_Nf.reshape(mine_mq.shape[1], slab.tile, -1).sum(axis=1, dtype=jnp.float32)
        sums_qf = jnp.where(mine_mq.any(axis=0)[:, None], sums_qf, 0.0)
        sums_mf = jnp.matmul(mine_mq.astype(jnp.float32), sums_qf, precision=lax.Precision.HIGHEST)
        return sums_mf if total_mf is None else total_mf + sums_mf

    def unsupported(self, d_model: int, rows: int, dtype: Any) -> str:
        """Why experts of these sizes cannot be multiplied on these devices; empty if they can."""
        if self.arch not in BLOCKS:
            known = ", ".join(arch for arch in BLOCKS if arch != "interpret")
            return f"runs on {known}, not on {self.arch or 'unknown devices'}"
        if jnp.dtype(dtype) != jnp.bfloat16 and self.arch != "interpret":
            return f"computes in bfloat16, not in {jnp.dtype(dtype).name}"
        if d_model % KERNEL_MULTIPLE or rows % KERNEL_MULTIPLE:
            sizes = f"{d_model} and {rows}"
            return f"needs d_model and a device's d_ff to be multiples of {KERNEL_MULTIPLE}, not {sizes}"
        return ""

    @property
    def _blocks(self) -> KernelBlocks:
        return self.blocks or BLOCKS[self.arch]

    def _call(self, body, slab: Slab, arrays: Arrays, outputs, columns: int, inner: int, products: int):
        of_all = self._blocks
        block = of_all.one if products == 1 else of_all.total if body.keywords["combine"] is _sum else of_all.pair
        block = block.fit(slab.tile, columns, inner)
        varying = jax.typeof(arrays[0]).mat
        call = pl.pallas_call(
            functools.partial(body, tile=slab.tile, block=block),
            grid=(len(slab.experts_q) * (slab.tile // block.rows) * (columns // block.columns),),
            out_shape=[jax.ShapeDtypeStruct(o.shape, o.dtype, manual_axis_type=varying) for o in outputs],
            compiler_params=triton.CompilerParams(num_warps=block.warps, num_stages=block.stages),
            interpret=self.arch == "interpret",
        )
        with slab.declare(slab.mean_rows, columns, inner, products):
            return tuple(call(slab.filled[None], slab.experts_q, *arrays))


_SQUARE = Blocks(128, 128, 64, 8, 2)
BLOCKS = {
    "gfx942": KernelBlocks(*4 * [_SQUARE]), "gfx950": KernelBlocks(*4 * [_SQUARE]),
    "sm_90": KernelBlocks(
        pair=Blocks(128, 128, 64, 8, 3), one=Blocks(128, 256, 64, 8, 3), total=Blocks(128, 256, 32, 8, 3),
        outer=Blocks(256, 128, 64, 8, 3),
    ),
    "interpret": KernelBlocks(*4 * [Blocks(16, 16, 16, 4, 1)]),
}  # fmt: skip
"""arch -> blocks. Those of sm_90 were chosen of 30 that were timed on an H100 with the experts of two models; AMD's
were not timed. With 8 warps two sums of 128 x 128 fit into registers; with 4, ptxas spills on Hopper, and a SIMD of AMD
holds one wavefront (benchmarks/experts.md)."""


def _sum(*products: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, products)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _rows_kernel(
    filled_ref, experts_ref, *refs, number: int, transposed: bool, biased: bool,
    combine: Callable[..., jax.Array] | None, tile: int, block: Blocks,
):  # fmt: skip
    """A tile of rows times a block of columns of its expert's weights."""
    sizes = number, number * biased, 1 if combine else number
    ends = list(itertools.accumulate((len(refs) - sum(sizes), *sizes)))
    rows_refs, weight_refs, bias_refs, out_refs = (
        refs[start:end] for start, end in zip((0, *ends), ends, strict=False)
    )
    row, column = block.position(*out_refs[0].shape)
    index = row // (tile // block.rows)

    @pl.when(index < filled_ref[0])
    def _():
        expert = experts_ref[index]
        rows = pl.ds(row * block.rows, block.rows)
        columns = pl.ds(column * block.columns, block.columns)

        def step(i, sums):
            inner = pl.ds(i * block.inner, block.inner)
            operands = [ref[rows, inner] for ref in rows_refs]
            operands = operands if len(operands) == number else operands * number
            weights = [
                ref[expert, columns, inner].T if transposed else ref[expert, inner, columns] for ref in weight_refs
            ]
            products = [_dot(a, b) for a, b in zip(operands, weights, strict=True)]
            if combine is _sum:
                return (functools.reduce(jnp.add, products, sums[0]),)
            return tuple(total + product for total, product in zip(sums, products, strict=True))

        steps = weight_refs[0].shape[2 if transposed else 1] // block.inner
        zero = jnp.zeros((block.rows, block.columns), jnp.float32)
        sums = lax.fori_loop(0, steps, step, (zero,) * (1 if combine is _sum else number))
        if biased:
            products = zip(sums, bias_refs, strict=True)
            sums = tuple(total + ref[expert, columns].astype(jnp.float32)[None] for total, ref in products)
        results = (combine(*sums),) if combine else sums
        for ref, result in zip(out_refs, results, strict=True):
            ref[rows, columns] = result.astype(ref.dtype)


def _outer_kernel(first_ref, counts_ref, a_ref, b_ref, *refs, tile: int, block: Blocks):
    """A block of one expert's gradient, over the tiles of that expert; added to the total, if there is one."""
    *total_refs, out_ref = refs
    row, column = block.position(*out_ref.shape[1:])
    expert = pl.program_id(1)
    number = counts_ref[expert]

    @pl.when((number > 0) | (not total_refs))
    def _():
        rows = pl.ds(row * block.rows, block.rows)
        columns = pl.ds(column * block.columns, block.columns)
        first = first_ref[expert] * tile

        def step(i, total):
            tokens = pl.ds(first + i * block.inner, block.inner)
            return total + _dot(a_ref[tokens, rows].T, b_ref[tokens, columns])

        steps = number * (tile // block.inner)
        total = lax.fori_loop(0, steps, step, jnp.zeros((block.rows, block.columns), jnp.float32))
        out_ref[expert, rows, columns] = sum((ref[expert, rows, columns] for ref in total_refs), total)


def choose_grouped(name: str, mesh: Mesh | AbstractMesh, d_model: int, rows: int, dtype: Any) -> Grouped:
    """How the devices of a mesh multiply experts of `rows` rows each; `name` is ``auto`` or one of `SLABS`.

    Raises:
      ConfigError: the name is unknown, or the devices do not support it.
    """
    if name not in ("auto", *SLABS):
        raise ConfigError(f"stream.expert_kernel={name} is unknown; use one of auto, {', '.join(SLABS)}")
    kernel = TritonGrouped(arch_of(mesh))
    reason = kernel.unsupported(d_model, rows, dtype)
    if reason and name == "triton":
        raise ConfigError(f"stream.expert_kernel=triton: {reason}; use stream.expert_kernel=xla")
    return OneByOne() if reason or name == "xla" else kernel
