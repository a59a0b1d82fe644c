"""Tile sizes of the Triton kernels on each GPU."""

from typing import Any, NamedTuple

import jax.numpy as jnp


class Tile(NamedTuple):
    """How much one Triton program keeps in registers at a time, and how it is compiled."""

    query: int
    """query tokens; a power of two"""
    key: int
    """key tokens; a power of two"""
    warps: int
    """number of warps, of 64 threads on AMD and of 32 on NVIDIA"""
    stages: int
    """depth of the pipeline that loads tiles ahead"""


class Tiles(NamedTuple):
    """One tile per kernel."""

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
    128: Tiles(Tile(128, 128, 4, 3), Tile(64, 128, 4, 2), Tile(128, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
    512: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(64, 64, 8, 2)),
}
_SMALL = Tiles(Tile(8, 8, 4, 1), Tile(8, 4, 4, 1), Tile(4, 8, 4, 1))
TILES = {"gfx942": _AMD, "gfx950": _CDNA4, "sm_90": _HOPPER, "interpret": {1 << 30: _SMALL}}
"""arch -> most bytes that one token's head may have -> tiles. These are the largest tiles that the compilers keep in
registers; none of them has been timed.

AMD: both operands use LDS in turn (16 to 64 KiB), so registers are the limit. A second stage would leave one wavefront
per SIMD; forward needs two wavefronts, which hide each other's latency. A wavefront computes 32 rows of a product: with
16 rows, and eight wavefronts per block, reading LDS would take as long as multiplying.
Hopper: a warp group computes 64 rows of a product; the tiles take 96 to 200 KiB of shared memory. A third stage loads
the visit lists ahead of the tiles.
interpret: small tiles, so that short test sequences have many of them.
benchmarks/attention_kernel.md says what the compilers made of these and other sizes.
"""


def padded_head_dim(head_dim: int) -> int:
    """Head dim inside the kernels: Triton needs dims that are powers of two, and at least 16 in products."""
    return max(16, 1 << (head_dim - 1).bit_length())


def find_tiles(arch: str, head_dim: int, dtype: Any) -> Tiles | None:
    """The tiles for heads of this size and dtype on an architecture; None if there are none."""
    head_bytes = padded_head_dim(head_dim) * jnp.dtype(dtype).itemsize
    return next((tiles for limit, tiles in TILES.get(arch, {}).items() if head_bytes <= limit), None)
