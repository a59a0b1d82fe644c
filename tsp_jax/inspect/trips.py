"""How often the body of a while loop runs, from the text of its condition, initial state and body."""

import re
from typing import TypeAlias

from tsp_jax.inspect.instructions import Computation, Computations, Instruction, callee
from tsp_jax.inspect.opcodes import SCALAR_FORWARDING

_COMPILER_COUNT = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}

_Scalar: TypeAlias = tuple[int | None, int]
"""(k, c): element k of the loop's state plus c; k is None for a plain number"""
_Known: TypeAlias = dict[tuple[str, int], _Scalar]
"""values known while following a scalar: ("state", k) in a loop's computations, ("argument", n) inside a fusion"""


def count_trips(computations: Computations, loop: Instruction) -> int | None:
    """How often a while loop's body runs, as the compiler notes it or as its text implies; None if data decide.

    Read from the text are loops with a condition `state[k] < limit`, a constant initial state and a body that sets
    `state[k] + step`.
    """
    if noted := _COMPILER_COUNT.search(loop.backend_config):
        return int(noted[1])
    caller, body = computations[loop.computation], callee(computations, loop, "body")
    start = next(iter(caller.operands(loop)), None)
    size = len(loop.shape) if start and isinstance(loop.shape, tuple) else 0
    initial = {k: _element(computations, caller, start, k, {}) for k in range(size) if start}
    known: _Known = {("state", k): (k, 0) for k in initial}
    fixed = {k: v for k, v in initial.items() if v and _element(computations, body, body.root, k, known) == (k, 0)}
    known |= {("state", k): value for k, value in fixed.items()}
    direction, left, right = _comparison(computations, callee(computations, loop, "condition"), known)
    if left is None or right is None:
        return None
    if left[0] is None:
        direction, left, right = _MIRRORED.get(direction, ""), right, left
    if left[0] is None or right[0] is not None:
        return None
    first, after = initial[left[0]], _element(computations, body, body.root, left[0], known)
    if first is None or after is None or after[0] != left[0] or not after[1]:
        return None
    return _trips(direction, right[1] - left[1] - first[1], after[1])


def _trips(direction: str, distance: int, step: int) -> int | None:
    """Trips of a counter that starts at 0 and grows by `step` while it compares with `distance`."""
    if direction == "NE":
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if direction not in (("LT", "LE") if step > 0 else ("GT", "GE")):
        return None
    inclusive = direction in ("LE", "GE")
    return max(0, distance // step + 1 if inclusive else -(-distance // step))


def _comparison(
    computations: Computations, computation: Computation, known: _Known
) -> tuple[str, _Scalar | None, _Scalar | None]:
    """(direction, left, right) of the one comparison that a loop's condition makes, which may be inside a fusion."""
    root = computation.root
    while root.opcode in ("fusion", "call"):
        known = _arguments(computations, computation, root, known)
        computation = callee(computations, root, "calls", "to_apply")
        root = computation.root
    operands = computation.operands(root)
    if root.opcode != "compare" or len(operands) != 2:
        return "", None, None
    left, right = (_scalar(computations, computation, o, known) for o in operands)
    return root.attributes.get("direction", ""), left, right


def _scalar(computations: Computations, computation: Computation, i: Instruction, known: _Known) -> _Scalar | None:
    """Follows an integer back to an element of the loop's state or to a number."""
    operands = computation.operands(i)
    if i.opcode == "constant":
        return (None, int(i.literal)) if re.fullmatch(r"-?\d+", i.literal) else None
    if i.opcode == "parameter":
        return known.get(("argument", int(i.literal)))
    if i.opcode == "get-tuple-element" and operands:
        index = int(i.attributes.get("index", 0))
        if operands[0].opcode == "parameter":
            return known.get(("state", index))
        return _element(computations, computation, operands[0], index, known)
    if i.opcode in SCALAR_FORWARDING and operands:
        return _scalar(computations, computation, operands[0], known)
    if i.opcode in ("add", "subtract") and len(operands) == 2:
        left, right = (_scalar(computations, computation, o, known) for o in operands)
        return _sum(i.opcode, left, right)
    if i.opcode in ("fusion", "call"):
        body = callee(computations, i, "calls", "to_apply")
        return _scalar(computations, body, body.root, _arguments(computations, computation, i, known))
    return None


def _sum(opcode: str, left: _Scalar | None, right: _Scalar | None) -> _Scalar | None:
    """Sum or difference of two scalars, if at most one of them depends on the state."""
    if left and right and right[0] is None:
        return left[0], left[1] + (right[1] if opcode == "add" else -right[1])
    if left and right and left[0] is None and opcode == "add":
        return right[0], right[1] + left[1]
    return None


def _element(
    computations: Computations, computation: Computation, i: Instruction, k: int, known: _Known
) -> _Scalar | None:
    """Element k of a tuple."""
    operands = computation.operands(i)
    if i.opcode != "tuple" or k >= len(operands):
        return None
    return _scalar(computations, computation, operands[k], known)


def _arguments(computations: Computations, computation: Computation, i: Instruction, known: _Known) -> _Known:
    """Known values of the arguments that an instruction passes to the computation it calls."""
    values = {n: _scalar(computations, computation, o, known) for n, o in enumerate(computation.operands(i))}
    return {("argument", n): value for n, value in values.items() if value is not None}
