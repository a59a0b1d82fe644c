"""Bytes alive over the schedule of a program, by kind, as few points.

A moment is the place of an instruction in the schedule, not a time: the body of a loop stands in the schedule once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tsp_jax.inspect.spans import Span

KINDS = ("state", "residual", "transient")
MOST_POINTS = 400


class Use(NamedTuple):
    """Moments at which a buffer holds values of one kind, ends included."""

    first: int
    last: int
    kind: str
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCurve:
    """Live bytes of one device at some moments of the schedule; the moment of the peak is among them."""

    moments: int
    """of the whole schedule"""
    points: tuple[tuple[int, int, int, int], ...]
    """(moment, bytes of state, of residuals, of transients): the highest moment of each of up to MOST_POINTS equal
    parts of the schedule"""
    scopes: tuple[str, ...]
    """readable scope of the instruction at each point"""
    loops: tuple[Span, ...]
    """(first, last) moment of each outermost loop"""


def memory_curve(
    buffers: Iterable[Sequence[Use]], moments: int, loops: Sequence[Span], scope_at: Callable[[int], str]
) -> MemoryCurve:
    """Sums buffers over the schedule.

    Args:
      buffers: the uses of each buffer; two uses of one buffer share at most single moments, which the later one has.
      moments: of the schedule; uses may end one moment after the last.
      loops: (first, last) moment of each outermost loop.
      scope_at: moment -> readable scope of its instruction.
    """
    changes = {kind: [0] * (moments + 2) for kind in KINDS}
    for uses in buffers:
        _add(changes, sorted(uses))
    state, residual, transient = (list(itertools.accumulate(changes[kind]))[: moments + 1] for kind in KINDS)
    total = list(map(sum, zip(state, residual, transient, strict=True)))
    size = max(1, -(-len(total) // MOST_POINTS))
    highest = [
        max(range(first, min(first + size, moments + 1)), key=total.__getitem__)
        for first in range(0, moments + 1, size)
    ]
    return MemoryCurve(
        moments=moments,
        points=tuple((moment, state[moment], residual[moment], transient[moment]) for moment in highest),
        scopes=tuple(scope_at(moment) if moment < moments else "end of the program" for moment in highest),
        loops=tuple(loops),
    )


def _add(changes: dict[str, list[int]], uses: Sequence[Use]) -> None:
    """Adds the uses of a buffer, in the order of their first moments; where two meet, the later one counts."""
    longest = None
    for use in uses:
        changes[use.kind][use.first] += use.bytes
        changes[use.kind][use.last + 1] -= use.bytes
        if longest and longest.last >= use.first:
            changes[longest.kind][use.first] -= longest.bytes
            changes[longest.kind][use.first + 1] += longest.bytes
        if not longest or use.last > longest.last:
            longest = use
