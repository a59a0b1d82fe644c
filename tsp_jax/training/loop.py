"""The loop of a run: `TrainLoop` steps, logs, evaluates and saves."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax

from tsp_jax.config import Config
from tsp_jax.errors import BAD_NUMBERS, PREEMPTED, RunStopped
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.clock import when_done
from tsp_jax.training.data import Batches, prefetch
from tsp_jax.training.distributed import report_once
from tsp_jax.training.evaluation import describe as describe_evaluation
from tsp_jax.training.evaluation import evaluate
from tsp_jax.training.loggers import Loggers
from tsp_jax.training.metrics import MetricsFile
from tsp_jax.training.profile import Profile
from tsp_jax.training.progress import TrainProgress
from tsp_jax.training.router_metrics import step_values
from tsp_jax.training.safety.finite import NumbersWatch, all_finite
from tsp_jax.training.safety.preemption import Agreement, StopSignals
from tsp_jax.training.safety.watchdog import Watchdog
from tsp_jax.training.schedule import CompiledSteps
from tsp_jax.training.splits import Scheduled
from tsp_jax.training.step import StepMetrics, TrainProgram, TrainState
from tsp_jax.training.throughput import Throughput


@dataclasses.dataclass
class TrainLoop:
    """The steps of one run, after everything is compiled and restored."""

    config: Config
    program: TrainProgram
    compiled: CompiledSteps
    batches: Scheduled
    held_out: dict[str, Batches]
    """by name"""
    speed: Throughput
    metrics: MetricsFile
    loggers: Loggers
    checkpoints: Checkpoints
    progress: TrainProgress
    signals: StopSignals
    watchdog: Watchdog
    profile: Profile

    def __post_init__(self):
        self.numbers = NumbersWatch(self.config.faults.skip_limit, self.metrics.earlier, report_once)

    def run(self, state: TrainState, start: int) -> None:
        """Runs steps `start` to the last. A step's metrics are fetched while the next step runs.

        Raises:
          RunStopped: a signal, bad numbers, or a checkpoint that could not be saved.
        """
        self.signals.protect()
        stop_agreed, pending, done = Agreement(self.signals), None, start
        batches = self._batches(start)
        # Given weights are evaluated before the first step: what training changes is seen against that.
        due = self._due(start, self.config.eval_every) if start else bool(self.config.weights_from)
        if due and start not in self.metrics.evaluations and not self._evaluate(state, start):
            batches = iter(())
        self.profile.resume(start)
        self.since = time.perf_counter()
        """when the last step, or an evaluation or checkpoint around it, was known to be done"""
        for step, batch in batches:
            state, step_metrics = self.compiled(state, batch)
            ended = when_done(step_metrics)
            self._log(pending)
            pending, done = (step + 1, step_metrics, ended), step + 1
            stop = stop_agreed()
            evaluate, save = self._due(done, self.config.eval_every), self._due(done, self.config.checkpoint_every)
            if evaluate or save or stop or self.profile.is_due(done):
                self._log(pending)
                pending = None
                self.profile.end(done)
                if evaluate:
                    stop |= not self._evaluate(state, done)
                if save or stop:
                    self._save(state, done)
                self.profile.begin(done)
                self.since = time.perf_counter()
            self.checkpoints.poll()
            if stop:
                break
        self._log(pending)
        if done > start and self.checkpoints.last != done:
            self._save(state, done)
        self.checkpoints.close(done)
        if done < self.config.steps or done not in self.metrics.evaluations:
            saved = f"step {done} of {self.config.steps} is saved" if done else "no step is done"
            raise RunStopped(f"by a signal; {saved}; start again", PREEMPTED)

    def _due(self, done: int, every: int) -> bool:
        return done >= self.config.steps or (every > 0 and done % every == 0)

    def _batches(self, start: int) -> Iterator:
        def make(step: int):
            return self.batches.place(step, self.program.batch_sharding, accumulate=self.config.accumulate)

        # Several processes must agree on the step, so a signal must not interrupt only one of them.
        interrupt = self.signals.requested if jax.process_count() == 1 else None
        return prefetch(make, start, self.config.steps, self.config.data.prefetch, interrupt)

    def _log(self, pending: tuple[int, StepMetrics, Callable[[], float]] | None) -> None:
        """Writes, shows and checks the metrics of a step; waits until the step is done."""
        if pending is None:
            return
        step, step_metrics, ended = pending
        values = step_values(step_metrics)
        self.watchdog.pet(f"step {step}")
        before, self.since = self.since, ended()
        batches, phase_step = self.batches.of(step - 1)
        speed = self.speed.of(batches.num_tokens(phase_step), batches.seq_len, self.since - before)
        line = {"step": step, **values, **speed}
        self._write(line)
        self.progress.show(line)
        self.numbers.see(line)

    def _evaluate(self, state: TrainState, step: int) -> bool:
        """Writes the losses of all held-out sets; returns False if a signal interrupts it (redone on resume)."""

        def go_on(what: str) -> bool:
            self.watchdog.pet(f"the start of {what} at step {step}")
            return not (jax.process_count() == 1 and self.signals.asked)

        found = evaluate(self.program, state.weights, self.held_out, self.config, go_on)
        if found is None:
            return False
        self._write({"step": step, **found})
        self.progress.say(f"step {step}: {describe_evaluation(found)}")
        return True

    def _write(self, line: dict) -> None:
        self.metrics.write(line)
        self.loggers.write(line)

    def _save(self, state: TrainState, step: int) -> None:
        if not all_finite(state):
            raise RunStopped(f"the state of step {step} is not finite; it was not saved", BAD_NUMBERS)
        self.checkpoints.save(state, step, self.metrics.sync())
        self.watchdog.pet(f"the start of saving step {step}")
