"""Measured rates of the devices that are present: matrix products, memory, collectives, copies to and from the host.

A figure is taken from several repeats. A repeat is one compiled loop, in which each call needs a result of the call
before it, so that dispatch does not count and no call is left out. All data are random.

Dims: R devices.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsp_jax.hardware.memory import memory_bytes

MOST_CALLS = 1000
"""most iterations of a loop of calls, and most copies queued at once"""
PRODUCTS = (
    (8192, 8192, 8192), (2048, 2048, 2048), (16384, 14336, 4096), (1024, 1024, 1024), (4096, 4096, 4096),
    (16384, 4096, 14336), (16384, 4096, 4096), (16384, 1024, 4096), (2048, 14336, 4096), (2048, 4096, 14336),
    (4096, 14336, 16384), (8192, 32768, 4096),
)  # fmt: skip
"""(m, n, k): squares, and those of a transformer with D 4096, F 14336, K H 1024, V 32768, forward and for gradients of
weights, with chunks of 2048 to 16384 tokens; the first ones are the quick ones"""
QUICK_PRODUCTS = 5
CPU_DIVISOR = 16
"""a CPU measures products whose dims are smaller by this factor"""
RECEIVED = {
    "all-gather": lambda size, ranks: size * (ranks - 1) / ranks,
    "reduce-scatter": lambda size, ranks: size * (ranks - 1) / ranks,
    "all-reduce": lambda size, ranks: 2 * size * (ranks - 1) / ranks,
    "all-to-all": lambda size, ranks: size * (ranks - 1) / ranks,
    "collective-permute": lambda size, ranks: size,
}
"""collective -> bytes that a device receives, given the bytes of its whole array, gathered or not yet reduced, and R;
as `tsp_jax.inspect.list_collectives` counts them"""


class Effort(NamedTuple):
    """How long to measure."""

    seconds: float = 0.05
    """duration of a repeat, about"""
    repeats: int = 7

    @classmethod
    def of(cls, quick: bool) -> "Effort":
        """The usual effort, or a small one."""
        return cls(0.01, 3) if quick else cls()


class Band(NamedTuple):
    """The 10th percentile, median and 90th percentile of repeats."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Band":
        """The band of some values."""
        return cls(*map(float, np.percentile(values, (10, 50, 90))))


class Line(NamedTuple):
    """``seconds = fixed_s + bytes / bytes_per_s``"""

    fixed_s: float
    bytes_per_s: float


# ------------------------------------------------------------------------------------------------ timing


def repeated(function: Callable[..., Any], number: int, chain: int = 0) -> Callable[..., Any]:
    """A function of (x, *rest) that calls `function` an even `number` of times and returns the last result.

    The next x is x with one element taken from the result. If `chain` is not 0, it is the result itself, and `chain`
    calls make an iteration: with 2, results alternate between two buffers, so that none is copied; with 1, XLA
    cannot make one kernel of two elementwise calls.
    """

    def link(x: jax.Array, rest: Any) -> jax.Array:
        for _ in range(chain):
            x = function(x, *rest)
        return x

    def step(carry: tuple[jax.Array, Any], rest: Any) -> tuple[jax.Array, Any]:
        x, result = carry[0], function(carry[0], *rest)
        leaf = jax.tree.leaves(result)[0]
        return x.at[(0,) * x.ndim].set(leaf[(-1,) * leaf.ndim].astype(x.dtype)), result

    def run(x: jax.Array, *rest: Any) -> Any:
        if chain:
            return lax.fori_loop(0, number // chain, lambda _, x: link(x, rest), x)
        result = jax.eval_shape(function, x, *rest)
        zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), result)
        return lax.fori_loop(0, number, lambda _, carry: step(carry, rest), (x, zeros))[1]

    return run


def seconds_per_call(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    effort: Effort,
    chain: int = 0,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
) -> list[float]:
    """Seconds of one call of ``function(x, *rest)``, for each repeat, after a warm-up.

    `chain` is as in `repeated`; `around` wraps the loop of calls, in a shard_map for example.
    """

    def compiled(number: int) -> Callable[[], Any]:
        call = jax.jit(around(repeated(function, number, chain))).lower(*arguments).compile()
        return lambda: call(*arguments)

    few = compiled(2)
    _timed(few)
    number = 2 * max(1, min(MOST_CALLS, round(effort.seconds / min(_timed(few), _timed(few)))))
    several = compiled(number) if number > 2 else few
    _timed(several)
    return [_timed(several) / number for _ in range(effort.repeats)]


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def random_array(seed: int, shape: Sequence[int], dtype: Any, sharding: Any, scale: float = 1.0) -> jax.Array:
    """Normal numbers times `scale`, made where they are needed."""

    def make() -> jax.Array:
        return (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * jnp.float32(scale)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)()


def on(device: Any) -> jax.sharding.Sharding:
    """The sharding of an array on one device."""
    return jax.sharding.SingleDeviceSharding(device)


# ------------------------------------------------------------------------------------------------ what is measured


