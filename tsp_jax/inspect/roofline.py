"""Cost of one execution of an instruction: operations of matrix products, and bytes of memory traffic.

The cost counts matrix products (``dot``, ``convolution``, library calls that carry their dimension numbers), and the
bytes that instructions read from and write to main memory, each array once. Elementwise operations and reductions count
by their bytes alone. Kernels that the text does not describe (custom calls, Triton's and Pallas' among them) count by
their bytes, and by the matrix products that the program declares for them (`declared_flops`), if any. Collectives are
not counted here; see `tsp_jax.inspect.collectives`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tsp_jax.hardware.rates import Work
from tsp_jax.inspect.collectives import is_collective
from tsp_jax.inspect.flops import product_flops, product_shape
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.opcodes import ALIASES, IN_PLACE, NO_KERNEL, NO_TRAFFIC_CALLS, POINT_TO_POINT, SLICES
from tsp_jax.inspect.parser import viewed_operand
from tsp_jax.inspect.scopes import declared_flops
from tsp_jax.inspect.shapes import HOST_MEMORY_SPACE, Shape, leaves


class Cost(NamedTuple):
    """Cost of one execution on one device."""

    products: tuple[Work, ...] = ()
    """matrix products, one after another"""
    bytes: float = 0.0
    """read from and written to main memory"""
    host_bytes: float = 0.0
    """read from and written to the host's memory"""

    @property
    def flops(self) -> float:
        """Operations of the matrix products; a multiply-add is two."""
        return sum(work.flops for work in self.products)


class Costs:
    """Costs of a module's instructions, each computed once."""

    def __init__(self, module: Module, *, on_chip: bool = False):
        """Makes an empty table. The cost of an instruction is computed when it is first asked for.

        Args:
          module: a parsed program.
          on_chip: memory spaces other than 0 are on-chip, as on TPU, and not main memory.
        """
        self.module, self._on_chip = module, on_chip
        self._known: dict[str, Cost] = {}

    def of(self, i: Instruction) -> Cost:
        """Cost of an execution. Fusions, calls and async wrappers include what they call; loops and branches cost 0."""
        key = f"{i.computation}/{i.name}"
        if key not in self._known:
            self._known[key] = self._cost(i)
        return self._known[key]

    def _cost(self, i: Instruction) -> Cost:
        if i.opcode in NO_KERNEL or is_collective(i) or i.phase in ("update", "done"):
            return Cost()
        if i.base in ("call", "async"):
            inner = [self.of(each) for c in self.module.called(i, "to_apply", "calls") for each in c.instructions]
            return Cost(
                tuple(work for cost in inner for work in cost.products),
                sum(cost.bytes for cost in inner), sum(cost.host_bytes for cost in inner),
            )  # fmt: skip
        computation = self.module.computations[i.computation]
        traffic = self._fusion_traffic(computation, i) if i.base == "fusion" else _plain_traffic(computation, i)
        return Cost(tuple(self._products(computation, i)), *self._traffic(traffic))

    def _products(self, computation: Computation, i: Instruction) -> Iterator[Work]:
        """Matrix products of one instruction, or of all in a fusion's body."""
        if i.base == "fusion":
            body = self.module.callee(i, "calls")
            for inner in body.instructions:
                yield from self._products(body, inner)
        elif declared := declared_flops(i):
            yield declared.work
        elif flops := product_flops(computation, i):
            operand = leaves(computation.operands(i)[0].shape)[0]
            dtype = "float32" if operand.dtype == "f32" else "bfloat16"
            yield Work(flops, product_shape(computation, i, flops), dtype)

    def _fusion_traffic(self, computation: Computation, i: Instruction) -> list[tuple[Shape, float]]:
        """(array, bytes read or written) for each array of a fusion."""
        callee = self.module.callee(i, "calls")
        written, updated = _written(self.module, callee, callee.root)
        results = _results(i)
        if len(results) != len(written):  # the root is no tuple of arrays
            written = [leaf.bytes for leaf in results]
        read = _read_shares(self.module, callee, updated)
        traffic = list(zip(results, written, strict=True))
        seen: dict[str, float] = {}
        for name, share in zip(i.operands, read, strict=False):
            seen[name] = min(1.0, seen.get(name, 0.0) + share)
        for operand in computation.operands(i):
            traffic += [(leaf, leaf.bytes * seen.pop(operand.name, 0.0)) for leaf in leaves(operand.shape)]
        return traffic

    def _traffic(self, traffic: Iterable[tuple[Shape, float]]) -> tuple[float, float]:
        """Sums (array, bytes) in the main memory and in the host's."""
        main = host = 0.0
        for shape, size in traffic:
            if shape.memory_space == HOST_MEMORY_SPACE:
                host += size
            elif shape.memory_space == 0 or not self._on_chip:
                main += size
        return main, host


