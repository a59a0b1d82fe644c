"""What a compiled program moves between devices: which collective, over which mesh axis, how often, how much.

Bytes are those a device *receives*, by the ring's account: with g devices in a group and n bytes of operand on each,

    all-gather (g - 1) n      reduce-scatter, all-to-all (g - 1) n / g      all-reduce 2 (g - 1) n / g
    collective-permute n      collective-broadcast n

The CPU compiler widens bfloat16 to float32, around collectives too. A contract tested on CPU should use float32
arrays or compare `Collective.elements`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.hlo import Computation, Instruction, Module, Trips, leaves

_OPS = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "collective-permute": "collective-permute",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-broadcast": "collective-broadcast",
}
UNKNOWN = "?"

Groups = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective instruction; its start and done are one."""

    op: str
    """all-gather, all-reduce, reduce-scatter, collective-permute, all-to-all or collective-broadcast"""
    axis: str
    """mesh axes that it runs over, such as data,tsp; ? if they cannot be told"""
    group_size: int
    """devices that exchange with one another"""
    scope: str
    """op_name: named scopes and the primitive"""
    count: float
    """times it runs in one execution of the program"""
    bytes: int
    """received per device, each time"""
    elements: int
    """received per device, each time: bytes without the width of the dtype"""
    dtype: str
    is_async: bool
    """other work may run while it is under way"""
    name: str
    """of the instruction"""
    computation: str

    @property
    def total_bytes(self) -> float:
        """Received per device in one execution of the program."""
        return self.count * self.bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """Collectives of one op over one axis."""

    instructions: int
    count: float
    bytes: float
    """received per device in one execution of the program"""


def collectives(
    module: Module, mesh_axes: Mapping[str, int] | None = None, *, unknown_trips: Trips = 1
) -> list[Collective]:
    """Every collective that runs, callers before callees, in schedule order within a computation.

    Args:
        module: a parsed program.
        mesh_axes: axis name -> size, in the order in which devices are laid out, row by row. None: every axis is ?.
        unknown_trips: trips of data-dependent loops that declare none; see `Module.executions`.

    Returns:
        One entry for each instruction. Those in a branch count as if the branch were always taken.

    Raises:
        ConfigError: the axes do not multiply to the program's devices.
    """
    devices = module.num_partitions * module.replica_count
    if mesh_axes is not None and math.prod(mesh_axes.values()) != devices:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh_axes.items())
        raise ConfigError(f"mesh {sizes} has {math.prod(mesh_axes.values())} devices, the program {devices}")
    wrappers = {
        callee: i
        for computation in module.computations.values()
        for i in computation.instructions
        if i.base in ("fusion", "async")
        for callee in i.called.get("calls", ())
    }
    return [
        _collective(module, computation, i, times, mesh_axes, wrappers.get(computation.name))
        for computation, times in module.executions(unknown_trips, fusions=True)
        for i in computation.instructions
        if i.base in _OPS and i.phase in ("", "start")
        if computation.name not in wrappers or not _continues(computation, i)
    ]


def is_collective(i: Instruction) -> bool:
    """Whether an instruction is a collective, or a part of one."""
    return i.base in _OPS


def groups_of(module: Module, i: Instruction) -> Groups:
    """Device numbers of each group of a collective instruction; of a permute the (source, target) pairs."""
    if i.base == "collective-permute":
        return _brace_groups(i.attributes.get("source_target_pairs", ""))
    text = i.attributes.get("replica_groups", "{}")
    if "device_ids" in i.attributes:  # the second half of a mesh's spelling
        text += f", device_ids={i.attributes['device_ids']}"
    return replica_groups(text, module.num_partitions * module.replica_count)


def chain(computation: Computation) -> tuple[str, str]:
    """(phase, id) of the asynchronous collective that a fusion of TPU's starts, continues or ends; ("", "") if none."""
    ids = (
        re.search(r'chain_id="([^"]*)"', i.attributes.get("frontend_attributes", ""))
        for i in computation.instructions
        if is_collective(i)
    )
    found = next(filter(None, ids), None)
    for target, phase in (("AsyncCollectiveStart", "start"), ("AsyncCollectiveDone", "done")):
        if _has_custom_call(computation, target):
            return phase, found[1] if found else ""
    return ("step", found[1]) if found else ("", "")


