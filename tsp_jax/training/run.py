"""A compiled run under way: batch, step, log, evaluate, save."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from tsp_jax.config import Config
from tsp_jax.errors import BAD_NUMBERS, PREEMPTED, RunStopped
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.data import prefetch
from tsp_jax.training.distributed import report_once
from tsp_jax.training.metrics import MetricsFile, StepClock, TrainProgress
from tsp_jax.training.safety.finite import NumbersWatch, all_finite
from tsp_jax.training.safety.preemption import Agreement, StopSignals
from tsp_jax.training.safety.watchdog import Watchdog
from tsp_jax.training.setup import RunData
from tsp_jax.training.step import StepMetrics, TrainProgram, TrainState


@dataclasses.dataclass
class Run:
    """What steps need, once everything is compiled and restored."""

    config: Config
    program: TrainProgram
    compiled: Any
    data: RunData
    metrics: MetricsFile
    checkpoints: Checkpoints
    progress: TrainProgress
    signals: StopSignals
    watchdog: Watchdog

    def __post_init__(self):
        self.clock = StepClock()
        self.numbers = NumbersWatch(self.config.faults, self.metrics.earlier_steps(), report_once)

    def go(self, state: TrainState, start: int) -> None:
        """Steps `start` to the end. A step's numbers are fetched while the next one runs."""
        self.signals.protect()
        stop_agreed, unseen, done = Agreement(self.signals), None, start
        batches = self._batches(start)
        cut_short = start and self._due(start, self.config.eval_every) and start not in self.metrics.evaluations
        if cut_short and not self._evaluate(state, start):
            batches = iter(())
        for step, batch in batches:
            state, numbers = self.compiled(state, batch)
            self._log(unseen)
            unseen, done = (step + 1, numbers), step + 1
            stops = stop_agreed()
            evaluates, saves = self._due(done, self.config.eval_every), self._due(done, self.config.checkpoint_every)
            if evaluates or saves or stops:
                self._log(unseen)
                unseen = None
                if evaluates:
                    stops |= not self._evaluate(state, done)
                if saves or stops:
                    self._save(state, done)
                self.clock.skip()
            self.checkpoints.poll()
            if stops:
                break
        self._log(unseen)
        if done > start and self.checkpoints.last != done:
            self._save(state, done)
        self.checkpoints.close(done)
        if done < self.config.steps or done not in self.metrics.evaluations:
            raise RunStopped(f"asked to; step {done} of {self.config.steps} is saved, start again to go on", PREEMPTED)

    def _due(self, done: int, every: int) -> bool:
        return done == self.config.steps or (every > 0 and done % every == 0)

    def _batches(self, start: int) -> Iterator:
        def make(step: int):
            return self.data.train.place(step, self.program.batch_sharding, accumulate=self.config.accumulate)

        alone = jax.process_count() == 1  # several must agree, and those that have their batch wait in the step
        interrupt = self.signals.requested if alone else None
        return prefetch(make, start, self.config.steps, self.config.data.prefetch, interrupt)

    def _log(self, unseen: tuple[int, StepMetrics] | None) -> None:
        if unseen is None:
            return
        step, numbers = unseen
        values = {name: float(value) for name, value in numbers._asdict().items()}
        self.watchdog.pet(f"step {step}")
        line = {"step": step, **values, "tokens_per_s": self.clock.rate(self.config.batch * self.config.seq_len)}
        self.metrics.write(line)
        self.progress.show(line)
        self.numbers.see(line)

    def _evaluate(self, state: TrainState, step: int) -> bool:
        """Writes the held-out loss; False if a signal cut it short, and it is to be done when the run is resumed."""
        total = count = 0.0
        for index in range(min(self.config.eval_batches, max(1, self.data.held_out.num_windows // self.config.batch))):
            if jax.process_count() == 1 and self.signals.asked:
                return False
            batch = self.data.held_out.place(index, self.program.batch_sharding, accumulate=1)
            nll, labels = self.program.evaluate(state.params, batch)
            total, count = total + float(nll), count + float(labels)
            self.watchdog.pet(f"batch {index} of the evaluation at step {step}")
        loss = total / max(count, 1.0)
        self.metrics.write({"step": step, "eval_loss": loss})
        self.progress.say(f"step {step}: held-out loss {loss:.4f} nats/token")
        return True

    def _save(self, state: TrainState, step: int) -> None:
        if not all_finite(state):
            raise RunStopped(f"the state of step {step} is not finite; it was not saved", BAD_NUMBERS)
        self.metrics.sync()
        self.checkpoints.save(state, step)
        self.watchdog.pet(f"the start of saving step {step}")
