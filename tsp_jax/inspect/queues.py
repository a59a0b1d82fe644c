"""Going through a schedule: three queues, what is under way on them, and what compute waits for.

Kernels follow one another on the compute queue. What blocks waits for compute and its own queue and keeps both. What is
started begins when it is issued and what was started before it has ended; where the program waits for its end, compute
stands still, and that is its exposed time.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tsp_jax.inspect.hlo import Computation
from tsp_jax.inspect.schedule import Queue, Schedule, Step, Task

_SETTLED = 1e-11
"""seconds by which the state after two rounds of a loop may differ and count as the same: rounding of sums"""


Amounts = defaultdict[str, float]


class Event(NamedTuple):
    """A slice of a timeline."""

    track: Queue
    name: str
    start_s: float
    seconds: float
    task: Task | None
    exposed: bool = False
    """compute stands still, waiting"""


class _Pending(NamedTuple):
    """Something started and not yet waited for."""

    key: str
    base: str
    """opcode without phase"""
    queue: Queue
    task: str
    end: float


class Run:
    """State of the queues: until when each is taken, and what has been started; what has run so far."""

    def __init__(
        self, schedule: Schedule, record: bool = False, summaries: dict[str, tuple[float, Amounts]] | None = None
    ):
        self.schedule, self.record = schedule, record
        self.now: dict[Queue, float] = {"compute": 0.0, "links": 0.0, "host": 0.0}
        self.pending: list[_Pending] = []
        self.runs: Amounts = defaultdict(float)
        """times that each task ran"""
        self.exposed: Amounts = defaultdict(float)
        """seconds that compute waited for each task"""
        self.events: list[Event] = []
        self._summaries = summaries if summaries is not None else {}

    def computation(self, computation: Computation) -> None:
        """Goes through a computation's schedule."""
        for step in self.schedule.steps(computation):
            if step.kind == "run":
                self._note("compute", self.now["compute"], step.seconds, self.schedule.tasks[step.task])
                self.now["compute"] += step.seconds
                self.runs[step.task] += 1
            elif step.kind in ("start", "block"):
                self._start(step)
            elif step.kind == "wait":
                self._wait(step)
            elif step.kind == "loop":
                self._loop(step)
            elif step.kind == "branch":
                self._branch(step.callees)
            else:
                for callee in step.callees:
                    self.computation(callee)

    def wait_for_all(self) -> None:
        """The program ends when all that it started has ended."""
        for task in list(self.pending):
            self._stall(task)

    def _start(self, step: Step) -> None:
        begin = max(self.now["compute"], self.now[step.queue])
        self.now[step.queue] = begin + step.seconds
        self._note(step.queue, begin, step.seconds, self.schedule.tasks[step.task])
        self.runs[step.task] += 1
        self.pending.append(_Pending(step.key, step.instruction.base, step.queue, step.task, self.now[step.queue]))
        if step.kind == "block":
            self._stall(self.pending[-1])

    def _wait(self, step: Step) -> None:
        found = [task for task in self.pending if task.key == step.key] if step.key else []
        if not step.key:
            found = [task for task in self.pending if task.base == step.instruction.base]
        if found:
            self._stall(found[0])

    def _stall(self, task: _Pending) -> None:
        self.pending.remove(task)
        wait = task.end - self.now["compute"]
        if wait > 0:
            self._note("compute", self.now["compute"], wait, self.schedule.tasks[task.task], exposed=True)
            self.now["compute"] = task.end
            self.exposed[task.task] += wait

    def _note(
        self,
        track: Queue,
        start: float,
        seconds: float,
        task: Task | None = None,
        name: str = "",
        exposed: bool = False,
    ) -> None:
        if self.record:
            self.events.append(Event(track, name or (task.name if task else ""), start, seconds, task, exposed))

    # Loops and branches

    def _loop(self, step: Step) -> None:
        """Round by round until the queues stand to each other as a round before: from there every round is alike."""
        body, condition = step.callees
        if all(map(self.schedule.compute_only, step.callees)):
            seconds, runs = self._summary(step)
            self._note("compute", self.now["compute"], seconds, self._whole(step, seconds, runs))
            self.now["compute"] += seconds
            self._add(runs, 1)
            return
        rounds, state = round(step.trips), self._state()
        for done in range(1, rounds + 1):
            begin, (runs, exposed) = self.now["compute"], (self.runs, self.exposed)
            self.runs, self.exposed = defaultdict(float), defaultdict(float)
            self.computation(condition)
            self.computation(body)
            of_round, waits = self.runs, self.exposed
            self.runs, self.exposed = runs, exposed
            before, state = state, self._state()
            alike = not self.record and _same(before, state)
            times = rounds - done + 1 if alike else 1
            self._add(of_round, times, waits)
            name = f"{self.schedule.label(step.instruction)} round {done} of {rounds}"
            self._note("compute", begin, self.now["compute"] - begin, name=name)
            if alike:
                self._shift((times - 1) * (self.now["compute"] - begin))
                break
        self.computation(condition)

    def _whole(self, step: Step, seconds: float, runs: Amounts) -> Task | None:
        """A loop without communication as one task."""
        if not self.record:
            return None
        tasks, i = self.schedule.tasks, step.instruction
        sizes = {key: sum(n * getattr(tasks[name], key) for name, n in runs.items()) for key in ("bytes", "flops")}
        label = self.schedule.label(i)
        return Task(name=i.name, op="while", scope=i.op_name, label=label, queue="compute", seconds=seconds, **sizes)

    def _add(self, runs: Amounts, times: float, waits: Mapping[str, float] | None = None) -> None:
        for total, part in ((self.runs, runs), (self.exposed, waits or {})):
            for name, value in part.items():
                total[name] += value * times

    def _shift(self, seconds: float) -> None:
        self.now = {queue: time + seconds for queue, time in self.now.items()}
        self.pending = [task._replace(end=task.end + seconds) for task in self.pending]

    def _state(self) -> list[tuple[str, float]]:
        """How long other queues and what is under way last beyond compute; all that a next round depends on."""
        ends = [*self.now.items(), *((task.task, task.end) for task in self.pending)]
        return [(name, max(0.0, end - self.now["compute"])) for name, end in ends]

    def _branch(self, branches: Iterable[Computation]) -> None:
        """Takes the branch that ends last."""
        options = []
        for branch in branches:
            trial = Run(self.schedule, summaries=self._summaries)
            trial.now, trial.pending = dict(self.now), list(self.pending)
            trial.computation(branch)
            options.append((trial.now["compute"], trial.now["links"], trial.now["host"], len(options), branch))
        if options:
            self.computation(max(options)[-1])

    def _summary(self, step: Step) -> tuple[float, Amounts]:
        """(seconds, runs) of a loop that is compute alone."""
        if step.task not in self._summaries:
            body, condition = (Run(self.schedule, summaries=self._summaries) for _ in range(2))
            body.computation(step.callees[0])
            condition.computation(step.callees[1])
            total = Run(self.schedule, summaries=self._summaries)
            total._add(body.runs, step.trips)
            total._add(condition.runs, step.trips + 1)
            seconds = step.trips * body.now["compute"] + (step.trips + 1) * condition.now["compute"]
            self._summaries[step.task] = seconds, total.runs
        return self._summaries[step.task]


def _same(a: list[tuple[str, float]], b: list[tuple[str, float]]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and abs(x[1] - y[1]) < _SETTLED for x, y in zip(a, b, strict=True))
