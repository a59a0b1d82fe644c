"""Checks and times cuDNN's attention on pairs of chunks (`tsp_jax.ops.kernels.cudnn`) on one GPU, in about a minute.

First values and gradients against plain mathematics in float32, for each zigzag rank; then times, and how much memory
cuDNN's workspace takes. A case that fails prints its error, and the next case runs. The last line counts failures.

On a GPU:                          python benchmarks/attention_cudnn_check.py
On a CPU, to see that it runs:     python benchmarks/attention_cudnn_check.py --pair xla --lengths 64 --times 256
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsp_jax.ops.kernels import CudnnKernel, Kernel, TritonKernel, XlaKernel, delta
from tsp_jax.ops.kernels.chunk_pairs import PairKernel, XlaPairKernel
from tsp_jax.ops.kernels.mask import Tokens

TOLERANCE = 0.02
"""largest error over the largest value: bfloat16 has 8 bits, and each pair's result is rounded"""


def tokens_of(length: int, ranks: int, rank: int) -> tuple[Tokens, Tokens]:
    """(queries of one zigzag rank, keys of all ranks), one document of `length` tokens."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * ranks, -1)
    order = np.concatenate([chunks[[i, 2 * ranks - 1 - i]].reshape(-1) for i in range(ranks)])
    keys, own = order[None], order.reshape(ranks, -1)[rank][None]
    return tuple(Tokens.one_document(jnp.asarray(positions)) for positions in (own, keys))


def arrays_of(length: int, ranks: int, heads: tuple[int, int, int]) -> list[jax.Array]:
    """q, k, v and dout in bfloat16, for (KV heads, query heads per KV head, dims of a head)."""
    kv_heads, group, head_dim = heads
    queries, keys = (1, length // ranks, kv_heads, group, head_dim), (1, length, kv_heads, head_dim)
    shapes = [queries, keys, keys, queries]
    return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]


def run(kernel: Kernel, q, k, v, dout, queries, keys):
    """(out, lse, dq, dk, dv)"""
    out, lse = kernel.attend(q, k, v, queries, keys)
    return out, lse, *kernel.attend_backward(q, k, v, queries, keys, delta(out, dout), lse, dout)


def plain(q, k, v, dout, queries, keys):
    """`run` by plain mathematics in float32."""

    def f(q, k, v):
        with jax.default_matmul_precision("highest"):
            scores = jnp.einsum("btkgh,bskh->btkgs", q, k) * q.shape[-1] ** -0.5
            allowed = keys.positions[:, None] <= queries.positions[:, :, None]
            scores = jnp.where(allowed[:, :, None, None], scores, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1)
            return jnp.einsum("btkgs,bskh->btkgh", weights, v), jax.nn.logsumexp(scores, axis=-1)

    (out, lse), vjp = jax.vjp(f, *(x.astype(jnp.float32) for x in (q, k, v)))
    return out, lse, *vjp((dout.astype(jnp.float32), jnp.zeros_like(lse)))


def check(kernel: PairKernel, length: int, ranks: int, rank: int, heads: tuple[int, int, int]) -> dict[str, Any]:
    """Largest errors over largest values."""
    queries, keys = tokens_of(length, ranks, rank)
    arrays = arrays_of(length, ranks, heads)
    kernel = kernel.within(length // ranks)
    found = jax.jit(functools.partial(run, kernel))(*arrays, queries, keys)
    errors = {}
    wanted = jax.jit(plain)(*arrays, queries, keys)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        errors[name] = float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
    assert all(error < TOLERANCE for error in errors.values()), errors
    return {name: f"{error:.1e}" for name, error in errors.items()}


def seconds_of(compiled: Any, *arrays: Any) -> float:
    """Median of five runs after one."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def clock(kernel: Kernel, length: int, ranks: int, heads: tuple[int, int, int]) -> dict[str, Any]:
    """Seconds and TFLOP/s of forward and backward on the last rank; of pairs of tokens only allowed ones count.

    Backward counts five products a pair. `temp_mib` is the compiled programs' temporary memory, cuDNN's workspace
    included.
    """
    queries, keys = tokens_of(length, ranks, ranks - 1)
    q, k, v, dout = arrays_of(length, ranks, heads)
    kernel = kernel.within(length // ranks)
    flops = 2.0 * heads[0] * heads[1] * heads[2] * length**2 / 2 / ranks
    forward = jax.jit(kernel.attend).lower(q, k, v, queries, keys).compile()
    out, lse = forward(q, k, v, queries, keys)
    inputs = q, k, v, queries, keys, delta(out, dout), lse, dout
    backward = jax.jit(kernel.attend_backward).lower(*inputs).compile()
    result = {}
    for name, compiled, products, args in (("forward", forward, 2, inputs[:5]), ("backward", backward, 5, inputs)):
        seconds = seconds_of(compiled, *args)
        memory = compiled.memory_analysis()
        temp = round(memory.temp_size_in_bytes / 2**20) if memory else None
        result[name] = {"ms": round(seconds * 1e3, 3), "tflops": round(products * flops / seconds / 1e12, 1)}
        result[name]["temp_mib"] = temp
    return result


def attempt(name: str, f: Any, *args: Any) -> bool:
    """Prints what a case returns, or its error; whether it ran."""
    start = time.perf_counter()
    try:
        line = {"case": name, **f(*args)}
    except Exception as error:
        text = traceback.format_exception_only(error)[-1].strip()
        line = {"case": name, "failed": text[:600]}
    print(json.dumps(line | {"took_s": round(time.perf_counter() - start, 1)}), flush=True)
    return "failed" not in line


def main() -> None:
    """Runs all cases within `--budget` seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pair", choices=["cudnn", "xla"], default="cudnn")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--times", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--only", choices=["check", "time"], default="", help="leave the other cases out")
    parser.add_argument("--budget", type=float, default=75.0, help="seconds after which no other case starts")
    args = parser.parse_args()
    device = jax.devices()[0]
    arch = f"sm_{str(getattr(device, 'compute_capability', '')).replace('.', '')}"
    kernel = CudnnKernel.for_arch(arch) if args.pair == "cudnn" else XlaPairKernel()
    # No case needs the branch for other tokens; with Triton in it, each case compiles for 17 to 27 s.
    kernel = dataclasses.replace(kernel, others=(XlaKernel(),))
    print(
        json.dumps({"device": device.device_kind, "arch": arch, "jax": jax.__version__, "pair": args.pair}), flush=True
    )
    short, long = min(args.lengths), max(args.lengths)
    cases = [(f"check r1 h{head_dim}", check, kernel, short, 1, 0, (2, 2, head_dim)) for head_dim in (128, 64, 256)]
    cases += [(f"check r4 rank{rank} h128", check, kernel, long, 4, rank, (2, 4, 128)) for rank in (0, 3)]
    for length in args.times:
        cases += [(f"time {length} r1 h128", clock, kernel, length, 1, (2, 4, 128))]
    cases += [(f"time {max(args.times)} r4 h128", clock, kernel, max(args.times), 4, (2, 4, 128))]
    if args.pair == "cudnn":
        cases += [
            (f"time {args.times[0]} r1 h128 triton", clock, TritonKernel.for_arch(arch), args.times[0], 1, (2, 4, 128))
        ]
    cases += [
        (f"time {args.times[0]} r1 h{head_dim}", clock, kernel, args.times[0], 1, (2, 4, head_dim))
        for head_dim in (64, 256)
    ]
    cases += [(f"check r2 rank{rank} h128", check, kernel, short, 2, rank, (1, 1, 128)) for rank in (0, 1)]
    cases += [(f"check r4 rank{rank} h128", check, kernel, long, 4, rank, (2, 4, 128)) for rank in (1, 2)]
    cases = [case for case in cases if case[0].startswith(args.only)]
    start, failures, left = time.perf_counter(), 0, 0
    for name, f, *rest in cases:
        if time.perf_counter() - start > args.budget:
            left += 1
            continue
        failures += not attempt(name, f, *rest)
    print(json.dumps({"cases": len(cases), "failed": failures, "left_out": left}), flush=True)


if __name__ == "__main__":
    main()
