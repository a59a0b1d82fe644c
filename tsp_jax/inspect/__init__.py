"""Reads what compiled programs do: their text as a tree, what they move, what they hold. Knows no model."""

from tsp_jax.inspect.collectives import Collective, Total, collectives, replica_groups, summary
from tsp_jax.inspect.hlo import Computation, Instruction, Module, Shape, leaves, nbytes, parse
from tsp_jax.inspect.memory import Buffer, Memory, buffers, largest, memory_report
from tsp_jax.inspect.peak import LiveBuffer, Peak, peak
from tsp_jax.inspect.report import FullWeight, Report, report
from tsp_jax.inspect.timeline import Timeline, simulate
from tsp_jax.inspect.trace import write_trace

__all__ = [
    "Buffer",
    "Collective",
    "Computation",
    "FullWeight",
    "Instruction",
    "LiveBuffer",
    "Memory",
    "Module",
    "Peak",
    "Report",
    "Shape",
    "Timeline",
    "Total",
    "buffers",
    "collectives",
    "largest",
    "leaves",
    "memory_report",
    "nbytes",
    "parse",
    "peak",
    "replica_groups",
    "report",
    "simulate",
    "summary",
    "write_trace",
]
