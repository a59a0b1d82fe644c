"""Tile sizes of the TPU kernels on each generation."""

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


_LARGE = Tiles(Tile(1024, 1024, 512), Tile(1024, 1024, 512), Tile(1024, 1024, 512))
TILES = dict.fromkeys(("tpu_v5p", "tpu_v5e", "tpu_v6e", "tpu_v7x"), _LARGE)
"""arch -> tiles"""
TILES["interpret"] = Tiles(Tile(8, 12, 6), Tile(8, 12, 4), Tile(12, 8, 4))