def product_shapes(platform: str, quick: bool) -> list[tuple[int, int, int]]:
    """(m, n, k) of the products to measure."""
    shapes, divisor = PRODUCTS[:QUICK_PRODUCTS] if quick else PRODUCTS, CPU_DIVISOR if platform == "cpu" else 1
    return [(m // divisor, n // divisor, k // divisor) for m, n, k in shapes]


def measure_product(device: Any, shape: tuple[int, int, int], effort: Effort, dtype: str = "bfloat16") -> Band:
    """Operations/s of the product [m, k] x [k, n], accumulated in float32; a multiply-add is two."""
    m, n, k = shape
    a_mk = random_array(0, (m, k), dtype, on(device))
    b_kn = random_array(1, (k, n), dtype, on(device), scale=k**-0.5)  # so that products are about as large as factors

    def product(a_mk: jax.Array, b_kn: jax.Array) -> jax.Array:
        return jnp.matmul(a_mk, b_kn, preferred_element_type=jnp.float32).astype(dtype)

    times = seconds_per_call(product, (a_mk, b_kn), effort, chain=2 if n == k else 0)
    return Band.of([2.0 * m * n * k / seconds for seconds in times])


def measure_memory(device: Any, effort: Effort) -> Band:
    """Bytes/s of main memory, read and written, while an array of a 32nd of it (at most 1 GiB) is scaled."""
    most = 2**26 if device.platform == "cpu" else 2**30
    size = min(most, (memory_bytes([device]) or most) // 32) // 4 // 1024 * 1024
    x = random_array(0, (size,), jnp.float32, on(device))

    def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
        return x * factor

    factor = jax.device_put(jnp.float32(0.999), on(device))
    times = seconds_per_call(scale, (x, factor), effort, chain=1)
    return Band.of([2.0 * x.nbytes / seconds for seconds in times])


def _call_of(op: str, ranks: int) -> Callable[[jax.Array], jax.Array]:
    """A collective over the axis ``all``, on one device's array."""
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    return {
        "all-gather": lambda x: lax.all_gather(x, "all", tiled=True),
        "reduce-scatter": lambda x: lax.psum_scatter(x, "all", tiled=True),
        "all-reduce": lambda x: lax.psum(x, "all"),
        "all-to-all": lambda x: lax.all_to_all(x, "all", 0, 0, tiled=True),
        "collective-permute": lambda x: lax.ppermute(x, "all", ring),
    }[op]


def collective_sizes(devices: Sequence[Any], quick: bool) -> list[int]:
    """Bytes of the whole array: 64 KiB to 256 MiB (16 MiB on a CPU, 1 MiB if quick), while 8 fit into memory."""
    most = 2**20 if quick else 2**24 if devices[0].platform == "cpu" else 2**28
    most = min(most, (memory_bytes(devices) or most * 8) // 8)
    return [2**power for power in range(16, 29, 4 if quick else 2) if 2**power <= most]


def measure_collective(devices: Sequence[Any], op: str, size: int, effort: Effort) -> tuple[float, list[float]]:
    """(bytes that a device receives, seconds of each repeat) of a collective over all devices, in float32.

    `size`: bytes of the array of which every device gathers the whole, or holds one to reduce or exchange. An
    all-reduce includes a copy of that array, because XLA reduces in place.
    """
    ranks = len(devices)
    mesh = Mesh(np.array(devices), ("all",))
    elements = size // 4 // ranks**2 * ranks**2
    own = elements // ranks if op == "all-gather" else elements
    spec = PartitionSpec("all")
    x = random_array(0, (own * ranks,), jnp.float32, NamedSharding(mesh, spec))

    def around(run: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    times = seconds_per_call(_call_of(op, ranks), (x,), effort, around=around)
    return RECEIVED[op](4 * elements, ranks), times


def fit_line(received: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line through points (bytes, seconds) with the least sum of squared relative errors, and no negative term.

    Minimizes ``sum(((fixed_s + bytes / bytes_per_s) / seconds - 1)^2)``. If the least sum has a negative `fixed_s`, or
    a rate that is not positive, `fixed_s` is 0.
    """
    bytes_, times = np.asarray(received, np.float64), np.asarray(seconds, np.float64)
    fixed, slope = 0.0, 0.0
    if len(set(received)) > 1:
        (fixed, slope), *_ = np.linalg.lstsq(np.stack([1 / times, bytes_ / times], axis=1), np.ones_like(times))
    if fixed < 0 or slope <= 0:
        fixed, slope = 0.0, (bytes_ / times).sum() / ((bytes_ / times) ** 2).sum()
    return Line(float(fixed), float(1 / slope))


def fit_collective(points: Iterable[tuple[float, Sequence[float]]]) -> dict[str, Any]:
    """The facts of a collective: the line through the medians, and the band of the rates of each repeat's own line."""
    points = list(points)
    received, times = [size for size, _ in points], [times for _, times in points]
    medians = [statistics.median(each) for each in times]
    line = fit_line(received, medians)
    rates = [fit_line(received, repeat).bytes_per_s for repeat in zip(*times, strict=True)]
    band = Band.of([*rates, line.bytes_per_s])
    return {
        "fixed_s": line.fixed_s, "bytes_per_s": line.bytes_per_s,
        "low": min(band.low, line.bytes_per_s), "high": max(band.high, line.bytes_per_s),
        "points": [{"received_bytes": a, "seconds": b} for a, b in zip(received, medians, strict=True)],
    }  # fmt: skip


def measure_host(device: Any, effort: Effort) -> dict[str, Band]:
    """Bytes/s of copies of 256 MiB (1 MiB on a CPU) to pinned memory of the host and back; empty if there is none."""
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        return {}
    x = random_array(0, (2**18 if device.platform == "cpu" else 2**26,), jnp.float32, on(device))
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    host = jax.block_until_ready(jax.device_put(x, there))
    copies = {"to_host": partial(jax.device_put, x, there), "from_host": partial(jax.device_put, host, on(device))}
    found = {}
    for direction, copy in copies.items():
        _timed(copy)
        number = max(1, min(MOST_CALLS, math.ceil(effort.seconds / _timed(copy))))
        times = [_timed(lambda c=copy, n=number: [c() for _ in range(n)]) / number for _ in range(effort.repeats)]
        found[direction] = Band.of([x.nbytes / seconds for seconds in times])
    return found
