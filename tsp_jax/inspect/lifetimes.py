"""Lifetimes of every array of a scheduled program, and which arrays must or may share memory.

The rules are in `tsp_jax.inspect.peak`; this module applies them while it walks the schedule.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tsp_jax.inspect.calls import check_calls
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.opcodes import ALIASES, ELEMENTWISE, IN_PLACE, POINT_TO_POINT
from tsp_jax.inspect.parser import parse_aliases, viewed_operand
from tsp_jax.inspect.shapes import Shape, ShapeTree, leaves

_OTHER_WORK = -1


class Value:
    """An array, and its lifetime from the moment it is made to its last use.

    `maker` is None for the state of a loop or branch, whose content other instructions make. Values that must share
    memory form a tree (union-find) by their `parent`; its root stands for all of them.
    """

    __slots__ = ("end", "maker", "parent", "readers", "shape", "start")

    def __init__(self, shape: Shape, maker: Instruction | None, start: int):
        self.shape, self.maker, self.start, self.end = shape, maker, start, start
        self.readers: list[Instruction] = []
        self.parent: Value = self

    def root(self) -> "Value":
        """The value that stands for all values that share memory with this one."""
        value = self
        while value.parent is not value:
            value.parent = value = value.parent.parent
        return value

    def unite(self, other: "Value") -> None:
        """Makes two values share memory, together with all values that share memory with either of them."""
        other.root().parent = self.root()


Values = list[Value]


class Walk:
    """A walk through a program, with every value found. Moment n is when instruction `moments[n]` runs."""

    def __init__(self, module: Module):
        check_calls(module)
        self.module = module
        self.moments: list[Instruction] = []
        self.values: Values = []
        self.loops: list[tuple[int, int]] = []
        """(first, last) moment of each outermost loop"""
        self.in_place: list[tuple[int, Value, Value]] = []
        """(moment, operand, result) of instructions that overwrite part of an operand"""
        self.reuse: list[tuple[int, Value, Value]] = []
        """(moment, operand, result) of instructions that may write their result over an operand that dies"""
        self.written: dict[tuple[str, str], Value] = {}
        """(computation, name) of an instruction that overwrites part of an operand -> the value that it writes"""
        self.labels: dict[tuple[str, str], tuple[str, str]] = {}
        """(computation, name) of an instruction -> (scope, file:line), its own or taken from another"""
        self._depth = 0
        self._offsets: dict[int, list[int]] = {}
        entry = module.entry
        parameters = sorted((i for i in entry.instructions if i.opcode == "parameter"), key=lambda i: int(i.literal))
        arguments = [[self._new(leaf, i) for leaf in leaves(i.shape)] for i in parameters]
        results = self._visit(entry, arguments)
        self.has_backward = any("transpose(" in i.op_name for i in self.moments)
        self.resident = {value.root() for values in arguments for value in values}
        for values in arguments:
            self._read(values, None)
        for output, number, within in module.input_output_alias:
            result = results[self._leaf_index(entry.root.shape, output)]
            arguments[number][self._leaf_index(parameters[number].shape, within)].unite(result)

    @property
    def now(self) -> int:
        return len(self.moments)

    def _new(self, shape: Shape, maker: Instruction | None) -> Value:
        value = Value(shape, maker, self.now)
        self.values.append(value)
        return value

    def _visit(self, computation: Computation, arguments: Sequence[Values]) -> Values:
        known: dict[str, Values] = {}
        for i in computation.instructions:
            operands = [known[name] for name in i.operands if name in known]
            if i.opcode == "parameter":
                known[i.name] = arguments[int(i.literal)]
            else:
                known[i.name] = self._fitted(i, self._result(computation, i, operands))
                self.moments.append(i)
        results = known[computation.root.name]
        self._read(results, None)
        return results

    def _read(self, values: Iterable[Value], reader: Instruction | None) -> None:
        for value in values:
            value.end = max(value.end, self.now)
            if reader:
                value.readers.append(reader)

    def _result(self, computation: Computation, i: Instruction, operands: list[Values]) -> Values:
        if i.opcode == "get-tuple-element":
            offsets, index = self._leaf_offsets(computation.operands(i)[0].shape), int(i.attributes["index"])
            return operands[0][offsets[index] : offsets[index + 1]]
        if i.opcode in ALIASES:
            return operands[0] if operands else []
        flat = [value for values in operands for value in values]
        if i.opcode == "tuple":
            return flat
        if i.phase in ("update", "done"):
            return self._finished(computation, i, operands)
        if i.base == "while":
            return self._loop(i, flat)
        if i.base == "conditional":
            return self._branches(i, operands)
        if i.opcode == "call":
            return self._visit(self.module.callee(i, "to_apply", "calls"), operands)
        if i.base in ("call", "async"):
            return self._started(i, i, operands)
        return self._made(i, operands, flat)

    def _leaf_offsets(self, shape: ShapeTree) -> list[int]:
        """Position of the first leaf of each element of a tuple, and at the end the number of leaves."""
        if id(shape) not in self._offsets:
            parts = shape if isinstance(shape, tuple) else ()
            self._offsets[id(shape)] = [0, *itertools.accumulate(len(leaves(part)) for part in parts)]
        return self._offsets[id(shape)]

    def _fitted(self, i: Instruction, values: Values) -> Values:
        """One value for each array in an instruction's result. Arrays without one, such as tokens, get a new value."""
        shapes = leaves(i.shape)
        if len(shapes) == len(values):
            return values
        return [*values[: len(shapes)], *(self._new(leaf, i) for leaf in shapes[len(values) :])]

    def _started(self, start: Instruction, i: Instruction, operands: list[Values]) -> Values:
        """Values of an asynchronous call: its operands, then its results. It runs once all operands have arrived."""
        body = self.module.callee(start, "to_apply", "calls")
        flat = [value for values in operands for value in values]
        if len(operands) < sum(each.opcode == "parameter" for each in body.instructions):
            return flat
        return [*flat, *self._visit(body, operands)]

    def _loop(self, i: Instruction, initial: Values) -> Values:
        self._read(initial, None)
        first, self._depth = self.now, self._depth + 1
        state = [self._phi(value) for value in initial]
        self._visit(self.module.callee(i, "condition"), [state])
        self._read(state, None)
        for old, new in zip(state, self._visit(self.module.callee(i, "body"), [state]), strict=True):
            old.unite(new)
        self._depth -= 1
        if not self._depth:
            self.loops.append((first, self.now))
        return [self._phi(value) for value in state]

    def _phi(self, value: Value) -> Value:
        phi = self._new(value.shape, None)
        value.unite(phi)
        return phi

    def _branches(self, i: Instruction, operands: list[Values]) -> Values:
        branches = self.module.called(i, "branch_computations")
        roots = [self._visit(branch, [args]) for branch, args in zip(branches, operands[1:], strict=True)]
        self._read([value for values in operands for value in values], None)
        results = [self._phi(value) for value in roots[0]]
        for root in roots[1:]:
            for result, value in zip(results, root, strict=True):
                result.unite(value)
        return results

    def _late(self, computation: Computation, i: Instruction, operands: list[Values]) -> Values:
        """Values of an async update whose operands include some that its start did not receive."""
        before, start = operands[0], computation.operands(i)[0]
        given = start.shape[0] if isinstance(start.shape, tuple) and start.shape else ()
        while start.phase == "update" and (sources := computation.operands(start)):
            start = sources[0]
        ends = self._leaf_offsets(given)
        arguments = [before[a:b] for a, b in itertools.pairwise(ends)] + operands[1:]
        # Without a start the call began in an earlier iteration of a loop.
        values = self._started(start, i, arguments) if start.called else [v for some in arguments for v in some]
        for early, result in zip(before[ends[-1] :], values[sum(map(len, arguments)) :], strict=False):
            if early.shape == result.shape:
                early.unite(result)
        return values

    def _finished(self, computation: Computation, i: Instruction, operands: list[Values]) -> Values:
        started = [value for values in operands for value in values]
        self._read(started, i)
        count = len(leaves(i.shape))
        if i.base in ("call", "async") and len(operands) > 1:
            return self._late(computation, i, operands)
        if i.phase == "update" or len(started) == count or i.base in POINT_TO_POINT:
            return started[:count]
        start = computation.operands(i)[0].shape  # (operands, results, ...); the start itself may be outside a loop
        skipped = len(leaves(start[0])) if isinstance(start, tuple) else 0
        return started[skipped : skipped + count]

    def _made(self, i: Instruction, operands: list[Values], flat: Values) -> Values:
        self._read(flat, i)
        shapes = leaves(i.shape)
        if i.opcode == "copy-start":  # (destination, source, context)
            return [self._new(shapes[0], i), *flat, *(self._new(leaf, i) for leaf in shapes[2:])]
        if i.opcode in ("send", "recv"):
            own = flat[:1] if i.opcode == "send" else []
            return [*own, *(self._new(leaf, i) for leaf in shapes[len(own) :])]
        if i.phase == "start" and len(shapes) > len(flat):
            return [*flat, *(self._new(leaf, i) for leaf in shapes[len(flat) :])]
        results = [self._new(leaf, i) for leaf in shapes]
        if "output_to_operand_aliasing" in i.attributes:
            for output, number, within in parse_aliases(i.attributes["output_to_operand_aliasing"]):
                operands[number][within[0] if within else 0].unite(results[self._leaf_index(i.shape, output)])
        self._note_sharing(i, {n: values[0] for n, values in enumerate(operands) if len(values) == 1}, results)
        return results

    def _note_sharing(self, i: Instruction, one: dict[int, Value], results: Values) -> None:
        """Notes which of an instruction's operands that are one array (`one`) may share memory with its results."""
        if found := overwritten(self.module, i):
            places = [(k, n) for k, n in found if n in one]
            self.in_place += [(self.now, one[n], results[k]) for k, n in places]
            targets = {n for _, n in places}
            if others := [value for n, value in one.items() if n not in targets]:
                self.written[i.computation, i.name] = max(others, key=lambda value: value.shape.bytes)
        instructions = self.module.computations[i.computation].by_name
        for k, n in _reusable(self.module, i):
            if n in one and _alike(leaves(instructions[i.operands[n]].shape)[0], results[k].shape):
                self.reuse.append((self.now, one[n], results[k]))

    def _leaf_index(self, shape: ShapeTree, index: Sequence[int]) -> int:
        """Position of the first leaf below `index`, among all leaves of a nested shape."""
        position = 0
        for k in index:
            assert isinstance(shape, tuple)
            position += self._leaf_offsets(shape)[k]
            shape = shape[k]
        return position


