"""Collectives of a compiled program: which one, over which mesh axis, how often, how many bytes.

Bytes are those that one device receives in a ring algorithm. With g devices in a group and operands of n bytes:

    all-gather (g - 1) n      reduce-scatter, all-to-all (g - 1) n / g      all-reduce 2 (g - 1) n / g
    collective-permute n      collective-broadcast n

An in-place permute sends only the slices that it names, n bytes in total, not its whole operand.

The CPU compiler widens bfloat16 to float32, in collectives too. A test that runs on CPU should use float32
arrays or compare `Collective.elements`.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.groups import Groups, axis_of_groups, axis_of_pairs, groups_of
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.opcodes import ASYNC_DONE, ASYNC_START, COLLECTIVES
from tsp_jax.inspect.shapes import Shape, ints, leaves


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective instruction; a start and its done count as one."""

    op: str
    """all-gather, all-reduce, reduce-scatter, collective-permute, all-to-all or collective-broadcast"""
    axis: str
    """mesh axes that the collective runs over, such as data,tsp; ? if they are not known"""
    group_size: int
    """devices that exchange data with one another"""
    scope: str
    """op_name in the HLO text: named scopes and the primitive"""
    count: float
    """executions in one execution of the program"""
    bytes: int
    """bytes that each device receives each time the collective runs; `elements` likewise"""
    elements: int
    dtype: str
    is_async: bool
    """other work may run at the same time"""
    name: str
    """of the instruction"""
    computation: str

    @property
    def total_bytes(self) -> float:
        """Received per device in one execution of the program."""
        return self.count * self.bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Total:
    """Sums over the collectives of one op over one axis."""

    instructions: int = 0
    count: float = 0
    bytes: float = 0
    """received per device in one execution of the program"""


def list_collectives(
    module: Module, mesh_axes: Mapping[str, int] | None = None, *, unknown_trips: Trips = 1
) -> list[Collective]:
    """Every collective instruction that runs, callers before callees, in schedule order within a computation.

    Args:
      module: a parsed program.
      mesh_axes: axis name -> size, major to minor in the order of the devices. None: every axis is ?.
      unknown_trips: trips of data-dependent loops that declare none; see `Module.executions`.

    Raises:
      ConfigError: the product of the axis sizes is not the program's number of devices.
    """
    if mesh_axes is not None and math.prod(mesh_axes.values()) != module.num_devices:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh_axes.items())
        raise ConfigError(f"mesh {sizes} has {math.prod(mesh_axes.values())} devices, the program {module.num_devices}")
    reader = _Reader(module, mesh_axes)
    return [
        reader.collective(computation, i, times)
        for computation, times in module.executions(unknown_trips, fusions=True)
        for i in computation.instructions
        if i.base in COLLECTIVES and i.phase in ("", "start")
        if not reader.continues(computation, i)
    ]


def is_collective(i: Instruction) -> bool:
    """Whether an instruction is a collective, or the start or done of one."""
    return i.base in COLLECTIVES


def fused_phase(computation: Computation) -> tuple[str, str]:
    """(phase, id) of a TPU fusion's async collective, or ("", "") if the fusion has none. Phases: start, step, done."""
    ids = (
        re.search(r'chain_id="([^"]*)"', i.attributes.get("frontend_attributes", ""))
        for i in computation.instructions
        if is_collective(i)
    )
    found = next(filter(None, ids), None)
    for target, phase in ((ASYNC_START, "start"), (ASYNC_DONE, "done")):
        if _has_custom_call(computation, target):
            return phase, found[1] if found else ""
    return ("step", found[1]) if found else ("", "")


def total_by_op(found: Iterable[Collective]) -> dict[tuple[str, str], Total]:
    """(op, axis) -> totals, sorted by bytes, the largest first."""
    totals: dict[tuple[str, str], Total] = {}
    for c in found:
        total = totals.get((c.op, c.axis), Total())
        totals[c.op, c.axis] = Total(total.instructions + 1, total.count + c.count, total.bytes + c.total_bytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))


