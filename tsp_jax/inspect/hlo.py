"""Compiled, scheduled HLO text as a tree: what runs, in which order, how often.

Reads ``jax.jit(f).lower(...).compile().as_text()`` of XLA's CPU, CUDA, ROCm and TPU compilers. Pure Python: a text
kept in a file is as good as a live program. Unknown opcodes and attributes are kept as they are.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from tsp_jax.errors import ConfigError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ROLES = ("body", "condition", "to_apply", "calls", "branch_computations", "called_computations")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[()\[\]{},\n"]', re.DOTALL)
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]\n]*)\](\{[^{}\n]*\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_BODY_END = re.compile(r"\s*\}[^\n]*\n")
_NAME = re.compile(r"[\w.\-]+")
_STRING = r'"([^"\\]*(?:\\.[^"\\]*)*)"'
_PHASE = re.compile(r"(.+)-(start|update|done)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_DECLARED_TRIPS = re.compile(r"(?:^|[/(])mean_trips\[([\d.e+\-]+)\]\)*/while$")


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """An array on one device. The layout (tiling, memory space) is kept as text and is no part of equality."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = dataclasses.field(default="", compare=False)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without tile padding. Elements below a byte are packed only if the layout says so, as in XLA.

        Raises:
            ConfigError: the dtype is unknown and its name holds no width.
        """
        bits = _BITS.get(self.dtype)
        if bits is None:
            width = re.match(r"[a-z]+(\d+)", self.dtype)
            if not width:
                raise ConfigError(f"dtype={self.dtype} in HLO text has no known size; add it to tsp_jax.inspect.hlo")
            bits = int(width[1])
        packed = not self.layout or "E(" in self.layout
        return -(-self.size * (bits if packed or bits >= 8 or not bits else 8) // 8)

    @property
    def memory_space(self) -> int:
        """0 is the device's main memory; on TPU 1 is on-chip memory, 5 the host's."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return int(space[1]) if space else 0


ShapeTree: TypeAlias = "Shape | tuple[ShapeTree, ...]"


def leaves(shape: ShapeTree) -> tuple[Shape, ...]:
    """The arrays of a nested tuple shape, in order."""
    return (shape,) if isinstance(shape, Shape) else tuple(leaf for part in shape for leaf in leaves(part))


def nbytes(shape: ShapeTree) -> int:
    """Bytes of all arrays of a shape."""
    return sum(leaf.bytes for leaf in leaves(shape))


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation. Names carry no ``%``."""

    name: str
    opcode: str
    shape: ShapeTree
    operands: tuple[str, ...]
    literal: str
    """what a constant holds, a parameter's number"""
    called: dict[str, tuple[str, ...]]
    """role (body, condition, to_apply, calls, branch_computations) -> names of computations"""
    attributes: dict[str, str]
    """every attribute, as text"""
    op_name: str
    """scope and primitive, such as jit(step)/while/body/tsp/mlp/bucket/dot_general"""
    source_file: str
    source_line: int
    computation: str
    is_root: bool

    @property
    def base(self) -> str:
        """The opcode without the -start, -update or -done of its asynchronous form."""
        match = _PHASE.fullmatch(self.opcode)
        return match[1] if match else self.opcode

    @property
    def phase(self) -> str:
        """start, update or done for a part of an asynchronous pair, else empty."""
        match = _PHASE.fullmatch(self.opcode)
        return match[2] if match else ""

    @property
    def backend_config(self) -> str:
        """The compiler's own annotation, as text."""
        return self.attributes.get("backend_config", "")