def overwritten(module: Module, i: Instruction) -> list[tuple[int, int]]:
    """(leaf of the result, operand) for each operand that an instruction overwrites in part."""
    if i.opcode in IN_PLACE:
        return [(0, 0)]
    if i.opcode != "fusion":
        return []
    body = module.callee(i, "calls")
    if (key := ("overwritten", body.name)) not in module.memo:
        sources, outputs = _sources(module, body), fusion_outputs(module, body)
        writers = [(k, writer) for k, writer in enumerate(outputs) if writer.opcode in IN_PLACE]
        targets = [(k, sources[writer.operands[0]]) for k, writer in writers]
        module.memo[key] = [(k, int(target.literal)) for k, target in targets if target.opcode == "parameter"]
    return module.memo[key]


def fusion_outputs(module: Module, body: Computation) -> list[Instruction]:
    """The instructions that make a fusion's results."""
    sources = _sources(module, body)
    return [sources[result.name] for result in _results(body)]


def _results(body: Computation) -> tuple[Instruction, ...]:
    return body.operands(body.root) if body.root.opcode == "tuple" else (body.root,)


def _sources(module: Module, body: Computation) -> dict[str, Instruction]:
    """Instruction -> the one whose array it returns as it is in memory: itself, unless it is a view."""
    if (key := ("sources", body.name)) not in module.memo:
        sources: dict[str, Instruction] = {}
        for i in body.instructions:
            name = viewed_operand(i)
            sources[i.name] = sources[name] if name else i
        module.memo[key] = sources
    return module.memo[key]


