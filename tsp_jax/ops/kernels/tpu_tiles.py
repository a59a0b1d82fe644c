"""Tile sizes of the TPU kernels on each generation, and what a core has."""

import math
from typing import NamedTuple

LANES = 128
"""lanes of a vector register; tiles of tokens are multiples of it"""


class Tile(NamedTuple):
    """How much one step of a TPU kernel's grid has in VMEM."""

    query: int
    """query tokens"""
    key: int
    """key tokens"""
    part: int
    """tokens of the passing tile that one matrix product takes"""


class Tiles(NamedTuple):
    """One tile per kernel."""

    forward: Tile
    dq: Tile
    dkv: Tile


class Core(NamedTuple):
    """What limits a kernel on one generation of TPUs."""

    cores: int
    """cores of a JAX device, which share the grid of a kernel"""
    vmem_bytes: int
    """VMEM of a core that a kernel may use; a little less than there is"""
    tiles: Tiles


_TILES = Tiles(Tile(1024, 1024, 512), Tile(1024, 1024, 512), Tile(1024, 1024, 512))
_SMALL = Tiles(Tile(8, 12, 6), Tile(8, 12, 4), Tile(12, 8, 4))
_MIB = 1 << 20
CORES = {
    "tpu_v5p": Core(2, 60 * _MIB, _TILES),
    "tpu_v5e": Core(1, 100 * _MIB, _TILES),
    "tpu_v6e": Core(1, 100 * _MIB, _TILES),
    "tpu_v7x": Core(1, 60 * _MIB, _TILES),
    "interpret": Core(2, 60 * _MIB, _SMALL),
}
"""arch -> core. The compiler of libtpu 0.0.42.1 refuses more VMEM than 63, 128, 127 and 64 MiB.

interpret: small tiles, so that short test sequences have many of them.
benchmarks/attention_tpu.md says what the compiler made of these and other sizes.
"""


def fit(tile: Tile, by_key: bool, q_len: int, k_len: int, chunk: int, unit: int) -> Tile:
    """A tile no longer than the tokens in whole units; it divides the chunk, if that is whole units."""

    def size(wanted: int, length: int) -> int:
        wanted = min(wanted, -(-length // unit) * unit)
        return math.gcd(wanted, chunk) if chunk and chunk % unit == 0 else wanted

    query, key = size(tile.query, q_len), size(tile.key, k_len)
    return Tile(query, key, math.gcd(tile.part, query if by_key else key))
