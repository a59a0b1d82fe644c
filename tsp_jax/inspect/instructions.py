"""Instructions of a compiled program, and the computations that they form."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from tsp_jax.inspect.shapes import ShapeTree


class Instruction(NamedTuple):
    """One line of a computation. Names are without ``%``."""

    name: str
    opcode: str
    base: str
    """the opcode without the -start, -update or -done of an asynchronous instruction"""
    phase: str
    """start, update or done for a part of an asynchronous instruction, else empty"""
    shape: ShapeTree
    operands: tuple[str, ...]
    literal: str
    """value of a constant, or number of a parameter"""
    called: Mapping[str, tuple[str, ...]]
    """role (body, condition, to_apply, calls, branch_computations) -> names of computations"""
    attributes: Mapping[str, str]
    """every attribute, as text"""
    op_name: str
    """scope and primitive, such as jit(step)/while/body/tsp/mlp/bucket/dot_general"""
    source_file: str
    source_line: int
    computation: str
    """name of the computation that holds it"""
    is_root: bool

    @property
    def backend_config(self) -> str:
        """The compiler's own annotation, as text."""
        return self.attributes.get("backend_config", "")

    @property
    def custom_call_target(self) -> str:
        """Which kernel a custom call runs; empty for other instructions."""
        return self.attributes["custom_call_target"].strip('"') if "custom_call_target" in self.attributes else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Computation:
    """Instructions in schedule order."""

    name: str
    instructions: tuple[Instruction, ...]
    by_name: dict[str, Instruction] = dataclasses.field(repr=False)
    root: Instruction = dataclasses.field(repr=False)
    """the instruction that makes the computation's result"""

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions that make an instruction's operands."""
        return tuple([self.by_name[name] for name in instruction.operands if name in self.by_name])
