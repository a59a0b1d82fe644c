"""What a compiled program holds: the arrays it makes, and the compiler's account of its memory."""

import dataclasses
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.hlo import Instruction, Module, Shape, ShapeTree, leaves

# Other names for an array that an instruction elsewhere makes, or that is no array of the device.
_VIEWS = ("tuple", "get-tuple-element", "bitcast", "opt-barrier", "add-dependency", "after-all", "domain")
_CALLERS = ("while", "conditional", "call", "async")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """An array that an instruction makes, one device's slice of it."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    """without tile padding"""
    memory_space: int
    """0 main memory; on TPU 1 on-chip, 5 the host's"""
    scope: str
    """op_name: named scopes and the primitive"""
    opcode: str
    name: str
    """of the instruction"""
    computation: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """outputs that reuse an argument's memory"""
    temp_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Arguments + temporaries + outputs - aliased. Compilers' own peaks may leave out the bodies of scans."""
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes


def buffers(module: Module) -> list[Buffer]:
    """Every array that an instruction outside fusions makes, whether or not it shares its memory with another.

    Left out are other names for the same array: tuples and their elements, bitcasts, the parameters and results of
    loops, branches and calls, and the done half of asynchronous pairs. The arguments of the program are in. A loop's
    arrays appear once, whatever its trips. Two arrays of the list may never be alive together, so that their sum says
    nothing; what the list can show is that an array is *not* there.
    """
    return [
        Buffer(
            shape=leaf.dims,
            dtype=leaf.dtype,
            bytes=leaf.bytes,
            memory_space=leaf.memory_space,
            scope=i.op_name,
            opcode=i.opcode,
            name=i.name,
            computation=computation.name,
        )
        for computation, _ in module.executions()
        for i in computation.instructions
        if i.opcode != "parameter" or computation is module.entry
        for leaf in leaves(_made(i))
        if leaf.dtype not in ("token", "opaque")
    ]


def largest(module: Module, n: int = 10) -> list[Buffer]:
    """The n largest buffers, the largest first."""
    return sorted(buffers(module), key=lambda buffer: -buffer.bytes)[:n]


def memory_report(compiled: Any) -> Memory:
    """The compiler's account of one device's memory.

    Args:
        compiled: what ``jax.jit(f).lower(...).compile()`` returned.

    Raises:
        ConfigError: the compiler gives no account.
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
    """The part of an instruction's shape that is new arrays."""
    if i.opcode in _VIEWS or i.base in _CALLERS or i.phase in ("update", "done"):
        return ()
    if i.phase != "start" or isinstance(i.shape, Shape) or i.base == "all-reduce":
        return i.shape
    if i.base in ("copy", "send", "recv"):  # (destination, source, context)
        return i.shape[:1]
    return i.shape[1:2]  # (operands, results, contexts)
