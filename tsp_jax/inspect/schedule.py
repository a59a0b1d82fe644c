"""A compiled program's instructions as steps of a schedule: what keeps which queue busy, and for how long.

Queues: compute; links, between devices; host, copies to and from the host's memory. Compute is where the program is
issued from; the others run what it starts, first in, first out.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.links import collective_seconds
from tsp_jax.inspect.collectives import chain, collectives, groups_of, is_collective
from tsp_jax.inspect.hlo import Computation, Instruction, Module, Trips
from tsp_jax.inspect.roofline import Costs

Queue = Literal["compute", "links", "host"]


_STRUCTURE = re.compile(
    r"while|body|cond|closed_call|shard_map|checkpoint|rematted_computation|scan|pjit|branch_\d+_fun|"
    r"(jit|jvp|transpose|vmap|pjit|checkpoint|custom_jvp_call|custom_vjp_call)\(.*\)|custom_[jv][jv]p_call|.*->.*|"
    r"mean_\w+\[.*\]|"
)


class Step(NamedTuple):
    """A part of a schedule."""

    kind: Literal["run", "block", "start", "wait", "loop", "branch", "call"]
    """run: on compute; block: on compute and another queue at once; start and wait: for something on another queue"""
    instruction: Instruction
    task: str = ""
    """name of what runs or starts"""
    queue: Queue = "compute"
    seconds: float = 0.0
    key: str = ""
    """by which a wait finds what was started; "" if the start is out of sight, in an earlier round of a loop"""
    callees: tuple[Computation, ...] = ()
    """(body, condition) of a loop, branches, what a call calls"""
    trips: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something that keeps a queue busy: a kernel, a collective or a host copy."""

    name: str
    """of the instruction"""
    op: str
    scope: str
    """op_name: named scopes and the primitive"""
    label: str
    """the scope, readable; see `readable_scope`"""
    queue: Queue
    seconds: float
    """each time"""
    bytes: float
    """each time: of main memory, received over links, or of host memory"""
    flops: float = 0.0
    """each time, of matrix products"""


def readable_scope(op_name: str, callers: Sequence[str] = (), depth: int = 4) -> str:
    """``jit(f)/transpose(jvp())/while/body/tsp/mlp/gather/all_gather`` -> ``backward tsp/mlp/gather``.

    Left out are the primitive and what transformations and control flow add; of instructions that the compiler merged,
    the first speaks. What is computed again for the backward pass is ``recompute``. Outside of differentiation there is
    no such word.

    Args:
        op_name: of the instruction.
        callers: op_names of the loops around it, innermost first. Functions that are called twice keep the names of one
            call, so that the outermost loop knows best which pass it is.
        depth: names kept.
    """
    *parts, _ = re.sub(r"\(([^():]*):.*", r"\1", op_name.partition(";")[0]).split("/")
    names = [part for part in parts if not _STRUCTURE.fullmatch(part)]
    start = names.index("tsp") if "tsp" in names else 0
    return _pass(op_name, callers) + ("/".join(names[start : start + depth]) or "other")


def _pass(op_name: str, callers: Sequence[str]) -> str:
    for name in (*reversed(callers), op_name):
        if "transpose(" in name:
            again = any("rematted_computation" in each for each in (op_name, *callers))
            return "recompute " if again else "backward "
        if "jvp(" in name:
            return "forward "
    return ""