class _Reader:
    """Reads the collectives of a module. What several of them share is read once."""

    def __init__(self, module: Module, mesh_axes: Mapping[str, int] | None):
        self._module, self._mesh_axes = module, mesh_axes
        self._wrappers = {
            callee: i
            for computation in module.computations.values()
            for i in computation.instructions
            if i.base in ("fusion", "async")
            for callee in i.called.get("calls", ())
        }
        self._targets: dict[str, tuple[str, ...]] = {}
        self._users: dict[str, Mapping[str, list[Instruction]]] = {}
        self._places: dict[tuple[bool, int], tuple[str, int]] = {}
        self._first_scopes: dict[str, str] = {}

    def collective(self, computation: Computation, i: Instruction, times: float) -> Collective:
        op, wrapper = COLLECTIVES[i.base], self._wrappers.get(computation.name)
        if op == "all-reduce" and wrapper and wrapper.base == "fusion" and self._keeps_a_slice(computation, i):
            op = "reduce-scatter"
        payload = _payload(computation, i)
        axis, size = self._place(op == "collective-permute", groups_of(self._module, i))
        return Collective(
            op=op, axis=axis, group_size=size, count=times, name=i.name, computation=i.computation,
            scope=i.op_name or self._reduction(i) or (wrapper.op_name if wrapper else ""),
            bytes=_received(op, sum(leaf.bytes for leaf in payload), size),
            elements=_received(op, sum(leaf.size for leaf in payload), size),
            dtype=payload[0].dtype if payload else "",
            is_async=self._is_async(computation, i, wrapper),
        )  # fmt: skip

    def continues(self, computation: Computation, i: Instruction) -> bool:
        """Whether an instruction is another copy of a collective that an earlier fusion has started.

        TPU fuses a collective's start, steps and done with other work; each of these fusions holds a copy.
        """
        if computation.name not in self._wrappers:
            return False
        chained = "chain_id=" in i.attributes.get("frontend_attributes", "")
        return self._calls(computation, ASYNC_DONE) or (chained and not self._calls(computation, ASYNC_START))

    def _is_async(self, computation: Computation, i: Instruction, wrapper: Instruction | None) -> bool:
        """Whether a collective is asynchronous. GPU splits all into start and done, and marks blocking ones."""
        if i.phase == "start":
            return '"is_sync":true' not in i.backend_config
        return wrapper is not None and (wrapper.base == "async" or self._calls(computation, ASYNC_START))

    def _calls(self, computation: Computation, target: str) -> bool:
        if computation.name not in self._targets:
            self._targets[computation.name] = tuple({i.custom_call_target for i in computation.instructions})
        return any(target in each for each in self._targets[computation.name])

    def _place(self, pairs: bool, groups: Groups) -> tuple[str, int]:
        """(axis, group size) of some groups, or of the pairs of a permute."""
        key = pairs, id(groups)
        if key not in self._places:
            self._places[key] = (
                axis_of_pairs(groups, self._mesh_axes) if pairs
                else (axis_of_groups(groups, self._mesh_axes), max(map(len, groups), default=1))
            )  # fmt: skip
        return self._places[key]

    def _reduction(self, i: Instruction) -> str:
        """The first scope in the computations that a collective reduces with."""
        for c in self._module.called(i, "to_apply"):
            if c.name not in self._first_scopes:
                self._first_scopes[c.name] = next((each.op_name for each in c.instructions if each.op_name), "")
            if self._first_scopes[c.name]:
                return self._first_scopes[c.name]
        return ""

    def _keeps_a_slice(self, computation: Computation, i: Instruction) -> bool:
        """Whether an all-reduce is a reduce-scatter: TPU fuses the all-reduce with the slice that this device keeps."""
        if computation.name not in self._users:
            self._users[computation.name] = _users(computation)
        users, todo = self._users[computation.name], [i.name]
        while todo:
            found = users.get(todo.pop(), [])
            if not found or any(user.opcode not in ("dynamic-slice", "bitcast") for user in found):
                return False
            todo += [user.name for user in found if user.opcode == "bitcast"]
        return True


def _payload(computation: Computation, i: Instruction) -> list[Shape]:
    """The arrays that a collective sends."""
    operands = computation.operands(i)
    if i.base == "ragged-all-to-all" or "slice_sizes" in i.attributes:
        operands = operands[:1]  # the others are output buffers and places in them
    arrays = [leaf for operand in operands for leaf in leaves(operand.shape)]
    slices = [ints(sizes) for sizes in re.findall(r"\{([\d, ]+)\}", i.attributes.get("slice_sizes", ""))]
    return [Shape(arrays[min(k, len(arrays) - 1)].dtype, sizes) for k, sizes in enumerate(slices)] if slices else arrays


def _has_custom_call(computation: Computation, target: str) -> bool:
    return any(target in i.custom_call_target for i in computation.instructions)


def _users(computation: Computation) -> Mapping[str, list[Instruction]]:
    """Instruction -> those that read it, once for each operand."""
    users: defaultdict[str, list[Instruction]] = defaultdict(list)
    for user in computation.instructions:
        for name in user.operands:
            users[name].append(user)
    return users


def _received(op: str, operand: int, size: int) -> int:
    """How much a device receives, in the unit of `operand`, such as bytes."""
    if size <= 1:
        return 0
    if op in ("collective-permute", "collective-broadcast"):
        return operand
    factor = {"all-gather": size, "all-reduce": 2}.get(op, 1)
    return factor * operand * (size - 1) // size
