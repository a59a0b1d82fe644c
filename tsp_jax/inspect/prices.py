"""Seconds of a schedule's tasks: at the rates of one scenario, or with one thing changed."""

import copy
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.links import collective_seconds
from tsp_jax.hardware.rates import Scenario, Work
from tsp_jax.inspect.schedule import Schedule, Step, Task, Transfer


class Change(NamedTuple):
    """What a simulation takes as different from the program."""

    seconds: Mapping[str, float] = MappingProxyType({})
    """name of a task -> its seconds, where they are fewer"""
    hidden: frozenset[str] = frozenset()
    """names of tasks for which compute never waits; they take their time on their own queues all the same"""
    contention: bool = True
    """whether computation and communication slow each other"""


class Prices:
    """Seconds of a schedule's tasks on given hardware, each computed once."""

    def __init__(self, schedule: Schedule, hardware: Hardware, scenario: Scenario):
        self.schedule, self.hardware, self.scenario = schedule, hardware, scenario
        rates, level = hardware.rates, scenario.links
        self.contention = rates.contention.compute.cost(level), rates.contention.links.cost(level)
        """shares of their rates that computation and communication lose while both run"""
        self.change = Change()
        self._origin: Prices | None = None
        self._memory_rate = rates.memory.bytes_per_s.rate(scenario.compute)
        self._host_rate = rates.host.bytes_per_s.rate(level)
        self._seconds: dict[str, list[float]] = {}
        self._product_seconds: dict[Work, float] = {}
        self._link_seconds: dict[tuple[str, float, int], float] = {}

    def changed(self, change: Change) -> "Prices":
        """The same tasks with a change: simulating them tells what the program would take with it."""
        other = copy.copy(self)
        other._origin, other.change, other._seconds = self, change, {}
        if not change.contention:
            other.contention = 0.0, 0.0
        return other

    def seconds(self, step: Step) -> list[float]:
        """Seconds of each task of a step."""
        name = step.tasks[0].name
        if (known := self._seconds.get(name)) is not None:
            return known
        if self._origin:
            before, fewer = self._origin.seconds(step), self.change.seconds
            found = [fewer.get(task.name, now) for task, now in zip(step.tasks, before, strict=True)]
        else:
            found = [self.of(task) for task in step.tasks]
        self._seconds[name] = found
        return found

    def of(self, task: Task) -> float:
        """Seconds of a task without the change."""
        if task.queue == "compute":
            return max(self.products_seconds(task.products), task.bytes / self._memory_rate)
        if task.queue == "host":
            return task.bytes / self._host_rate
        return self._transfer_seconds(self.schedule.transfers[task.name], task.bytes)

    def memory_seconds(self, kernel: Task) -> float:
        """Time of a kernel's traffic of main memory."""
        return kernel.bytes / self._memory_rate

    def products_seconds(self, products: Iterable[Work]) -> float:
        """Time of matrix products, one after another."""
        return sum(map(self._seconds_of, products)) if products else 0.0

    def fixed_seconds(self, task: Task) -> float:
        """The part of a collective's time that does not depend on its bytes."""
        return self._transfer_seconds(self.schedule.transfers[task.name], 0.0)

    def _seconds_of(self, work: Work) -> float:
        """Time of matrix products; programs repeat a few shapes many times."""
        if work not in self._product_seconds:
            self._product_seconds[work] = self.hardware.rates.seconds(work, self.scenario.compute)
        return self._product_seconds[work]

    def _transfer_seconds(self, transfer: Transfer, received: float) -> float:
        op, groups = transfer.collective.op, transfer.groups
        if (key := (op, received, id(groups))) not in self._link_seconds:  # programs repeat a few groups many times
            self._link_seconds[key] = collective_seconds(self.hardware, op, received, groups, self.scenario.links)
        return self._link_seconds[key]
