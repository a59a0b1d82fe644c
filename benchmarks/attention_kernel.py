"""Time and error of attention kernels, forward and backward, at one rank's shape; runs alternate.

Queries are one rank's zigzag tokens, keys all ranks'. cuDNN knows no positions: it gets a causal square with as many
allowed pairs, and its time is scaled by what rounding changed.

On a GPU: python benchmarks/attention_kernel.py
On a CPU, interpreted, to see that it runs: python benchmarks/attention_kernel.py --seq-len 256 --ranks 4 --head-dim 16
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from tsp_jax.layout import make_mesh
from tsp_jax.ops import kernels
from tsp_jax.ops.kernels.blockwise import Blocks, Tokens
from tsp_jax.training.data import sequence_order


@dataclasses.dataclass(frozen=True)
class Args:
    """What to time."""

    seq_len: int = 131072
    ranks: int = 8
    rank: int = 0
    kv_heads: int = 4
    group: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"
    blocks: int = 512
    """of the XLA kernel"""
    pairs: int = 10


def inputs(args: Args) -> tuple[Any, ...]:
    """(q, k, v, dout, queries, keys)"""
    order = sequence_order(args.seq_len, args.ranks, "zigzag").astype(np.int32)
    length = args.seq_len // args.ranks
    here = order[args.rank * length : (args.rank + 1) * length]
    keys = [jax.random.normal(jax.random.key(i), (1, args.seq_len, args.kv_heads, args.head_dim)) for i in range(2)]
    heads = (1, length, args.kv_heads, args.group, args.head_dim)
    queries = [jax.random.normal(jax.random.key(i), heads) for i in range(2, 4)]
    tokens = [Tokens(jnp.asarray(x)[None], jnp.zeros((1, len(x)), jnp.int32)) for x in (here, order)]
    return *(x.astype(args.dtype) for x in (queries[0], *keys, queries[1])), *tokens


def forward_backward(arch: str, blocks: Blocks) -> Callable[..., tuple[jax.Array, ...]]:
    """(out, dq, dk, dv) of one of our kernels."""

    def run(q, k, v, dout, queries, keys):
        out, lse = kernels.attend(arch, q, k, v, queries, keys, blocks)
        return out, *kernels.attend_backward(arch, q, k, v, queries, keys, out, lse, dout, blocks)

    return jax.jit(run)


def cudnn(args: Args, allowed_pairs: int) -> tuple[Callable[[], Any], float]:
    """A run of cuDNN's causal attention, and how many pairs of ours are one of its."""
    length = max(128, round((2 * allowed_pairs) ** 0.5 / 128) * 128)
    heads = (1, length, args.kv_heads * args.group, args.head_dim), (1, length, args.kv_heads, args.head_dim)
    q, k, v, dout = (jax.random.normal(jax.random.key(i), heads[i in (1, 2)]).astype(args.dtype) for i in range(4))

    @jax.jit
    def run(q, k, v, dout):
        def attend(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return lambda: run(q, k, v, dout), allowed_pairs / (length * (length + 1) / 2)


def errors(actual: Any, desired: Any) -> dict[str, float]:
    """Greatest error of each array over its greatest value."""
    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, actual, desired, strict=True)
    return {name: float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()) for name, x, y in pairs}


def seconds(run: Callable[[], Any]) -> float:
    """Of one run, to the end."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main(args: Args) -> None:
    """Prints a JSON line for each kernel; `ratio` is time over that of the fused kernel, pair by pair."""
    device = jax.devices()[0]
    mesh = make_mesh({"one": 1}, [device])
    on_cpu = device.platform == "cpu"
    arch = "interpret" if on_cpu else kernels.choose("fused", mesh, args.head_dim, args.dtype)
    arrays, blocks = inputs(args), Blocks(args.blocks, args.blocks)
    positions = np.asarray(arrays[-2].positions[0], np.int64)
    allowed_pairs = int((positions + 1).sum())
    run_fused, run_xla = forward_backward(arch, blocks), forward_backward("", blocks)
    runs = {"fused": (lambda: run_fused(*arrays), 1.0), "xla": (lambda: run_xla(*arrays), 1.0)}
    if arch.startswith("sm_"):
        runs["cudnn"] = cudnn(args, allowed_pairs)
    with jax.default_matmul_precision("highest"):
        exact = run_xla(*(x.astype(jnp.float32) for x in arrays[:4]), *arrays[4:])
        jax.block_until_ready(exact)
    error = {name: errors(runs[name][0](), exact) for name in ("fused", "xla")}
    times = {name: [] for name in runs}
    for run, _ in runs.values():
        seconds(run)
    for _ in range(args.pairs):
        for name, (run, scale) in runs.items():
            times[name].append(seconds(run) * scale)
    operations = 14 * allowed_pairs * args.head_dim * args.kv_heads * args.group
    for name, taken in times.items():
        line = {
            "kernel": name,
            "seconds": statistics.median(taken),
            "ratio": statistics.median(t / f for t, f in zip(taken, times["fused"], strict=True)),
            "tflops": operations / statistics.median(taken) / 1e12,
            "max_error": error.get(name),
            "device": device.device_kind,
            "arch": arch,
            "jax": jax.__version__,
            "config": dataclasses.asdict(args),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
