"""Simulation of a schedule: three queues, the work in flight on them, and the time that compute waits.

Kernels run one after another on the compute queue. A blocking step waits for compute and for its own queue, and keeps
both busy. Asynchronous work begins when it has been issued and all earlier work of its queue has ended. Where the
program waits for such work to end, the compute queue stands idle: that is exposed time. While the compute queue and
the links both work, each loses a share of its rate (`Prices.contention`).
"""

import functools
import itertools
import operator
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import Literal, NamedTuple

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.instructions import Computation
from tsp_jax.inspect.prices import Prices
from tsp_jax.inspect.schedule import Queue, Step, Task

_SETTLED = 1e-11
"""tolerance in seconds: queue states closer than this are taken as equal, since sums are rounded"""

_FEW = 64
"""as much work in flight on the links may be put off one by one"""
_MOST_WORK = 2_000_000
"""most simulated steps; a real training step takes fewer than a hundred thousand, with every loop iteration traced"""

Amounts = defaultdict[str, float]
Record = Literal["", "outline", "all"]
"""events to keep: none, those of the iterations that are simulated, or those of every iteration"""
ComputeLoops = dict[tuple[str, str], tuple[float, Amounts]]
"""(computation, name) of a loop that uses only the compute queue -> (its seconds, how often each step in it runs)"""


class Event(NamedTuple):
    """A span of time on one queue."""

    track: Queue
    name: str
    start_s: float
    seconds: float
    task: Task | None
    exposed: bool = False
    """the compute queue waits for the task"""
    times: int = 1
    """iterations of a loop that are alike; the event is the first of them, and the others follow it"""
    holds: int = 0
    """number of events directly before this one that are parts of it: those of an iteration of a loop"""


class _Pending:
    """Work that was started and not yet waited for.

    Its `names` are its key, if any, and its opcode without phase after a space. It ends at `end`, and by
    `Simulation.delay` later while it is `delayed`.
    """

    __slots__ = ("delayed", "end", "names", "task")

    def __init__(self, names: tuple[str, ...], task: Task, end: float, delayed: bool):
        self.names, self.task, self.end, self.delayed = names, task, end, delayed


