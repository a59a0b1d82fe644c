"""What would shorten a step most: simulations of the same program with one thing changed.

Each candidate is a kind of change (`_KINDS`) to one part of the program. Parts are scopes without their pass, two names
deep, such as tsp/mlp; a change of the whole program has no part. The program is simulated again with the change, at the
rates of every scenario, so that a gain is a band. Gains do not add: two changes may shorten the same wait.

A change says what is gone, not how to get rid of it. It leaves out what a remedy costs elsewhere, such as memory.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tsp_jax.hardware.rates import Band, Work
from tsp_jax.inspect.schedule import Change, Schedule, Task
from tsp_jax.inspect.timeline import TaskTotal, Timeline, step_seconds

LEAST_SHARE = 0.005
"""gains below this share of the step are left out"""
MOST_FOUND = 3
_MOST_TRIED = 12
"""candidates that are simulated, those with the largest first estimates"""
LARGER = 4
"""how many times as large combined collectives are"""
_TYPICAL = "typical rates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """A change that would shorten the step."""

    kind: str
    """communication, fixed cost, contention, host, products, attention, memory or recomputation"""
    part: str
    """scope without its pass; empty: the whole program"""
    what: str
    """what the simulation changes"""
    remedy: str
    """what the author of a program may do about it"""
    mostly: str
    """the instruction that contributes most, its source and its share; empty: no instruction changes"""
    gain_s: Band
    """seconds by which the step is shorter, over all scenarios; the typical value is that at typical rates"""
    step_s: float
    """time of the step with the change, at typical rates"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottlenecks:
    """The changes that would shorten a step most."""

    found: tuple[Bottleneck, ...]
    """the largest gain first"""
    together_s: float
    """time of the step with all these changes, at typical rates"""
    verdict: str
    """one sentence: what bounds the step"""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        found = [dataclasses.asdict(each) | {"gain_s": each.gain_s._asdict()} for each in self.found]
        return {"found": found, "together_s": self.together_s, "verdict": self.verdict}


class _Kind(NamedTuple):
    applies: Callable[[Task], bool]
    change: Callable[[Task, Schedule], Task]
    what: str
    """{part} stands for the part of the program, {detail} for a detail of the change"""
    remedy: str
    whole: bool = False
    """one candidate for the whole program, instead of one for each part"""


def find_bottlenecks(timeline: Timeline) -> Bottlenecks:
    """Simulates a timeline's program again with what might shorten it, and returns the changes that do so most."""
    least = LEAST_SHARE * timeline.step_s
    tried = sorted(_candidates(timeline), key=lambda each: -each.estimate)[:_MOST_TRIED]
    gains = [(timeline.step_s - _step(timeline, _TYPICAL, each), each) for each in tried if each.estimate >= least]
    best = sorted((pair for pair in gains if pair[0] >= least), key=lambda pair: -pair[0])[:MOST_FOUND]
    found = tuple(_bottleneck(timeline, each) for _, each in best)
    together_s = _step(timeline, _TYPICAL, *(each for _, each in best))
    return Bottlenecks(found=found, together_s=together_s, verdict=_verdict(timeline, found))


class _Candidate(NamedTuple):
    kind: str
    part: str
    savings: dict[str, float]
    """name of each task that changes -> seconds by which its executions are shorter, or less exposed"""

    @property
    def estimate(self) -> float:
        """Seconds by which the step would be shorter if nothing else waited."""
        return sum(self.savings.values())

    def change(self) -> Change:
        if self.kind == "contention":
            return Change(contention=False)
        change = _KINDS[self.kind].change
        return Change(lambda task, schedule: change(task, schedule) if task.name in self.savings else task)


def _candidates(timeline: Timeline) -> Iterator[_Candidate]:
    schedule = timeline.schedules[_TYPICAL]
    totals = (*timeline.kernels, *timeline.collectives, *timeline.host_copies)
    for name, kind in _KINDS.items():
        parts: defaultdict[str, list[TaskTotal]] = defaultdict(list)
        for total in filter(lambda total: kind.applies(total.task), totals):
            parts["" if kind.whole else _part(total.task.label)].append(total)
        for part, members in parts.items():
            changed = ((total, kind.change(total.task, schedule)) for total in members)
            yield _Candidate(name, part, {total.task.name: _saving(total, task) for total, task in changed})
    yield _Candidate("contention", "", {"": timeline.contention_s})


def _part(label: str) -> str:
    """A label without its pass, two names deep."""
    return "/".join(label.rpartition(" ")[2].split("/")[:2])


def _saving(total: TaskTotal, changed: Task) -> float:
    return total.exposed_s if changed.hidden else total.count * (total.task.seconds - changed.seconds)


def _step(timeline: Timeline, scenario: str, *candidates: _Candidate) -> float:
    schedule = timeline.schedules[scenario]
    for candidate in candidates:
        schedule = schedule.changed(candidate.change())
    return step_seconds(schedule)


def _bottleneck(timeline: Timeline, candidate: _Candidate) -> Bottleneck:
    kind, steps = _KINDS[candidate.kind], {name: _step(timeline, name, candidate) for name in timeline.schedules}
    gains = [timeline.scenarios[name].step_s - step_s for name, step_s in steps.items()]
    schedule = timeline.schedules[_TYPICAL]
    detail = _kernels(schedule, candidate.savings) if candidate.kind == "attention" else ""
    return Bottleneck(
        kind=candidate.kind, part=candidate.part, what=kind.what.format(part=candidate.part, detail=detail),
        remedy=kind.remedy, mostly=_mostly(schedule, candidate), step_s=steps[_TYPICAL],
        gain_s=Band(min(gains), timeline.step_s - steps[_TYPICAL], max(gains)),
    )  # fmt: skip


