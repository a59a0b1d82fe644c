"""A compiled program as a tree of computations: what runs, in which order, how often."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.instructions import Computation, Instruction
from tsp_jax.inspect.opcodes import SCALAR_FORWARDING
from tsp_jax.inspect.scopes import declared_trips, likely_branches
from tsp_jax.inspect.shapes import Shape, natural

Trips: TypeAlias = float | Callable[[Instruction], float]
"""trip count where neither the text nor the program gives it: a number, or a function of the while instruction"""

UNSCHEDULED = "is_scheduled=true, so the compiler has not finished with it; use the text of compiled.as_text()"
"""end of the message "its text lacks ...", about programs that are not scheduled yet"""

_COMPILER_COUNT = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}

_Scalar: TypeAlias = tuple[int | None, int]
"""(k, c): element k of the loop's state plus c; k is None for a plain number"""
_Known: TypeAlias = dict[tuple[str, int], _Scalar]
"""scalars with known values; keys: ("state", k) for a loop's state, ("argument", n) for a fusion's arguments"""
_TOO_LARGE = 2**63
"""more iterations than any loop has"""
_MOST_RUNS = 1e30


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A compiled program, as each device runs it."""

    name: str
    entry: Computation
    computations: dict[str, Computation] = dataclasses.field(repr=False)
    is_scheduled: bool
    """whether instructions are listed in the order in which they run; if not, the compiler has not finished"""
    num_partitions: int
    replica_count: int
    input_output_alias: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]
    """(index of an output, number of the parameter whose memory it reuses, index within the parameter)"""
    _trip_counts: dict[tuple[str, str], int | None] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _constants: dict[str, dict[str, _Scalar]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """computation -> those of its scalars whose values are the same for every caller"""
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    """what other modules have read from the text and need again; keys name the reader first"""

    @property
    def num_devices(self) -> int:
        """Devices that run the program together."""
        return self.num_partitions * self.replica_count

    @property
    def names_devices(self) -> bool:
        """Whether the text says how many devices run it. One that does not counts as a program of one device."""
        return bool(self.memo.get("counted"))

    def check_scheduled(self) -> None:
        """Raises ConfigError if the text is from before scheduling, and so has neither a peak nor a timeline."""
        if not self.is_scheduled:
            raise ConfigError(f"{self.name} has no peak and no timeline: its text lacks {UNSCHEDULED}")

    def called(self, instruction: Instruction, *roles: str) -> tuple[Computation, ...]:
        """The computations that an instruction calls in the given roles; an incomplete text raises ConfigError."""
        names = [name for role in roles for name in instruction.called.get(role, ())]
        if missing := [name for name in names if name not in self.computations]:
            raise ConfigError(f"HLO text calls computation {missing[0]}, which it lacks; pass the complete text")
        return tuple(self.computations[name] for name in names)

    def callee(self, i: Instruction, *roles: str) -> Computation:
        """The first computation that an instruction calls in the given roles; ConfigError if there is none."""
        if not (found := self.called(i, *roles)):
            raise ConfigError(f"{i.opcode} {i.name} lacks its {roles[0]}; pass the complete HLO text")
        return found[0]

    def trip_count(self, loop: Instruction) -> int | None:
        """Number of iterations of a while loop; None if it depends on data.

        The number is taken from the compiler's annotation. Without an annotation it is computed, if the loop's
        condition is like `state[k] < limit`, its initial state is constant and its body adds a constant step.
        """
        if noted := _COMPILER_COUNT.search(loop.backend_config):
            return natural(noted[1])
        if (key := (loop.computation, loop.name)) not in self._trip_counts:
            self._trip_counts[key] = self._count(loop)
        return self._trip_counts[key]

    def _count(self, loop: Instruction) -> int | None:
        caller, body = self.computations[loop.computation], self.callee(loop, "body")
        if caller.name not in self._constants:
            self._constants[caller.name] = _scalars(self, caller, {})
        size = len(loop.shape) if isinstance(loop.shape, tuple) else 0
        start = _elements(caller.operands(loop)[0], self._constants[caller.name], size)
        known: _Known = {("state", k): (k, 0) for k in range(size)}
        after = _elements(body.root, _scalars(self, body, known), size)
        known |= {("state", k): v for k, v in enumerate(start) if v and after[k] == (k, 0)}
        direction, left, right = _comparison(self, self.callee(loop, "condition"), known)
        if left is None or right is None:
            return None
        if left[0] is None:
            direction, left, right = _MIRRORED.get(direction, ""), right, left
        if left[0] is None or right[0] is not None:
            return None
        first, last = start[left[0]], _elements(body.root, _scalars(self, body, known), size)[left[0]]
        if first is None or last is None or last[0] != left[0] or not last[1]:
            return None
        return _trips(direction, right[1] - left[1] - first[1], last[1])

    def trips(self, loop: Instruction, unknown_trips: Trips = 1) -> float:
        """How often a while loop's body runs: `trip_count`, else what the program declares, else `unknown_trips`."""
        trips = self.trip_count(loop)
        if trips is None:
            trips = declared_trips(loop)
        if trips is None:
            trips = unknown_trips(loop) if callable(unknown_trips) else unknown_trips
        return trips

    def branches(self, conditional: Instruction) -> tuple[Computation, ...]:
        """The branch that the program declares as the likely one, else all branches."""
        branches = self.called(conditional, "branch_computations")
        by_truth = "true_computation" in conditional.attributes  # the text then has branch 1 first
        return likely_branches(conditional, branches[::-1] if by_truth else branches)

    def executions(
        self, unknown_trips: Trips = 1, *, fusions: bool = False, unlikely: bool = False
    ) -> Iterator[tuple[Computation, float]]:
        """Every computation that runs, callers first, and how often it runs in one execution of the module.

        Of a conditional, the branches of `branches` count as taken. `unknown_trips` are the trips of data-dependent
        loops for which the program declares none (`declared_trips`). `fusions` adds the bodies of fusions; only the
        results of a body's root are written to memory. `unlikely` adds all other branches.
        """
        times: dict[str, float] = dict.fromkeys(self.computations, 0)
        times[self.entry.name] = 1
        calls = {name: self._calls(c, unknown_trips, fusions, unlikely) for name, c in self.computations.items()}
        for name in _callers_first(self.entry.name, calls):
            if times[name]:
                yield self.computations[name], times[name]
                for target, factor in calls[name]:
                    times[target] += times[name] * factor
                    if not times[target] < _MOST_RUNS:
                        raise ConfigError(f"computation {target} runs {_MOST_RUNS:g} times or more; no program does")

    def walk(self, unknown_trips: Trips = 1, *, fusions: bool = False) -> Iterator[tuple[Instruction, float]]:
        """Every instruction that runs, and how often; see `executions`."""
        for computation, times in self.executions(unknown_trips, fusions=fusions):
            yield from ((i, times) for i in computation.instructions)

    def _calls(
        self, computation: Computation, unknown_trips: Trips, fusions: bool, unlikely: bool
    ) -> list[tuple[str, float]]:
        """(callee, number of calls) for each call in one execution of a computation."""
        calls: list[tuple[str, float]] = []
        for i in computation.instructions:
            if not i.called or i.phase in ("update", "done"):
                continue
            if i.base == "while":
                trips = self.trips(i, unknown_trips)
                calls += [(self.callee(i, "body").name, trips), (self.callee(i, "condition").name, trips + 1)]
            elif i.base == "conditional":
                taken = self.called(i, "branch_computations") if unlikely else self.branches(i)
                calls += [(c.name, 1) for c in taken]
            elif i.base in ("call", "async") or (fusions and i.base == "fusion"):
                calls += [(c.name, 1) for c in self.called(i, "to_apply", "calls")]
        return calls


