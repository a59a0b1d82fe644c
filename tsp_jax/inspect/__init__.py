"""Reads compiled programs: memory, communication, and a simulated timeline. It knows no model.

`report` is the entry point, and `compile_for` for functions that are not compiled yet. Behind them:

texts, shapes, instructions, module, parser          the text of a program as a tree
opcodes                                              tables of opcodes
scopes                                               what named scopes tell
collectives, groups                                  communication
memory, lifetimes, peak, memory_curve                memory
flops, roofline, schedule, prices, queues, timeline  cost of instructions, and the simulation
trace, outline                                       the timeline as a file, and as a tree that can be drawn
program_report, unknown, render, expect, units       the report, what it lacks, printing it, checks on it
bottleneck                                           simulations with one thing changed: what would shorten a step
totals, report_json, diff, render_diff               two programs side by side
compile_for, abstract, refusals                      compiling a user's function; its arguments; what goes wrong
"""

from tsp_jax.inspect.bottleneck import Bottleneck, Bottlenecks, find_bottlenecks
from tsp_jax.inspect.collectives import Collective, Total, list_collectives, total_by_op
from tsp_jax.inspect.compile_for import CompiledFunction, compile_for, target_mesh
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
    "Bottleneck", "Bottlenecks", "Buffer", "Collective", "CompiledFunction", "Computation", "FullWeight",
    "Instruction", "LiveBuffer", "Memory", "Module", "Peak", "Report", "Shape", "Timeline", "Total", "compile_for",
    "compiled_memory", "find_bottlenecks", "find_peak",
    "largest_buffers", "leaves", "list_buffers", "list_collectives", "nbytes", "parse", "replica_groups", "report",
    "simulate", "target_mesh", "total_by_op", "write_trace",
]  # fmt: skip
