"""Peak memory of a compiled, scheduled program and the buffers alive at that moment, from its text alone.

Time. The schedule is one sequence: the body of a loop stands in it once, and branches stand one after another. A value
lives from the instruction that makes it to the last one that reads it. A value that a computation returns lives to the
end of that computation. Inside a loop's body, an element of the state is dead between the last use of its old value and
the making of its new value. Parameters live throughout, outputs to the end.

Memory. Values that XLA must keep in one buffer count once:

- aliases: tuples, their elements, bitcasts, the done of an asynchronous instruction, arguments and results of calls
- a loop's initial state, parameter, root and result
- the result of a conditional and the roots of its branches
- donated parameters and the outputs that reuse them

Values that XLA may keep in one buffer also count once, if nothing else lives in the buffer meanwhile:

- a dynamic-update-slice or scatter, alone or at the root of a fusion, writes into its operand
- elementwise operations and fusions, sorts and all-reduces reuse an operand of equal size that dies there

TPU's tile padding is counted. Constants below 1 MiB, scratch memory inside kernels, and arrays outside the device's
main memory are not. Fragmentation is not modelled. On GPU and CPU, XLA's sum (arguments + temporaries + outputs -
aliased) equals the figure of this module or is slightly larger. On TPU, the sum is a fifth larger, and TPU's own
`peak_memory_in_bytes` equals the figure of this module.
"""

import dataclasses
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable

