"""Reads the named scopes of a program: a readable label, the trip counts of loops, the FLOPs of kernels."""

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.rates import Work
from tsp_jax.inspect.instructions import Instruction

_ADDED_BY_JAX = re.compile(
    r"while|body|cond|closed_call|shard_map|checkpoint|rematted_computation|eval_jaxpr|scan|pjit|branch_\d+_fun|"
    r"(jit|jvp|transpose|vmap|pjit|checkpoint|custom_jvp_call|custom_vjp_call)\(.*\)|custom_[jv][jv]p_call|.*->.*|"
    r"mean_\w+\[.*\]|likely_branch\[.*\]|"
)
_DECLARED_TRIPS = re.compile(r"(?:^|[/(])mean_trips\[([^\]/]*)\]\)*/while$")
_DECLARED_FLOPS = re.compile(r"(?:^|[/(])mean_flops\[([\w.]+)=([^\]/]*)\]\)*/[^/]+$")
_GROUPED = re.compile(r"grouped\.(\d{1,9})x(\d{1,9})x(\d{1,9})")
_ATTENTION = re.compile(r"attention_(forward|backward)(?:\.(\w+)\.h(\d{1,6}))?")


_TOO_MANY = 1e30


class DeclaredFlops(NamedTuple):
    """FLOPs that a program declares for a kernel: the mean over the kernel's executions."""

    kind: str
    """kind of kernel, such as attention_forward.triton.h128 (`tsp_jax.ops.kernels.kernel.declare_products`), or
    grouped.8192x768x2048, products of m rows with n columns over k, of several experts (`tsp_jax.ops.grouped`)"""
    flops: float

    @property
    def work(self) -> Work:
        """What `Rates.seconds` needs to know; a kind that it does not know counts as plain products."""
        if found := _GROUPED.fullmatch(self.kind):
            m, n, k = map(float, found.groups())
            return Work(self.flops, (m, n, k), kernel="grouped")
        if not (found := _ATTENTION.fullmatch(self.kind)):
            return Work(self.flops)
        direction, kernel, head_dim = found.groups()
        direction = "forward" if direction == "forward" else "backward"
        return Work(self.flops, direction=direction, kernel=kernel or "", head_dim=int(head_dim or 0))


def readable_scope(op_name: str, callers: Sequence[str] = ()) -> str:
    """A readable label for an op_name: the pass, then the named scopes.

    ``jit(f)/transpose(jvp())/while/body/tsp/mlp/gather/all_gather`` becomes ``backward tsp/mlp/gather``. The pass is
    forward, backward, or recompute (rematerialization for the backward pass). Labels of programs without
    differentiation name no pass. The primitive, transformations and control flow are left out. If the compiler merged
    several instructions, the label is that of the first one.

    `callers`: op_names of the enclosing loops, innermost first. The body of a function that is called twice has the
    op_names of one call only, so the outermost loop is the most reliable source of the pass.
    """
    *parts, _ = re.sub(r"\(([^():]*):.*", r"\1", op_name.partition(";")[0]).split("/")
    names = [part for part in parts if not _ADDED_BY_JAX.fullmatch(part)]
    start = names.index("tsp") if "tsp" in names else 0
    return _pass(op_name, callers) + ("/".join(names[start : start + 4]) or "other")


def _pass(op_name: str, callers: Sequence[str]) -> str:
    for name in (*reversed(callers), op_name):
        if "transpose(" in name:
            again = any(map(_recomputes, (op_name, *callers)))
            return "recompute " if again else "backward "
        if "jvp(" in name:
            return "forward "
    return ""


def _recomputes(op_name: str) -> bool:
    """Whether backward recomputes an instruction: by jax.checkpoint, or by a layer's VJP that backward calls."""
    if "rematted_computation" in op_name:
        return True
    parts = op_name.split("/")
    backward = next((k for k, part in enumerate(parts) if part.startswith("transpose(")), len(parts))
    for part in parts[backward + 1 :]:
        if part.startswith("transpose(") or not _ADDED_BY_JAX.fullmatch(part):
            return False
        if part.startswith("jvp("):
            return True
    return False


def declared_trips(loop: Instruction) -> float | None:
    """The mean trip count that a program declares for a data-dependent loop; None if the program declares none.

    A program declares it with a named scope directly around the loop: ``with jax.named_scope("mean_trips[64.5]")``.
    """
    found = _DECLARED_TRIPS.search(loop.op_name)
    return _positive(loop, "mean_trips", "", found[1], "64.5") if found else None


def declared_flops(i: Instruction) -> DeclaredFlops | None:
    """The FLOPs that a program declares for a kernel whose HLO text does not show them; None if it declares none.

    A program declares them with a named scope directly around the kernel:
    ``with jax.named_scope("mean_flops[some_kind=1.5e12]")``. Attention kernels do so by `declare_products`.
    """
    found = _DECLARED_FLOPS.search(i.op_name) if i.opcode == "custom-call" else None
    if not found:
        return None
    kind, number = found.groups()
    return DeclaredFlops(kind, _positive(i, "mean_flops", f"{kind}=", number, "1.5e12"))


Branch = TypeVar("Branch")
_LIKELY_BRANCH = re.compile(r"(?:^|[/(])likely_branch\[([^\]/]*)\]\)*/[^/]+$")


def likely_branches(conditional: Instruction, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
    """The branches that count as taken: the one that a program declares as the likely one, else all.

    A program declares its number with a named scope directly around the conditional:
    ``with jax.named_scope("likely_branch[1]")``. The branches of `lax.cond` are 0 for false and 1 for true.
    """
    found = _LIKELY_BRANCH.search(conditional.op_name)
    if not found:
        return branches
    if not found[1].isdecimal() or int(found[1]) >= len(branches):
        text = f"{conditional.name}: scope likely_branch[{found[1]}] is no number of a branch"
        raise ConfigError(f"{text}; use 0 to {len(branches) - 1}")
    return (branches[int(found[1])],)


def _positive(i: Instruction, scope: str, kind: str, text: str, example: str) -> float:
    """The number that a scope declares; raises ConfigError unless it is above zero and below `_TOO_MANY`."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < _TOO_MANY:
        number = f"number above 0 and below {_TOO_MANY:g}"
        raise ConfigError(f"{i.name}: scope {scope}[{kind}{text}] is no {number}; use {scope}[{kind}{example}]")
    return number