def declared_trips(loop: Instruction) -> float | None:
    """How often the body of a data-dependent loop runs on average, by the program's own word.

    A program says so with a named scope directly around the loop, ``with jax.named_scope("mean_trips[64.5]")``. Scopes
    further out are those of other loops.
    """
    found = _DECLARED_TRIPS.search(loop.op_name)
    try:
        return float(found[1]) if found else None
    except ValueError:
        raise ConfigError(f"scope mean_trips[{found[1] if found else ''}] is no number; use mean_trips[64.5]") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Computation:
    """Instructions in schedule order."""

    name: str
    instructions: tuple[Instruction, ...]
    by_name: dict[str, Instruction] = dataclasses.field(repr=False)

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the computation's."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions that produce an instruction's operands."""
        return tuple(self.by_name[name] for name in instruction.operands if name in self.by_name)


Trips: TypeAlias = float | Callable[[Instruction], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A compiled program as one device sees it."""

    name: str
    entry: Computation
    computations: dict[str, Computation] = dataclasses.field(repr=False)
    num_partitions: int
    replica_count: int
    input_output_alias: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]
    """(index of output, number of parameter, index within it)"""
    attributes: dict[str, str] = dataclasses.field(repr=False)

    def called(self, instruction: Instruction, *roles: str) -> tuple[Computation, ...]:
        """The computations that an instruction calls in the given roles."""
        names = [name for role in roles for name in instruction.called.get(role, ())]
        if missing := [name for name in names if name not in self.computations]:
            raise ConfigError(f"HLO text calls computation {missing[0]}, which it lacks; pass the text uncut")
        return tuple(self.computations[name] for name in names)

    def callee(self, instruction: Instruction, *roles: str) -> Computation:
        """The one computation that an instruction must call."""
        if not (found := self.called(instruction, *roles)):
            raise ConfigError(f"{instruction.opcode} {instruction.name} lacks its {roles[0]}; pass HLO text uncut")
        return found[0]

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a while loop's body runs; None where data decide."""
        if known := _KNOWN_TRIPS.search(loop.backend_config):
            return int(known[1])
        return _counted_trips(self, loop)

    def trips(self, loop: Instruction, unknown_trips: Trips = 1) -> float:
        """How often a while loop's body runs: counted, else declared (`declared_trips`), else `unknown_trips`."""
        trips = self.trip_count(loop)
        if trips is None:
            trips = declared_trips(loop)
        if trips is None:
            trips = unknown_trips(loop) if callable(unknown_trips) else unknown_trips
        return trips

    def executions(self, unknown_trips: Trips = 1, *, fusions: bool = False) -> Iterator[tuple[Computation, float]]:
        """Every computation that runs, callers first, and how often it runs in one execution of the module.

        Args:
            unknown_trips: trips of a loop whose count neither the text nor the program tells (`declared_trips`): a
                number, or a function of the while.
            fusions: also yield the bodies of fusions, whose values (but for the root) never reach memory.

        Yields:
            (computation, times). Each branch of a conditional counts as if it were always taken.
        """
        times: dict[str, float] = dict.fromkeys(self.computations, 0)
        times[self.entry.name] = 1
        calls = {name: self._calls(c, unknown_trips, fusions) for name, c in self.computations.items()}
        for name in _callers_first(self.entry.name, calls):
            if times[name]:
                yield self.computations[name], times[name]
                for callee, factor in calls[name]:
                    times[callee] += times[name] * factor

    def walk(self, unknown_trips: Trips = 1, *, fusions: bool = False) -> Iterator[tuple[Instruction, float]]:
        """Every instruction that runs, and how often; see `executions`."""
        for computation, times in self.executions(unknown_trips, fusions=fusions):
            for instruction in computation.instructions:
                yield instruction, times

    def _calls(self, computation: Computation, unknown_trips: Trips, fusions: bool) -> list[tuple[str, float]]:
        calls: list[tuple[str, float]] = []
        for i in computation.instructions:
            if not i.called or i.phase in ("update", "done"):
                continue
            if i.base == "while":
                trips = self.trips(i, unknown_trips)
                calls += [(self.callee(i, "body").name, trips), (self.callee(i, "condition").name, trips + 1)]
            elif i.base == "conditional":
                calls += [(c.name, 1) for c in self.called(i, "branch_computations")]
            elif i.base in ("call", "async") or (fusions and i.base == "fusion"):
                calls += [(c.name, 1) for c in self.called(i, "to_apply", "calls")]
        return calls


