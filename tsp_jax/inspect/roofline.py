"""What one execution of an instruction costs: floating-point operations of matrix products, bytes of memory.

Counted: products (``dot``, ``convolution``, library calls that carry their dimension numbers), and what instructions
read and write of main memory, each array once. Not counted: elementwise operations and reductions, whose time is taken
to be that of their bytes; collectives, which `tsp_jax.inspect.collectives` counts. Kernels that the text does not
describe (custom calls, Triton's and Pallas' among them) have the products that the program declares
(`declared_flops`), else bytes alone.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.collectives import is_collective
from tsp_jax.inspect.hlo import Computation, Instruction, Module, Shape, leaves

HOST = 5
"""memory space of arrays in the host's memory"""

_FREE = frozenset((
    "tuple", "get-tuple-element", "bitcast", "opt-barrier", "add-dependency", "after-all", "domain", "parameter",
    "constant", "while", "conditional", "partition-id", "replica-id",
))  # fmt: skip
_ALIASES = frozenset(("bitcast", "opt-barrier", "add-dependency", "get-tuple-element"))
_PARTIAL = frozenset(("slice", "dynamic-slice", "gather"))
_IN_PLACE = frozenset(("dynamic-update-slice", "scatter"))
_SILENT_CALLS = ("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone")


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """One execution on one device."""

    flops: float = 0.0
    """of matrix products; a multiply-add is two"""
    work: float = 0.0
    """operations of the matrix products that take as long at the sustained rate: more than flops where a kernel that
    declares them does not reach it"""
    bytes: float = 0.0
    """read from and written to main memory"""
    host_bytes: float = 0.0
    """read from and written to the host's memory"""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class Costs:
    """Costs of a module's instructions, each worked out once."""

    def __init__(self, module: Module, *, on_chip: bool = False, efficiency: Mapping[str, float] | None = None):
        """The costs of a module's instructions.

        Args:
            module: a parsed program.
            on_chip: arrays in other memory spaces than 0 are no part of main memory, as on TPU.
            efficiency: kind of `Declared` -> share of the sustained rate that its kernels reach; others reach all.
        """
        self.module, self._on_chip, self._efficiency = module, on_chip, efficiency or {}
        self._known: dict[str, Cost] = {}
        self._inner: dict[str, Cost] = {}

    def of(self, i: Instruction) -> Cost:
        """Cost of one execution; that of fusions, calls and asynchronous wrappers is what they call, of loops 0."""
        key = f"{i.computation}/{i.name}"
        if key not in self._known:
            self._known[key] = self._cost(i)
        return self._known[key]

    def _cost(self, i: Instruction) -> Cost:
        if i.opcode in _FREE or is_collective(i) or i.phase in ("update", "done"):
            return Cost()
        if i.base in ("call", "async"):
            inner = [each for c in self.module.called(i, "to_apply", "calls") for each in c.instructions]
            return sum(map(self.of, inner), Cost())
        computation = self.module.computations[i.computation]
        if i.base == "fusion":
            callee = self.module.callee(i, "calls")
            return self._fusion_traffic(computation, i, callee) + self._inside(callee)
        return self._traffic(_plain_traffic(computation, i)) + self._products(computation, i)

    def _inside(self, computation: Computation) -> Cost:
        """Operations of all instructions of a fusion's body."""
        if computation.name not in self._inner:
            parts = (self._products(computation, i) for i in computation.instructions)
            self._inner[computation.name] = sum(parts, Cost())
        return self._inner[computation.name]

    def _products(self, computation: Computation, i: Instruction) -> Cost:
        """Operations of one instruction."""
        if i.opcode == "fusion":
            return sum(map(self._inside, self.module.called(i, "calls")), Cost())
        if declared := declared_flops(i):
            return Cost(flops=declared.flops, work=declared.flops / self._efficiency.get(declared.kind, 1.0))
        number = flops(computation, i)
        return Cost(flops=number, work=number)

    def _fusion_traffic(self, computation: Computation, i: Instruction, callee: Computation) -> Cost:
        written, updated = _written(self.module, callee, callee.root)
        results = _results(i)
        if len(results) != len(written):  # a root that is no tuple of arrays
            written = [leaf.bytes for leaf in results]
        read = _read_shares(self.module, callee, updated)
        moved = list(zip(results, written, strict=True))
        seen: dict[str, float] = {}
        for name, share in zip(i.operands, read, strict=False):
            seen[name] = min(1.0, seen.get(name, 0.0) + share)
        for operand in computation.operands(i):
            moved += [(leaf, leaf.bytes * seen.pop(operand.name, 0.0)) for leaf in leaves(operand.shape)]
        return self._traffic(moved)

    def _traffic(self, moved: Iterable[tuple[Shape, float]]) -> Cost:
        """Sums bytes by the memory that each array lies in."""
        main = host = 0.0
        for shape, size in moved:
            space = shape.memory_space
            if space == HOST:
                host += size
            elif space == 0 or not self._on_chip:
                main += size
        return Cost(bytes=main, host_bytes=host)


