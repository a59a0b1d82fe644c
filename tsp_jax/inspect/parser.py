"""Parses the text of compiled, scheduled HLO.

Reads ``jax.jit(f).lower(...).compile().as_text()`` of XLA's CPU, CUDA, ROCm and TPU compilers, from a live program or
from a file. Pure Python. Unknown opcodes and attributes are kept as text.
"""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.checks import DEEPEST, check_module
from tsp_jax.inspect.collection import paused_collection
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.opcodes import split_phase
from tsp_jax.inspect.shapes import Shape, ShapeTree, ints, natural
from tsp_jax.inspect.texts import module_text

_ROLES = ("body", "condition", "to_apply", "calls", "branch_computations", "called_computations")
_SOURCE_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_WITHOUT_OPERANDS = ("constant", "parameter", "iota")

_QUOTED = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_PLAIN = rf'(?:[^()\[\]{{}}"]++|{_QUOTED})*+'  # with no brackets outside of strings
_STRUCTURE = re.compile(rf'{_QUOTED}|\{{{_PLAIN}\}}|\[{_PLAIN}\]|\({_PLAIN}\)|[()\[\]{{}},\n"]', re.DOTALL)
"""a string, innermost brackets with their content, or one character that matters"""
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]\n]*)\](\{[^{}\n]*\})?")
_NAMES = r"%?[\w.\-]++(?:, %?[\w.\-]++)*+"
_SIMPLE = re.compile(
    rf"\s*(ROOT )?%?([\w.\-]+) = ([a-z]\w*\[[^\]\n]*\](?:\{{[^{{}}\n]*\}})?)\s*([\w\-]+)\(({_NAMES})?\)"
)
"""an instruction whose result is one array and whose operands are names alone, up to its attributes"""
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_BODY_END = re.compile(r"\s*\}[^\n]*\n")
_DYNAMIC = re.compile(r"\b[a-z]\w*\[[\d,]*<=\d")
_NAME = re.compile(r"[\w.\-]+")
_METADATA = re.compile(r'(op_name|source_file)="([^"\\]*(?:\\.[^"\\]*)*)"|(source_line|stack_frame_id)=(\d+)')

_NO_ATTRIBUTES: Mapping[str, str] = {}
_NO_CALLS: Mapping[str, tuple[str, ...]] = {}

Sources = Mapping[str, tuple[str, int]]
"""stack_frame_id -> (file, line)"""


@paused_collection()
def parse(text: str | None) -> Module:
    """Parses one compiled module, from what ``compiled.as_text()`` returned; some compilers return None.

    Raises:
      ConfigError: the text is not HLO, is incomplete, or holds more than one module.
    """
    text = module_text(text or "")
    header, pos = _split(text, len("HloModule "), "\n", "the header")
    attributes = _attributes(header[1:])
    computations, entry = _computations(text, pos)
    if entry is None:
        raise _incomplete("the module: it has no ENTRY computation")
    module = Module(
        name=header[0].lstrip("%"), entry=entry, computations=computations,
        is_scheduled=attributes.get("is_scheduled") == "true",
        num_partitions=_devices(attributes, "num_partitions"), replica_count=_devices(attributes, "replica_count"),
        input_output_alias=parse_aliases(attributes.get("input_output_alias", "")),
    )  # fmt: skip
    module.memo["dynamic"] = bool(_DYNAMIC.search(text))
    module.memo["counted"] = "num_partitions" in attributes or "replica_count" in attributes
    check_module(module)
    return module


def _devices(attributes: dict[str, str], key: str) -> int:
    text = attributes.get(key, "1")
    if not re.fullmatch(r"\d{1,6}", text) or not int(text):
        raise ConfigError(f"{key}={text:.80} of HLO text is no number of devices; it must be from 1 to 999999")
    return int(text)


def _computations(text: str, pos: int) -> tuple[dict[str, Computation], Computation | None]:
    """(all computations by name, the entry), from the position after the header."""
    computations: dict[str, Computation] = {}
    entry = None
    tables: dict[str, dict[str, str]] = {table: {} for table in _SOURCE_TABLES}
    table, sources = {}, {}
    while pos < len(text):
        end = text.index("\n", pos) + 1
        line = text[pos:end].strip()
        if match := _COMPUTATION.match(line):
            sources = sources or _sources(tables)
            computation, end = _computation(text, end, match[2], sources)
            if computation.name in computations or (entry and match[1]):
                raise ConfigError(f"HLO text has two computations {computation.name}, or two ENTRY; parse one module")
            computations[computation.name] = computation
            entry = computation if match[1] else entry
        elif line.startswith(("%", "ENTRY")):
            raise _incomplete(f"computation {line[:40]}")
        elif line in tables:
            table = tables[line]
        else:
            number, _, row = line.partition(" ")
            table[number] = row
        pos = end
    return computations, entry


