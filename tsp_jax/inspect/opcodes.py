"""Tables of HLO opcodes: what several modules must know about an instruction's kind, in one place."""

import functools
import re

from tsp_jax.hardware import links

COLLECTIVES = {op: op for op in links.COLLECTIVES} | {"ragged-all-to-all": "all-to-all"}
"""opcode -> the collective that it is counted as"""

TUPLES = frozenset(("tuple", "get-tuple-element"))
ALIASES = frozenset(("bitcast", "opt-barrier", "add-dependency", "after-all", "domain"))
"""the result is the operand's memory under another name"""
CONTROL_FLOW = frozenset(("while", "conditional", "call", "async"))
"""opcodes whose result is made by the computations that they call"""
NO_KERNEL = TUPLES | ALIASES | {"parameter", "constant", "while", "conditional", "partition-id", "replica-id"}
"""opcodes that launch no kernel of their own, and so cost nothing"""

POINT_TO_POINT = frozenset(("copy", "send", "recv"))
"""opcodes whose -start returns (destination, source, context); for all others it returns (operands, results, ...)"""
SCALAR_FORWARDING = {"copy", "bitcast", "convert", "reshape", "broadcast", "copy-start", "copy-done", "opt-barrier"}
"""a scalar passes through them with its value unchanged"""
SLICES = frozenset(("slice", "dynamic-slice", "gather"))
"""read only as many elements of their first operand as they return"""
IN_PLACE = frozenset(("dynamic-update-slice", "scatter"))
"""may overwrite part of their first operand"""
FILLERS = frozenset(("broadcast", "constant", "iota", "copy"))
"""give a buffer its first content, which says little about what the buffer is for"""
ELEMENTWISE = frozenset(
    re.findall(
        r"\S+",
        """abs add and atan2 bitcast-convert cbrt ceil clamp compare complex convert cosine divide erf exponential
        exponential-minus-one floor imag is-finite log log-plus-one logistic maximum minimum multiply negate not or
        popcnt power real reduce-precision remainder round-nearest-afz round-nearest-even rsqrt select shift-left
        shift-right-arithmetic shift-right-logical sign sine sqrt stochastic-convert subtract tan tanh xor""",
    )
)


@functools.lru_cache(maxsize=4096)
def split_phase(opcode: str) -> tuple[str, str]:
    """(opcode without its phase, phase): start, update, done, or empty if the instruction is not asynchronous."""
    base, _, phase = opcode.rpartition("-")
    return (base, phase) if base and phase in ("start", "update", "done") else (opcode, "")


# Targets of custom calls.
ALLOCATE = "AllocateBuffer"
ASYNC_START = "AsyncCollectiveStart"
ASYNC_DONE = "AsyncCollectiveDone"
NO_TRAFFIC_CALLS = (ALLOCATE, ASYNC_START, ASYNC_DONE)
"""custom calls that read and write nothing themselves"""
