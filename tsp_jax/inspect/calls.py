"""Checks that the computations in an HLO text match the instructions that call them, before calls are followed."""

from collections.abc import Iterator, Sequence

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.checks import misfit
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.shapes import ShapeTree, leaves


def check_calls(module: Module) -> None:
    """Raises ConfigError if a call does not fit the computation that it names, or an alias names a missing array.

    The error is one line that names the call or alias. A computation that the text lacks is no error here: it may
    never run.
    """
    parameters = {name: _parameters(c) for name, c in module.computations.items()}
    for computation in module.computations.values():
        for i in computation.instructions:
            if not i.called and i.base != "conditional":
                continue
            operands = [operand.shape for operand in computation.operands(i)]
            for name, given in _calls(i, operands):
                if name in parameters and parameters[name] > given:
                    raise misfit(i, f"passes {given} arguments to {name}, which has {parameters[name]} parameters")
            for name, shape in _results(i, operands):
                callee = module.computations.get(name)
                if callee and _arrays(callee.root.shape) != _arrays(shape):
                    returned = f"{name}, which returns {_arrays(callee.root.shape)}"
                    raise misfit(i, f"makes {_arrays(shape)} arrays by {returned}; their shapes must be equal")
    _check_aliases(module)


def _parameters(computation: Computation) -> int:
    """Number of arguments that a computation takes."""
    return 1 + max((int(i.literal) for i in computation.instructions if i.opcode == "parameter"), default=-1)


def _calls(i: Instruction, operands: Sequence[ShapeTree]) -> Iterator[tuple[str, int]]:
    """(computation, number of arguments passed to it) for each call that an instruction makes."""
    if i.base == "while":
        yield from ((name, len(operands)) for role in ("body", "condition") for name in i.called.get(role, ()))
    elif i.base == "conditional":
        branches = i.called.get("branch_computations", ())
        if not branches or len(operands) != len(branches) + 1:
            raise misfit(
                i, f"has {len(branches)} branches and {len(operands)} operands; it needs one more than branches"
            )
        yield from ((name, 1) for name in branches)
    elif i.opcode in ("call", "fusion"):
        yield from ((name, len(operands)) for role in ("calls", "to_apply") for name in i.called.get(role, ()))


def _results(i: Instruction, operands: Sequence[ShapeTree]) -> Iterator[tuple[str, ShapeTree]]:
    """(called computation, shape that it must return), for each call whose result is the result of the instruction."""
    if i.base == "while":
        yield from ((name, shape) for name in i.called.get("body", ()) for shape in (i.shape, *operands[:1]))
    elif i.base == "conditional":
        yield from ((name, i.shape) for name in i.called.get("branch_computations", ()))
    elif i.opcode in ("call", "fusion"):
        yield from ((name, i.shape) for role in ("calls", "to_apply") for name in i.called.get(role, ()))


def _arrays(shape: ShapeTree) -> int:
    return len(leaves(shape))


def _check_aliases(module: Module) -> None:
    parameters = {int(i.literal): i for i in module.entry.instructions if i.opcode == "parameter"}
    for output, number, within in module.input_output_alias:
        argument = parameters.get(number)
        if argument is None or not _holds(argument.shape, within) or not _holds(module.entry.root.shape, output):
            raise ConfigError(
                f"input_output_alias lets output {list(output)} reuse {list(within)} of parameter {number}, of which "
                f"{module.entry.name} lacks one; pass the complete HLO text"
            )


def _holds(shape: ShapeTree, index: Sequence[int]) -> bool:
    """Whether a shape has a subshape at an index."""
    for k in index:
        if not isinstance(shape, tuple) or k >= len(shape):
            return False
        shape = shape[k]
    return True
