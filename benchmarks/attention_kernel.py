"""Time and error of attention kernels, forward and backward, at one rank's shape; runs alternate.

Queries are one rank's zigzag tokens, keys all ranks'. cuDNN knows no positions: it gets a causal square with as many
allowed pairs, and its time is scaled by what rounding changed. The rates printed, over `Hardware.sustained_flops`, are
what `Hardware.attention_forward` and `attention_backward` assume.

On a GPU: python benchmarks/attention_kernel.py
On a CPU, interpreted, to see that it runs: python benchmarks/attention_kernel.py --seq-len 256 --ranks 4 --head-dim 16
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from tsp_jax.layout import make_mesh
from tsp_jax.ops import kernels
from tsp_jax.ops.kernels.xla import Blocks, Tokens
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


class Runs(NamedTuple):
    """One kernel on its inputs."""

    forward: Callable[[], Any]
    both: Callable[[], tuple[jax.Array, ...]]
    """forward and backward: (out, dq, dk, dv)"""
    scale: float = 1.0
    """how many of our pairs of tokens are one of its"""


def ours(arch: str, blocks: Blocks, arrays: tuple[Any, ...]) -> Runs:
    """One of our kernels."""
    q, k, v, dout, *tokens = arrays

    @jax.jit
    def forward(q, k, v, queries, keys):
        return kernels.attend(arch, q, k, v, queries, keys, blocks)

    @jax.jit
    def both(q, k, v, dout, queries, keys):
        out, lse = kernels.attend(arch, q, k, v, queries, keys, blocks)
        return out, *kernels.attend_backward(arch, q, k, v, queries, keys, kernels.delta(out, dout), lse, dout, blocks)

    return Runs(lambda: forward(q, k, v, *tokens), lambda: both(q, k, v, dout, *tokens))


def cudnn(args: Args, allowed_pairs: int) -> Runs:
    """cuDNN's causal attention over a square of as much work."""
    length = max(128, round((2 * allowed_pairs) ** 0.5 / 128) * 128)
    heads = (1, length, args.kv_heads * args.group, args.head_dim), (1, length, args.kv_heads, args.head_dim)
    q, k, v, dout = (jax.random.normal(jax.random.key(i), heads[i in (1, 2)]).astype(args.dtype) for i in range(4))

    @jax.jit
    def forward(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    @jax.jit
    def both(q, k, v, dout):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, *vjp(dout)

    scale = allowed_pairs / (length * (length + 1) / 2)
    return Runs(lambda: forward(q, k, v), lambda: both(q, k, v, dout), scale)


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
    arch = "interpret" if device.platform == "cpu" else kernels.choose("fused", mesh, args.head_dim, args.dtype)
    arrays, blocks = inputs(args), Blocks(args.blocks, args.blocks)
    allowed_pairs = int((np.asarray(arrays[-2].positions[0], np.int64) + 1).sum())
    runs = {"fused": ours(arch, blocks, arrays), "xla": ours("", blocks, arrays)}
    if arch.startswith("sm_"):
        runs["cudnn"] = cudnn(args, allowed_pairs)
    with jax.default_matmul_precision("highest"):
        exact = ours("", blocks, (*(x.astype(jnp.float32) for x in arrays[:4]), *arrays[4:])).both()
        jax.block_until_ready(exact)
    error = {name: errors(runs[name].both(), exact) for name in ("fused", "xla")}
    times = measure(runs, args.pairs)
    products = 2 * allowed_pairs * args.head_dim * args.kv_heads * args.group
    for name, (forward, both) in times.items():
        backward = statistics.median(b - f for f, b in zip(forward, both, strict=True))
        line = {
            "kernel": name,
            "seconds": statistics.median(both),
            "ratio": statistics.median(t / f for t, f in zip(both, times["fused"][1], strict=True)),
            # Of the 2 products of a forward and the 5 of a backward pass, whatever a kernel computes again.
            "tflops": 7 * products / statistics.median(both) / 1e12,
            "forward_tflops": 2 * products / statistics.median(forward) / 1e12,
            "backward_tflops": 5 * products / backward / 1e12,
            "max_error": error.get(name),
            "device": device.device_kind,
            "arch": arch,
            "jax": jax.__version__,
            "config": dataclasses.asdict(args),
        }
        print(json.dumps(line), flush=True)


def measure(runs: dict[str, Runs], pairs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Kernel -> (seconds forward, seconds of both), each `pairs` times after a warm-up; kernels alternate."""
    for run in runs.values():
        seconds(run.forward)
        seconds(run.both)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for _ in range(pairs):
        for name, run in runs.items():
            times[name][0].append(seconds(run.forward) * run.scale)
            times[name][1].append(seconds(run.both) * run.scale)
    return times


if __name__ == "__main__":
    main(tyro.cli(Args))
