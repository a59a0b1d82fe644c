"""What would shorten a step most: simulations of the same program with one thing changed.

Each candidate is a kind of change (`_KINDS`) to one part of the program. Parts are scopes without their pass, two names
deep, such as tsp/mlp; a change of the whole program has no part. The program is simulated again with the change, at the
rates of every scenario, so that a gain is a band. Gains do not add: two changes may shorten the same wait.

A change says what is gone, not how to get rid of it. It leaves out what a remedy costs elsewhere, such as memory.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tsp_jax.hardware.rates import Band, Work
from tsp_jax.inspect.collection import paused_collection
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.prices import Change, Prices
from tsp_jax.inspect.schedule import Task
from tsp_jax.inspect.timeline import TYPICAL, TaskTotal, Timeline, step_seconds

LEAST_SHARE = 0.005
"""gains below this share of the step are left out"""
MOST_FOUND = 3
_MOST_TRIED = 12
"""candidates that are simulated, those with the largest first estimates"""
LARGER = 4
"""how many times as large combined collectives are"""


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
    seconds: Callable[[Task, Prices], float] | None
    """of a task with the change, where it is shorter; None: compute does not wait for the task"""
    what: str
    """{part} stands for the part of the program, {detail} for a detail of the change"""
    remedy: str
    whole: bool = False
    """one candidate for the whole program, instead of one for each part"""


@paused_collection()
def find_bottlenecks(timeline: Timeline) -> Bottlenecks:
    """Simulates a timeline's program again with what might shorten it, and returns the changes that do so most."""
    least = LEAST_SHARE * timeline.step_s
    tried = sorted(_candidates(timeline), key=lambda each: -each.estimate)[:_MOST_TRIED]
    steps = [(_step(timeline, TYPICAL, each), each) for each in tried if each.estimate >= least]
    best = sorted((pair for pair in steps if timeline.step_s - pair[0] >= least), key=lambda pair: pair[0])[:MOST_FOUND]
    found = tuple(_bottleneck(timeline, step_s, each) for step_s, each in best)
    together_s = _step(timeline, TYPICAL, *(each for _, each in best))
    return Bottlenecks(found=found, together_s=together_s, verdict=_verdict(timeline, found))


class _Candidate(NamedTuple):
    kind: str
    part: str
    tasks: list[Task]
    savings: list[float]
    """seconds by which the executions of each task are shorter, or less exposed; of contention: in all"""

    @property
    def estimate(self) -> float:
        """Seconds by which the step would be shorter if nothing else waited."""
        return sum(self.savings)

    def change(self, prices: Prices) -> Change:
        if self.kind == "contention":
            return Change(contention=False)
        if (seconds := _KINDS[self.kind].seconds) is None:
            return Change(hidden=frozenset(task.name for task in self.tasks))
        return Change({task.name: seconds(task, prices) for task in self.tasks})


def _candidates(timeline: Timeline) -> Iterator[_Candidate]:
    totals = (*timeline.kernels, *timeline.collectives, *timeline.host_copies)
    for name, kind in _KINDS.items():
        parts: defaultdict[str, list[TaskTotal]] = defaultdict(list)
        for total in totals:
            if kind.applies(total.task):
                parts["" if kind.whole else _part(total.task.label)].append(total)
        for part, members in parts.items():
            savings = [_saving(kind, total, timeline.prices[TYPICAL]) for total in members]
            yield _Candidate(name, part, [total.task for total in members], savings)
    yield _Candidate("contention", "", [], [timeline.contention_s])


@functools.lru_cache(maxsize=65536)
def _part(label: str) -> str:
    """A label without its pass, two names deep."""
    return "/".join(label.rpartition(" ")[2].split("/")[:2])


def _saving(kind: _Kind, total: TaskTotal, prices: Prices) -> float:
    return total.count * (total.each_s - kind.seconds(total.task, prices)) if kind.seconds else total.exposed_s


def _step(timeline: Timeline, scenario: str, *candidates: _Candidate) -> float:
    prices = timeline.prices[scenario]
    return step_seconds(prices.changed(_together(candidate.change(prices) for candidate in candidates)))


def _together(changes: Iterable[Change]) -> Change:
    """All changes at once: a task takes the least of the seconds that they name."""
    seconds: dict[str, float] = {}
    hidden, contention = frozenset(), True
    for change in changes:
        least = {name: min(seconds[name], change.seconds[name]) for name in seconds.keys() & change.seconds.keys()}
        seconds = {**seconds, **change.seconds, **least}
        hidden, contention = hidden | change.hidden, contention and change.contention
    return Change(seconds, hidden, contention)


