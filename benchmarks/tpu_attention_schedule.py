"""What share of a TPU's peak can an attention kernel reach by its compiled schedule?

No rate of a TPU attention kernel alone is published. The compiler's final schedule of jax's splash attention says how
many cycles the inner loop takes if nothing stalls. The share is the fewest cycles in which the matrix units could do
the loop's products, over the cycles of the loop. It is compiled, not measured, and fitted to nothing.

Command:  python benchmarks/tpu_attention_schedule.py v5p 256    (kind of TPU, head size); needs aot-tpu
Result:   benchmarks/tpu_attention_schedule.md
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FLOPS_PER_CYCLE = {"v5e": 4 * 128 * 128 * 2, "v5p": 4 * 128 * 128 * 2, "v7x": 4 * 256 * 256 * 2}
"""of one core's matrix units; v7x: two units of 256 x 256 that take two rows a cycle (2.2 GHz make 1,153 TFLOP/s)"""
QUERY, KEY, PART = 1024, 1024, 512
"""tokens of a tile of queries, of keys, and of the part of the keys that is computed at once"""
PRODUCTS = {"fwd": 2, "dkv": 5}
"""kernel -> products for each pair of query and key"""


def compile_splash(kind: str, head_dim: int) -> None:
    """Compiles forward and fused backward for one core; LIBTPU_INIT_ARGS says where schedules are written."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tsp_jax.hardware.targets import parse_target, use_target

    target = parse_target(f"{kind}:8")
    use_target(target)
    mesh = Mesh(np.array(target.devices()[:1]), ("x",))
    tokens = 4 * QUERY
    blocks = splash.BlockSizes(
        block_q=QUERY, block_kv=KEY, block_kv_compute=PART, block_q_dkv=QUERY, block_kv_dkv=KEY,
        block_kv_dkv_compute=PART, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens))])
    attend = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    x = jax.ShapeDtypeStruct((1, tokens, head_dim), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)).lower(x, x, x, x).compile()


def loop_cycles(text: str) -> int:
    """Bundles of the longest stretch without a branch: the products of a tile."""
    rows = [
        (int(found[1], 16), line) for line in text.splitlines() if (found := re.match(r"\s*(0x[0-9a-f]+|0)\s", line))
    ]
    edges = [0, *(address for address, line in rows if "sbr.rel" in line), rows[-1][0]]
    return max(b - a for a, b in itertools.pairwise(edges))


def main() -> None:
    """Compiles in a process of its own and prints a line for each kernel."""
    kind, head_dim = sys.argv[1], int(sys.argv[2])
    if "--compile" in sys.argv:
        return compile_splash(kind, head_dim)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, *sys.argv, "--compile"], env=os.environ | {"LIBTPU_INIT_ARGS": flags}, check=True
        )
        for kernel, products in PRODUCTS.items():
            (file,) = [
                f for f in Path(folder).glob(f"*splash_mha_{kernel}*-final_bundles.txt") if "analysis" not in f.name
            ]
            cycles = loop_cycles(file.read_text())
            fewest = products * 2 * QUERY * KEY * head_dim / FLOPS_PER_CYCLE[kind]
            share = min(1.0, fewest / cycles)
            print(f"{kind}, heads of {head_dim}, {kernel}: {cycles} cycles, {fewest:.0f} at peak: {share:.0%}")


if __name__ == "__main__":
    main()
