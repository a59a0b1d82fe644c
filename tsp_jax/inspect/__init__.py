"""Reads what compiled programs do: their text as a tree, what they move, what they hold. Knows no model."""

from tsp_jax.inspect.hlo import Computation, Instruction, Module, Shape, leaves, nbytes, parse
from tsp_jax.inspect.memory import Buffer, Memory, buffers, largest, memory_report
from tsp_jax.inspect.traffic import Collective, Total, collectives, replica_groups, summary

__all__ = [
    "Buffer",
    "Collective",
    "Computation",
    "Instruction",
    "Memory",
    "Module",
    "Shape",
    "Total",
    "buffers",
    "collectives",
    "largest",
    "leaves",
    "memory_report",
    "nbytes",
    "parse",
    "replica_groups",
    "summary",
]