# Bytes


def _plain_traffic(computation: Computation, i: Instruction) -> list[tuple[Shape, float]]:
    """(array, bytes of it that move) of an instruction outside fusions."""
    operands = computation.operands(i)
    results = leaves(i.shape)
    arrays = [leaves(operand.shape) for operand in operands]
    if i.opcode == "custom-call" and any(call in i.attributes.get("custom_call_target", "") for call in _SILENT_CALLS):
        return []
    if i.base in ("copy", "send", "recv") and i.phase == "start":  # (destination, source, context)
        return [(shape, shape.bytes) for shape in results[:2]]
    made = [(shape, float(shape.bytes)) for shape in _results(i)]
    if i.base in _PARTIAL and arrays:
        return made + [(arrays[0][0], made[0][1])] + [(s, s.bytes) for some in arrays[1:] for s in some]
    if i.base in _IN_PLACE and len(arrays) > 1:
        return _in_place_traffic(i, arrays)
    unique = {operand.name: some for operand, some in zip(operands, arrays, strict=True)}
    return made + [(shape, shape.bytes) for some in unique.values() for shape in some]


def _results(i: Instruction) -> Sequence[Shape]:
    """Arrays of the result; a start's value is ((operands), results, context)."""
    if i.phase == "start" and not isinstance(i.shape, Shape):
        return leaves(i.shape[1]) if len(i.shape) > 1 else ()
    return leaves(i.shape)


def _in_place_traffic(i: Instruction, arrays: Sequence[tuple[Shape, ...]]) -> list[tuple[Shape, float]]:
    """An update is read and written where it goes; a scatter also reads its indices and what it updates."""
    if i.base == "dynamic-update-slice":
        target, update = arrays[0][0], arrays[1][0]
        return [(update, update.bytes), (target, update.bytes)]
    number = len(arrays) // 2  # targets, indices, updates
    moved = [(shape, float(shape.bytes)) for some in arrays[number:] for shape in some]
    updates = zip(arrays[:number], arrays[number + 1 :], strict=False)
    return moved + [(target[0], 2.0 * update[0].bytes) for target, update in updates]


def _source(computation: Computation, i: Instruction) -> Instruction:
    """The instruction that made what an instruction is another name for."""
    while i.opcode in _ALIASES and (operands := computation.operands(i)):
        i = operands[0]
    return i


def _written(module: Module, computation: Computation, i: Instruction) -> tuple[list[float], set[str]]:
    """(bytes that a fusion writes for each array of a value, instructions that update an argument in place).

    Arguments that are handed through are not written; nor is what a collective makes, which comes over links.
    """
    i = _source(computation, i)
    if i.opcode == "tuple":
        parts = [_written(module, computation, operand) for operand in computation.operands(i)]
        return [size for sizes, _ in parts for size in sizes], {name for _, names in parts for name in names}
    if i.opcode == "fusion":
        callee = module.callee(i, "calls")
        return _written(module, callee, callee.root)
    if i.opcode == "parameter" or is_collective(i) or _is_silent(i):
        return [0.0] * len(leaves(i.shape)), set()
    size, names, place = 0.0, set(), i
    while place.opcode in _IN_PLACE and len(operands := computation.operands(place)) > 1:
        size += leaves(operands[-1 if place.opcode == "scatter" else 1].shape)[0].bytes
        names.add(f"{computation.name}/{place.name}")
        place = _source(computation, operands[0])
    if names and place.opcode == "parameter":
        return [size], names
    return [float(leaf.bytes) for leaf in leaves(i.shape)], set()


def _is_silent(i: Instruction) -> bool:
    return any(call in i.attributes.get("custom_call_target", "") for call in _SILENT_CALLS)


def _read_shares(module: Module, computation: Computation, updated: set[str]) -> list[float]:
    """What share of each parameter a fusion's body reads, following from its root what every value is needed for."""
    needed: dict[str, float] = {computation.root.name: 1.0}
    parameters: dict[int, float] = {}
    for i in reversed(computation.instructions):
        share = min(1.0, needed.get(i.name, 0.0))
        if i.opcode == "parameter":
            handed_through = i.name == computation.root.name
            parameters[int(i.literal)] = 0.0 if handed_through else share
            continue
        for name, part in zip(i.operands, _operand_shares(module, computation, i, updated), strict=True):
            through = i.opcode == "tuple" and computation.by_name[name].opcode == "parameter"
            needed[name] = needed.get(name, 0.0) + (0.0 if through else share * part)
    return [parameters[n] for n in sorted(parameters)]