def _mostly(schedule: Schedule, candidate: _Candidate) -> str:
    name = max(candidate.savings, key=lambda name: candidate.savings[name])
    if (task := schedule.tasks.get(name)) is None:
        return ""
    found = (c.by_name[name] for c in schedule.module.computations.values() if name in c.by_name)
    sources = (f" at {'/'.join(i.source_file.split('/')[-2:])}:{i.source_line}" for i in found if i.source_file)
    return f"{task.label} ({task.op} {name}){next(sources, '')}, {candidate.savings[name] / candidate.estimate:.0%}"


def _verdict(timeline: Timeline, found: Iterable[Bottleneck]) -> str:
    by_memory = sum(total.seconds for total in timeline.kernels if total.task.memory_s > total.task.products_s)
    products, memory = (part / (timeline.step_s or 1.0) for part in (timeline.matmul_s, by_memory))
    bound = f"matrix products at the rate of the fastest take {products:.0%} of the step"
    bound += f", kernels bound by memory {memory:.0%}"
    if any(found):
        return bound
    return f"no change simulated here shortens the step by {LEAST_SHARE:.1%}: {bound}; fewer operations or bytes would"


# ------------------------------------------------------------------------------------------------ changes


def _hide(task: Task, _: Schedule) -> Task:
    return task._replace(hidden=True)


def _combine(task: Task, schedule: Schedule) -> Task:
    saved_s = (1 - 1 / LARGER) * schedule.fixed_seconds(task)
    return task._replace(seconds=max(0.0, task.seconds - saved_s))


def _drop(task: Task, _: Schedule) -> Task:
    return task._replace(seconds=0.0, products_s=0.0, memory_s=0.0)


def _kernel(task: Task, *, products_s: float, memory_s: float) -> Task:
    return task._replace(seconds=max(products_s, memory_s), products_s=products_s, memory_s=memory_s)


def _fastest_products(task: Task, schedule: Schedule) -> Task:
    best = schedule.hardware.rates.best_flops.rate(schedule.scenario.compute)
    return _kernel(task, products_s=min(task.products_s, task.flops / best), memory_s=task.memory_s)


def _fastest_attention(task: Task, schedule: Schedule) -> Task:
    products = tuple(_with_fastest_kernel(work, schedule) for work in task.products)
    products_s = min(task.products_s, schedule.products_seconds(products))
    return _kernel(task, products_s=products_s, memory_s=task.memory_s)


def _with_fastest_kernel(work: Work, schedule: Schedule) -> Work:
    """The same products by the kernel with the highest typical rate."""
    rates = schedule.hardware.rates
    kernels = [work.kernel, *dict.fromkeys(row.kernel for row in rates.attention if row.direction == work.direction)]
    return max(
        (work._replace(kernel=kernel) for kernel in kernels),
        key=lambda each: rates.attention_row(each).flops_per_s.typical,
    )


def _kernels(schedule: Schedule, tasks: Iterable[str]) -> str:
    """The kernels that would be faster than those of some attention tasks."""
    found = {
        faster.kernel
        for name in tasks
        for work in schedule.tasks[name].products
        if (faster := _with_fastest_kernel(work, schedule)).kernel != work.kernel
    }
    return " and ".join(sorted(found))


def _attends(task: Task) -> bool:
    return any(work.direction for work in task.products)


_KINDS = {
    "communication": _Kind(
        lambda task: task.queue == "links",
        _hide,
        "the step never waits for communication",
        "start collectives earlier (prefetch what the next layer needs), or give them more work to overlap with",
        whole=True,
    ),
    "fixed cost": _Kind(
        lambda task: task.queue == "links",
        _combine,
        f"1/{LARGER} as many collectives in {{part}}, each {LARGER} times as large",
        "combine collectives: larger buckets, or several arrays at once",
    ),
    "contention": _Kind(
        lambda task: False,
        lambda task, _: task,
        "communication and computation do not slow each other",
        "move data with copy engines rather than with kernels, if the collectives' library can; else communicate less",
        whole=True,
    ),
    "host": _Kind(
        lambda task: task.queue == "host",
        _hide,
        "the step never waits for copies to and from the host",
        "keep less in the host's memory, or start copies earlier",
        whole=True,
    ),
    "products": _Kind(
        lambda task: bool(task.products) and not _attends(task),
        _fastest_products,
        "matrix products of {part} at the rate of the fastest shape",
        "multiply larger matrices at a time, in dims that are multiples of the hardware's tile",
    ),
    "attention": _Kind(
        _attends,
        _fastest_attention,
        "attention at the rate of {detail}, the fastest kernel known for this hardware",
        "use that kernel",
        whole=True,
    ),
    "memory": _Kind(
        lambda task: task.queue == "compute" and not task.products,
        _drop,
        "elementwise operations, reductions and copies of {part} take no time",
        "fuse elementwise operations into the kernels beside them, keep fewer copies, or use narrower types",
    ),
    "recomputation": _Kind(
        lambda task: task.label.startswith("recompute "),
        _drop,
        "backward recomputes nothing",
        "keep more of the forward pass (jax.checkpoint's policy), if memory allows",
        whole=True,
    ),
}
"""kind -> which tasks it changes and how; contention changes no task but the schedule"""
