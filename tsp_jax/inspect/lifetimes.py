"""Every array of a scheduled program on one time line, and which of them may or must share memory.

See `tsp_jax.inspect.peak` for the rules; this module walks the schedule by them.
"""

import re
from collections.abc import Iterable, Sequence

from tsp_jax.inspect.hlo import Computation, Instruction, Module, Shape, leaves

_VIEWS = ("bitcast", "opt-barrier", "optimization-barrier", "add-dependency", "domain", "after-all")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_ELEMENTWISE = frozenset(
    re.findall(
        r"[\w\-]+",
        """abs add and atan2 bitcast-convert cbrt ceil clamp compare complex convert cosine divide erf exponential
        exponential-minus-one floor imag is-finite log log-plus-one logistic maximum minimum multiply negate not or
        popcnt power real reduce-precision remainder round-nearest-afz round-nearest-even rsqrt select shift-left
        shift-right-arithmetic shift-right-logical sign sine sqrt stochastic-convert subtract tan tanh xor""",
    )
)


class Value:
    """An array from its maker (None: a loop's or branch's state, made elsewhere) to its last reader.

    `parent` leads to the one value that stands for all that must be in one place.
    """

    __slots__ = ("end", "maker", "parent", "readers", "shape", "start")

    def __init__(self, shape: Shape, maker: Instruction | None, start: int):
        self.shape, self.maker, self.start, self.end = shape, maker, start, start
        self.readers: list[Instruction] = []
        self.parent: Value = self

    def root(self) -> "Value":
        """The value that stands for all that share this one's memory."""
        value = self
        while value.parent is not value:
            value.parent = value = value.parent.parent
        return value

    def unite(self, other: "Value") -> None:
        """Puts two values, and all that share their memory, in one place."""
        other.root().parent = self.root()


Values = list[Value]


class Walk:
    """Every value of a program, on one time line: moment n is when instruction `moments[n]` runs."""

    def __init__(self, module: Module):
        self.module = module
        self.moments: list[Instruction] = []
        self.values: Values = []
        self.loops: list[tuple[int, int]] = []
        """outermost loops, first and last moment"""
        self.in_place: list[tuple[int, Value, Value]] = []
        self.reuse: list[tuple[int, Value, Value]] = []
        """(moment, operand, result)"""
        self.written: dict[tuple[str, str], Value] = {}
        """(computation, name) of an instruction that overwrites a part of its operand -> what it writes there"""
        self._depth = 0
        entry = module.entry
        parameters = sorted((i for i in entry.instructions if i.opcode == "parameter"), key=lambda i: int(i.literal))
        self.arguments = [[self._new(leaf, i) for leaf in leaves(i.shape)] for i in parameters]
        results = self._visit(entry, self.arguments)
        self.resident = {value.root() for values in self.arguments for value in values}
        for value in (value for values in self.arguments for value in values):
            value.end = self.now
        for output, number, within in module.input_output_alias:
            result = results[_leaf_index(entry.root.shape, output)]
            self.arguments[number][_leaf_index(parameters[number].shape, within)].unite(result)

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
                known[i.name] = self._result(computation, i, operands)
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
        flat = [value for values in operands for value in values]
        if i.opcode == "tuple":
            return flat
        if i.opcode == "get-tuple-element":
            shape = computation.operands(i)[0].shape
            first = _leaf_index(shape, (int(i.attributes["index"]),))
            return flat[first : first + len(leaves(i.shape))]
        if i.opcode in _VIEWS:
            return operands[0] if operands else []
        if i.phase in ("update", "done"):
            return self._finished(computation, i, flat)
        if i.base == "while":
            return self._loop(i, flat)
        if i.base == "conditional":
            return self._branches(i, operands)
        if i.base in ("call", "async"):
            results = self._visit(self.module.callee(i, "to_apply", "calls"), operands)
            return self._started(i, flat, results) if i.base == "async" else results
        return self._made(i, operands, flat)

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

    def _started(self, i: Instruction, operands: Values, results: Values) -> Values:
        """A start's values: (operands, results, contexts)."""
        rest = leaves(i.shape)[len(operands) + len(results) :]
        return [*operands, *results, *(self._new(leaf, i) for leaf in rest)]

    def _finished(self, computation: Computation, i: Instruction, started: Values) -> Values:
        start = computation.operands(i)[0]
        self._read(started, i)
        count = len(leaves(i.shape))
        if i.phase == "update" or len(started) == count or start.base in ("copy", "send", "recv"):
            return started[:count]
        skipped = sum(len(leaves(operand.shape)) for operand in computation.operands(start))
        while start.phase == "update":
            start = computation.operands(start)[0]
            skipped = sum(len(leaves(operand.shape)) for operand in computation.operands(start))
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
            results = [self._new(leaf, i) for leaf in shapes[len(flat) :]]
            return [*flat, *results]
        results = [self._new(leaf, i) for leaf in shapes]
        for output, number, within in _declared_aliases(i):
            operand = operands[number][within[0] if within else 0]
            operand.unite(results[_leaf_index(i.shape, output)])
        one = {number: values[0] for number, values in enumerate(operands) if len(values) == 1}
        places = [(k, n) for k, n in overwritten(self.module, i) if n in one]
        self.in_place += [(self.now, one[n], results[k]) for k, n in places]
        if others := [value for n, value in one.items() if n not in (place for _, place in places)]:
            self.written[i.computation, i.name] = max(others, key=lambda value: value.shape.bytes)
        self.reuse += [(self.now, one[n], results[k]) for k, n in _reusable(self.module, i) if n in one]
        return results