class Simulation:
    """State of the queues (until when each is busy, and the work in flight), and totals of what has run so far."""

    def __init__(self, prices: Prices, record: Record = "", parent: "Simulation | None" = None):
        self.prices, self.schedule = prices, prices.schedule
        self.record: Record = record
        self.now: dict[Queue, float] = {"compute": 0.0, "links": 0.0, "host": 0.0}
        self.pending: dict[_Pending, None] = {}
        """in the order in which it was started"""
        self.named: defaultdict[str, deque[_Pending]] = defaultdict(deque)
        """name -> work that a wait may mean by it; what is no longer pending is removed when it is met"""
        self.ahead: deque[_Pending] = deque()
        """work on the links whose end computation may still put off, in the order in which it ends"""
        self.delay = 0.0
        """by how much computation has put off all work that is delayed"""
        self.executions: Amounts = defaultdict(float)
        """name of a step with tasks -> number of executions"""
        self.exposed: Amounts = defaultdict(float)
        """task -> seconds that the compute queue waited for it"""
        self.events: list[Event] = []
        self._compute_loops: ComputeLoops = parent._compute_loops if parent else {}
        self._work: Counter[str] = parent._work if parent else Counter()

    def run(self, computation: Computation) -> None:
        """Simulates the steps of a computation."""
        for step in self.schedule.steps(computation):
            self._spend(len(step.tasks) or 1, step)
            if step.kind == "run":
                self._run_kernels(step)
            elif step.kind in ("start", "block"):
                self._start(step)
            elif step.kind == "wait":
                self._wait(step)
            elif step.kind == "loop":
                self._loop(step)
            elif step.kind == "branch":
                self._spend(len(self.pending) * len(step.callees), step)
                self._branch(step.callees)
            else:
                self._calls(step.callees)

    def _calls(self, computations: Iterable[Computation]) -> None:
        for computation in computations:
            self.run(computation)

    def _spend(self, work: int, step: Step) -> None:
        """Counts simulated steps and comparisons of work in flight; raises ConfigError if there are too many."""
        self._work["done"] += work
        if self._work["done"] > _MOST_WORK:
            raise ConfigError(
                f"simulation exceeds {_MOST_WORK:,} steps in {step.instruction.name} ({step.instruction.opcode}): "
                "iterations never become alike, or are too many to trace; leave out the target for memory alone"
            )

    def wait_for_all(self) -> None:
        """Ends the program: it lasts until all work that it started has ended."""
        for work in list(self.pending):
            self._stall(work)
        if self.prices.change.hidden:
            self.now["compute"] = max(self.now.values())

    def _run_kernels(self, step: Step) -> None:
        """Runs kernels one after another; once the links are idle, only the time of all the others together counts."""
        seconds, ran = self.prices.seconds(step), 0
        while ran < len(seconds) and (self.record or self.now["links"] > self.now["compute"]):
            self._compute(seconds[ran], step.tasks[ran])
            ran += 1
        rest = itertools.islice(seconds, ran, None)
        self.now["compute"] = functools.reduce(operator.add, rest, self.now["compute"])
        self.executions[step.name] += 1

    def _start(self, step: Step) -> None:
        (task,), (seconds,) = step.tasks, self.prices.seconds(step)
        begin = max(self.now["compute"], self.now[step.queue])
        self.now[step.queue] = begin + seconds
        self._note(step.queue, begin, seconds, task)
        self.executions[task.name] += 1
        if step.kind == "block":
            self._await(task, begin + seconds)
            return
        names = (step.key, f" {step.instruction.base}") if step.key else (f" {step.instruction.base}",)
        delayed = step.queue == "links"
        work = _Pending(names, task, self.now[step.queue] - (self.delay if delayed else 0.0), delayed)
        self.pending[work] = None
        if delayed:
            self.ahead.append(work)
        for name in names:
            self.named[name].append(work)

    def _end(self, work: _Pending) -> float:
        return work.end + self.delay if work.delayed else work.end

    def _compute(self, seconds: float, task: Task | None) -> None:
        """Runs work of so many seconds on the compute queue; it and what the links do meanwhile slow each other."""
        begin, (own, links) = self.now["compute"], self.prices.contention
        busy = max(0.0, self.now["links"] - begin)
        if busy and (own or links):
            both = min(seconds / (1 - own), busy / (1 - links))
            seconds += own * both
            self.now["links"] += links * both
            while self.ahead and (end := self._end(self.ahead[0])) - begin < both * (1 - links):
                work = self.ahead.popleft()  # it ends before this computation
                work.end, work.delayed = max(end, begin + (end - begin) / (1 - links)), False
            if len(self.ahead) > _FEW:
                self.delay += links * both
            else:  # `delay` stays 0 in all real programs, which spares them its rounding
                for work in self.ahead:
                    work.end += links * both
        self._note("compute", begin, seconds, task)
        self.now["compute"] = begin + seconds

    def _wait(self, step: Step) -> None:
        waiting = self.named[step.key or f" {step.instruction.base}"]
        while waiting:
            if (work := waiting.popleft()) in self.pending:
                self._stall(work)
                break

    def _stall(self, work: _Pending) -> None:
        del self.pending[work]
        self._await(work.task, self._end(work))

    def _await(self, task: Task, end: float) -> None:
        """Lets compute wait until a task ends."""
        wait = end - self.now["compute"]
        if wait > 0 and task.name not in self.prices.change.hidden:
            self._note("compute", self.now["compute"], wait, task, exposed=True)
            self.now["compute"] = end
            self.exposed[task.name] += wait

    def _note(
        self, track: Queue, start: float, seconds: float, task: Task | None, exposed: bool = False,
    ) -> None:  # fmt: skip
        if self.record:
            self.events.append(Event(track, task.name if task else "", start, seconds, task, exposed))

    def _loop(self, step: Step) -> None:
        """Simulates iterations until the state of the queues repeats; all later iterations take the same time."""
        body, condition = step.callees
        if all(map(self.schedule.compute_only, step.callees)):
            seconds, runs = self._compute_loop(step)
            self._compute(seconds, self._whole(step, runs))
            _add(self.executions, runs, 1)
            return
        iterations, state = round(step.trips), self._state()
        for done in range(1, iterations + 1):
            self._spend(len(self.pending), step)
            begin, (runs, exposed) = self.now["compute"], (self.executions, self.exposed)
            noted = len(self.events)
            self.executions, self.exposed = defaultdict(float), defaultdict(float)
            self.run(condition)
            self.run(body)
            before, state = state, self._state()
            alike = self.record != "all" and _same(before, state)
            times = iterations - done + 1 if alike else 1
            _add(runs, self.executions, times)
            _add(exposed, self.exposed, times)
            self.executions, self.exposed = runs, exposed
            if self.record:
                name = f"{self.schedule.label(step.instruction)} iteration {done} of {iterations}"
                size, holds = self.now["compute"] - begin, len(self.events) - noted
                self.events.append(Event("compute", name, begin, size, None, times=times, holds=holds))
            if alike:
                self._shift((times - 1) * (self.now["compute"] - begin))
                break
        self.run(condition)

    def _whole(self, step: Step, runs: Amounts) -> Task | None:
        """A loop without communication as one task of a recorded timeline."""
        if not self.record:
            return None
        i, tasks = step.instruction, [(n, task) for name, n in runs.items() for task in self.schedule.named[name].tasks]
        size, flops = sum(n * task.bytes for n, task in tasks), sum(n * task.flops for n, task in tasks)
        return Task(i.name, "while", i.op_name, self.schedule.label(i), "compute", size, flops)

    def _shift(self, seconds: float) -> None:
        self.now = {queue: time + seconds for queue, time in self.now.items()}
        for work in self.pending:
            work.end += seconds

    def _state(self) -> list[tuple[str, float]]:
        """For each queue and task in flight, how long after compute it ends. The next iteration depends on this."""
        ends = [*self.now.items(), *((work.task.name, self._end(work)) for work in self.pending)]
        return [(name, max(0.0, end - self.now["compute"])) for name, end in ends]

    def _trial(self) -> "Simulation":
        """A simulation that goes on from this state of the queues, with copies of the work in flight."""
        trial = Simulation(self.prices, self.record, parent=self)
        trial.now, trial.delay = dict(self.now), self.delay
        if self.pending:
            copies = {work: _Pending(work.names, work.task, work.end, work.delayed) for work in self.pending}
            trial.pending = dict.fromkeys(copies.values())
            for work in trial.pending:
                for name in work.names:
                    trial.named[name].append(work)
            trial.ahead = deque(copies[work] for work in self.ahead if work in copies)
        return trial

    def _branch(self, branches: Iterable[Computation]) -> None:
        """Simulates every branch, and goes on from the one that ends last."""
        different = list({branch.name: branch for branch in branches}.values())
        if len(different) < 2:
            self._calls(different)
            return
        trials = [self._trial() for _ in different]
        for trial, branch in zip(trials, different, strict=True):
            trial.run(branch)
        last = max(reversed(trials), key=lambda trial: (trial.now["compute"], trial.now["links"], trial.now["host"]))
        self.now, self.delay = last.now, last.delay
        self.pending, self.named, self.ahead = last.pending, last.named, last.ahead
        self.events += last.events
        _add(self.executions, last.executions, 1)
        _add(self.exposed, last.exposed, 1)

    def _compute_loop(self, step: Step) -> tuple[float, Amounts]:
        key = step.instruction.computation, step.instruction.name
        if key not in self._compute_loops:
            body, condition = (Simulation(self.prices, parent=self) for _ in range(2))
            body.run(step.callees[0])
            condition.run(step.callees[1])
            runs: Amounts = defaultdict(float)
            _add(runs, body.executions, step.trips)
            _add(runs, condition.executions, step.trips + 1)
            seconds = step.trips * body.now["compute"] + (step.trips + 1) * condition.now["compute"]
            self._compute_loops[key] = seconds, runs
        return self._compute_loops[key]


def _add(total: Amounts, part: Amounts, times: float) -> None:
    for name, value in part.items():
        total[name] += value * times


def _same(a: list[tuple[str, float]], b: list[tuple[str, float]]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and abs(x[1] - y[1]) < _SETTLED for x, y in zip(a, b, strict=True))
