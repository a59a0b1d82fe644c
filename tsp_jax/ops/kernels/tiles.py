"""Tiles of the fused kernels on each GPU: what one program holds at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


class Tile(NamedTuple):
    """What one program holds at a time, and how Triton is to compile it."""

    query: int
    """tokens; a power of two"""
    key: int
    warps: int
    """of 64 threads on AMD, of 32 on NVIDIA"""
    stages: int
    """depth of the pipeline that loads tiles ahead"""


class Tiles(NamedTuple):
    """One for each kernel."""

    forward: Tile
    dq: Tile
    dkv: Tile


_AMD = {
    128: Tiles(Tile(128, 64, 4, 1), Tile(128, 32, 4, 1), Tile(32, 128, 4, 1)),
    256: Tiles(Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(32, 128, 4, 1)),
    512: Tiles(Tile(128, 32, 4, 1), Tile(64, 32, 4, 1), Tile(16, 64, 4, 1)),
}
_CDNA4 = _AMD | {256: _AMD[256]._replace(forward=Tile(128, 32, 4, 1))}
_HOPPER = {
    256: Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    512: Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
}
_SMALL = Tiles(Tile(8, 8, 4, 1), Tile(8, 4, 4, 1), Tile(4, 8, 4, 1))
TILES = {"gfx942": _AMD, "gfx950": _CDNA4, "sm_90": _HOPPER, "interpret": {1 << 30: _SMALL}}
"""arch -> bytes of a token's head, at most -> tiles: the largest that compilers keep in registers; none of it is timed.

AMD: operands take turns in LDS (16 to 64 KiB), so registers set the limit; a second stage would leave one wavefront a
SIMD, where two hide latency from each other (forward). A wavefront has 32 rows of a product: with 16 of them, in blocks
of eight, reading LDS would take as long as multiplying. Hopper: products of 64 rows to a warp group, 96 to 200 KiB of
shared memory; a third stage reads numbers of tiles ahead of tiles. interpret: so small that short sequences have many.
What the compilers made of them, and of others: benchmarks/attention_kernel.md.
"""


def head_size(head_dim: int) -> int:
    """Of heads in a kernel: Triton's arrays have powers of two of elements, its products 16 or more along each side."""
    return max(16, 1 << (head_dim - 1).bit_length())


def supports(q_shape: Sequence[int], dtype: Any, arch: str) -> bool:
    """Whether there are tiles for queries [..., H], bfloat16 or float32."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and _find(arch, q_shape, dtype) is not None


def tiles_of(arch: str, q_shape: Sequence[int], dtype: Any) -> Tiles:
    """The tiles for queries [..., H].

    Raises:
      ValueError: there are none.
    """
    tiles = _find(arch, q_shape, dtype)
    if tiles is None:
        heads = f"heads of {q_shape[-1]} {jnp.dtype(dtype).name}"
        raise ValueError(f"arch={arch}, {heads}: no tiles, only for {', '.join(TILES)}; use blockwise.attend")
    return tiles


def _find(arch: str, q_shape: Sequence[int], dtype: Any) -> Tiles | None:
    row_bytes = head_size(q_shape[-1]) * jnp.dtype(dtype).itemsize
    return next((tiles for limit, tiles in TILES.get(arch, {}).items() if row_bytes <= limit), None)
