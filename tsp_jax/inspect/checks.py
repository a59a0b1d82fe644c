"""Checks that a text is a valid program (names, nesting of calls, shapes), before anything is computed from it."""

import functools
import graphlib
import re
from collections.abc import Sequence

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.opcodes import ALIASES, ELEMENTWISE
from tsp_jax.inspect.shapes import Shape, ShapeTree, ints, leaves

DEEPEST = 100
"""most levels to which computations may be nested; programs of real models have fewer than 20"""
_MOST_EXPANDED = 1_000_000
"""limit on a program's instructions with every call expanded; a long text may have several times those it lists"""
_LARGEST = 2**63
_ARRAYS = {
    "dot": 2, "ragged-dot": 2, "convolution": 2, "dynamic-update-slice": 2, "gather": 2, "scatter": 3,
    "slice": 1, "dynamic-slice": 1, "sort": 1,
} | dict.fromkeys(ELEMENTWISE, 1)  # fmt: skip
"""opcode -> how many operands must be arrays; the result must also be an array"""
_OPERANDS = {"get-tuple-element", "while", "conditional", "bitcast", "opt-barrier", "add-dependency", "domain"}
"""opcodes that need an operand of any shape"""
_CHECKED = {*_ARRAYS, *_OPERANDS, *ALIASES, "tuple"}


def check_module(module: Module) -> None:
    """Raises ConfigError, in one line that names the instruction, if a program cannot be what a compiler wrote."""
    sound: set[int] = set()
    for computation in module.computations.values():
        _check_names(computation)
        for i in computation.instructions:
            if id(i.shape) not in sound:  # programs repeat a few shapes many times
                _check_shape(i)
                sound.add(id(i.shape))
            if i.opcode in _CHECKED or i.phase in ("update", "done"):
                _check_operands(i, computation.operands(i))
    _check_calls(module)


def misfit(i: Instruction, wrong: str) -> ConfigError:
    """An error about one instruction."""
    return ConfigError(f"HLO instruction {i.name:.200} ({i.opcode}) {wrong}; pass the text as the compiler wrote it")


def _check_names(computation: Computation) -> None:
    """Checks that names are unique, operands are earlier instructions, and parameters are numbered 0, 1, ..."""
    known: set[str] = set()
    numbers: set[int] = set()
    roots = [i for i in computation.instructions if i.is_root]
    if len(roots) > 1:
        raise misfit(roots[1], f"is a second ROOT of {computation.name}")
    for i in computation.instructions:
        if i.name in known:
            raise misfit(i, f"stands twice in {computation.name}")
        if not known.issuperset(i.operands):
            missing = next(name for name in i.operands if name not in known)
            raise misfit(i, f"has operand {missing:.200}, which no earlier instruction of {computation.name} makes")
        known.add(i.name)
        if i.opcode == "parameter":
            if not re.fullmatch(r"\d{1,18}", i.literal) or int(i.literal) in numbers:
                raise misfit(i, f"has number {i.literal:.80}; it must be a number that no other parameter has")
            numbers.add(int(i.literal))
    if gaps := set(range(len(numbers))) - numbers:
        raise ConfigError(f"computation {computation.name:.200} lacks parameter({min(gaps)}); pass the complete text")


def _check_shape(i: Instruction) -> None:
    for leaf in leaves(i.shape):
        if leaf.layout and not _layout_fits(leaf.layout, len(leaf.dims)):
            raise misfit(i, f"has shape {leaf.dtype}{leaf.layout:.80}, whose layout does not fit")
    if any(leaf.size >= _LARGEST for leaf in leaves(i.shape)):
        raise misfit(i, f"has an array of {_LARGEST:g} elements or more")


def _check_operands(i: Instruction, operands: Sequence[Instruction]) -> None:
    needed = _ARRAYS.get(i.opcode, 0)
    if needed and (len(operands) < needed or not all(leaves(o.shape) for o in (i, *operands[:needed]))):
        raise misfit(i, f"needs {needed} arrays as operands, and one as its result")
    if (i.opcode in _OPERANDS or i.phase in ("update", "done")) and not operands:
        raise misfit(i, "needs an operand")
    if i.opcode == "get-tuple-element":
        _check_element(i, operands[0].shape)
    if i.opcode == "tuple" and len(leaves(i.shape)) != sum(len(leaves(o.shape)) for o in operands):
        raise misfit(i, "has another number of arrays than its operands")
    if i.opcode in ALIASES - {"after-all"} and len(leaves(i.shape)) != len(leaves(operands[0].shape)):
        raise misfit(i, "has another number of arrays than its operand")


def _check_element(i: Instruction, source: ShapeTree) -> None:
    index = i.attributes.get("index", "none")
    if isinstance(source, Shape) or not re.fullmatch(r"\d{1,9}", index) or int(index) >= len(source):
        elements = "no tuple" if isinstance(source, Shape) else f"a tuple of {len(source)} elements"
        raise misfit(i, f"has index {index:.80}, and its operand is {elements}")
    if len(leaves(source[int(index)])) != len(leaves(i.shape)):
        raise misfit(i, f"has another number of arrays than element {index} of its operand")


@functools.lru_cache(maxsize=65536)
def _layout_fits(layout: str, rank: int) -> bool:
    """Whether a layout such as {1,0:T(8,128)} names only dims that a shape has, and no tile size of 0."""
    order, tiles = re.match(r"\{([\d,]*)", layout), re.findall(r"T((?:\([\d,*]*\))+)", layout)
    dims = ints(order[1]) if order else ()
    return len(set(dims)) == len(dims) and all(k < rank for k in dims) and all(0 not in ints(t) for t in tiles)


def _check_calls(module: Module) -> None:
    """Checks that calls form no cycle, are not nested too deeply, and do not expand to too many instructions."""
    calls = {
        name: [(i, target) for i in c.instructions for names in i.called.values() for target in names]
        for name, c in module.computations.items()
    }
    known = {name: [target for _, target in found if target in calls] for name, found in calls.items()}
    try:
        order = list(graphlib.TopologicalSorter(known).static_order())
    except graphlib.CycleError as error:
        callee, caller = error.args[1][:2]
        i = next(i for i, target in calls[caller] if target == callee)
        raise misfit(i, f"calls {callee}, which calls {caller} in turn: nothing ends a cycle of calls") from None
    most = max(_MOST_EXPANDED, 8 * sum(len(c.instructions) for c in module.computations.values()))
    depth, size = {}, {}
    for name in order:
        depth[name], size[name] = 1, len(module.computations[name].instructions)
        for i, target in ((i, target) for i, target in calls[name] if target in calls):
            depth[name] = max(depth[name], depth[target] + 1)
            size[name] += size[target]
            if depth[name] > DEEPEST:
                raise misfit(i, f"nests computations more than {DEEPEST} deep")
            if size[name] > most:
                raise misfit(i, f"runs more than {most:,} instructions, with every call written out")
