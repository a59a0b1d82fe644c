"""Reads compiled programs: memory, communication, and a simulated timeline. It knows no model.

`report` is the entry point. Behind it:

shapes, instructions, module, parser                 the text of a program as a tree
opcodes                                              tables of opcodes
scopes                                               what named scopes tell
collectives, groups                                  communication
memory, lifetimes, peak                              memory
flops, roofline, schedule, queues, timeline, trace   cost of instructions, and the simulation
bottleneck                                           simulations with one thing changed: what would shorten a step
program_report, render, expect, units                the report, printing it, checks on it
totals, report_json, diff, render_diff               two programs side by side
"""

from tsp_jax.inspect.bottleneck import Bottleneck, Bottlenecks, find_bottlenecks
from tsp_jax.inspect.collectives import Collective, Total, list_collectives, total_by_op
from tsp_jax.inspect.groups import replica_groups
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.memory import Buffer, Memory, compiled_memory, largest_buffers, list_buffers
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.parser import parse
from tsp_jax.inspect.peak import LiveBuffer, Peak, find_peak
from tsp_jax.inspect.program_report import FullWeight, Report, report
from tsp_jax.inspect.shapes import Shape, leaves, nbytes
from tsp_jax.inspect.timeline import Timeline, simulate
from tsp_jax.inspect.trace import write_trace

__all__ = [
    "Bottleneck", "Bottlenecks", "Buffer", "Collective", "Computation", "FullWeight", "Instruction", "LiveBuffer",
    "Memory", "Module", "Peak", "Report", "Shape", "Timeline", "Total", "compiled_memory", "find_bottlenecks",
    "find_peak", "largest_buffers", "leaves", "list_buffers", "list_collectives", "nbytes", "parse", "replica_groups",
    "report", "simulate", "total_by_op", "write_trace",
]  # fmt: skip
