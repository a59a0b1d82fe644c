"""Times attention kernels, forward and backward, at one rank's shape, and compares their errors; runs alternate.

Queries are one rank's zigzag tokens, keys those of all ranks. cuDNN takes no positions: it gets a causal square with as
many allowed pairs, up to rounding, for which its time is corrected. The rates printed count 2
products a pair in forward and 5 in backward; those of `tsp_jax.hardware.rates` count all that a kernel executes.

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

from tsp_jax.mesh import make_mesh
from tsp_jax.ops.kernels import Kernel, TritonKernel, XlaKernel, arch_of, choose_kernel, delta
from tsp_jax.ops.kernels.mask import Tokens
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
    """tokens in a block of the XLA kernel"""
    pairs: int = 10
    """runs of each kernel"""


def inputs(args: Args) -> tuple[Any, ...]:
    """(q, k, v, dout, queries, keys)"""
    order = sequence_order(args.seq_len, args.ranks, "zigzag").astype(np.int32)
    length = args.seq_len // args.ranks
    own = order[args.rank * length : (args.rank + 1) * length]
    keys = [jax.random.normal(jax.random.key(i), (1, args.seq_len, args.kv_heads, args.head_dim)) for i in range(2)]
    heads = (1, length, args.kv_heads, args.group, args.head_dim)
    queries = [jax.random.normal(jax.random.key(i), heads) for i in range(2, 4)]
    tokens = [Tokens(jnp.asarray(x)[None], jnp.zeros((1, len(x)), jnp.int32)) for x in (own, order)]
    return *(x.astype(args.dtype) for x in (queries[0], *keys, queries[1])), *tokens


class Runs(NamedTuple):
    """One kernel on its inputs."""

    forward: Callable[[], Any]
    both: Callable[[], tuple[jax.Array, ...]]
    """forward and backward: (out, dq, dk, dv)"""
    scale: float = 1.0
    """our allowed pairs of tokens over those of this kernel's inputs"""


def runs_of(kernel: Kernel, arrays: tuple[Any, ...]) -> Runs:
    """A kernel of this package."""
    q, k, v, dout, *tokens = arrays

    @jax.jit
    def forward(q, k, v, queries, keys):
        return kernel.attend(q, k, v, queries, keys)

    @jax.jit
    def both(q, k, v, dout, queries, keys):
        out, lse = kernel.attend(q, k, v, queries, keys)
        return out, *kernel.attend_backward(q, k, v, queries, keys, delta(out, dout), lse, dout)

    return Runs(lambda: forward(q, k, v, *tokens), lambda: both(q, k, v, dout, *tokens))


def cudnn(args: Args, allowed_pairs: int) -> Runs:
    """cuDNN's causal attention over a square of T = S tokens with about as many allowed pairs."""
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
    """Seconds of one run, until its results are ready."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main(args: Args) -> None:
    """Prints a JSON line for each kernel; `ratio` is its time over that of triton, run by run."""
    device = jax.devices()[0]
    mesh = make_mesh({"one": 1}, [device])
    triton = TritonKernel("interpret")
    if device.platform != "cpu":
        triton = choose_kernel("triton", mesh, args.head_dim, args.dtype)
    arrays, xla = inputs(args), XlaKernel(args.blocks, args.blocks)
    allowed_pairs = int((np.asarray(arrays[-2].positions[0], np.int64) + 1).sum())
    runs = {"triton": runs_of(triton, arrays), "xla": runs_of(xla, arrays)}
    if arch_of(mesh).startswith("sm_"):
        runs["cudnn"] = cudnn(args, allowed_pairs)
    with jax.default_matmul_precision("highest"):
        exact = runs_of(xla, (*(x.astype(jnp.float32) for x in arrays[:4]), *arrays[4:])).both()
        jax.block_until_ready(exact)
    error = {name: errors(runs[name].both(), exact) for name in ("triton", "xla")}
    times = measure(runs, args.pairs)
    products = 2 * allowed_pairs * args.head_dim * args.kv_heads * args.group
    for name, (forward, both) in times.items():
        backward = statistics.median(b - f for f, b in zip(forward, both, strict=True))
        line = {
            "kernel": name,
            "seconds": statistics.median(both),
            "ratio": statistics.median(t / f for t, f in zip(both, times["triton"][1], strict=True)),
            # 2 products forward and 5 backward: what a kernel recomputes is not counted.
            "tflops": 7 * products / statistics.median(both) / 1e12,
            "forward_tflops": 2 * products / statistics.median(forward) / 1e12,
            "backward_tflops": 5 * products / backward / 1e12,
            "max_error": error.get(name),
            "device": device.device_kind,
            "arch": arch_of(mesh),
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