def _reusable(module: Module, i: Instruction) -> list[tuple[int, int]]:
    """(leaf of the result, operand) pairs that may share memory if alike: read and written in the same order."""
    if i.opcode in ELEMENTWISE:
        return [(0, n) for n in range(len(i.operands))]
    if i.opcode in ("sort", "all-reduce", "all-reduce-start"):
        return [(n, n) for n in range(min(len(i.operands), len(leaves(i.shape))))]
    if i.opcode != "fusion":
        return []
    body = module.callee(i, "calls")
    if (key := ("reusable", body.name)) not in module.memo:
        module.memo[key] = _reusable_in_fusion(body)
    return module.memo[key]


def _alike(a: Shape, b: Shape) -> bool:
    return a.size == b.size and a.bytes == b.bytes and a.memory_space == b.memory_space


def _reusable_in_fusion(body: Computation) -> list[tuple[int, int]]:
    """(result, parameter) pairs with only elementwise work between them, where no other result uses the parameter."""
    tuple_root = body.root if body.root.opcode == "tuple" else None
    reached: defaultdict[str, set[int]] = defaultdict(set)
    """instruction -> results that depend on it (two suffice); also _OTHER_WORK if non-elementwise work depends on it"""
    for k, output in enumerate(_results(body)):
        reached[output.name].add(k)
    for i in reversed(body.instructions):
        in_order = i.opcode in ELEMENTWISE or i.opcode == "bitcast"
        results = sorted(reached[i.name])[:2]
        for n, name in enumerate(() if i is tuple_root else i.operands):
            over = i.opcode == "dynamic-update-slice" and n == 0
            reached[name].update(results if in_order or over else (_OTHER_WORK,))
    parameters = [(i, reached[i.name]) for i in body.instructions if i.opcode == "parameter"]
    return [(k, int(i.literal)) for i, found in parameters if len(found) == 1 for k in found if k != _OTHER_WORK]
