"""What the TPU compiler makes of attention kernels, for one rank at 128 K tokens: bundles, spills, memory.

No TPU is needed. A core issues one bundle of instructions a cycle: apart from stalls, the bundles between two branches
are the cycles of that part of a kernel. The compiler's dump says which unit each bundle uses.

    python benchmarks/attention_tpu.py backward --tile 1024 1024 512
    python benchmarks/attention_tpu.py splash_backward --tile 1024 1024 512

`splash` is `jax.experimental.pallas.ops.tpu.splash_attention` with a causal mask and segments, on the same shapes.
"""

import argparse
import functools
import itertools
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

UNITS = {"MXU": 4, "XLU": 3, "VALU": 4, "VPOP": 2, "EUP": 1, "VLOAD": 3, "FILL": 3, "VSTORE": 1, "SPILL": 1, "SALU": 2}
"""unit -> how many of its instructions v5p has room for in a bundle, in the order of the dump"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="bundles, spills and memory of attention kernels on a TPU")
    parser.add_argument("kernel", choices=["forward", "backward", "splash_forward", "splash_backward"])
    parser.add_argument("--target", default="v5p", help="a kind of TPU that tsp_jax.hardware knows")
    parser.add_argument("--tile", type=int, nargs=3, metavar=("QUERY", "KEY", "PART"), help="default: the kernel's own")
    parser.add_argument("--fused", action="store_true", help="splash_backward: one kernel")
    parser.add_argument("--queries", type=int, default=16384)
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--least", type=int, default=250, help="least bundles of a part that is printed")
    return parser.parse_args()


def splash(args: argparse.Namespace):
    """(q, k, v, queries, keys) -> outputs, of splash attention; its heads come first."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (query, key, part), apart = args.tile, not args.fused
    sizes = kernel.BlockSizes(
        block_q=query, block_kv=key, block_kv_compute=part, block_q_dkv=query, block_kv_dkv=key,
        block_kv_dkv_compute=part, block_q_dq=query if apart else None, block_kv_dq=key if apart else None,
        use_fused_bwd_kernel=args.fused,
    )  # fmt: skip
    shape = args.queries, args.keys
    mask = masks.MultiHeadMask([masks.CausalMask(shape, offset=args.keys - args.queries)] * args.kv_heads * args.group)
    run = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return lambda q, k, v, queries, keys: run(q, k, v, kernel.SegmentIds(queries.segments[0], keys.segments[0]))


def gradients(attend: Any, q, k, v, queries: Any, keys: Any, dout):
    """(dq, dk, dv)"""
    import jax

    return jax.vjp(lambda *arrays: attend(*arrays, queries, keys), q, k, v)[1](dout)


def compile_kernel(args: argparse.Namespace) -> None:
    """Compiles the kernel of the arguments for one device, and prints temporary memory."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from tsp_jax.hardware.targets import Target, parse_target, use_target
    from tsp_jax.inspect.memory import compiled_memory
    from tsp_jax.ops.kernels import TpuKernel, arch_of
    from tsp_jax.ops.kernels.mask import Tokens
    from tsp_jax.ops.kernels.tpu_tiles import Tile, Tiles

    target: Target = parse_target(f"{args.target}:8")
    use_target(target)
    mesh = Mesh(np.array(target.devices()[:1]), ("tsp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())

    def like(*shape: int, dtype: str = args.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    queries, keys = (Tokens(*(like(1, n, dtype="int32"),) * 2) for n in (args.queries, args.keys))
    heads, size = args.kv_heads * args.group, args.head_dim
    if args.kernel.startswith("splash"):
        f, backward = splash(args), args.kernel.endswith("backward")
        q, k = like(heads, args.queries, size), like(args.kv_heads, args.keys, size)
        arguments = (q, k, k, queries, keys, *((q,) if backward else ()))
        if backward:
            f = functools.partial(gradients, f)
    else:
        kernel = TpuKernel(arch_of(mesh), Tiles(*(Tile(*args.tile),) * 3) if args.tile else None).within(args.queries)
        q, k = like(1, args.queries, args.kv_heads, args.group, size), like(1, args.keys, args.kv_heads, size)
        row = like(1, args.queries, args.kv_heads, args.group, dtype="float32")
        backward = args.kernel == "backward"
        f: Any = kernel.attend_backward if backward else kernel.attend
        arguments = (q, k, k, queries, keys, *((row, row, q) if backward else ()))
    start = time.time()
    compiled = jax.jit(f).lower(*arguments).compile()
    temporary = compiled_memory(compiled).temp_bytes
    print(f"{jax.__version__} {args}\ncompiled in {time.time() - start:.0f} s; temporaries {temporary / 1e6:.1f} MB")


def print_parts(folder: Path, least: int) -> None:
    """Prints the bundles of each kernel, and those between two branches with their use of each unit."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
        if "schedule-analysis" in name or not re.search("mean_flops|splash", name):
            continue
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", str(path))
        (units,) = Path(stem).parent.glob(f"{Path(stem).name}-*-final_hlo-static-per-bundle-utilization.txt")
        used = [
            [int(n) for n in line.split()] for line in units.read_text().splitlines() if re.match(r"\d[ \d]+$", line)
        ]
        bundles = re.findall(r"(?m)^\s*(0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:(.*)", path.read_text())
        branches = [0, *(int(at, 16) for at, text in bundles if "sbr.rel" in text), int(bundles[-1][0], 16)]
        print(f"{name}: {branches[-1]} bundles")
        for first, last in itertools.pairwise(branches):
            if last - first > least:
                totals = (sum(column) for column in zip(*used[first:last], strict=True))
                share = {unit: n / (last - first) / UNITS[unit] for unit, n in zip(UNITS, totals, strict=True)}
                print(
                    f"  {last - first:6d}  " + "  ".join(f"{unit} {x:.0%}" for unit, x in share.items() if x >= 0.005)
                )


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}"
        compile_kernel(args)
        print_parts(Path(folder), args.least)


if __name__ == "__main__":
    main()
