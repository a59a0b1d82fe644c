"""Sums over a report, without names of instructions: by scope, and over buffers that look alike."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tsp_jax.inspect.peak import LiveBuffer
from tsp_jax.inspect.scopes import readable_scope
from tsp_jax.inspect.timeline import Timeline


def total_scopes(timeline: Timeline) -> dict[str, dict[str, float]]:
    """Named scope (`Task.label`) -> its figures in a step, the longest time first.

    compute_s: time of its kernels. exposed_s: time that the step waits for its collectives and host copies. received:
    bytes of its collectives. flops: of its matrix products. All compute_s, all exposed_s and the step's contention_s
    add up to the step.
    """
    found: defaultdict[str, dict[str, float]] = defaultdict(
        lambda: {"compute_s": 0.0, "exposed_s": 0.0, "received": 0.0, "flops": 0.0}
    )
    for total in timeline.kernels:
        found[total.task.label]["compute_s"] += total.seconds
        found[total.task.label]["flops"] += total.count * total.task.flops
    for total in (*timeline.collectives, *timeline.host_copies):
        found[total.task.label]["exposed_s"] += total.exposed_s
    for total in timeline.collectives:
        found[total.task.label]["received"] += total.count * total.task.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["compute_s"] - item[1]["exposed_s"]))


def total_buffers(buffers: Iterable[LiveBuffer]) -> list[dict[str, Any]]:
    """Buffers of equal kind, dtype, shape and readable scope together, with their number and bytes."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for b in buffers:
        scope = b.scope if b.opcode == "parameter" else readable_scope(b.scope)
        row = {"kind": b.kind, "dtype": b.dtype, "shape": list(b.shape), "scope": scope, "count": 0, "bytes": 0}
        row = found.setdefault((b.kind, b.dtype, b.shape, scope), row)
        row["count"] += 1
        row["bytes"] += b.bytes
    return sorted(found.values(), key=lambda row: -row["bytes"])
