"""A compiled program's instructions as steps of a schedule: which queue each keeps busy. It knows no rates.

There are three queues: compute, links (between devices), and host (copies to and from the host's memory). The compute
queue issues all work. The other two run what it starts, first in, first out.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from tsp_jax.hardware.rates import Work
from tsp_jax.inspect.collectives import Collective, fused_phase, is_collective, list_collectives
from tsp_jax.inspect.groups import Groups, groups_of
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.roofline import Costs
from tsp_jax.inspect.scopes import readable_scope

Queue = Literal["compute", "links", "host"]
_Busy = Literal["block", "start"]


class Task(NamedTuple):
    """Work that keeps a queue busy: a kernel, a collective or a host copy. `Prices` tell its seconds."""

    name: str
    """of the instruction; if several computations have one of that name, all but the first add theirs"""
    op: str
    scope: str
    """op_name in the HLO text: named scopes and the primitive"""
    label: str
    """readable form of the scope; see `readable_scope`"""
    queue: Queue
    bytes: float
    """per execution: read and written in main memory by a kernel, received by a collective, or moved by a host copy"""
    flops: float = 0.0
    """per execution, of matrix products"""
    products: tuple[Work, ...] = ()
    """of a kernel"""


class Transfer(NamedTuple):
    """A collective and the groups of devices in which it runs."""

    collective: Collective
    groups: Groups


class Step(NamedTuple):
    """A part of a schedule."""

    kind: Literal["run", "block", "start", "wait", "loop", "branch", "call"]
    """run: on compute; block: on another queue while compute waits; start, wait: begin or await work on other queues"""
    instruction: Instruction
    """the first, if the step is of several"""
    tasks: tuple[Task, ...] = ()
    """kernels that run one after another, or the one task that keeps another queue busy; none for other kinds"""
    queue: Queue = "compute"
    key: str = ""
    """pairs an async op's start and wait; "" if it started in an earlier iteration of a loop"""
    callees: tuple[Computation, ...] = ()
    """(body, condition) of a loop, the branches of a conditional, the computations of a call"""
    trips: float = 1.0

    @property
    def name(self) -> str:
        """The name of the first task, which no other step has."""
        return self.tasks[0].name


class Schedule:
    """Steps of each computation of a module, made when they are first asked for."""

    def __init__(self, module: Module, unknown_trips: Trips = 1, *, on_chip: bool = False):
        """Reads which collectives a module has. `on_chip`: see `Costs`."""
        self.module, self._unknown_trips = module, unknown_trips
        self.named: dict[str, Step] = {}
        """name of a step -> the step"""
        self.transfers: dict[str, Transfer] = {}
        """name of a task of the links -> what it does"""
        self._costs = Costs(module, on_chip=on_chip)
        self._steps: dict[str, list[Step]] = {}
        self._names: dict[str, str] = {}
        self._labels: dict[tuple[str, str], str] = {}
        self._compute_only: dict[str, bool] = {}
        self._callers = {
            name: i
            for c in module.computations.values()
            for i in c.instructions
            for names in i.called.values()
            for name in names
        }
        found = list_collectives(module, unknown_trips=unknown_trips)
        self._collectives = {(c.computation, c.name): c for c in found}

    def steps(self, computation: Computation) -> list[Step]:
        """The steps of a computation that take time, in schedule order. Neighbouring kernels are one step."""
        if computation.name not in self._steps:
            parts = ((i, part) for i in computation.instructions for part in self._parts(computation, i))
            steps = self._steps[computation.name] = list(_joined(parts))
            self.named.update((step.name, step) for step in steps if step.tasks)
        return self._steps[computation.name]

    def compute_only(self, computation: Computation) -> bool:
        """Whether everything that a computation runs stays on the compute queue."""
        if computation.name not in self._compute_only:
            steps = self.steps(computation)
            alone = all(step.queue == "compute" and all(map(self.compute_only, step.callees)) for step in steps)
            self._compute_only[computation.name] = alone
        return self._compute_only[computation.name]

    def _parts(self, computation: Computation, i: Instruction) -> Iterator[Step | Task]:
        if i.opcode == "while":
            loop = self.module.callee(i, "body"), self.module.callee(i, "condition")
            yield Step("loop", i, callees=loop, trips=self.module.trips(i, self._unknown_trips))
        elif i.opcode == "conditional":
            yield Step("branch", i, callees=self.module.branches(i))
        elif i.opcode == "call":
            yield Step("call", i, callees=self.module.called(i, "to_apply", "calls"))
        elif i.phase == "done":
            yield from self._done(computation, i)
        elif i.opcode == "fusion":
            yield from self._fusion(i)
        elif i.phase != "update":
            yield from self._plain(i)

    def _plain(self, i: Instruction) -> Iterator[Step | Task]:
        inside = [i] if is_collective(i) else []
        if i.base == "async":
            inside = [each for c in self.module.called(i, "calls") for each in c.instructions]
        kind = "start" if i.phase == "start" and self._queue(i) != "compute" else "block"
        yield from self._kernel(i, kind)
        if inside:
            yield from self._communication(inside, kind, i.name)

    def _fusion(self, i: Instruction) -> Iterator[Step | Task]:
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
                name = self._name(i)
                self.transfers[name] = Transfer(c, groups_of(self.module, i))
                task = Task(name, c.op, c.scope, self.label(i, c.scope), "links", c.bytes)
                yield Step(kind, i, (task,), "links", key)

    def _kernel(self, i: Instruction, kind: _Busy) -> Iterator[Step | Task]:
        cost = self._costs.of(i)
        if not (cost.products or cost.bytes or cost.host_bytes):
            return
        name, op, label = self._name(i), i.custom_call_target or i.opcode, self.label(i)
        if (cost.products or cost.bytes) and not (kind == "start" and cost.host_bytes):
            yield Task(name, op, i.op_name, label, "compute", cost.bytes, cost.flops, cost.products)
        if cost.host_bytes:
            task = Task(f"{name} (host)", op, i.op_name, label, "host", cost.host_bytes)
            yield Step(kind, i, (task,), "host", i.name)

    def _name(self, i: Instruction) -> str:
        """The name of an instruction's task."""
        first = self._names.setdefault(i.name, i.computation)
        return i.name if first == i.computation else f"{i.name} of {i.computation}"

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


def _joined(parts: Iterable[tuple[Instruction, Step | Task]]) -> Iterator[Step]:
    """Steps, with neighbouring kernels as one."""
    for kernels, group in itertools.groupby(parts, key=lambda part: isinstance(part[1], Task)):
        if kernels:
            (i, first), *others = group
            yield Step("run", i, (first, *(task for _, task in others)))  # pyright: ignore[reportArgumentType]
        else:
            yield from (step for _, step in group)  # pyright: ignore[reportReturnType]
