"""The search for the best choice: closed forms say what may win, the compiler decides among the finalists.

Each round compiles the choices whose optimistic bound is lowest: their closed form, times what compiled steps like them
took of theirs, less what such a figure may be wrong by. The search ends when no bound is below the best compiled step,
or when its budget is spent; what is left of the budget goes to steps of less memory, which make the front.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import Target
from tsp_jax.plan.compiled import Compile, Compiled, Job, Refused
from tsp_jax.plan.estimate import Estimate, estimate
from tsp_jax.plan.space import Choice

Minimise = Literal["time", "memory", "cost"]
_TYPICAL = ("typical rates",)
ROUND = 4
"""steps compiled in a round; even, for two processes"""
_NEAR = 0.15
_FOR_FRONT = 2
"""of the last round, steps of less memory"""
_SLACK = {0: 0.0, 1: 0.02, 2: 0.04, 3: 0.06}
"""distance of a choice to the nearest compiled one -> share by which its bound is below its corrected closed form"""
_MEMORY_SLACK = 0.05
"""share of the limit by which the closed form of a choice may exceed it, if nothing like it has been compiled"""


@dataclasses.dataclass(eq=False)
class Candidate:
    """A choice and what is known about it."""

    choice: Choice
    estimate: Estimate
    compiled: Compiled | None = None
    note: str = ""
    """why it has no compiled figures, or does not fit"""

    @property
    def step_s(self) -> float:
        """Of the compiled step, else of the closed form."""
        return self.compiled.step_s if self.compiled else self.estimate.step_s

    @property
    def peak_bytes(self) -> float:
        """Of the compiled step, else of the closed form."""
        return self.compiled.peak_bytes if self.compiled else self.estimate.peak_bytes


def price(config: Config, target: Target, choices: Iterable[Choice]) -> list[Candidate]:
    """The closed form of each choice that the target can run, at typical rates, in the order of `choices`.

    Raises:
      ConfigError: the target can run none of them.
    """
    found, refusal = [], None
    for choice in choices:
        try:
            found.append(Candidate(choice, estimate(choice.apply(config), target, _TYPICAL)))
        except ConfigError as error:
            refusal = refusal or error
    if not found:
        assert refusal
        raise refusal
    return found


def narrow_down(
    config: Config, target: Target, choices: Sequence[Choice], limit_bytes: float, kernels: Iterable[str] = ()
) -> list[Candidate]:
    """The candidates that may win or join the front, with as few prices as that needs.

    Every choice is priced with buckets of one size. Buckets of other sizes are priced for those whose step that fits is
    at most `_NEAR` longer than the shortest, for the best of every layout, and for those on the front; for these also
    `kernels`.
    """
    size = Choice.of(config).bucket_mib
    found = price(config, target, [c for c in choices if c.bucket_mib == size])
    found.sort(key=lambda c: (c.peak_bytes > limit_bytes, c.step_s))
    limit = found[0].step_s * (1 + _NEAR)
    kept = [c for c in found if c.step_s <= limit and c.peak_bytes <= limit_bytes]
    kept += {c.choice.layout: c for c in reversed(found)}.values()
    kept += [found[k] for k in pareto([(c.step_s, c.peak_bytes) for c in found])]
    wanted = {c.choice for c in kept}
    others = [c for c in choices if c.bucket_mib != size and dataclasses.replace(c, bucket_mib=size) in wanted]
    others += [dataclasses.replace(c, kernel=kernel) for kernel in kernels for c in choices if c in wanted]
    return found + (price(config, target, others) if others else [])


class Search:
    """Finds the best of some candidates.

    Args:
      candidates: with closed forms; compiled figures are added to them.
      limit_bytes: memory of a device that a step may fill.
      minimise: what is least for the best candidate. On one number of devices, cost is time.
    """

    def __init__(self, candidates: Sequence[Candidate], limit_bytes: float, minimise: Minimise = "time"):
        self.candidates, self.limit_bytes = candidates, limit_bytes
        self.minimise: Minimise = minimise
        self.stopped = ""
        """why the search ended before its bounds did; empty if it did not"""

    def run(
        self, config: Config, compile: Compile, *, compilations: int, seconds: float = math.inf,
        progress: Callable[[str], object] = lambda _: None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Compiles finalists in rounds.

        Args:
          config: what all candidates share.
          compile: compiles jobs.
          compilations: most steps to compile.
          seconds: no round starts that would end later, if it takes as long as the longest before it.
          progress: called with a line of text before each round.
          clock: seconds.
        """
        began, longest, left = clock(), 0.0, compilations
        while left > 0:
            if longest and clock() - began + longest > seconds:
                self.stopped = f"the search stopped after {compilations - left} compilations: {seconds:g} s are over"
                return
            chosen = self._next(min(left, ROUND), last=left <= ROUND)
            if not chosen:
                return
            number = compilations - left
            progress(f"compiling {number + 1} to {number + len(chosen)} of at most {compilations}")
            start = clock()
            for candidate, found in zip(chosen, compile([Job(c.choice.apply(config)) for c in chosen]), strict=True):
                self._record(candidate, found)
            longest, left = max(longest, clock() - start), left - len(chosen)
        if self._bounded(self._open()):
            self.stopped = f"the search stopped after {compilations} compilations; more may find a faster step"

    def best(self) -> Candidate | None:
        """The best compiled candidate that fits; None if there is none."""
        return min((c for c in self.compiled() if self.fits(c)), key=self._value, default=None)

    def compiled(self) -> list[Candidate]:
        """The candidates with compiled figures."""
        return [c for c in self.candidates if c.compiled]

    def fits(self, candidate: Candidate) -> bool:
        """Whether a compiled step fits, or an estimated one may."""
        if candidate.compiled:
            return candidate.compiled.peak_bytes <= self.limit_bytes
        distance, _, peak = self.predicted(candidate)
        return not candidate.note and peak <= self.limit_bytes * (1 + (_MEMORY_SLACK if distance > 1 else 0))

    def predicted(self, candidate: Candidate) -> tuple[int, float, float]:
        """(distance to the nearest compiled candidates, seconds of a step, peak bytes), scaled by what these took."""
        compiled = [(c.choice.distance(candidate.choice), c) for c in self.compiled()]
        if not compiled:
            return 3, candidate.estimate.step_s, candidate.estimate.peak_bytes
        nearest = min(distance for distance, _ in compiled)
        near = [c for distance, c in compiled if distance == nearest]
        steps = _mean([c.step_s / c.estimate.step_s for c in near])
        peaks = _mean([c.peak_bytes / c.estimate.peak_bytes for c in near])
        return nearest, candidate.estimate.step_s * steps, candidate.estimate.peak_bytes * peaks

    def _record(self, candidate: Candidate, found: Compiled | Refused) -> None:
        if isinstance(found, Refused):
            candidate.note = found.why
            return
        candidate.compiled = found
        if not self.fits(candidate):
            over = (found.peak_bytes - self.limit_bytes) / 1e9
            candidate.note = f"does not fit: {over:.1f} GB more than the {self.limit_bytes / 1e9:.1f} GB to be filled"

    def _value(self, candidate: Candidate) -> tuple[float, float]:
        step, peak = candidate.step_s, candidate.peak_bytes
        return (peak, step) if self.minimise == "memory" else (step, peak)

    def _open(self) -> list[Candidate]:
        """Candidates that may fit and have not been compiled."""
        return [c for c in self.candidates if not c.compiled and self.fits(c)]

    def _bounded(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those whose bound is below the best compiled step's value, the lowest bound first."""
        best = self.best()
        limit = self._value(best)[0] if best else math.inf
        bounds = [(self._bound(c), number) for number, c in enumerate(candidates)]
        return [candidates[number] for bound, number in sorted(bounds) if bound < limit]

    def _bound(self, candidate: Candidate) -> float:
        distance, step, peak = self.predicted(candidate)
        return (peak if self.minimise == "memory" else step) * (1 - _SLACK[distance])

    def _next(self, number: int, last: bool) -> list[Candidate]:
        """The next candidates to compile: first one of each layout, then the lowest bounds, then the front's."""
        candidates = self._open()
        first = not self.compiled()
        wanted = number - (_FOR_FRONT if last and not first and number > _FOR_FRONT else 0)
        chosen: list[Candidate] = []
        for candidate in self._bounded(candidates):
            alike = [c for c in chosen if _alike(c.choice, candidate.choice, first)]
            if len(chosen) < wanted and len(alike) < (1 if first else 2):
                chosen.append(candidate)
        rest = [c for c in candidates if c not in chosen]
        return chosen + self._for_front(rest, number - len(chosen))

    def _for_front(self, candidates: Sequence[Candidate], number: int) -> list[Candidate]:
        """Candidates that would join the front, spread over its memory; the one of least memory first."""
        predicted = [self.predicted(c)[1:] for c in candidates]
        compiled = [(c.step_s, c.peak_bytes) for c in self.compiled() if self.fits(c)]
        places = pareto([*compiled, *predicted])
        new = sorted((predicted[k - len(compiled)][1], k - len(compiled)) for k in places if k >= len(compiled))
        stride = max(1, len(new) // number) if number else 1
        return [candidates[k] for _, k in new[::stride][:number]]


def _alike(one: Choice, other: Choice, first: bool) -> bool:
    if first:
        return one.layout == other.layout
    return one.where == other.where and one.remat == other.remat


def _mean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point beats in both figures, in the order of the first figure.

    Of equal points, the first one counts.
    """
    found, least = [], math.inf
    for place in sorted(range(len(points)), key=lambda k: (points[k], k)):
        if points[place][1] < least:
            found.append(place)
            least = points[place][1]
    return found
