"""Arrays that a compiled program makes, and its memory use as the compiler reports it."""

import dataclasses
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.instructions import Instruction
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.opcodes import ALIASES, CONTROL_FLOW, POINT_TO_POINT, TUPLES
from tsp_jax.inspect.shapes import Shape, ShapeTree, leaves

LARGE_CONSTANT = 1 << 20
"""bytes from which a constant counts as memory; compilers make up small ones"""


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """An array that an instruction makes, on one device."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    """without tile padding"""
    memory_space: int
    """0: main memory; on TPU also 1: on-chip memory, 5: the host's memory"""
    scope: str
    """op_name in the HLO text: named scopes and the primitive"""
    opcode: str
    name: str
    """of the instruction"""
    computation: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device, as the compiler reports them (no measurement)."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """outputs that reuse an argument's memory"""
    temp_bytes: int
    constant_bytes: int = 0
    """large arrays that the program holds; see `program_constants`"""

    @property
    def peak_bytes(self) -> int:
        """Arguments + temporaries + outputs - aliased + constants; the compiler's own may leave out scans' bodies."""
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes + self.constant_bytes


def list_buffers(module: Module) -> list[Buffer]:
    """Every array that an instruction outside fusions makes, the arguments of the program included.

    Aliases of an array are left out, and an array made in a loop is listed once. Arrays of the list may share memory or
    never be alive together, so their sum means nothing. The list serves to show that an array is never made.
    """
    return [
        Buffer(leaf.dims, leaf.dtype, leaf.bytes, leaf.memory_space, i.op_name, i.opcode, i.name, i.computation)
        for computation, _ in module.executions(unlikely=True)
        for i in computation.instructions
        if i.opcode != "parameter" or computation is module.entry
        for leaf in leaves(_made(i))
        if leaf.dtype not in ("token", "opaque")
    ]


def largest_buffers(module: Module, n: int = 10) -> list[Buffer]:
    """The n largest buffers, the largest first."""
    return sorted(list_buffers(module), key=lambda buffer: -buffer.bytes)[:n]


def program_constants(module: Module) -> int:
    """Bytes of the large arrays that a program holds, such as weights that a function captured.

    No compiler counts them in its memory analysis.
    """
    large = (b for b in list_buffers(module) if b.opcode == "constant" and b.bytes >= LARGE_CONSTANT)
    return sum(buffer.bytes for buffer in large)


def compiled_memory(compiled: Any) -> Memory:
    """Memory of one device, as the compiler of ``jax.jit(f).lower(...).compile()`` reports it.

    Raises:
      ConfigError: the compiler reports none.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ConfigError("this compiler gives no memory analysis; compile for cpu, cuda, rocm or tpu")
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
    )


def _made(i: Instruction) -> ShapeTree:
    """The part of an instruction's shape that holds new arrays."""
    if i.opcode in TUPLES | ALIASES or i.base in CONTROL_FLOW or i.phase in ("update", "done"):
        return ()
    if i.phase != "start" or isinstance(i.shape, Shape) or i.base == "all-reduce":
        return i.shape
    if i.base in POINT_TO_POINT:  # (destination, source, context)
        return i.shape[:1]
    return i.shape[1:2]  # (operands, results, contexts)
