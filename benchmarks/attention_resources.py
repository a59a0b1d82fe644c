"""What the Triton attention kernels need of a GPU, read from the compilers' output; no GPU needed.

Registers and spills are those of the code object's metadata (AMD) and of ptxas (NVIDIA), shared memory (LDS) that of
the launch. `waves` is how many wavefronts (AMD) or warps (NVIDIA) a SIMD holds at once, in whole blocks, by registers
and shared memory alone.

python benchmarks/attention_resources.py --target mi300x
python benchmarks/attention_resources.py --target h100 --head-dims 128 --tiles 'forward=128,64,8,2;dq=64,64,4,2'
"""

# ruff: noqa: E402 -- what the compilers read must be set before they are loaded

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

DUMP = Path(tempfile.mkdtemp(prefix="attention_resources_"))
# Read when the compilers start: the first keeps AMD's objects, both say where.
os.environ["TF_ROCM_KEEP_XLA_TEMPFILES"], os.environ["TMPDIR"] = "1", str(DUMP)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"

import jax
import msgpack
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.ops.kernels import TritonKernel, arch_of, delta
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.kernels.tiles import Tile, Tiles, find_tiles

NAMES = {"forward": "_forward_kernel", "dq": "_dq_kernel", "dkv": "_dkv_kernel"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Which kernels to compile."""

    target: str = "mi300x"
    head_dims: str = "64,128"
    group: int = 1
    """query heads per KV head"""
    dtype: str = "bfloat16"
    seq_len: int = 131072
    ranks: int = 8
    tiles: str = ""
    """tiles to compile instead of those of `tiles.TILES`: forward=QUERY,KEY,WARPS,STAGES;dq=...;dkv=...; several of a
    kernel are compiled one after another"""


def compile_kernels(mesh: Mesh, args: Args, head_dim: int, tiles: Tiles) -> None:
    """Compiles forward and backward for one rank; the compilers write their output to `DUMP`."""
    length, heads = args.seq_len // args.ranks, 4
    kernel = TritonKernel(arch_of(mesh), tiles)

    def like(*shape: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def run(q, k, v, dout, queries, keys):
        out, lse = kernel.attend(q, k, v, queries, keys)
        return out, kernel.attend_backward(q, k, v, queries, keys, delta(out, dout), lse, dout)

    q = like(1, length, heads, args.group, head_dim, dtype=args.dtype)
    k = like(1, args.seq_len, heads, head_dim, dtype=args.dtype)
    queries, keys = (Tokens(like(1, n), like(1, n)) for n in (length, args.seq_len))
    specs = jax.tree.map(lambda _: PartitionSpec(), (q, k, k, q, queries, keys))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    jax.jit(sharded).lower(q, k, k, q, queries, keys).compile()


def read(platform: str) -> dict[str, dict[str, Any]]:
    """Function name -> resources in the last compilation's output; empties `DUMP`."""
    found: dict[str, dict[str, Any]] = {}
    for file in DUMP.glob("*.thunk_sequence.txt"):
        for name, shared in re.findall(r"(_\w+_kernel) grid:.*shared_memory: (\d+) bytes", file.read_text()):
            found[name] = {"shared_bytes": int(shared)}
    for file in DUMP.glob("*.o" if platform == "rocm" else "*.ptx"):
        for name, facts in _amd(file) if platform == "rocm" else _nvidia(file):
            found.get(name, {}).update(facts)
    for file in DUMP.iterdir():
        file.unlink()
    return found


def _amd(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Resources from the note NT_AMDGPU_METADATA of an ELF object."""
    data = file.read_bytes()
    note = data.find(b"AMDGPU\0\0")
    if note < 0:
        return
    name_size, size, _ = struct.unpack_from("<III", data, note - 12)
    start = note + -(-name_size // 4) * 4
    for kernel in msgpack.unpackb(data[start : start + size])["amdhsa.kernels"]:
        registers = kernel[".vgpr_count"]
        yield (
            kernel[".name"],
            {
                "registers": registers,
                "of_them_accumulators": kernel.get(".agpr_count", 0),
                "spilled_registers": kernel[".vgpr_spill_count"],
                "stack_bytes": kernel[".private_segment_fixed_size"],
                "waves_by_registers": 512 // (-(-registers // 8) * 8),
            },
        )


def _nvidia(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Resources that ptxas prints for a PTX file."""
    text = file.read_text()
    name = re.search(r"\.entry (_\w+_kernel)\(", text)
    if not name:
        return
    gpu = re.search(r"\.target (\w+)", text)
    assert gpu
    command = [str(_ptxas()), "-v", "--gpu-name", gpu[1], str(file), "-o", os.devnull]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", printed)[0])
    stack, stores, _ = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", printed))
    yield (
        name[1],
        {
            "registers": registers,
            "spilled_registers": stores // 4,
            "stack_bytes": stack,
            "waves_by_registers": 512 // (-(-registers // 8) * 8),
        },
    )


@functools.cache
def _ptxas() -> Path:
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert spec and spec.submodule_search_locations, "pip install nvidia-cuda-nvcc-cu12"
    return Path(next(iter(spec.submodule_search_locations))) / "bin" / "ptxas"


def candidates(args: Args, arch: str, head_dim: int) -> Iterator[Tiles]:
    """The i-th tiles of every kernel in `args`, together; those of `tiles.TILES` where a kernel has no i-th."""
    chosen = find_tiles(arch, head_dim, args.dtype)
    assert chosen, f"no tiles for heads of {head_dim} {args.dtype} on {arch}"
    asked: dict[str, list[Tile]] = {name: [] for name in NAMES}
    for item in filter(None, args.tiles.split(";")):
        name, _, sizes = item.partition("=")
        asked[name].append(Tile(*map(int, sizes.split(","))))
    for i in range(max(1, *map(len, asked.values()))):
        yield chosen._replace(**{name: tiles[i] for name, tiles in asked.items() if i < len(tiles)})


def main(args: Args) -> None:
    """Prints a JSON line for each kernel."""
    target = parse_target(f"{args.target}:8")
    use_target(target)
    platform = target.hardware.platform
    mesh = Mesh(np.array(target.devices()), ("ranks",), axis_types=(AxisType.Auto,))
    block_shared, threads = (65536, 64) if platform == "rocm" else (232448, 32)
    done = set()
    for head_dim in map(int, args.head_dims.split(",")):
        for tiles in candidates(args, arch_of(mesh), head_dim):
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
                try:
                    compile_kernels(mesh, args, head_dim, tiles)
                except jax.errors.JaxRuntimeError as error:
                    print(json.dumps({"tiles": tiles, "error": str(error).splitlines()[0][:200]}), flush=True)
                    continue
            found = read(platform)
            for kernel, tile in tiles._asdict().items():
                if (head_dim, kernel, tile) in done:  # compiled before: the compiler caches it and writes no file
                    continue
                done.add((head_dim, kernel, tile))
                facts = found[NAMES[kernel]]
                # A block's warps are spread over the four SIMDs of a compute unit.
                by_registers = facts.pop("waves_by_registers") * 4 // tile.warps
                waves = min(by_registers, block_shared // max(1, facts["shared_bytes"])) * tile.warps // 4
                line = {"target": args.target, "kernel": kernel, "head_dim": head_dim, **tile._asdict(), **facts}
                print(json.dumps({**line, "waves": waves, "threads": tile.warps * threads}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
