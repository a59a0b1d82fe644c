"""Simulated timeline of a compiled program on given hardware: time of a step, and which communication is exposed.

`tsp_jax.inspect.queues` has the rules of the simulation, `tsp_jax.inspect.roofline` the cost of an instruction,
`tsp_jax.hardware.links` the link model, `tsp_jax.hardware.rates` the rates. The program is simulated in each of
`SCENARIOS`: at typical rates, to which all figures but bands refer, and at the corners of the rates' bands. Every
result states its assumptions, as `Timeline.assumptions`.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.links import link_model
from tsp_jax.hardware.rates import GROUPED, SCENARIOS, Band, Rates, Work
from tsp_jax.inspect.collection import paused_collection
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.platforms import check_platform, platforms_of_text
from tsp_jax.inspect.prices import Prices
from tsp_jax.inspect.queues import Event, Record, Simulation
from tsp_jax.inspect.schedule import Queue, Schedule, Task
from tsp_jax.inspect.scopes import declared_flops, declared_trips

TYPICAL = next(iter(SCENARIOS))


class TaskTotal(NamedTuple):
    """All executions of a task in a step."""

    task: Task
    each_s: float
    """time of one execution"""
    count: float  # pyright: ignore[reportIncompatibleMethodOverride]
    exposed_s: float
    """exposed time of all executions together"""

    @property
    def seconds(self) -> float:
        """Time of all executions together."""
        return self.count * self.each_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one execution. step_s = compute_s + contention_s + exposed_comm_s + exposed_host_s."""

    step_s: float
    compute_s: float
    """time that kernels take alone"""
    contention_s: float
    """time by which communication lengthens kernels"""
    comm_s: float
    """time that collectives take alone"""
    exposed_comm_s: float
    """time that the compute queue waits for collectives"""
    host_s: float
    """time that the link to the host is busy"""
    exposed_host_s: float
    """time that the compute queue waits for copies to and from the host"""
    matmul_s: float
    """time that the matrix products take at the rate of the fastest product: a lower bound for any schedule"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline(Times):
    """Simulated execution of a program on one device, at typical rates."""

    flops: float
    """floating-point operations of the matrix products"""
    scenarios: Mapping[str, Times]
    """name in `SCENARIOS` -> times at its rates"""
    kernels: tuple[TaskTotal, ...]
    """tasks of the compute queue, the longest first"""
    collectives: tuple[TaskTotal, ...]
    """tasks of the links, the longest first"""
    assumptions: tuple[str, ...]
    """what the simulation assumes, to be printed with the results"""
    outline: tuple[Event, ...] = dataclasses.field(default=(), repr=False)
    """events of the simulated iterations of loops; iterations that are alike stand once"""
    events: tuple[Event, ...] = dataclasses.field(default=(), repr=False)
    """events of every iteration, if they were recorded"""
    host_copies: tuple[TaskTotal, ...] = dataclasses.field(default=(), repr=False)
    """tasks of the link to the host, the longest first"""
    prices: Mapping[str, Prices] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """name in `SCENARIOS` -> what was simulated, for simulations with a change"""

    def band(self, name: str = "step_s") -> Band:
        """The shortest, the typical and the longest of a time over all scenarios."""
        found = [getattr(times, name) for times in self.scenarios.values()]
        return Band(min(found), getattr(self, name), max(found))

    @property
    def matmul_ratio(self) -> float | None:
        """Time of the step over the time of its matrix products alone; None without matrix products."""
        return self.step_s / self.matmul_s if self.matmul_s else None

    @functools.cached_property
    def hidden_fraction(self) -> dict[str, float]:
        """Instruction name -> share of the collective's time that overlaps with computation, over all executions.

        The share is 0 if compute waits at least as long as the collective takes. The wait can be longer than the
        collective, for example because earlier collectives delay it.
        """
        return {
            total.task.name: max(0.0, 1.0 - total.exposed_s / total.seconds) if total.seconds else 1.0
            for total in self.collectives
        }

    @property
    def by_scope(self) -> dict[str, float]:
        """Named scope (`Task.label`) -> seconds of kernels, the longest first."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for total in self.kernels:
            seconds[total.task.label] += total.seconds
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


