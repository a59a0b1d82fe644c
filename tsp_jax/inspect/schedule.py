"""A compiled program's instructions as steps of a schedule: which queue each keeps busy, and for how long.

There are three queues: compute, links (between devices), and host (copies to and from the host's memory). The compute
queue issues all work. The other two run what it starts, first in, first out.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.links import collective_seconds
from tsp_jax.hardware.rates import Scenario, Work
from tsp_jax.inspect.collectives import Collective, fused_phase, is_collective, list_collectives
from tsp_jax.inspect.groups import Groups, groups_of
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.roofline import Cost, Costs
from tsp_jax.inspect.scopes import readable_scope

Queue = Literal["compute", "links", "host"]
_Busy = Literal["run", "block", "start"]


class Task(NamedTuple):
    """Work that keeps a queue busy: a kernel, a collective or a host copy."""

    name: str
    """of the instruction"""
    op: str
    scope: str
    """op_name in the HLO text: named scopes and the primitive"""
    label: str
    """readable form of the scope; see `readable_scope`"""
    queue: Queue
    seconds: float
    """per execution, at typical rates"""
    bytes: float
    """per execution: read and written in main memory by a kernel, received by a collective, or moved by a host copy"""
    flops: float = 0.0
    """per execution, of matrix products"""


class _Transfer(NamedTuple):
    """A collective and the groups of devices in which it runs."""

    collective: Collective
    groups: Groups


class Step(NamedTuple):
    """A part of a schedule."""

    kind: Literal["run", "block", "start", "wait", "loop", "branch", "call"]
    """run: on compute; block: on another queue while compute waits; start, wait: begin or await work on other queues"""
    instruction: Instruction
    task: str = ""
    """name of the task that runs or starts"""
    queue: Queue = "compute"
    key: str = ""
    """pairs an async op's start and wait; "" if it started in an earlier iteration of a loop"""
    callees: tuple[Computation, ...] = ()
    """(body, condition) of a loop, the branches of a conditional, the computations of a call"""
    trips: float = 1.0
    work: Cost | _Transfer | None = None
    """from which the task's seconds follow"""