def _computation(text: str, pos: int, name: str, sources: Sources) -> tuple[Computation, int]:
    instructions, end = [], None
    while (simple := _SIMPLE.match(text, pos)) or not (end := _BODY_END.match(text, pos)):
        head, pos = _simple_head(simple) if simple else _head(text, pos, name)
        attributes, pos = _attributes_at(text, pos, head.name)
        instructions.append(_instruction(head, attributes, name, sources))
    if not instructions:
        raise ConfigError(f"computation {name} of HLO text has no instruction; pass all of compiled.as_text()")
    root = next((i for i in reversed(instructions) if i.is_root), instructions[-1])
    return Computation(name, tuple(instructions), {i.name: i for i in instructions}, root), end.end()


class _Head(NamedTuple):
    """An instruction without its attributes."""

    name: str
    is_root: bool
    shape: ShapeTree
    opcode: str
    operands: list[str]
    """or what else stands in the place of operands"""


def _simple_head(match: re.Match) -> tuple[_Head, int]:
    """What `_SIMPLE` has found, and the position after it."""
    root, name, array, opcode, names = match.groups()
    operands = names.replace("%", "").split(", ") if names else []
    return _Head(name, bool(root), _array_of(array, name), opcode, operands), match.end()


def _head(text: str, pos: int, computation: str) -> tuple[_Head, int]:
    """An instruction in any form up to its attributes, and the position after it."""
    if not (match := _INSTRUCTION.match(text, pos)):
        raise _incomplete(f"computation {computation}")
    where = f"instruction {match[2]}"
    shape, pos = _shape(text, match.end(), match[2])
    if not (opcode := _OPCODE.match(text, pos)):
        raise _incomplete(where)
    inner, pos = _split(text, opcode.end(), ")", where)
    if opcode[1] not in _WITHOUT_OPERANDS:
        inner = [names[-1] for part in inner if (names := _NAME.findall(part))]
    return _Head(match[2], bool(match[1]), shape, opcode[1], inner), pos


def _attributes_at(text: str, pos: int, name: str) -> tuple[Mapping[str, str], int]:
    """Attributes of an instruction, which end with its line, and the position after that."""
    if text.startswith("\n", pos):
        return _NO_ATTRIBUTES, pos + 1
    rest, pos = _split(text, pos, "\n", f"instruction {name}")
    attributes = _attributes(rest)
    if (config := attributes.get("backend_config", "")).startswith('"'):  # as older compilers write it
        attributes["backend_config"] = config[1:-1].replace('\\"', '"')
    return attributes, pos


def _instruction(head: _Head, attributes: Mapping[str, str], computation: str, sources: Sources) -> Instruction:
    literal = head.opcode in _WITHOUT_OPERANDS
    op_name, file, line = _metadata(attributes["metadata"], sources) if "metadata" in attributes else ("", "", 0)
    base, phase = split_phase(head.opcode)
    return Instruction(
        name=head.name, opcode=head.opcode, base=base, phase=phase, shape=head.shape,
        operands=() if literal else tuple(head.operands), literal=", ".join(head.operands) if literal else "",
        called=_called(attributes) if attributes else _NO_CALLS, attributes=attributes, op_name=op_name,
        source_file=file, source_line=line, computation=computation, is_root=head.is_root,
    )  # fmt: skip


def _shape(text: str, pos: int, name: str, depth: int = 0) -> tuple[ShapeTree, int]:
    where = f"instruction {name}"
    if depth > DEEPEST:
        raise ConfigError(f"HLO text nests tuples more than {DEEPEST} deep in {where}; pass compiled.as_text()")
    if match := _ARRAY.match(text, pos):
        return _array_of(match[0], name), match.end()
    if text.startswith("b(", pos):  # a buffer, which holds one array
        shape, pos = _shape(text, pos + 2, name, depth + 1)
        return shape, pos + 1
    if not text.startswith("(", pos):
        if _OPCODE.match(text, pos):
            raise ConfigError(f"HLO text lacks the shape of the result of {where}; print the program with its shapes")
        raise _incomplete(where)
    parts, pos = [], pos + 1
    while not text.startswith(")", pos):
        part, pos = _shape(text, pos, name, depth + 1)
        parts.append(part)
        while text[pos : pos + 1] in (",", " "):
            pos += 1
    return tuple(parts), pos + 1