from tsp_jax.inspect.collection import paused_collection
from tsp_jax.inspect.instructions import Instruction
from tsp_jax.inspect.lifetimes import Value, Values, Walk, fusion_outputs, overwritten
from tsp_jax.inspect.memory import LARGE_CONSTANT
from tsp_jax.inspect.memory_curve import MemoryCurve, Use, memory_curve
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.opcodes import ALLOCATE, FILLERS
from tsp_jax.inspect.scopes import readable_scope
from tsp_jax.inspect.shapes import HOST_MEMORY_SPACE, Shape, ints
from tsp_jax.inspect.spans import Span, Spans


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LiveBuffer:
    """A buffer that is alive at the moment of peak memory, named after its content."""

    bytes: int
    """with TPU's tile padding"""
    shape: tuple[int, ...]
    dtype: str
    kind: str
    """state, residual or transient; see `find_peak`"""
    scope: str
    """op_name of the instruction that makes it; for a stacked buffer, of the dynamic-update-slice that fills it"""
    holds: str
    """for a buffer that is filled slice by slice, the scope of the slices; else empty"""
    source: str
    """file:line of the instruction that makes it, or empty; `name`, `opcode`, `computation` are that instruction's"""
    name: str
    opcode: str
    computation: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The moment at which a program needs most memory, as read from its text."""

    bytes: int
    """on one device, in its main memory"""
    at: str
    """scope and name of the instruction that runs at that moment"""
    buffers: tuple[LiveBuffer, ...]
    """the largest first"""
    by_kind: dict[str, int]
    """bytes of state, residual and transient buffers"""
    host_bytes: int
    """peak in the host's memory, possibly at another moment than the device's peak"""
    curve: MemoryCurve
    """bytes over the schedule; at the peak they are those of `by_kind`"""


@paused_collection()
def find_peak(module: Module) -> Peak:
    """Finds the moment of peak memory and the buffers that are alive then.

    The kind of a buffer follows from the names that JAX gives (``jvp(`` without ``transpose(`` is the forward pass;
    ``transpose(`` is the backward pass, rematerialization included):

    state: parameters of the program, and outputs that reuse their memory.
    residual: written in the forward pass and read in the backward pass. In a program without a backward pass: alive
      before and after the outermost loop that contains the peak.
    transient: everything else, gradients included.

    If several moments have the most bytes, the first counts. A buffer that several values share is named after the
    value that is made last.

    Raises:
      ConfigError: the program is not scheduled.
    """
    module.check_scheduled()
    walk = Walk(module)
    groups = _groups(walk)
    allocations = _allocations(walk, groups)
    moment, total = _highest(allocations, walk.now, host=False)
    loop = next(((a, b) for a, b in walk.loops if a <= moment <= b), None)
    group_of = {value.root(): group for group in groups for value in group.values}
    found = []
    for allocation in allocations:
        if alive := [group for group in allocation if group.counts(host=False) and group.alive(moment)]:
            found.append(_describe(walk, max(alive, key=lambda group: group.start), loop, group_of))
    found.sort(key=lambda buffer: -buffer.bytes)
    at = walk.moments[moment] if walk.moments else None  # None: the program does nothing
    return Peak(
        bytes=total,
        at=f"{_label(walk, at)[0]} {at.name}".strip() if at else "",
        buffers=tuple(found),
        by_kind={k: sum(b.bytes for b in found if b.kind == k) for k in ("state", "residual", "transient")},
        host_bytes=_highest(allocations, walk.now, host=True)[1],
        curve=_curve(walk, allocations, loop),
    )


def _curve(walk: Walk, allocations: Iterable[list["_Group"]], loop: Span | None) -> MemoryCurve:
    def uses(group: _Group) -> list[Use]:
        kind = _kind(walk, group, loop)
        return [Use(*span, kind, group.bytes) for span in group.spans]

    counted = ([group for group in groups if group.counts(host=False)] for groups in allocations)
    buffers = ([use for group in groups for use in uses(group)] for groups in counted)
    return memory_curve(buffers, walk.now, walk.loops, lambda moment: _readable(walk, walk.moments[moment]))


def _readable(walk: Walk, i: Instruction) -> str:
    return readable_scope(_label(walk, i)[0] or f"{i.name}/")


class _Group:
    """Values that must share memory, and when it is in use: `spans` of moments (first, last), ends included."""

    def __init__(self, values: Values, resident: bool, now: int):
        self.values, self.resident = values, resident
        lives = [(value.start, value.end) for value in values]
        self.spans = list(Spans(lives, gap=1)) if len(lives) > 1 else lives
        self.makers = [value.maker for value in values if value.maker]
        self.start, self.end = self.spans[0][0], self.spans[-1][1]
        self.shape = max((value.shape for value in values), key=_bytes) if len(values) > 1 else values[0].shape
        self.bytes = _bytes(self.shape)
        constant = bool(self.makers) and all(maker.opcode == "constant" for maker in self.makers)
        if resident or constant:
            self.spans = [(0, now)]
        ignored = not self.bytes or (constant and self.bytes < LARGE_CONSTANT)
        self._place = "" if ignored else _place(self.shape)

    def counts(self, host: bool) -> bool:
        """Whether the values take up the host's memory (`host`), or else the device's main memory."""
        return self._place == ("host" if host else "device")

    def alive(self, moment: int) -> bool:
        return any(first <= moment <= last for first, last in self.spans)


def _place(shape: Shape) -> str:
    """Where an array lies: host, device (its main memory), or "".

    On TPU, a memory space above 0 is on-chip (recognized by its tiled layouts) or the host's. On GPU, it is a kind of
    main memory.
    """
    if (space := shape.memory_space) == HOST_MEMORY_SPACE:
        return "host"
    return "device" if space == 0 or ":T(" not in shape.layout else ""


def _bytes(shape: Shape) -> int:
    """Bytes with padding to the first tile of a layout such as {1,0:T(8,128)(2,1)}."""
    return _padded_bytes(shape.dtype, shape.dims, shape.layout) if ":T(" in shape.layout else shape.bytes


@functools.lru_cache(maxsize=65536)
def _padded_bytes(dtype: str, dims: tuple[int, ...], layout: str) -> int:
    shape, tile = Shape(dtype, dims, layout), re.search(r":T\(([\d,]+)\)", layout)
    order = re.match(r"\{([\d,]*)", shape.layout)
    if not tile or not order or not shape.dims:
        return shape.bytes
    padded = list(shape.dims)
    for dim, size in zip(ints(order[1]), reversed(ints(tile[1])), strict=False):
        padded[dim] = -(-padded[dim] // size) * size
    return dataclasses.replace(shape, dims=tuple(padded)).bytes


def _groups(walk: Walk) -> list[_Group]:
    """Groups values that share memory. An update happens in place if nothing reads the old content later."""
    lives: dict[Value, list[Span]] = {value.root(): [] for update in walk.in_place for value in update[1:]}
    for value in walk.values if lives else ():
        if (root := value.root()) in lives:
            lives[root].append((value.start, value.end))
    spans = {root: Spans(found, gap=0) for root, found in lives.items()}
    updates = _Updates(walk)
    for _, operand, result in walk.in_place:
        a, b = operand.root(), result.root()
        if a is b or a in walk.resident:
            continue

        # In a loop, the result of the last of several updates is the operand of the first.
        if spans[a].meets_only_at(spans[b], functools.partial(updates.between, a, b)):
            a.unite(b)
            spans[a] = spans[a].joined(spans[b])
            updates.unite(a, b)
    members: defaultdict[Value, Values] = defaultdict(list)
    for value in walk.values:
        members[value.root()].append(value)
    resident = {root.root() for root in walk.resident}
    return [_Group(values, root in resident, walk.now) for root, values in members.items()]


class _Updates:
    """The updates in which each value takes part, as the operand that is overwritten or as the result."""

    def __init__(self, walk: Walk):
        self._of: defaultdict[Value, dict[int, list[tuple[Value, Value]]]] = defaultdict(dict)
        """root -> moment -> (operand, result)"""
        for moment, *update in walk.in_place:
            for root in {value.root() for value in update}:
                self._of[root].setdefault(moment, []).append((update[0], update[1]))

    def between(self, a: Value, b: Value, moment: int) -> bool:
        """Whether the instruction at a moment makes one of two values (roots) by overwriting part of the other."""
        found = min((self._of[root].get(moment, ()) for root in (a, b)), key=len)
        return any({operand.root(), result.root()} == {a, b} for operand, result in found)

    def unite(self, a: Value, b: Value) -> None:
        """Adds the updates of a value to those of its root `a`."""
        few, many = sorted((self._of.pop(a, {}), self._of.pop(b, {})), key=len)
        for moment, updates in few.items():
            many.setdefault(moment, []).extend(updates)
        self._of[a] = many


class _Allocation:
    """Groups that use the same memory one after another."""

    def __init__(self, group: _Group):
        self.groups, self.spans, self.resident = [group], Spans(group.spans, gap=1), group.resident

    def take(self, other: "_Allocation") -> None:
        self.groups += other.groups
        self.spans = self.spans.joined(other.spans)


def _allocations(walk: Walk, groups: list[_Group]) -> list[list[_Group]]:
    """Merges groups into one allocation where an operation may write over an operand that dies."""
    allocation_of = {group.values[0].root(): _Allocation(group) for group in groups}
    taken: set[tuple[int, _Allocation]] = set()
    for moment, operand, result in walk.reuse:
        a, b = allocation_of[operand.root()], allocation_of[result.root()]
        if a is b or (moment, b) in taken or a.resident or b.resident:
            continue
        if a.spans.meets_only_at(b.spans, moment.__eq__):
            few, many = (a, b) if len(a.groups) <= len(b.groups) else (b, a)
            many.take(few)
            for group in few.groups:
                allocation_of[group.values[0].root()] = many
            taken.add((moment, many))
    return [allocation.groups for allocation in dict.fromkeys(allocation_of.values())]


def _highest(allocations: list[list[_Group]], end: int, *, host: bool) -> tuple[int, int]:
    """(moment of the peak, bytes at the peak)"""
    change = [0] * (end + 2)
    for allocation in allocations:
        groups = [group for group in allocation if group.counts(host)]
        size = max((group.bytes for group in groups), default=0)
        spans = groups[0].spans if len(groups) == 1 else Spans((s for group in groups for s in group.spans), gap=1)
        for first, last in spans:
            change[first] += size
            change[last + 1] -= size
    best = moment = total = 0
    for now, step in enumerate(change):
        total += step
        if total > best:
            best, moment = total, now
    return min(moment, end - 1), best


def _kind(walk: Walk, group: _Group, loop: tuple[int, int] | None) -> str:
    """state, residual or transient; see `find_peak`. `loop`: the outermost loop that contains the peak."""
    if group.resident:
        return "state"
    if not walk.has_backward:
        return "residual" if loop and group.start < loop[0] and group.end > loop[1] else "transient"
    made = [_label(walk, maker)[0] for maker in group.makers]
    read = [_label(walk, reader)[0] for value in group.values for reader in value.readers]
    forward = any("jvp(" in scope and "transpose(" not in scope for scope in made)
    return "residual" if forward and any("transpose(" in scope for scope in read) else "transient"


def _label(walk: Walk, i: Instruction) -> tuple[str, str]:
    """(scope, file:line) of an instruction.

    An instruction without an op_name takes both from its first operand. A fusion without an op_name takes both from
    the instructions that make its results.
    """
    named, passed = i, [i]
    if not i.op_name and i.opcode == "fusion" and (i.computation, i.name) not in walk.labels:
        body = walk.module.callee(i, "calls")
        candidates = itertools.chain(fusion_outputs(walk.module, body), reversed(body.instructions))
        named = next((inner for inner in candidates if inner.op_name), i)
    while not named.op_name and named.operands and (named.computation, named.name) not in walk.labels:
        passed.append(named)
        named = walk.module.computations[named.computation].by_name[named.operands[0]]
    own = named.op_name, f"{named.source_file}:{named.source_line}" if named.source_file else ""
    label = walk.labels.get((named.computation, named.name), own)
    walk.labels.update({(each.computation, each.name): label for each in passed})
    return label


def _describe(walk: Walk, group: _Group, loop: tuple[int, int] | None, group_of: dict[Value, _Group]) -> LiveBuffer:
    module = walk.module
    maker = _naming_maker(module, group)
    scope, source = _label(walk, maker)
    part = walk.written.get((maker.computation, maker.name)) if overwritten(module, maker) else None
    return LiveBuffer(
        bytes=group.bytes, shape=group.shape.dims, dtype=group.shape.dtype, kind=_kind(walk, group, loop), scope=scope,
        holds=_label(walk, _naming_maker(module, group_of[part.root()]))[0] if part else "", source=source,
        name=maker.name, opcode=maker.opcode, computation=maker.computation,
    )  # fmt: skip


def _naming_maker(module: Module, group: _Group) -> Instruction:
    """The instruction to name a group after.

    It is a parameter; else an update that fills the buffer slice by slice; else the first instruction that does more
    than copy or fill with a constant.
    """

    def rank(maker: Instruction) -> int:
        if maker.opcode == "parameter":
            return 0
        if overwritten(module, maker):
            return 1
        outputs = fusion_outputs(module, module.callee(maker, "calls")) if maker.opcode == "fusion" else [maker]
        return 3 if all(i.opcode in FILLERS or ALLOCATE in i.custom_call_target for i in outputs) else 2

    return min(group.makers, key=rank)