def _callers_first(entry: str, calls: dict[str, list[tuple[str, float]]]) -> list[str]:
    """Depth-first postorder, reversed. Recursion is as deep as the program's nesting, which is shallow."""
    seen: set[str] = set()
    order: list[str] = []

    def visit(name: str) -> None:
        seen.add(name)
        for callee, _ in calls[name]:
            if callee not in seen:
                visit(callee)
        order.append(name)

    visit(entry)
    return order[::-1]


# Trip counts. A scalar is (k, c): element k of the loop's state plus c; k is None for a plain number. What is known
# while following one: ("state", k) in a loop's computations, ("argument", n) inside a fusion.
_Scalar: TypeAlias = tuple[int | None, int]
_Known: TypeAlias = dict[tuple[str, int], _Scalar]
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}
_FORWARDING = ("copy", "bitcast", "convert", "reshape", "broadcast", "copy-start", "copy-done", "opt-barrier")


def _scalar(module: Module, computation: Computation, i: Instruction, known: _Known) -> _Scalar | None:
    """Follows an integer to the loop's state or to a number."""
    operands = computation.operands(i)
    if i.opcode == "constant":
        return (None, int(i.literal)) if re.fullmatch(r"-?\d+", i.literal) else None
    if i.opcode == "parameter":
        return known.get(("argument", int(i.literal)))
    if i.opcode == "get-tuple-element" and operands:
        index = int(i.attributes.get("index", 0))
        if operands[0].opcode == "parameter":
            return known.get(("state", index))
        return _element(module, computation, operands[0], index, known)
    if i.opcode in _FORWARDING and operands:
        return _scalar(module, computation, operands[0], known)
    if i.opcode in ("add", "subtract") and len(operands) == 2:
        left, right = (_scalar(module, computation, o, known) for o in operands)
        if left and right and right[0] is None:
            return left[0], left[1] + (right[1] if i.opcode == "add" else -right[1])
        if left and right and left[0] is None and i.opcode == "add":
            return right[0], right[1] + left[1]
    if i.opcode in ("fusion", "call"):
        callee = module.callee(i, "calls", "to_apply")
        return _scalar(module, callee, callee.root, _arguments(module, computation, i, known))
    return None


def _element(module: Module, computation: Computation, i: Instruction, k: int, known: _Known) -> _Scalar | None:
    """Element k of a tuple."""
    operands = computation.operands(i)
    if i.opcode != "tuple" or k >= len(operands):
        return None
    return _scalar(module, computation, operands[k], known)


def _arguments(module: Module, computation: Computation, i: Instruction, known: _Known) -> _Known:
    values = {n: _scalar(module, computation, o, known) for n, o in enumerate(computation.operands(i))}
    return {("argument", n): value for n, value in values.items() if value is not None}


def _comparison(module: Module, computation: Computation, known: _Known) -> tuple[str, _Scalar | None, _Scalar | None]:
    """The one comparison that a loop's condition makes, through a fusion where there is one."""
    root = computation.root
    while root.opcode in ("fusion", "call"):
        known = _arguments(module, computation, root, known)
        computation = module.callee(root, "calls", "to_apply")
        root = computation.root
    operands = computation.operands(root)
    if root.opcode != "compare" or len(operands) != 2:
        return "", None, None
    left, right = (_scalar(module, computation, o, known) for o in operands)
    return root.attributes.get("direction", ""), left, right


def _counted_trips(module: Module, loop: Instruction) -> int | None:
    """Trips from a condition `state[k] < limit`, the initial state and the body's `state[k] + step`."""
    caller, body = module.computations[loop.computation], module.callee(loop, "body")
    start = next(iter(caller.operands(loop)), None)
    size = len(loop.shape) if start and isinstance(loop.shape, tuple) else 0
    initial = {k: _element(module, caller, start, k, {}) for k in range(size) if start}
    known: _Known = {("state", k): (k, 0) for k in initial}
    fixed = {k: v for k, v in initial.items() if v and _element(module, body, body.root, k, known) == (k, 0)}
    known |= {("state", k): value for k, value in fixed.items()}
    direction, left, right = _comparison(module, module.callee(loop, "condition"), known)
    if left is None or right is None:
        return None
    if left[0] is None:
        direction, left, right = _MIRRORED.get(direction, ""), right, left
    if left[0] is None or right[0] is not None:
        return None
    first, after = initial[left[0]], _element(module, body, body.root, left[0], known)
    if first is None or after is None or after[0] != left[0] or not after[1]:
        return None
    return _trips(direction, right[1] - left[1] - first[1], after[1])