def _array_of(text: str, name: str) -> Shape:
    """The shape of an array of an instruction."""
    try:
        return _array(text)
    except ValueError:
        raise ConfigError(
            f"HLO text has shape {text:.80} in instruction {name}; dimensions must be numbers of at most 18 digits"
        ) from None


@functools.lru_cache(maxsize=65536)
def _array(text: str) -> Shape:
    """The shape of an array; programs repeat a few shapes many times."""
    match = _ARRAY.match(text)
    assert match
    dtype, dims, layout = match.groups("")
    sizes = (dim.strip().removeprefix("<=") for dim in dims.split(",") if dim.strip())
    return Shape(dtype, tuple(map(natural, sizes)), layout)


def _split(text: str, pos: int, end: str, where: str) -> tuple[list[str], int]:
    """Comma-separated parts from `pos` to the first `end` outside all brackets, and the position after that."""
    depth, start, parts = 0, pos, []
    for match in _STRUCTURE.finditer(text, pos):
        token = match.group()
        if not depth and token in (end, ","):
            parts.append(text[start : match.start()].strip())
            start = match.end()
            if token == end:
                return [part for part in parts if part], start
        elif token in ("(", "[", "{"):
            depth += 1
        elif token in (")", "]", "}"):
            depth -= 1
            if depth < 0:
                break
        elif token == '"':
            break
    raise _incomplete(where)


def _incomplete(where: str) -> ConfigError:
    return ConfigError(f"HLO text has unbalanced brackets or ends early in {where}; pass all of compiled.as_text()")


def _attributes(parts: list[str]) -> dict[str, str]:
    return {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}


def _called(attributes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found = {role: tuple(_NAME.findall(attributes[role])) for role in _ROLES if role in attributes}
    if "true_computation" in attributes:
        names = attributes["true_computation"] + " " + attributes.get("false_computation", "")
        found["branch_computations"] = tuple(_NAME.findall(names))
    return found


def _metadata(text: str, sources: Sources) -> tuple[str, str, int]:
    """(op_name, source file, source line) of an instruction."""
    found: dict[str, str] = {}
    for quoted, value, number, digits in _METADATA.findall(text):
        found.setdefault(quoted or number, value or digits)
    file, line = sources.get(found.get("stack_frame_id", ""), ("", 0))
    name = found.get("op_name", "").replace('\\"', '"').replace("\\'", "'")
    return name, found.get("source_file", file), natural(found["source_line"]) if "source_line" in found else line


def _sources(tables: dict[str, dict[str, str]]) -> dict[str, tuple[str, int]]:
    """stack_frame_id -> (file, line) of the innermost frame."""
    places, found = {}, {}
    for number, row in tables["FileLocations"].items():
        file, line = re.search(r"file_name_id=(\d+)", row), re.search(r"\bline=(\d+)", row)
        places[number] = (
            tables["FileNames"].get(file[1], "").strip('"') if file else "",
            natural(line[1]) if line else 0,
        )
    for number, row in tables["StackFrames"].items():
        place = re.search(r"file_location_id=(\d+)", row)
        found[number] = places.get(place[1], ("", 0)) if place else ("", 0)
    return found


def parse_aliases(text: str) -> tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]:
    """(index of an output, number of the argument whose memory it reuses, index within the argument) of each alias."""
    found = re.findall(r"\{([\d, ]*)\}:\s*\((\d+),\s*\{([\d, ]*)\}", text)
    return tuple((ints(output), natural(number), ints(within)) for output, number, within in found)


def viewed_operand(i: Instruction) -> str | None:
    """Name of the operand that an instruction returns as it is in memory; None if it makes an array of its own.

    A fusion may begin with a fusion that returns its operand in another tiling: ``output_to_operand_aliasing={{}: (0,
    {})}``. libtpu writes such fusions for v7x.
    """
    if i.opcode == "bitcast":
        return i.operands[0]
    if i.opcode != "fusion" or "output_to_operand_aliasing" not in i.attributes:
        return None
    aliases = parse_aliases(i.attributes["output_to_operand_aliasing"])
    return next((i.operands[number] for output, number, within in aliases if not output and not within), None)