class Schedule:
    """Steps of each computation of a module on given hardware at typical rates, cached; see `at` for other rates."""

    def __init__(self, module: Module, hardware: Hardware, unknown_trips: Trips = 1):
        self.module, self.hardware, self._unknown_trips = module, hardware, unknown_trips
        self._costs = Costs(module, on_chip=hardware.platform == "tpu")
        self.tasks: dict[str, Task] = {}
        self._typical = self
        self._steps: dict[str, list[Step]] = {}
        self._compute_only: dict[str, bool] = {}
        self._labels: dict[tuple[str, str], str] = {}
        self._link_seconds: dict[tuple[str, float, int, str], float] = {}
        self._use(Scenario())
        self._callers = {
            name: i
            for c in module.computations.values()
            for i in c.instructions
            for names in i.called.values()
            for name in names
        }
        found = list_collectives(module, unknown_trips=unknown_trips)
        self._collectives = {(c.computation, c.name): c for c in found}

    def at(self, scenario: Scenario) -> "Schedule":
        """The same schedule at other levels of the rates. What does not depend on rates is shared."""
        other = copy.copy(self)
        other._use(scenario)
        return other

    def _use(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._timed_steps: dict[str, list[tuple[Step, float]]] = {}
        self.seconds: dict[str, float] = {}
        """task -> seconds per execution"""
        self._product_seconds: dict[Work, float] = {}
        rates, level = self.hardware.rates, scenario.links
        self._memory_rate = rates.memory.bytes_per_s.rate(scenario.compute)
        self._host_rate = rates.host.bytes_per_s.rate(level)
        self.contention = rates.contention.compute.cost(level), rates.contention.links.cost(level)
        """shares of their rates that computation and communication lose while both run"""

    def steps(self, computation: Computation) -> list[Step]:
        """The steps of a computation that take time, in schedule order."""
        name = computation.name
        if name not in self._steps:
            self._steps[name] = [s for i in computation.instructions for s in self._typical._parts(computation, i)]
        return self._steps[name]

    def timed_steps(self, computation: Computation) -> list[tuple[Step, float]]:
        """The steps of a computation, and for how many seconds each keeps its queue busy."""
        name = computation.name
        if name not in self._timed_steps:
            steps = self.steps(computation)
            timed = [(s, self._seconds(s.queue, s.work) if s.work else 0.0) for s in steps]
            self.seconds.update((step.task, seconds) for step, seconds in timed if step.work)
            self._timed_steps[name] = timed
        return self._timed_steps[name]

    def _seconds(self, queue: Queue, work: Cost | _Transfer) -> float:
        if isinstance(work, _Transfer):
            c, level = work.collective, self.scenario.links
            key = c.op, c.bytes, id(work.groups), level
            if key not in self._link_seconds:  # programs repeat a few groups many times
                self._link_seconds[key] = collective_seconds(self.hardware, c.op, c.bytes, work.groups, level)
            return self._link_seconds[key]
        if queue == "host":
            return work.host_bytes / self._host_rate
        return max(sum(map(self._seconds_of, work.products)), work.bytes / self._memory_rate)

    def compute_only(self, computation: Computation) -> bool:
        """Whether everything that a computation runs stays on the compute queue."""
        if computation.name not in self._compute_only:
            steps = self.steps(computation)
            alone = all(step.queue == "compute" and all(map(self.compute_only, step.callees)) for step in steps)
            self._compute_only[computation.name] = alone
        return self._compute_only[computation.name]

    def _parts(self, computation: Computation, i: Instruction) -> Iterator[Step]:
        if i.opcode == "while":
            loop = self.module.callee(i, "body"), self.module.callee(i, "condition")
            yield Step("loop", i, i.name, callees=loop, trips=self.module.trips(i, self._unknown_trips))
        elif i.opcode == "conditional":
            yield Step("branch", i, i.name, callees=self.module.branches(i))
        elif i.opcode == "call":
            yield Step("call", i, i.name, callees=self.module.called(i, "to_apply", "calls"))
        elif i.phase == "done":
            yield from self._done(computation, i)
        elif i.opcode == "fusion":
            yield from self._fusion(i)
        elif i.phase != "update":
            yield from self._plain(i)

    def _plain(self, i: Instruction) -> Iterator[Step]:
        inside = [i] if is_collective(i) else []
        if i.base == "async":
            inside = [each for c in self.module.called(i, "calls") for each in c.instructions]
        kind = "start" if i.phase == "start" and self._queue(i) != "compute" else "block"
        yield from self._kernel(i, kind)
        yield from self._communication(inside, kind, i.name)

    def _fusion(self, i: Instruction) -> Iterator[Step]:
        callee = self.module.callee(i, "calls")
        phase, number = fused_phase(callee)
        if phase == "done":
            yield Step("wait", i, queue="links", key=f"chain {number}")
        yield from self._kernel(i, "block")
        if phase in ("", "start"):
            yield from self._communication(callee.instructions, "start" if phase else "block", f"chain {number}")

    def _communication(self, instructions: Iterable[Instruction], kind: _Busy, key: str) -> Iterator[Step]:
        """Steps of the collectives among some instructions."""
        for i in instructions:
            c = self._collectives.get((i.computation, i.name))
            if c is not None:
                work = _Transfer(c, groups_of(self.module, i))
                yield self._busy(kind, i, "links", work, op=c.op, scope=c.scope, bytes=c.bytes, key=key)

    def _kernel(self, i: Instruction, kind: _Busy) -> Iterator[Step]:
        cost, op = self._costs.of(i), i.custom_call_target or i.opcode
        if (cost.products or cost.bytes) and not (kind == "start" and cost.host_bytes):
            yield self._busy("run", i, "compute", cost, op=op, bytes=cost.bytes, flops=cost.flops)
        if cost.host_bytes:
            yield self._busy(kind, i, "host", cost, op=op, bytes=cost.host_bytes, key=i.name)

    def _seconds_of(self, work: Work) -> float:
        """Time of matrix products; programs repeat a few shapes many times."""
        if work not in self._product_seconds:
            self._product_seconds[work] = self.hardware.rates.seconds(work, self.scenario.compute)
        return self._product_seconds[work]

    def _busy(
        self, kind: _Busy, i: Instruction, queue: Queue, work: Cost | _Transfer, *, op: str, bytes: float,
        flops: float = 0.0, scope: str = "", key: str = "",
    ) -> Step:  # fmt: skip
        """Makes a step that keeps a queue busy, and adds its task to `tasks`."""
        name, scope = i.name + " (host)" * (queue == "host"), scope or i.op_name
        seconds = self._seconds(queue, work)
        self.tasks[name] = Task(name, op, scope, self.label(i, scope), queue, seconds, bytes, flops)
        return Step(kind, i, name, queue, key, work=work)

    def label(self, i: Instruction, scope: str = "") -> str:
        """The readable scope of an instruction, or of the loop around it if the instruction has none."""
        key = i.computation, scope or i.op_name
        if key not in self._labels:
            callers, caller = [], self._callers.get(i.computation)
            while caller is not None:
                callers.append(caller.op_name)
                caller = self._callers.get(caller.computation)
            around = next(filter(None, callers), "")
            self._labels[key] = readable_scope(key[1] or f"{around}/", callers)
        return self._labels[key]

    def _queue(self, start: Instruction) -> Queue:
        """The queue on which an instruction starts asynchronous work; compute if the instruction starts none.

        A start need not be asynchronous: on GPU, blocking collectives also consist of a start and a done.
        """
        if is_collective(start):
            c = self._collectives.get((start.computation, start.name))
            return "links" if c and c.is_async else "compute"
        wrapped = self.module.called(start, "calls") if start.base == "async" else ()
        if any((c.name, i.name) in self._collectives for c in wrapped for i in c.instructions):
            return "links"
        return "host" if self._costs.of(start).host_bytes else "compute"

    def _done(self, computation: Computation, i: Instruction) -> Iterator[Step]:
        start = next(iter(computation.operands(i)), None)
        while start is not None and start.phase == "update":
            start = next(iter(computation.operands(start)), None)
        if start is None or start.phase != "start":  # it belongs to an earlier iteration of a loop
            yield Step("wait", i, queue="links" if is_collective(i) or i.base == "async" else "host")
        elif (queue := self._queue(start)) != "compute":
            yield Step("wait", i, queue=queue, key=start.name)