def _callers_first(entry: str, calls: dict[str, list[tuple[str, float]]]) -> list[str]:
    """The computations that run, in topological order by depth-first search."""
    seen, order, stack = {entry}, [], [(entry, iter(calls[entry]))]
    while stack:
        name, rest = stack[-1]
        target = next((target for target, _ in rest if target not in seen), None)
        if target is None:
            order.append(name)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(calls[target])))
    return order[::-1]


def _trips(direction: str, distance: int, step: int) -> int | None:
    """Trips of a loop whose counter starts at 0 and grows by `step` while `counter <direction> distance` holds."""
    if direction == "NE":
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if direction not in (("LT", "LE") if step > 0 else ("GT", "GE")):
        return None
    inclusive = direction in ("LE", "GE")
    return max(0, distance // step + 1 if inclusive else -(-distance // step))


def _comparison(module: Module, computation: Computation, known: _Known) -> tuple[str, _Scalar | None, _Scalar | None]:
    """(direction, left, right) of the one comparison that a loop's condition makes, which may be inside a fusion."""
    root = computation.root
    while root.opcode in ("fusion", "call"):
        found = _scalars(module, computation, known)
        known = _arguments([found.get(name) for name in root.operands])
        computation = module.callee(root, "calls", "to_apply")
        root = computation.root
    if root.opcode != "compare" or len(root.operands) != 2:
        return "", None, None
    found = _scalars(module, computation, known)
    left, right = map(found.get, root.operands)
    return root.attributes.get("direction", ""), left, right


def _scalars(module: Module, computation: Computation, known: _Known) -> dict[str, _Scalar]:
    """Instruction -> value, for scalars that follow from the loop's state or from constants."""
    found: dict[str, _Scalar] = {}
    for i in computation.instructions:
        value = _scalar(module, computation, i, known, found)
        if value is not None and abs(value[1]) < _TOO_LARGE:
            found[i.name] = value
    return found


def _scalar(
    module: Module, computation: Computation, i: Instruction, known: _Known, found: dict[str, _Scalar]
) -> _Scalar | None:
    """The value of an instruction, from `known` and from the values already `found` of earlier instructions."""
    operands = [found.get(name) for name in i.operands]
    if i.opcode == "constant":
        return (None, int(i.literal)) if re.fullmatch(r"-?\d{1,19}", i.literal) else None
    if i.opcode == "parameter":
        return known.get(("argument", int(i.literal)))
    if i.opcode == "get-tuple-element":
        source, index = computation.by_name[i.operands[0]], int(i.attributes["index"])
        if source.opcode == "parameter":
            return known.get(("state", index))
        return found.get(source.operands[index]) if source.opcode == "tuple" and index < len(source.operands) else None
    if i.opcode in SCALAR_FORWARDING and operands:
        return operands[0]
    if i.opcode in ("add", "subtract") and len(operands) == 2:
        return _sum(i.opcode, *operands)
    if i.opcode in ("fusion", "call") and isinstance(i.shape, Shape) and i.shape.size == 1:
        body = module.callee(i, "calls", "to_apply")
        return _scalars(module, body, _arguments(operands)).get(body.root.name)
    return None


def _sum(opcode: str, left: _Scalar | None, right: _Scalar | None) -> _Scalar | None:
    """Sum or difference of two scalars, if at most one of them depends on the state."""
    if left and right and right[0] is None:
        return left[0], left[1] + (right[1] if opcode == "add" else -right[1])
    if left and right and left[0] is None and opcode == "add":
        return right[0], right[1] + left[1]
    return None


def _elements(i: Instruction, found: dict[str, _Scalar], size: int) -> list[_Scalar | None]:
    """The elements of a tuple of a given size; they are unknown if `i` is not a tuple."""
    names = i.operands if i.opcode == "tuple" else ()
    return [found.get(name) for name in names[:size]] + [None] * (size - len(names))


def _arguments(operands: Sequence[_Scalar | None]) -> _Known:
    """Known values of the arguments that an instruction passes to the computation it calls."""
    return {("argument", n): value for n, value in enumerate(operands) if value is not None}