def _operand_shares(module: Module, computation: Computation, i: Instruction, updated: set[str]) -> list[float]:
    """What share of each operand an instruction needs to make all of its value."""
    shares = [1.0] * len(i.operands)
    if is_collective(i) or _is_silent(i):
        return [0.0] * len(shares)
    if i.opcode in _PARTIAL and shares:
        whole = leaves(computation.by_name[i.operands[0]].shape)[0].size
        shares[0] = leaves(i.shape)[0].size / whole if whole else 0.0
    elif f"{computation.name}/{i.name}" in updated:
        # A scatter reads what it updates; a dynamic-update-slice does not.
        update, target = (leaves(computation.by_name[i.operands[k]].shape)[0].size for k in (-1, 0))
        shares[0] = update / target if i.opcode == "scatter" and target else 0.0
    elif i.opcode == "fusion":
        shares = _read_shares(module, module.callee(i, "calls"), updated)
    return shares


# Operations


_DECLARED = re.compile(r"(?:^|[/(])mean_flops\[(\w+)=([\d.e+\-]+)\]\)*/[^/]+$")


class Declared(NamedTuple):
    """What a kernel multiplies each time it runs, on average, by the program's own word."""

    kind: str
    """of kernel; see `tsp_jax.hardware.devices.Hardware.efficiency`"""
    flops: float


def declared_flops(i: Instruction) -> Declared | None:
    """The operations of a kernel whose text does not tell them.

    A program says so with a named scope directly around it, ``with jax.named_scope("mean_flops[some_kind=1.5e12]")``.
    """
    found = _DECLARED.search(i.op_name) if i.opcode == "custom-call" else None
    if not found:
        return None
    kind, number = found.groups()
    try:
        return Declared(kind, float(number))
    except ValueError:
        raise ConfigError(f"scope mean_flops[{kind}={number}] is no number; use mean_flops[{kind}=1.5e12]") from None


def flops(computation: Computation, i: Instruction) -> float:
    """Operations of one matrix product; 0 for other instructions."""
    operands = [leaves(operand.shape) for operand in computation.operands(i)]
    if len(operands) < 2 or not operands[0] or not operands[1]:
        return 0.0
    left, right, result = operands[0][0], operands[1][0], leaves(i.shape)[0]
    if i.opcode in ("dot", "scaled-dot", "ragged-dot"):
        return _product(left, result, i.attributes.get("lhs_contracting_dims", ""))
    if i.opcode == "custom-call" and re.search("gemm|matmul", i.attributes.get("custom_call_target", "")):
        dims = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', i.backend_config)
        return _product(left, result, dims[1]) if dims else 0.0
    if i.opcode == "convolution":
        return _convolution(left, right, result, i.attributes)
    return 0.0


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text)]


def _product(left: Shape, result: Shape, contracting: str) -> float:
    return 2.0 * result.size * math.prod(left.dims[k] for k in _ints(contracting))


def _convolution(left: Shape, right: Shape, result: Shape, attributes: dict[str, str]) -> float:
    """Multiply-adds where the window meets the array itself, not its padding: TPU writes batched products that way."""
    inputs, kernel, outputs = re.split("_|->", attributes["dim_labels"])
    sides = dict(re.findall(r"(\w+)=([\dx_\-]+)", attributes.get("window", "")))
    batch = left.dims[inputs.index("b")] // int(attributes.get("batch_group_count", 1))
    total = 2.0 * batch * right.dims[kernel.index("i")] * result.dims[outputs.index("f")]
    for n in range(len(inputs) - 2):
        k = inputs.index(str(n)), kernel.index(str(n)), outputs.index(str(n))
        total *= _meetings(left.dims[k[0]], right.dims[k[1]], result.dims[k[2]], n, sides)
    return total


def _meetings(size: int, window: int, out: int, n: int, sides: dict[str, str]) -> int:
    """Pairs of output place and window place that meet an element, along spatial dimension n."""

    def side(name: str, otherwise: int) -> int:
        return _ints(sides[name].split("x")[n])[0] if name in sides else otherwise

    stride, low, spread, gap = side("stride", 1), side("pad", 0), side("lhs_dilate", 1), side("rhs_dilate", 1)
    meetings, reach = 0, (size - 1) * spread
    period = spread // math.gcd(stride, spread)
    for k in range(window):
        first = max(0, -((k * gap - low) // stride))  # the first place not before the array
        last = min(out - 1, (reach + low - k * gap) // stride)
        hits = (o for o in range(first, min(first + period, last + 1)) if (o * stride + k * gap - low) % spread == 0)
        start = next(hits, None)
        meetings += 0 if start is None else (last - start) // period + 1
    return meetings