def _leaf_index(shape: object, index: Sequence[int]) -> int:
    """Position among the leaves of a nested shape of the first leaf below `index`."""
    position = 0
    for k in index:
        assert isinstance(shape, tuple)
        position += sum(len(leaves(part)) for part in shape[:k])
        shape = shape[k]
    return position


def _declared_aliases(i: Instruction) -> list[tuple[list[int], int, list[int]]]:
    text = i.attributes.get("output_to_operand_aliasing", "")
    found = re.findall(r"\{([\d, ]*)\}:\s*\((\d+),\s*\{([\d, ]*)\}", text)
    return [(_numbers(output), int(operand), _numbers(within)) for output, operand, within in found]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# Sharing


def overwritten(module: Module, i: Instruction) -> list[tuple[int, int]]:
    """(leaf of the result, operand) that the instruction overwrites."""
    if i.opcode in _IN_PLACE:
        return [(0, 0)]
    if i.opcode != "fusion":
        return []
    body = module.callee(i, "calls")
    pairs = []
    for k, writer in enumerate(fusion_outputs(body)):
        if writer.opcode in _IN_PLACE:
            target = _through_bitcasts(body, body.operands(writer)[0])
            if target.opcode == "parameter":
                pairs.append((k, int(target.literal)))
    return pairs


def fusion_outputs(body: Computation) -> list[Instruction]:
    root = body.root
    outputs = body.operands(root) if root.opcode == "tuple" else (root,)
    return [_through_bitcasts(body, output) for output in outputs]


def _through_bitcasts(body: Computation, i: Instruction) -> Instruction:
    while i.opcode == "bitcast":
        i = body.operands(i)[0]
    return i


def _reusable(module: Module, i: Instruction) -> list[tuple[int, int]]:
    """(leaf of the result, operand) that may share memory: same size, read and written in the same order."""
    results = leaves(i.shape)
    operands = [leaves(operand.shape) for operand in module.computations[i.computation].operands(i)]
    if i.opcode in _ELEMENTWISE:
        pairs = [(0, n) for n in range(len(operands))]
    elif i.opcode in ("sort", "all-reduce", "all-reduce-start"):
        pairs = [(n, n) for n in range(min(len(operands), len(results)))]
    elif i.opcode == "fusion":
        pairs = _reusable_in_fusion(module.callee(i, "calls"))
    else:
        return []
    return [(k, n) for k, n in pairs if len(operands[n]) == 1 and _alike(operands[n][0], results[k])]


def _alike(a: Shape, b: Shape) -> bool:
    return a.size == b.size and a.bytes == b.bytes and a.memory_space == b.memory_space


def _reusable_in_fusion(body: Computation) -> list[tuple[int, int]]:
    users: dict[str, list[Instruction]] = {}
    for i in body.instructions:
        for name in i.operands:
            users.setdefault(name, []).append(i)
    outputs = body.operands(body.root) if body.root.opcode == "tuple" else (body.root,)
    places = {output.name: k for k, output in enumerate(outputs)}
    parameters = [i for i in body.instructions if i.opcode == "parameter"]
    pairs = [(_only_output(parameter, users, places, body.root), int(parameter.literal)) for parameter in parameters]
    return [(k, n) for k, n in pairs if k is not None]


def _only_output(
    parameter: Instruction, users: dict[str, list[Instruction]], places: dict[str, int], root: Instruction
) -> int | None:
    """The output that elementwise operations alone, and no other output, make of a parameter."""
    found, seen, todo = set(), {parameter.name}, [parameter]
    while todo:
        i = todo.pop()
        if i.name in places:
            found.add(places[i.name])
        for user in users.get(i.name, ()):
            if user is root and root.opcode == "tuple":
                continue
            over = user.opcode == "dynamic-update-slice" and user.operands[0] == i.name
            if not over and user.opcode not in _ELEMENTWISE and user.opcode != "bitcast":
                return None
            if user.name not in seen:
                seen.add(user.name)
                todo.append(user)
    return found.pop() if len(found) == 1 else None