def summary(found: Iterable[Collective]) -> dict[tuple[str, str], Total]:
    """Totals by (op, axis), the largest first."""
    groups: dict[tuple[str, str], list[Collective]] = {}
    for c in found:
        groups.setdefault((c.op, c.axis), []).append(c)
    totals = {
        key: Total(instructions=len(g), count=sum(c.count for c in g), bytes=sum(c.total_bytes for c in g))
        for key, g in groups.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))


def _collective(
    module: Module,
    computation: Computation,
    i: Instruction,
    times: float,
    mesh_axes: Mapping[str, int] | None,
    wrapper: Instruction | None,
) -> Collective:
    op, devices = _OPS[i.base], module.num_partitions * module.replica_count
    if op == "all-reduce" and wrapper and wrapper.base == "fusion" and _keeps_a_slice(computation, i):
        op = "reduce-scatter"
    operands = computation.operands(i)
    if i.base == "ragged-all-to-all" or "slice_sizes" in i.attributes:
        operands = operands[:1]  # the others are places to write to
    payload = [leaf for operand in operands for leaf in leaves(operand.shape)]
    if op == "collective-permute":
        axis, size = _axis_of_pairs(groups_of(module, i), mesh_axes)
    else:
        groups = groups_of(module, i)
        axis, size = _axis_of_groups(groups, mesh_axes, devices), max(map(len, groups), default=1)
    reduction = [each.op_name for c in module.called(i, "to_apply") for each in c.instructions]
    return Collective(
        op=op,
        axis=axis,
        group_size=size,
        scope=next(filter(None, [i.op_name, *reduction, wrapper.op_name if wrapper else ""]), ""),
        count=times,
        bytes=_received(op, sum(leaf.bytes for leaf in payload), size),
        elements=_received(op, sum(leaf.size for leaf in payload), size),
        dtype=payload[0].dtype if payload else "",
        is_async=_is_async(computation, i, wrapper),
        name=i.name,
        computation=i.computation,
    )


def _has_custom_call(computation: Computation, target: str) -> bool:
    return any(target in i.attributes.get("custom_call_target", "") for i in computation.instructions)


def _continues(computation: Computation, i: Instruction) -> bool:
    """TPU fuses the start, the steps and the done of a collective with other work, and repeats it in each fusion."""
    chained = "chain_id=" in i.attributes.get("frontend_attributes", "")
    return _has_custom_call(computation, "AsyncCollectiveDone") or (
        chained and not _has_custom_call(computation, "AsyncCollectiveStart")
    )


def _is_async(computation: Computation, i: Instruction, wrapper: Instruction | None) -> bool:
    """GPU writes every collective as a start and a done, and marks those that it runs as one."""
    if i.phase == "start":
        return '"is_sync":true' not in i.backend_config
    return wrapper is not None and (wrapper.base == "async" or _has_custom_call(computation, "AsyncCollectiveStart"))


def _keeps_a_slice(computation: Computation, i: Instruction) -> bool:
    """TPU's reduce-scatter is an all-reduce fused with the slice that this device keeps."""
    users = [user for user in computation.instructions if i.name in user.operands]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode == "bitcast" and _keeps_a_slice(computation, user))
        for user in users
    )


def _received(op: str, operand: int, size: int) -> int:
    """What a device receives, in the operand's unit."""
    if size <= 1:
        return 0
    if op in ("collective-permute", "collective-broadcast"):
        return operand
    factor = {"all-gather": size, "all-reduce": 2}.get(op, 1)
    return factor * operand * (size - 1) // size


# Groups of devices