@paused_collection()
def simulate(module: Module, hardware: Hardware, *, unknown_trips: Trips = 1, record: bool = False) -> Timeline:
    """Simulates one execution of a scheduled program.

    Args:
      module: a parsed program.
      hardware: rates and links; its platform must be the one that the program was compiled for.
      unknown_trips: trips to assume for data-dependent loops that declare none; see `Module.executions`.
      record: keep events for `write_trace`; loops with communication record every iteration.

    Raises:
      ConfigError: the program is not scheduled, or was compiled for another platform.
    """
    module.check_scheduled()
    check_platform(hardware, platforms_of_text(module))
    schedule = Schedule(module, unknown_trips, on_chip=hardware.platform == "tpu")
    prices = {name: Prices(schedule, hardware, scenario) for name, scenario in SCENARIOS.items()}
    typical = _simulation(prices[TYPICAL], "all" if record else "outline")
    outline = _simulation(prices[TYPICAL], "outline") if record else typical
    totals = _totals(typical)
    scenarios = {name: _times(typical if name == TYPICAL else _simulation(each)) for name, each in prices.items()}
    return Timeline(
        **{field.name: getattr(scenarios[TYPICAL], field.name) for field in dataclasses.fields(Times)},
        flops=_flops(totals["compute"]), kernels=totals["compute"], collectives=totals["links"], scenarios=scenarios,
        assumptions=_assumptions(module, hardware, unknown_trips, totals), outline=tuple(outline.events),
        events=tuple(typical.events) if record else (), host_copies=totals["host"], prices=prices,
    )  # fmt: skip


def step_seconds(prices: Prices) -> float:
    """Time of one execution at some prices, such as those with a change."""
    return _simulation(prices).now["compute"]


def _simulation(prices: Prices, record: Record = "") -> Simulation:
    simulation = Simulation(prices, record)
    simulation.run(prices.schedule.module.entry)
    simulation.wait_for_all()
    return simulation


Totals = dict[Queue, tuple[TaskTotal, ...]]


def _totals(simulation: Simulation) -> Totals:
    """Tasks that ran on each queue, the longest first."""
    found: dict[Queue, list[TaskTotal]] = {"compute": [], "links": [], "host": []}
    for name, count in simulation.executions.items():
        step = simulation.schedule.named[name]
        for task, seconds in zip(step.tasks, simulation.prices.seconds(step), strict=True):
            found[task.queue].append(TaskTotal(task, seconds, count, simulation.exposed.get(task.name, 0.0)))
    return {queue: tuple(sorted(some, key=lambda total: -total.seconds)) for queue, some in found.items()}


def _times(simulation: Simulation) -> Times:
    """Seconds of a simulated execution, added in the order of `_totals`: they are the sums of its figures."""
    prices, kernels, products = simulation.prices, [], []
    waits: dict[Queue, list[tuple[float, float]]] = {"links": [], "host": []}
    for name, count in simulation.executions.items():
        step = simulation.schedule.named[name]
        seconds = [count * each_s for each_s in prices.seconds(step)]
        if step.queue == "compute":
            kernels += seconds
            products += [(s, count * task.flops) for s, task in zip(seconds, step.tasks, strict=True) if task.flops]
        else:
            waits[step.queue].append((seconds[0], simulation.exposed.get(name, 0.0)))
    compute_s, (comm_s, exposed_s) = sum(sorted(kernels, reverse=True)), _sums(waits["links"])
    (host_s, exposed_host_s), (_, flops) = _sums(waits["host"]), _sums(products)
    step_s = simulation.now["compute"]
    stretched = step_s - compute_s - exposed_s - exposed_host_s if prices.contention[0] else 0.0
    return Times(
        step_s=step_s, compute_s=compute_s, contention_s=max(0.0, stretched), comm_s=comm_s, exposed_comm_s=exposed_s,
        host_s=host_s, exposed_host_s=exposed_host_s,
        matmul_s=flops / prices.hardware.rates.best_flops.rate(prices.scenario.compute),
    )  # fmt: skip