def _trips(direction: str, distance: int, step: int) -> int | None:
    """Trips of a counter that starts at 0 and moves by `step` while it compares with `distance`."""
    if direction == "NE":
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if direction not in (("LT", "LE") if step > 0 else ("GT", "GE")):
        return None
    inclusive = direction in ("LE", "GE")
    return max(0, distance // step + 1 if inclusive else -(-distance // step))


# Text


def _cut(where: str) -> ConfigError:
    return ConfigError(f"HLO text has unbalanced brackets or ends early in {where}; pass compiled.as_text() uncut")


def _pieces(text: str, pos: int, end: str, where: str) -> tuple[list[str], int]:
    """Comma-separated pieces from `pos` to `end` outside all brackets, and the position after `end`."""
    depth, start, pieces = 0, pos, []
    for match in _STRUCTURE.finditer(text, pos):
        token = match.group()
        if not depth and token in (end, ","):
            pieces.append(text[start : match.start()].strip())
            start = match.end()
            if token == end:
                return [piece for piece in pieces if piece], start
        elif token in ("(", "[", "{"):
            depth += 1
        elif token in (")", "]", "}"):
            depth -= 1
        if depth < 0 or token == '"':
            break
    raise _cut(where)


def _attributes(pieces: list[str]) -> dict[str, str]:
    pairs = (piece.partition("=") for piece in pieces)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _shape(text: str, pos: int, where: str) -> tuple[ShapeTree, int]:
    if match := _ARRAY.match(text, pos):
        dims = (dim.strip().removeprefix("<=") for dim in match[2].split(",") if dim.strip())
        try:
            return Shape(match[1], tuple(int(dim) for dim in dims), match[3] or ""), match.end()
        except ValueError:
            raise ConfigError(f"HLO text has shape {match[0]} in {where}; dimensions must be numbers") from None
    if text.startswith("b(", pos):  # a buffer: the array it holds
        shape, pos = _shape(text, pos + 2, where)
        return shape, pos + 1
    if not text.startswith("(", pos):
        raise _cut(where)
    parts, pos = [], pos + 1
    while not text.startswith(")", pos):
        part, pos = _shape(text, pos, where)
        parts.append(part)
        while text[pos : pos + 1] in (",", " "):
            pos += 1
    return tuple(parts), pos + 1


def _metadata(text: str, sources: dict[str, tuple[str, int]]) -> tuple[str, str, int]:
    op_name, file, line = (
        re.search(p, text) for p in (f"op_name={_STRING}", f"source_file={_STRING}", r"source_line=(\d+)")
    )
    frame = re.search(r"stack_frame_id=(\d+)", text)
    source = sources.get(frame[1], ("", 0)) if frame else ("", 0)
    name = op_name[1].replace('\\"', '"').replace("\\'", "'") if op_name else ""
    return name, file[1] if file else source[0], int(line[1]) if line else source[1]


def _sources(tables: dict[str, dict[str, str]]) -> dict[str, tuple[str, int]]:
    """stack_frame_id -> (file, line) of its innermost frame."""
    places, found = {}, {}
    for number, row in tables["FileLocations"].items():
        file, line = re.search(r"file_name_id=(\d+)", row), re.search(r"\bline=(\d+)", row)
        places[number] = (tables["FileNames"].get(file[1], "").strip('"') if file else "", int(line[1]) if line else 0)
    for number, row in tables["StackFrames"].items():
        place = re.search(r"file_location_id=(\d+)", row)
        found[number] = places.get(place[1], ("", 0)) if place else ("", 0)
    return found


def _called(attributes: dict[str, str]) -> dict[str, tuple[str, ...]]:
    called = {role: tuple(_NAME.findall(attributes[role])) for role in _ROLES if role in attributes}
    if "true_computation" in attributes:
        names = attributes["true_computation"] + " " + attributes.get("false_computation", "")
        called["branch_computations"] = tuple(_NAME.findall(names))
    return called


def _instruction(text: str, match: re.Match, computation: str, sources: dict) -> tuple[Instruction, int]:
    where = f"instruction {match[2]}"
    shape, pos = _shape(text, match.end(), where)
    opcode = _OPCODE.match(text, pos)
    if not opcode:
        raise _cut(where)
    inner, pos = _pieces(text, opcode.end(), ")", where)
    rest, pos = _pieces(text, pos, "\n", where)
    attributes = _attributes(rest)
    plain = opcode[1] in ("constant", "parameter", "iota")
    op_name, file, line = _metadata(attributes.get("metadata", ""), sources)
    instruction = Instruction(
        name=match[2],
        opcode=opcode[1],
        shape=shape,
        operands=() if plain else tuple(_NAME.findall(piece)[-1] for piece in inner if _NAME.search(piece)),
        literal=", ".join(inner) if plain else "",
        called=_called(attributes),
        attributes=attributes,
        op_name=op_name,
        source_file=file,
        source_line=line,
        computation=computation,
        is_root=bool(match[1]),
    )
    return instruction, pos


def _computation(text: str, pos: int, name: str, sources: dict) -> tuple[Computation, int]:
    instructions = []
    while not (end := _BODY_END.match(text, pos)):
        match = _INSTRUCTION.match(text, pos)
        if not match:
            raise _cut(f"computation {name}")
        instruction, pos = _instruction(text, match, name, sources)
        instructions.append(instruction)
    return Computation(name, tuple(instructions), {i.name: i for i in instructions}), end.end()


def _digits(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _alias(text: str) -> tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]:
    found = re.findall(r"\{([\d, ]*)\}:\s*\((\d+),\s*\{([\d, ]*)\}", text)
    return tuple((_digits(output), int(parameter), _digits(within)) for output, parameter, within in found)


def parse(text: str | None) -> Module:
    """Reads the text of one compiled module.

    Args:
        text: what ``compiled.as_text()`` returned; None where a compiler has no text is refused like other text.

    Returns:
        The module; its entry, loops and branches are told apart, so that `Module.walk` can count.

    Raises:
        ConfigError: the text is no HLO, was cut, or holds more than one module.
    """
    text = re.sub(r"/\*index=\d+\*/", "", (text or "").lstrip()) + "\n"
    if not text.startswith("HloModule "):
        raise ConfigError(f"text starts with {text[:30].strip()!r}, not with HloModule; pass compiled.as_text()")
    header, pos = _pieces(text, len("HloModule "), "\n", "the header")
    attributes, computations, entry = _attributes(header[1:]), {}, None
    tables: dict[str, dict[str, str]] = {table: {} for table in _TABLES}
    table, sources = {}, {}
    while pos < len(text):
        end = text.index("\n", pos) + 1
        line = text[pos:end].strip()
        if match := _COMPUTATION.match(line):
            sources = sources or _sources(tables)
            computation, end = _computation(text, end, match[2], sources)
            computations[computation.name] = computation
            entry = computation if match[1] else entry
        elif line.startswith(("%", "ENTRY")):
            raise _cut(f"computation {line[:40]}")
        elif line.startswith("HloModule "):
            raise ConfigError("text holds more than one HloModule; parse them one by one")
        elif line in tables:
            table = tables[line]
        else:
            number, _, row = line.partition(" ")
            table[number] = row
        pos = end
    if entry is None:
        raise _cut("the module: it has no ENTRY computation")
    return Module(
        name=header[0].lstrip("%"),
        entry=entry,
        computations=computations,
        num_partitions=int(attributes.get("num_partitions", 1)),
        replica_count=int(attributes.get("replica_count", 1)),
        input_output_alias=_alias(attributes.get("input_output_alias", "")),
        attributes=attributes,
    )
