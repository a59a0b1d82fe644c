"""What the Triton kernels of grouped products need of a GPU, read from the compilers' output; no GPU needed.

As `attention_resources.py`, for the products of Qwen3-30B-A3B's experts: a slab of 8,192 rows, 8 experts of 768 rows.

python benchmarks/grouped_resources.py --target mi300x
python benchmarks/grouped_resources.py --target h100 --blocks '128,128,64,4,3;128,128,64,8,3'
"""

import dataclasses
from typing import Any

import attention_resources as resources  # sets what the compilers read before they are loaded
import jax
import numpy as np
import tyro
from grouped import products
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.ops.grouped import BLOCKS, Blocks, KernelBlocks, Slab, TritonGrouped
from tsp_jax.ops.kernels import arch_of

ROWS, EXPERTS, D_FF, D_MODEL, TILE = 8192, 8, 768, 2048, 128


@dataclasses.dataclass(frozen=True)
class Args:
    """Which kernels to compile."""

    target: str = "mi300x"
    blocks: str = ""
    """ROWS,COLUMNS,INNER,WARPS,STAGES; several, separated by semicolons, are compiled one after another. By default
    those of `grouped.BLOCKS`"""


def main(args: Args) -> None:
    """Prints a line for each kernel and blocks."""
    target = parse_target(f"{args.target}:1")
    use_target(target)
    mesh = Mesh(np.array(target.devices()), ("one",), axis_types=(AxisType.Auto,))
    arch = arch_of(mesh)
    every = [KernelBlocks(*4 * [Blocks(*map(int, each.split(",")))]) for each in args.blocks.split(";") if each]

    def like(*shape: int, dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    tiles = ROWS // TILE
    places: Any = np.arange(tiles, dtype=np.int32) * EXPERTS // tiles
    filled: Any = np.int32(tiles)
    slab = Slab(places, EXPERTS, filled, TILE, tiles, ROWS / EXPERTS)
    x, h, w = like(ROWS, D_MODEL), like(ROWS, D_FF), like(EXPERTS, D_FF, D_MODEL)
    for blocks in every or [BLOCKS[arch]]:
        kernel = TritonGrouped(arch, blocks)
        arrays = {"gate and up": (x, w), "one product": (x, w), "down": (h, w), "dx": (h, h, w), "outer": (h, x)}
        for name, call in products(kernel, slab).items():
            part = {"gate and up": "pair", "dx": "total", "outer": "outer"}.get(name, "one")
            jax.jit(call).lower(*arrays[name]).compile()
            for facts in resources.read(target.hardware.platform).values():
                print(f"{args.target}, blocks {tuple(getattr(blocks, part))[:5]}, {name}: {facts}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
