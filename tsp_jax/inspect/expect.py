"""Contracts that a compiled program must keep, such as ``no-full-weight,exposed<=0.1,peak<=24GB``.

Times and shares of time are those at typical rates.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.program_report import Report
from tsp_jax.inspect.shapes import leaves
from tsp_jax.inspect.units import format_bytes, format_seconds

_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_BYTES |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_UNITS = {"bytes": _BYTES, "share": {"": 1.0, "%": 1e-2}, "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6}}
_SHOW = {"bytes": format_bytes, "share": "{:.1%}".format, "time": format_seconds}


class Quantity(NamedTuple):
    """A figure of a report that a contract bounds from above."""

    kind: str
    """bytes, share or time"""
    read: Callable[[Report], float]
    culprit: Callable[[Report], str]
    """names the buffer or collective that contributes most"""


def _largest_buffer(report: Report) -> str:
    made = next((b for b in report.peak.buffers if b.kind != "state"), None)
    if made is None:
        return "no buffer beside the state"
    where = f" at {made.source}" if made.source else ""
    shape = ",".join(map(str, made.shape))
    return f"largest buffer beside the state: {made.dtype}[{shape}], {format_bytes(made.bytes)}, {made.scope}{where}"


def _most_exposed(report: Report) -> str:
    assert report.timeline is not None
    found = max(report.timeline.collectives, key=lambda total: total.exposed_s, default=None)
    if found is None:
        return "no collective"
    of = f"{format_seconds(found.exposed_s)} of its {format_seconds(found.seconds)}"
    return f"most exposed: {found.task.op} {found.task.name}, {of} in {found.count:g} executions, {found.task.scope}"


def _most_traffic(report: Report) -> str:
    found = max(report.collectives, key=lambda c: c.total_bytes, default=None)
    return f"most: {found.op} over {found.axis}, {format_bytes(found.total_bytes)}, {found.scope}" if found else ""


def _timeline(report: Report, name: str) -> float:
    report.exposed_fraction  # noqa: B018  raises if there is no timeline
    return getattr(report.timeline, name)


QUANTITIES = {
    "peak": Quantity("bytes", lambda r: r.peak_bytes, _largest_buffer),
    "temp": Quantity("bytes", lambda r: r.memory.temp_bytes if r.memory else r.peak.bytes, _largest_buffer),
    "received": Quantity("bytes", lambda r: sum(c.total_bytes for c in r.collectives), _most_traffic),
    "exposed": Quantity("share", lambda r: r.exposed_fraction, _most_exposed),
    "exposed-time": Quantity("time", lambda r: _timeline(r, "exposed_comm_s"), _most_exposed),
    "step": Quantity("time", lambda r: _timeline(r, "step_s"), _most_exposed),
}
ABSENCES = ("no-full-weight", "no-sync-collective")


class Expectation(NamedTuple):
    """One contract: an upper bound of a quantity, or a name from `ABSENCES`."""

    text: str
    name: str
    bound: float | None = None


def parse_expectations(text: str) -> list[Expectation]:
    """Reads a comma-separated list of contracts.

    Raises:
      ConfigError: a contract is not understood.
    """
    return [_clause(item.strip()) for item in text.split(",") if item.strip()]


def _clause(item: str) -> Expectation:
    if item in ABSENCES:
        return Expectation(item, item)
    match = re.fullmatch(r"([\w-]+)\s*<=\s*([\d.]+(?:e[+-]?\d+)?)\s*([a-zA-Z%]*)", item)
    known = f"use one of {', '.join(ABSENCES)}, or {', '.join(QUANTITIES)} with <= and a number"
    if not match or match[1] not in QUANTITIES:
        raise ConfigError(f"expect={item} is not understood; {known}")
    units, unit = _UNITS[QUANTITIES[match[1]].kind], match[3].lower()
    if unit not in units:
        raise ConfigError(f"expect={item}: unit '{match[3]}' does not fit {match[1]}; use one of {', '.join(units)}")
    return Expectation(item, match[1], float(match[2]) * units[unit])


def broken(report: Report, expectations: list[Expectation]) -> list[str]:
    """Returns a line for each contract that is broken, with the buffer or collective that breaks it.

    Raises:
      ConfigError: the report lacks what a contract needs, for example because the program is not scheduled.
    """
    if expectations:
        report.module.check_scheduled()
    return [line for e in expectations if (line := _broken(report, e))]


def _broken(report: Report, e: Expectation) -> str:
    if e.bound is not None:
        quantity = QUANTITIES[e.name]
        value = quantity.read(report)
        return "" if value <= e.bound else f"{e.text}: is {_SHOW[quantity.kind](value)}; {quantity.culprit(report)}"
    found = _full_weight(report) if e.name == "no-full-weight" else _sync_collective(report)
    return f"{e.text}: {found}" if found else ""


def _sync_collective(report: Report) -> str:
    found = [c for c in report.collectives if not c.is_async and c.bytes]
    worst = max(found, key=lambda c: c.total_bytes, default=None)
    return f"{len(found)} collectives, the largest {worst.op} over {worst.axis}, {worst.scope}" if worst else ""


def _full_weight(report: Report) -> str:
    if not report.full_weights:
        raise ConfigError("expect=no-full-weight: the program has no sharded matrix among its arguments; leave it out")
    for c in (c for c in report.collectives if c.op == "all-gather" and "gather_sequence" not in c.scope):
        instruction = report.module.computations[c.computation].by_name[c.name]
        whole = max(leaf.size for leaf in leaves(instruction.shape))
        for weight in report.full_weights:
            if whole == weight.elements and weight.scope in c.scope:
                return f"all-gather {c.name} returns all {whole} elements of a weight; {c.scope}"
    return ""