def _bottleneck(timeline: Timeline, step_s: float, candidate: _Candidate) -> Bottleneck:
    kind = _KINDS[candidate.kind]
    steps = {name: step_s if name == TYPICAL else _step(timeline, name, candidate) for name in timeline.prices}
    gains = {name: timeline.scenarios[name].step_s - after_s for name, after_s in steps.items()}
    prices = timeline.prices[TYPICAL]
    detail = _kernels(prices, candidate.tasks) if candidate.kind == "attention" else ""
    return Bottleneck(
        kind=candidate.kind, part=candidate.part, what=kind.what.format(part=candidate.part, detail=detail),
        remedy=kind.remedy, mostly=_mostly(prices.schedule.module, candidate), step_s=step_s,
        gain_s=Band(min(gains.values()), gains[TYPICAL], max(gains.values())),
    )  # fmt: skip


def _mostly(module: Module, candidate: _Candidate) -> str:
    if not candidate.tasks:
        return ""
    saved, task = max(zip(candidate.savings, candidate.tasks, strict=True), key=lambda pair: pair[0])
    found = (c.by_name[task.name] for c in module.computations.values() if task.name in c.by_name)
    sources = (f" at {'/'.join(i.source_file.split('/')[-2:])}:{i.source_line}" for i in found if i.source_file)
    return f"{task.label} ({task.op} {task.name}){next(sources, '')}, {saved / candidate.estimate:.0%}"


def _verdict(timeline: Timeline, found: Iterable[Bottleneck]) -> str:
    prices = timeline.prices[TYPICAL]
    by_memory = sum(
        total.seconds
        for total in timeline.kernels
        if prices.memory_seconds(total.task) > prices.products_seconds(total.task.products)
    )
    products, memory = (part / (timeline.step_s or 1.0) for part in (timeline.matmul_s, by_memory))
    bound = f"matrix products at the rate of the fastest take {products:.0%} of the step"
    bound += f", kernels bound by memory {memory:.0%}"
    if any(found):
        return bound
    return f"no change simulated here shortens the step by {LEAST_SHARE:.1%}: {bound}; fewer operations or bytes would"


# ------------------------------------------------------------------------------------------------ changes


def _combined(task: Task, prices: Prices) -> float:
    return max(0.0, prices.of(task) - (1 - 1 / LARGER) * prices.fixed_seconds(task))


def _nothing(task: Task, prices: Prices) -> float:
    return 0.0


def _fastest_products(task: Task, prices: Prices) -> float:
    best = prices.hardware.rates.best_flops.rate(prices.scenario.compute)
    return max(min(prices.products_seconds(task.products), task.flops / best), prices.memory_seconds(task))


def _fastest_attention(task: Task, prices: Prices) -> float:
    faster = prices.products_seconds(tuple(_with_fastest_kernel(work, prices) for work in task.products))
    return max(min(prices.products_seconds(task.products), faster), prices.memory_seconds(task))


def _with_fastest_kernel(work: Work, prices: Prices) -> Work:
    """The same products by the kernel with the highest typical rate."""
    rates = prices.hardware.rates
    kernels = [work.kernel, *dict.fromkeys(row.kernel for row in rates.attention if row.direction == work.direction)]
    return max(
        (work._replace(kernel=kernel) for kernel in kernels),
        key=lambda each: rates.attention_row(each).flops_per_s.typical,
    )


def _kernels(prices: Prices, tasks: Iterable[Task]) -> str:
    """The kernels that would be faster than those of some attention tasks."""
    found = {
        faster.kernel
        for task in tasks
        for work in task.products
        if (faster := _with_fastest_kernel(work, prices)).kernel != work.kernel
    }
    return " and ".join(sorted(found))


def _attends(task: Task) -> bool:
    return any(work.direction for work in task.products)


_KINDS = {
    "communication": _Kind(
        lambda task: task.queue == "links",
        None,
        "the step never waits for communication",
        "start collectives earlier (prefetch what the next layer needs), or give them more work to overlap with",
        whole=True,
    ),
    "fixed cost": _Kind(
        lambda task: task.queue == "links",
        _combined,
        f"1/{LARGER} as many collectives in {{part}}, each {LARGER} times as large",
        "combine collectives: larger buckets, or several arrays at once",
    ),
    "contention": _Kind(
        lambda task: False,
        None,
        "communication and computation do not slow each other",
        "move data with copy engines rather than with kernels, if the collectives' library can; else communicate less",
        whole=True,
    ),
    "host": _Kind(
        lambda task: task.queue == "host",
        None,
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
        _nothing,
        "elementwise operations, reductions and copies of {part} take no time",
        "fuse elementwise operations into the kernels beside them, keep fewer copies, or use narrower types",
    ),
    "recomputation": _Kind(
        lambda task: task.label.startswith("recompute "),
        _nothing,
        "backward recomputes nothing",
        "keep more of the forward pass (jax.checkpoint's policy), if memory allows",
        whole=True,
    ),
}
"""kind -> which tasks it changes and how; contention changes no task but the schedule"""
