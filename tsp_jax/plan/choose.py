"""The plan: which layout, mesh, remat policy and buckets a configuration should have on a target."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import Target
from tsp_jax.plan.advice import CLOSE, is_tsp, kernel_line, reasons, ties, when_not_tsp
from tsp_jax.plan.budget import Budget, usable_bytes
from tsp_jax.plan.compiled import Compile, Compiled, Compilers, Job, Refused
from tsp_jax.plan.estimate import rival_kernels
from tsp_jax.plan.explain import Difference, differs, explain
from tsp_jax.plan.limits import longest_contexts, nothing_fits
from tsp_jax.plan.search import Candidate, Minimise, Search, narrow_down, pareto
from tsp_jax.plan.space import FIELDS, Choice, choices
from tsp_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was chosen for a configuration on a target, from what, and why."""

    name: str
    base: Config
    target: Target
    minimise: Minimise
    budget: Budget
    candidates: tuple[Candidate, ...]
    """the compiled ones, the fastest first, then the best of every other layout and mesh, by closed forms"""
    best: int
    """place among `candidates`"""
    front: tuple[int, ...]
    """places of the candidates that fit and that none beats in both time and memory, the fastest first"""
    search: Search = dataclasses.field(repr=False)
    why: tuple[str, ...]
    ties: tuple[str, ...]
    notes: tuple[str, ...]
    """what the search left out"""

    @functools.cached_property
    def longest(self) -> dict[str, int]:
        """Layout -> tokens of the longest sequence that fits with everything on the devices."""
        return longest_contexts(self.base, self.search, self.target.hardware)

    @functools.cached_property
    def longest_offloaded(self) -> dict[str, int]:
        """The same with what backward needs in the host's memory, which is taken to be large enough."""
        return longest_contexts(self.base, self.search, self.target.hardware, offload=True)

    @property
    def chosen(self) -> Candidate:
        """The best candidate."""
        return self.candidates[self.best]

    def config(self) -> Config:
        """The configuration with the best choice; on virtual CPU devices, with as many as the target has."""
        config = dataclasses.replace(self.chosen.choice.apply(self.base), plan="")
        cpus = self.target.num_devices if self.target.hardware.platform == "cpu" else 0
        return dataclasses.replace(config, cpu_devices=cpus)

    def tokens_per_s(self, candidate: Candidate) -> float:
        """Of all devices together."""
        return self.base.batch * self.base.seq_len / candidate.step_s

    def tokens_per_device_hour(self, candidate: Candidate) -> float:
        """Tokens that one device-hour pays for."""
        return 3600 * self.tokens_per_s(candidate) / self.target.num_devices

    def differences(self, candidate: Candidate) -> list[Difference]:
        """The parts that make a compiled peak differ from its closed form by more than `explain.LARGE`.

        The largest first; empty if it differs by less, or is not compiled. Parts are left out that differ by less than
        a tenth of the whole difference.
        """
        found, closed = candidate.compiled, candidate.estimate
        if not found or not differs(found.peak_bytes, closed.peak_bytes):
            return []
        least = abs(found.peak_bytes - closed.peak_bytes) / 10
        parts = explain(closed, found.peak_at, found.parts, found.peak_bytes)
        return [each for each in parts if abs(each.compiled - each.closed_form) >= least]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain numbers and strings."""
        return {
            "model": self.name, "target": str(self.target), "seq_len": self.base.seq_len, "batch": self.base.batch,
            "minimise": self.minimise, "budget": self.budget.to_json(),
            "candidates": [self._candidate(place, c) for place, c in enumerate(self.candidates)],
            "best": self.best, "front": list(self.front), "longest": self.longest,
            "longest_offloaded": self.longest_offloaded, "ties": list(self.ties),
            "why": list(self.why), "notes": list(self.notes),
        }  # fmt: skip

    def _candidate(self, place: int, candidate: Candidate) -> dict[str, Any]:
        closed = candidate.estimate
        return {
            "config": dataclasses.asdict(candidate.choice),
            "closed_form": {
                "peak_bytes": closed.peak_bytes, "step_s": closed.step_s, "memory": dict(closed.memory),
                "seconds": dict(closed.seconds),
            },
            "compiled": dataclasses.asdict(candidate.compiled) if candidate.compiled else None,
            "tokens_per_s": self.tokens_per_s(candidate),
            "tokens_per_device_hour": self.tokens_per_device_hour(candidate),
            "on_front": place in self.front, "note": candidate.note,
            "differences": [dataclasses.asdict(each) for each in self.differences(candidate)],
        }  # fmt: skip


def choose(
    config: Config, target: Target, *, fixed: frozenset[str] = frozenset(), memory: float = 0.9,
    minimise: Minimise = "time", narrow: bool = False, name: str = "", optimizer: Optimizer = None,
    compilations: int = 12, seconds: float = math.inf, workers: int = 2, compile: Compile | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> Plan:  # fmt: skip
    """Chooses layout, mesh, remat policy, buckets, micro-batches and ZeRO-1.

    The tokens of a step and the numbers of training stay as they are.

    Args:
      config: the model, the tokens of a step, and everything that is not chosen.
      target: devices, present or not.
      fixed: fields of `Config` that stay as they are, such as layout or stream.bucket_mib.
      memory: share of a device's memory that a program may fill.
      minimise: time of a step; memory; or cost, which is time on a fixed number of devices.
      narrow: also search bfloat16 moments and gradients, which change the numbers of training.
      name: of the model, for messages.
      optimizer: None: the one that `config` names. A transformation of the user's own is refused.
      compilations: most steps to compile; 0: closed forms alone decide.
      seconds: no round of compilations starts that would end later.
      workers: processes that compile.
      compile: compiles the finalists; None: in processes of their own, with rows kept on disk.
      progress: called with a line of text as results come.

    Raises:
      ConfigError: nothing fits, fixed fields contradict each other, or `memory` is out of range; before anything is
        compiled. Or no finalist compiles.
    """
    budget = usable_bytes(target.hardware, memory)
    if optimizer is not None:
        raise ConfigError("optimizer is a transformation of its own, which a plan cannot price; use optimizer.name")
    _check_known(fixed)
    if compilations:
        target.devices()  # refuses a target that has none
    progress("closed forms")
    found = choices(config, target.num_devices, fixed, narrow)
    searched = "stream.kernel" not in fixed and config.stream.kernel == "auto"
    kernels = rival_kernels(config, target.hardware) if searched else []
    candidates = narrow_down(config, target, found, budget.usable_bytes, kernels)
    search = Search(candidates, budget.usable_bytes, minimise)
    if not any(c.peak_bytes <= budget.usable_bytes for c in candidates):
        raise nothing_fits(name or "the model", config, target, candidates, budget.usable_bytes, memory, fixed, narrow)
    if compilations:
        with contextlib.ExitStack() as stack:
            compile = compile or stack.enter_context(_compilers(target, workers, progress))
            search.run(config, compile, compilations=compilations, seconds=seconds, progress=progress)
    return _plan(config, target, search, budget, fixed=fixed, name=name)


def _check_known(fixed: frozenset[str]) -> None:
    if unknown := sorted(fixed - {*FIELDS.values()}):
        raise ConfigError(f"fixed={unknown[0]} is not chosen by a plan; use one of {', '.join(FIELDS.values())}")


def _compilers(target: Target, workers: int, progress: Callable[[str], object]) -> Compilers:
    def say(job: Job, found: Compiled | Refused, kept: bool) -> None:
        figures = found.why if isinstance(found, Refused) else f"{found.step_s:.4g} s, {found.peak_bytes / 1e9:.1f} GB"
        place = f"{job.config.layout} {job.config.mesh}, {job.config.remat}, {job.config.stream.bucket_mib:g} MiB"
        progress(f"{place}: {figures}{' (kept from before)' * kept}")

    return Compilers(target, workers=workers, progress=say)


def _plan(config: Config, target: Target, search: Search, budget: Budget, *, fixed: frozenset[str], name: str) -> Plan:
    compiled = sorted(search.compiled(), key=lambda c: c.step_s)
    fitting = [c for c in compiled if search.fits(c)]
    failed = [c for c in search.candidates if c.note and not c.compiled]
    if failed and not compiled:
        raise ConfigError(f"target={target}: no finalist compiles; {failed[0].choice.text()}: {failed[0].note}")
    others = _best_of_places([c for c in search.candidates if not c.compiled and not c.note], compiled)
    if compiled and not fitting:
        raise ConfigError(
            f"target={target}: {name} fits by closed forms alone; {compiled[0].choice.text()} {compiled[0].note}; "
            "use more --compilations, a larger --memory, or more devices"
        )
    ranked = fitting or [c for c in search.candidates if search.fits(c)]
    places = [ranked[k] for k in pareto([(c.step_s, c.peak_bytes) for c in ranked])]
    best = places[-1] if search.minimise == "memory" else places[0]
    shown = tuple(dict.fromkeys((*compiled, *failed, *places, *others)))
    kernels = kernel_line(config, target, best)
    not_tsp = when_not_tsp(config, target, best, search.limit_bytes, fixed)
    return Plan(
        name=name, base=config, target=target, minimise=search.minimise, budget=budget, candidates=shown,
        best=shown.index(best), front=tuple(map(shown.index, places)), search=search,
        why=(*_verdict(best, ranked), *reasons(best, ranked), *filter(None, [kernels, not_tsp])),
        ties=tuple(ties(config, best, ranked)), notes=tuple(filter(None, [search.stopped, _rounding(config, best)])),
    )  # fmt: skip


def _rounding(config: Config, best: Candidate) -> str:
    """One line if the best choice rounds more than the configuration does."""
    own, chosen = Choice.of(config), best.choice
    names = [name for name in ("moments_dtype", "grad_dtype") if getattr(own, name) != getattr(chosen, name)]
    what = " and ".join(f"{FIELDS[name]}={getattr(chosen, name)}" for name in names)
    return f"{what} changes the numbers of training; leave out --narrow to keep them" if names else ""


def _best_of_places(candidates: list[Candidate], compiled: list[Candidate]) -> list[Candidate]:
    """The candidate with the shortest closed form of every layout and mesh of which nothing is compiled."""
    known, found = {c.choice.where for c in compiled}, dict[str, Candidate]()
    for candidate in sorted(candidates, key=lambda c: c.estimate.step_s):
        if candidate.choice.where not in known:
            found.setdefault(candidate.choice.where, candidate)
    return list(found.values())


def _verdict(best: Candidate, ranked: list[Candidate]) -> list[str]:
    """One line if TSP is not the best, and slower by more than closed forms are wrong by."""
    tsp = min((c for c in ranked if is_tsp(c.choice)), key=lambda c: c.step_s, default=None)
    if tsp is None or is_tsp(best.choice) or tsp.step_s <= best.step_s * (1 + CLOSE):
        return []
    return [
        f"do not use TSP here: its best, {tsp.choice.where}, takes {tsp.step_s:.3g} s a step, {best.choice.where} "
        f"{best.step_s:.3g} s"
    ]
