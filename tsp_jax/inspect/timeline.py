"""Simulated timeline of a compiled program on given hardware: time of a step, and which communication is exposed.

`tsp_jax.inspect.queues` has the rules of the simulation, `tsp_jax.inspect.roofline` the cost of an instruction,
`tsp_jax.hardware.links` the link model. Every result states its assumptions, as `Timeline.assumptions`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.links import link_model
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.platforms import check_platform, platforms_of_text
from tsp_jax.inspect.queues import Event, Simulation
from tsp_jax.inspect.schedule import Queue, Schedule, Task
from tsp_jax.inspect.scopes import declared_flops, declared_trips


@dataclasses.dataclass(frozen=True, slots=True)
class TaskTotal:
    """All executions of a task in a step."""

    task: Task
    count: float
    exposed_s: float
    """exposed time of all executions together"""

    @property
    def seconds(self) -> float:
        """Time of all executions together."""
        return self.count * self.task.seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Simulated execution of a program on one device. step_s = compute_s + exposed_comm_s + exposed_host_s."""

    step_s: float
    compute_s: float
    """time that the compute queue runs kernels"""
    comm_s: float
    """time that the links are busy with collectives"""
    exposed_comm_s: float
    """time that the compute queue waits for collectives"""
    host_s: float
    """time that the link to the host is busy"""
    exposed_host_s: float
    """time that the compute queue waits for copies to and from the host"""
    flops: float
    """floating-point operations of the matrix products"""
    matmul_s: float
    """time that `flops` take at the sustained rate: a lower bound for any schedule"""
    kernels: tuple[TaskTotal, ...]
    """tasks of the compute queue, the longest first"""
    collectives: tuple[TaskTotal, ...]
    """tasks of the links, the longest first"""
    assumptions: tuple[str, ...]
    """what the simulation assumes, to be printed with the results"""
    events: tuple[Event, ...] = dataclasses.field(default=(), repr=False)

    @property
    def matmul_ratio(self) -> float | None:
        """Time of the step over the time of its matrix products alone; None without matrix products."""
        return self.step_s / self.matmul_s if self.matmul_s else None

    @property
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
    schedule = Schedule(module, hardware, unknown_trips)
    simulation = Simulation(schedule, record)
    simulation.run(module.entry)
    simulation.wait_for_all()
    compute, links, host = (_totals(schedule, simulation, queue) for queue in ("compute", "links", "host"))
    flops = sum(total.count * total.task.flops for total in compute)
    return Timeline(
        step_s=simulation.now["compute"], compute_s=sum(total.seconds for total in compute),
        comm_s=sum(total.seconds for total in links), exposed_comm_s=sum(total.exposed_s for total in links),
        host_s=sum(total.seconds for total in host), exposed_host_s=sum(total.exposed_s for total in host),
        flops=flops, matmul_s=flops / hardware.sustained_flops, kernels=compute, collectives=links,
        assumptions=_assumptions(module, hardware, unknown_trips, compute), events=tuple(simulation.events),
    )  # fmt: skip


def _totals(schedule: Schedule, simulation: Simulation, queue: Queue) -> tuple[TaskTotal, ...]:
    """Tasks that ran on a queue, the longest first."""
    tasks = ((schedule.tasks[name], count) for name, count in simulation.executions.items())
    totals = (TaskTotal(task, n, simulation.exposed[task.name]) for task, n in tasks if task.queue == queue)
    return tuple(sorted(totals, key=lambda total: -total.seconds))


def _assumptions(module: Module, hardware: Hardware, unknown: Trips, kernels: Iterable[TaskTotal]) -> tuple[str, ...]:
    return (
        f"{hardware.name}: {hardware.sustained_flops / 1e12:g} TFLOP/s in matrix products, "
        f"{hardware.sustained_bandwidth / 1e12:g} TB/s of memory, {hardware.host_bandwidth / 1e9:g} GB/s to the host",
        f"source of these rates: {hardware.source}",
        link_model(hardware),
        "links have no latency, kernels no launch cost; communication does not slow down computation",
        "a kernel takes the longer of its matrix products and its memory traffic; other arithmetic is free",
        "caches keep nothing between kernels; copies within the device run one after another with the kernels",
        *_loop_assumptions(module, unknown),
        *_kernel_assumptions(module, hardware, kernels),
    )


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


def _kernel_assumptions(module: Module, hardware: Hardware, kernels: Iterable[TaskTotal]) -> list[str]:
    """The rates assumed for kernels that the HLO text does not describe."""
    calls = {i.name for i, _ in module.walk() if i.opcode == "custom-call"}
    opaque = sorted({t.task.op for t in kernels if t.task.name in calls and not t.task.flops})
    kinds = sorted({d.kind for d in map(declared_flops, (i for i, _ in module.walk(fusions=True))) if d})
    lines = []
    if kinds:
        shares = ", ".join(f"{kind} {hardware.efficiency.get(kind, 1.0):g}" for kind in kinds)
        rule = "read each array once and reach these shares of the rate above"
        lines.append(f"kernels that declare their matrix products {rule}: {shares}")
        lines.append(f"source of these shares: {hardware.attention_source}")
    if opaque:
        lines.append(f"other custom kernels count by their memory traffic alone: {', '.join(opaque)}")
    return lines