def _plain_traffic(computation: Computation, i: Instruction) -> list[tuple[Shape, float]]:
    """(array, bytes read or written) for each array of an instruction outside fusions."""
    operands = computation.operands(i)
    arrays = [leaves(operand.shape) for operand in operands]
    if _is_silent(i):
        return []
    if i.base in POINT_TO_POINT and i.phase == "start":  # (destination, source, context)
        return [(shape, shape.bytes) for shape in leaves(i.shape)[:2]]
    made = [(shape, float(shape.bytes)) for shape in _results(i)]
    if i.base in SLICES and arrays:
        return made + [(arrays[0][0], made[0][1])] + [(s, s.bytes) for some in arrays[1:] for s in some]
    if i.base in IN_PLACE and len(arrays) > 1:
        return _in_place_traffic(i, arrays)
    unique = {operand.name: some for operand, some in zip(operands, arrays, strict=True)}
    return made + [(shape, shape.bytes) for some in unique.values() for shape in some]


def _results(i: Instruction) -> Sequence[Shape]:
    """Arrays of the result. The start of an asynchronous instruction returns ((operands), results, context)."""
    if i.phase == "start" and not isinstance(i.shape, Shape):
        return leaves(i.shape[1]) if len(i.shape) > 1 else ()
    return leaves(i.shape)


def _in_place_traffic(i: Instruction, arrays: Sequence[tuple[Shape, ...]]) -> list[tuple[Shape, float]]:
    """(array, bytes): reads the update, and writes it to its place; a scatter also reads indices and old content."""
    if i.base == "dynamic-update-slice":
        target, update = arrays[0][0], arrays[1][0]
        return [(update, update.bytes), (target, update.bytes)]
    number = len(arrays) // 2  # targets, indices, updates
    traffic = [(shape, float(shape.bytes)) for some in arrays[number:] for shape in some]
    updates = zip(arrays[:number], arrays[number + 1 :], strict=False)
    return traffic + [(target[0], 2.0 * update[0].bytes) for target, update in updates]


def _source(computation: Computation, i: Instruction) -> Instruction:
    """The instruction that makes the array of which `i` is an alias."""
    while (i.opcode in ALIASES or i.opcode == "get-tuple-element" or viewed_operand(i)) and i.operands:
        source = computation.by_name[viewed_operand(i) or i.operands[0]]
        if i.opcode == "get-tuple-element" and source.opcode == "tuple":
            source = computation.by_name[source.operands[int(i.attributes["index"])]]
        i = source
    return i


def _written(module: Module, computation: Computation, i: Instruction) -> tuple[list[float], set[str]]:
    """(bytes that a fusion writes for each array of a result, instructions that update an argument in place).

    Arguments that a fusion returns unchanged are not written; results of collectives count as link traffic.
    """
    i = _source(computation, i)
    if i.opcode == "tuple":
        parts = [_written(module, computation, operand) for operand in computation.operands(i)]
        return [size for sizes, _ in parts for size in sizes], {name for _, names in parts for name in names}
    if i.opcode == "fusion":
        return _written(module, callee := module.callee(i, "calls"), callee.root)
    if i.opcode == "parameter" or is_collective(i) or _is_silent(i):
        return [0.0] * len(leaves(i.shape)), set()
    size, names, place = 0.0, set(), i
    while place.opcode in IN_PLACE and len(operands := computation.operands(place)) > 1:
        size += leaves(operands[-1 if place.opcode == "scatter" else 1].shape)[0].bytes
        names.add(f"{computation.name}/{place.name}")
        place = _source(computation, operands[0])
    if names and place.opcode == "parameter":
        return [size], names
    return [float(leaf.bytes) for leaf in leaves(i.shape)], set()


def _is_silent(i: Instruction) -> bool:
    target = i.custom_call_target
    return bool(target) and any(call in target for call in NO_TRAFFIC_CALLS)


def _read_shares(module: Module, computation: Computation, updated: set[str]) -> list[float]:
    """The share of each parameter that a fusion's body reads, found by following uses from the root backwards."""
    needed: dict[str, float] = {computation.root.name: 1.0}
    parameters: dict[int, float] = {}
    for i in reversed(computation.instructions):
        share = min(1.0, needed.get(i.name, 0.0))
        if i.opcode == "parameter":
            parameters[int(i.literal)] = 0.0 if i is computation.root else share
            continue
        for name, part in zip(i.operands, _operand_shares(module, computation, i, updated), strict=True):
            through = i.opcode == "tuple" and computation.by_name[name].opcode == "parameter"
            needed[name] = needed.get(name, 0.0) + (0.0 if through else share * part)
    return [parameters[n] for n in sorted(parameters)]


def _operand_shares(module: Module, computation: Computation, i: Instruction, updated: set[str]) -> list[float]:
    """The share of each operand that an instruction reads to make its whole result."""
    shares = [1.0] * len(i.operands)
    if is_collective(i) or _is_silent(i):
        return [0.0] * len(shares)
    if i.opcode in SLICES and shares:
        whole = leaves(computation.by_name[i.operands[0]].shape)[0].size
        shares[0] = leaves(i.shape)[0].size / whole if whole else 0.0
    elif f"{computation.name}/{i.name}" in updated:
        # A scatter reads what it updates; a dynamic-update-slice does not.
        update, target = (leaves(computation.by_name[i.operands[k]].shape)[0].size for k in (-1, 0))
        shares[0] = update / target if i.opcode == "scatter" and target else 0.0
    elif i.opcode == "fusion":
        shares = _read_shares(module, module.callee(i, "calls"), updated)
    return shares