def replica_groups(text: str, devices: int) -> Groups:
    """Groups of device numbers from HLO's three spellings; empty if the text is of none of them.

    ``{{0,1},{2,3}}`` (``{}`` is all devices), ``[groups,size]<=[dims]T(permutation)``, and
    ``mesh['a'=2,'b'=4] {'b'}``, which may say in what order the mesh has the devices: ``mesh['a'=4,'b'=2],
    device_ids=([2,4]T(1,0)) {'b'}`` or ``device_ids=(1,0,...)``.
    """
    if re.fullmatch(r"\{\s*\}", text):
        return [tuple(range(devices))]
    if text.startswith("{"):
        return _brace_groups(text)
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        (_, size), dims = _ints(iota[1])[-2:], _ints(iota[2])
        order = _transposed(dims, _ints(iota[3]) if iota[3] else range(len(dims)))
        return [tuple(order[k : k + size]) for k in range(0, len(order), size)]
    if mesh := re.fullmatch(r"mesh\[([^\]]*)\](?:,\s*device_ids=\((.*)\))?\s*\{([^}]*)\}", text):
        return [tuple(_device(place, mesh[2]) for place in group) for group in _mesh_groups(mesh[1], mesh[3])]
    return []


def _device(place: int, order: str | None) -> int:
    """Which device stands at a place of a mesh that has them in this order; in their own if None."""
    if order is None:
        return place
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        dims = _ints(iota[1])
        return _transposed(dims, _ints(iota[2]) if iota[2] else range(len(dims)))[place]
    return _ints(order)[place]


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _brace_groups(text: str) -> Groups:
    return [tuple(_ints(group)) for group in re.findall(r"\{([\d, ]+)\}", text)]


def _transposed(dims: Sequence[int], permutation: Sequence[int]) -> list[int]:
    """0, 1, ... laid out in `dims`, transposed, read row by row."""
    strides = [math.prod(dims[k + 1 :]) for k in range(len(dims))]
    ranges = [range(0, dims[k] * strides[k], strides[k]) for k in permutation]
    return [sum(place) for place in itertools.product(*ranges)]


def _mesh_groups(mesh: str, axes: str) -> Groups:
    """Groups over named axes, or over a part of one: 'x':(2)4 is 4 positions whose stride leaves 2 groups above."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
    parts = {name: (int(p), int(s)) for name, p, s in re.findall(r"'?([\w.\-]+)'?:\((\d+)\)(\d+)", axes)}
    chosen = re.findall(r"'?([\w.\-]+)'?(?::\(\d+\)\d+)?\s*(?:,|$)", axes)
    dims, inside = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, size))
        inside += [len(dims) + 1] if name in chosen else []
        dims += [before, part, size // (before * part)]
    outside = [k for k in range(len(dims)) if k not in inside]
    size = math.prod(dims[k] for k in inside)
    order = _transposed(dims, outside + inside)
    return [tuple(order[k : k + size]) for k in range(0, len(order), size)]


def _coordinates(device: int, sizes: Sequence[int]) -> list[int]:
    return [device // math.prod(sizes[k + 1 :]) % size for k, size in enumerate(sizes)]


def _axis_of_groups(groups: Groups, mesh_axes: Mapping[str, int] | None, devices: int) -> str:
    """The axes along which coordinates differ within a group, if the groups are all cosets of those axes."""
    if mesh_axes is None or not groups:
        return UNKNOWN
    names, sizes = list(mesh_axes), list(mesh_axes.values())
    first = [_coordinates(device, sizes) for device in groups[0]]
    axes = [k for k, values in enumerate(zip(*first, strict=True)) if len(set(values)) > 1]
    outside = [k for k in range(len(sizes)) if k not in axes]
    order = _transposed(sizes, outside + axes)
    size = math.prod(sizes[k] for k in axes)
    expected = {frozenset(order[k : k + size]) for k in range(0, devices, size)}
    return ",".join(names[k] for k in axes) if expected == {frozenset(g) for g in groups} else UNKNOWN


def _axis_of_pairs(pairs: Groups, mesh_axes: Mapping[str, int] | None) -> tuple[str, int]:
    """The axes along which a message travels, and the devices connected by messages."""
    if mesh_axes is None:
        return UNKNOWN, _largest_component(pairs)
    sizes = list(mesh_axes.values())
    moved = {
        k
        for source, target in pairs
        for k, (a, b) in enumerate(zip(_coordinates(source, sizes), _coordinates(target, sizes), strict=True))
        if a != b
    }
    return ",".join(list(mesh_axes)[k] for k in sorted(moved)), math.prod(sizes[k] for k in moved)


def _largest_component(pairs: Groups) -> int:
    members: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = members.get(source, {source}) | members.get(target, {target})
        members.update(dict.fromkeys(joined, joined))
    return max(map(len, members.values()), default=1)