class Schedule:
    """Steps of a module's computations on a piece of hardware, each worked out once."""

    def __init__(self, module: Module, hardware: Hardware, unknown_trips: Trips = 1):
        self.module, self.hardware, self._unknown_trips = module, hardware, unknown_trips
        self.tasks: dict[str, Task] = {}
        self._costs = Costs(module, on_chip=hardware.platform == "tpu", efficiency=hardware.efficiency)
        self._steps: dict[str, list[Step]] = {}
        self._compute_only: dict[str, bool] = {}
        found = collectives(module, unknown_trips=unknown_trips)
        self._callers = {
            name: i
            for c in module.computations.values()
            for i in c.instructions
            for names in i.called.values()
            for name in names
        }
        self._collectives = {(c.computation, c.name): c for c in found}

    def steps(self, computation: Computation) -> list[Step]:
        """What takes time, in schedule order."""
        if computation.name not in self._steps:
            parts = (self._parts(computation, i) for i in computation.instructions)
            self._steps[computation.name] = [step for part in parts for step in part]
        return self._steps[computation.name]

    def compute_only(self, computation: Computation) -> bool:
        """Whether nothing that a computation runs touches another queue than compute."""
        if computation.name not in self._compute_only:
            self._compute_only[computation.name] = all(
                step.queue == "compute" and all(map(self.compute_only, step.callees))
                for step in self.steps(computation)
            )
        return self._compute_only[computation.name]

    def _parts(self, computation: Computation, i: Instruction) -> Iterator[Step]:
        if i.opcode == "while":
            loop = self.module.callee(i, "body"), self.module.callee(i, "condition")
            yield Step("loop", i, i.name, callees=loop, trips=self.module.trips(i, self._unknown_trips))
        elif i.opcode == "conditional":
            yield Step("branch", i, i.name, callees=self.module.called(i, "branch_computations"))
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
        yield from self._moves(inside, kind, i.name)

    def _fusion(self, i: Instruction) -> Iterator[Step]:
        callee = self.module.callee(i, "calls")
        phase, number = chain(callee)
        if phase == "done":
            yield Step("wait", i, queue="links", key=f"chain {number}")
        yield from self._kernel(i, "block")
        if phase in ("", "start"):
            yield from self._moves(callee.instructions, "start" if phase else "block", f"chain {number}")

    def _moves(self, instructions: Iterable[Instruction], kind: Literal["start", "block"], key: str) -> Iterator[Step]:
        """The collectives among some instructions."""
        for i in instructions:
            c = self._collectives.get((i.computation, i.name))
            if c is not None:
                seconds = collective_seconds(self.hardware, c.op, c.bytes, groups_of(self.module, i))
                yield self._busy(kind, i, "links", seconds, op=c.op, scope=c.scope, bytes=c.bytes, key=key)

    def _kernel(self, i: Instruction, kind: Literal["start", "block"]) -> Iterator[Step]:
        cost, op = self._costs.of(i), i.attributes.get("custom_call_target", "").strip('"') or i.opcode
        seconds = max(cost.work / self.hardware.sustained_flops, cost.bytes / self.hardware.sustained_bandwidth)
        if seconds and not (kind == "start" and cost.host_bytes):
            yield self._busy("run", i, "compute", seconds, op=op, bytes=cost.bytes, flops=cost.flops)
        if cost.host_bytes:
            seconds = cost.host_bytes / self.hardware.host_bandwidth
            yield self._busy(kind, i, "host", seconds, op=op, bytes=cost.host_bytes, key=i.name)

    def _busy(
        self,
        kind: Literal["run", "block", "start"],
        i: Instruction,
        queue: Queue,
        seconds: float,
        *,
        op: str,
        bytes: float,
        scope: str = "",
        flops: float = 0.0,
        key: str = "",
    ) -> Step:
        """A step, and its task."""
        name = i.name + " (host)" * (queue == "host")
        scope = scope or i.op_name
        self.tasks[name] = Task(
            name=name, op=op, scope=scope, label=self.label(i, scope), queue=queue, seconds=seconds, bytes=bytes,
            flops=flops,
        )  # fmt: skip
        return Step(kind, i, name, queue, seconds, key)

    def label(self, i: Instruction, scope: str = "") -> str:
        """Readable scope; of an instruction without a scope that of the loop around it."""
        callers, caller = [], self._callers.get(i.computation)
        while caller is not None:
            callers.append(caller.op_name)
            caller = self._callers.get(caller.computation)
        around = next(filter(None, callers), "")
        return readable_scope(scope or i.op_name or f"{around}/", callers)

    def _queue(self, start: Instruction) -> Queue:
        """Where an instruction's work is done. GPU writes collectives that block as a start and a done as well."""
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
        if start is None or start.phase != "start":  # of an earlier round of a loop
            yield Step("wait", i, queue="links" if is_collective(i) or i.base == "async" else "host")
        elif (queue := self._queue(start)) != "compute":
            yield Step("wait", i, queue=queue, key=start.name)