def _sums(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Sums of (seconds, another figure) over tasks, the longest first."""
    found = sorted(pairs, key=lambda pair: -pair[0])
    return sum(seconds for seconds, _ in found), sum(other for _, other in found)


def _flops(kernels: Iterable[TaskTotal]) -> float:
    return sum(total.count * total.task.flops for total in kernels)


def _assumptions(module: Module, hardware: Hardware, unknown: Trips, totals: Totals) -> tuple[str, ...]:
    rates = hardware.rates
    return (
        "a band goes from the shortest to the longest step over slow and fast computation and slow and fast links; "
        "other figures are at typical rates",
        *([f"rates of {rates.origin}; what that file lacks is {hardware.name}'s"] if rates.origin else []),
        f"{hardware.name}: products of {_product_range(rates)} TFLOP/s by shape; "
        f"{rates.memory.bytes_per_s.text(1e12)} TB/s of memory; {rates.host.bytes_per_s.text(1e9)} GB/s to the host",
        *_sources([*(p.source for p in rates.products), rates.memory.source, rates.host.source]),
        link_model(hardware),
        *_collective_assumptions(rates, totals["links"]),
        f"while both run, communication takes {rates.contention.compute.text(0.01)} % of computation's rate, and "
        f"computation {rates.contention.links.text(0.01)} % of communication's; {rates.contention.source}",
        "kernels have no launch cost",
        "a kernel takes the longer of its matrix products and its memory traffic; other arithmetic is free",
        "caches keep nothing between kernels; copies within the device run one after another with the kernels",
        *_loop_assumptions(module, unknown),
        *_kernel_assumptions(module, rates, totals["compute"]),
    )


def _product_range(rates: Rates) -> str:
    slowest = min((p.flops_per_s for p in rates.products), key=lambda band: band.typical)
    best = rates.best_flops.text(1e12)
    return best if len(rates.products) == 1 else f"{slowest.typical / 1e12:.3g} (small ones) up to {best}"


def _sources(sources: Iterable[object]) -> list[str]:
    """A line for each source, once."""
    return [f"source of these rates: {text}" for text in dict.fromkeys(map(str, sources))]


def _collective_assumptions(rates: Rates, collectives: Iterable[TaskTotal]) -> list[str]:
    """The rates of each kind of collective that the program runs."""
    lines = []
    for op in sorted({total.task.op for total in collectives}):
        row = rates.collective(op)
        figures = f"{row.fixed_s.text(1e-6)} us and {row.bytes_per_s.text(1e9)} GB/s within a node"
        lines.append(f"{op}: {figures}; {row.source}")
    return lines


def _loop_assumptions(module: Module, unknown_trips: Trips) -> list[str]:
    """Lines that say which trip count is assumed for each data-dependent loop."""
    loops = [i for i, _ in module.walk(unknown_trips) if i.opcode == "while" and module.trip_count(i) is None]
    declared = sorted({trips for loop in loops if (trips := declared_trips(loop)) is not None})
    unknown = [loop.name for loop in loops if declared_trips(loop) is None]
    lines = []
    if declared:
        numbers = ", ".join(map(str, declared))
        lines.append(f"data-dependent loops run the mean number of trips that they declare: {numbers}")
    if unknown:
        times = "as often as the caller says" if callable(unknown_trips) else f"{unknown_trips:g} times"
        lines.append(f"data-dependent loops that declare no trips run {times}: {', '.join(unknown)}")
    return lines


def _kernel_assumptions(module: Module, rates: Rates, kernels: Iterable[TaskTotal]) -> list[str]:
    """The rates assumed for kernels that the HLO text does not describe."""
    calls = {i.name for i, _ in module.walk() if i.opcode == "custom-call"}
    opaque = sorted({t.task.op for t in kernels if t.task.name in calls and not t.task.flops})
    found = {d.kind: d.work for d in map(declared_flops, (i for i, _ in module.walk(fusions=True))) if d}
    lines = []
    if found:
        lines.append("kernels that declare their matrix products read each array once")
        lines += [f"{kind}: {_declared_rate(rates, work)}" for kind, work in sorted(found.items())]
    if opaque:
        lines.append(f"other custom kernels count by their memory traffic alone: {', '.join(opaque)}")
    return lines


def _declared_rate(rates: Rates, work: Work) -> str:
    if work.kernel == "grouped":
        share, source = GROUPED
        return f"{share.text()} times the rate of one product of the same size; {source}"
    if not work.direction:
        return f"{rates.best_flops.text(1e12)} TFLOP/s, as the fastest plain products"
    row = rates.attention_row(work)
    other = [] if row.kernel in (work.kernel, "") else [f"of kernel {row.kernel}"]
    other += [] if row.head_dim in (work.head_dim, 0) else [f"of heads of {row.head_dim}"]
    return f"{row.flops_per_s.text(1e12)} TFLOP/s{', ' * bool(other)}{' and '.join(other)}; {row.source}"
