"""A compiled program as a tree of computations: what runs, in which order, how often."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

from tsp_jax.inspect.instructions import Computation, Instruction, called, callee
from tsp_jax.inspect.scopes import declared_trips
from tsp_jax.inspect.trips import count_trips

Trips: TypeAlias = float | Callable[[Instruction], float]
"""trips of loops that neither the text nor the program tells: a number, or a function of the while instruction"""


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A compiled program, as each device runs it."""

    name: str
    entry: Computation
    computations: dict[str, Computation] = dataclasses.field(repr=False)
    num_partitions: int
    replica_count: int
    input_output_alias: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]
    """(index of an output, number of the parameter whose memory it reuses, index within the parameter)"""
    attributes: dict[str, str] = dataclasses.field(repr=False)

    @property
    def num_devices(self) -> int:
        """Devices that run the program together."""
        return self.num_partitions * self.replica_count

    def called(self, instruction: Instruction, *roles: str) -> tuple[Computation, ...]:
        """The computations that an instruction calls in the given roles."""
        return called(self.computations, instruction, *roles)

    def callee(self, instruction: Instruction, *roles: str) -> Computation:
        """The first computation that an instruction calls in the given roles; there must be one."""
        return callee(self.computations, instruction, *roles)

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a while loop's body runs, from the text; None if data decide."""
        return count_trips(self.computations, loop)

    def trips(self, loop: Instruction, unknown_trips: Trips = 1) -> float:
        """How often a while loop's body runs: counted in the text, else declared, else `unknown_trips`."""
        trips = self.trip_count(loop)
        if trips is None:
            trips = declared_trips(loop)
        if trips is None:
            trips = unknown_trips(loop) if callable(unknown_trips) else unknown_trips
        return trips

    def executions(self, unknown_trips: Trips = 1, *, fusions: bool = False) -> Iterator[tuple[Computation, float]]:
        """Every computation that runs, callers first, and how often it runs in one execution of the module.

        Args:
          unknown_trips: trips of data-dependent loops that declare none (`declared_trips`).
          fusions: also yield the bodies of fusions; only the results of their roots are written to memory.

        Yields:
          (computation, times). Every branch of a conditional counts as taken.
        """
        times: dict[str, float] = dict.fromkeys(self.computations, 0)
        times[self.entry.name] = 1
        calls = {name: self._calls(c, unknown_trips, fusions) for name, c in self.computations.items()}
        for name in _callers_first(self.entry.name, calls):
            if times[name]:
                yield self.computations[name], times[name]
                for target, factor in calls[name]:
                    times[target] += times[name] * factor

    def walk(self, unknown_trips: Trips = 1, *, fusions: bool = False) -> Iterator[tuple[Instruction, float]]:
        """Every instruction that runs, and how often; see `executions`."""
        for computation, times in self.executions(unknown_trips, fusions=fusions):
            for instruction in computation.instructions:
                yield instruction, times

    def _calls(self, computation: Computation, unknown_trips: Trips, fusions: bool) -> list[tuple[str, float]]:
        """(name, times) of what one execution of a computation calls."""
        calls: list[tuple[str, float]] = []
        for i in computation.instructions:
            if not i.called or i.phase in ("update", "done"):
                continue
            if i.base == "while":
                trips = self.trips(i, unknown_trips)
                calls += [(self.callee(i, "body").name, trips), (self.callee(i, "condition").name, trips + 1)]
            elif i.base == "conditional":
                calls += [(c.name, 1) for c in self.called(i, "branch_computations")]
            elif i.base in ("call", "async") or (fusions and i.base == "fusion"):
                calls += [(c.name, 1) for c in self.called(i, "to_apply", "calls")]
        return calls


def _callers_first(entry: str, calls: dict[str, list[tuple[str, float]]]) -> list[str]:
    """Topological order by depth-first search; its recursion is as deep as the program's nesting, which is shallow."""
    seen: set[str] = set()
    order: list[str] = []

    def visit(name: str) -> None:
        seen.add(name)
        for target, _ in calls[name]:
            if target not in seen:
                visit(target)
        order.append(name)

    visit(entry)
    return order[::-1]
