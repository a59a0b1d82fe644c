"""Floating-point operations of matrix products, from the shapes and dimension numbers of the text."""

import math
import re
from collections.abc import Mapping

from tsp_jax.inspect.checks import misfit
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.scopes import declared_flops
from tsp_jax.inspect.shapes import Shape, ints, leaves

_PRODUCTS = frozenset(("dot", "scaled-dot", "ragged-dot", "custom-call", "convolution"))
_WIDEST_WINDOW = 2**20


def product_flops(computation: Computation, i: Instruction) -> float:
    """Operations of an instruction that is a matrix product, a multiply-add counting as two; 0 for others.

    Raises:
      ConfigError: its dimension numbers do not fit its operands.
    """
    try:
        return _product_flops(computation, i)
    except (IndexError, KeyError, ValueError, ZeroDivisionError):
        raise misfit(i, "has dimension numbers or a window that do not fit its operands") from None


def _product_flops(computation: Computation, i: Instruction) -> float:
    if i.opcode not in _PRODUCTS:
        return 0.0
    operands, results = [leaves(operand.shape) for operand in computation.operands(i)], leaves(i.shape)
    if len(operands) < 2 or not operands[0] or not operands[1] or not results:
        return 0.0
    left, right, result = operands[0][0], operands[1][0], results[0]
    if i.opcode in ("dot", "scaled-dot", "ragged-dot"):
        contracting = i.attributes.get("lhs_contracting_dims", "")
        ragged = set(ints(i.attributes.get("lhs_ragged_dims", ""))) & set(ints(contracting))
        # Groups divide a ragged contraction between them; the result has a first dim of groups.
        return _product(left, result, contracting) / (result.dims[0] or 1 if ragged else 1)
    if i.opcode == "custom-call" and re.search("gemm|matmul", i.custom_call_target):
        dims = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', i.backend_config)
        return _product(left, result, dims[1]) if dims else 0.0
    if i.opcode == "convolution":
        return _convolution(left, right, result, i.attributes)
    if i.opcode == "custom-call" and "$conv" in i.custom_call_target:  # of cuDNN, and of MIOpen by the same names
        return _convolution(*_forward_roles(i.custom_call_target, left, right, result), i.attributes)
    return 0.0


def product_shape(computation: Computation, i: Instruction, flops: float) -> tuple[float, float, float] | None:
    """(m, n, k) of a product [m, k] x [k, n] of so many operations, with a batch counted in m; None if unclear."""
    operands, results = [leaves(operand.shape) for operand in computation.operands(i)], leaves(i.shape)
    if not operands or not operands[0] or not results or not results[0].size:
        return None
    k = flops / 2 / results[0].size
    m = min(max(1.0, operands[0][0].size / k), results[0].size) if k else 0.0
    return (m, results[0].size / m, k) if m else None


def declared_or_product_flops(computation: Computation, i: Instruction) -> float:
    """Operations of an instruction: those that the program declares for it, else those of a matrix product."""
    declared = declared_flops(i)
    return declared.flops if declared else product_flops(computation, i)


def total_flops(module: Module, unknown_trips: Trips = 1) -> float:
    """Operations of matrix products in one execution of a program (scheduled or not), from the shapes in its text."""
    runs = module.executions(unknown_trips, fusions=True)
    return sum(times * declared_or_product_flops(c, i) for c, times in runs for i in c.instructions)


def _product(left: Shape, result: Shape, contracting: str) -> float:
    return 2.0 * result.size * math.prod(left.dims[k] for k in ints(contracting))


def _forward_roles(target: str, left: Shape, right: Shape, result: Shape) -> tuple[Shape, Shape, Shape]:
    """(input, kernel, output) of the forward convolution, whose labels and window a backward call carries too."""
    if "BackwardInput" in target:
        return result, right, left
    return (left, result, right) if "BackwardFilter" in target else (left, right, result)


def _convolution(left: Shape, right: Shape, result: Shape, attributes: Mapping[str, str]) -> float:
    """Operations of a convolution, padding not counted: TPU writes batched products as convolutions."""
    inputs, kernel, outputs = re.split("_|->", attributes["dim_labels"])
    sides = dict(re.findall(r"(\w+)=([\dx_\-]+)", attributes.get("window", "")))
    batch = left.dims[inputs.index("b")] // int(attributes.get("batch_group_count", 1))
    total = 2.0 * batch * right.dims[kernel.index("i")] * result.dims[outputs.index("f")]
    for n in range(len(inputs) - 2):
        k = inputs.index(str(n)), kernel.index(str(n)), outputs.index(str(n))
        total *= _hits(left.dims[k[0]], right.dims[k[1]], result.dims[k[2]], n, sides)
    return total


def _hits(size: int, window: int, out: int, n: int, sides: dict[str, str]) -> int:
    """Number of (output, window) position pairs that meet an input element, along spatial dimension n."""

    def side(name: str, otherwise: int) -> int:
        return ints(sides[name].split("x")[n])[0] if name in sides else otherwise

    stride, low, spread, gap = side("stride", 1), side("pad", 0), side("lhs_dilate", 1), side("rhs_dilate", 1)
    if out < window:  # positions of the two enter alike; the loop goes over the fewer
        out, window, stride, gap = window, out, gap, stride
    if window > _WIDEST_WINDOW or min(stride, spread, gap) < 1:
        raise ValueError(window)
    hits, reach = 0, (size - 1) * spread
    period = spread // math.gcd(stride, spread)
    for k in range(window):
        first = max(0, -((k * gap - low) // stride))  # the first output position whose element is not before the array
        last = min(out - 1, (reach + low - k * gap) // stride)
        places = (o for o in range(first, min(first + period, last + 1)) if (o * stride + k * gap - low) % spread == 0)
        start = next(places, None)
        hits += 0 if start is None else (last - start) // period + 1
    return hits
