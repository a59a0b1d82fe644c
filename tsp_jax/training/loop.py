"""Train: batch, step, log, evaluate, save."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from tsp_jax.compiler import compiler_options
from tsp_jax.config import Config
from tsp_jax.errors import BAD_NUMBERS, PREEMPTED, RunStopped
from tsp_jax.inspect import collectives, memory_report, parse
from tsp_jax.layout import Placement
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.data import prefetch
from tsp_jax.training.distributed import is_writer, report, report_once, write_whole
from tsp_jax.training.guard import NumbersWatch, all_finite, is_skipped
from tsp_jax.training.initial import check_init_from, initial_state
from tsp_jax.training.metrics import MetricsFile, StepClock, TrainProgress, plot_losses, print_summary, read_metrics
from tsp_jax.training.preemption import Agreement, StopSignals
from tsp_jax.training.setup import RunData, describe, load_data, open_workdir, place_run
from tsp_jax.training.step import StepMetrics, TrainProgram, TrainState, make_program
from tsp_jax.training.watchdog import Watchdog


def train(config: Config, name: str = "run") -> dict:
    """Trains, or resumes, the run of a configuration. With several processes, each makes this call.

    Everything that can be refused is refused before anything compiles or is written.

    Returns:
      The summary (see `print_summary`); {} on processes that do not write.

    Raises:
      ConfigError: the configuration does not fit the machine, the data or the working directory.
      RunStopped: the run ended early: a signal, bad numbers, or a checkpoint that could not be saved.
    """
    with StopSignals() as signals:
        return _train(config, name, signals)


def _train(config: Config, name: str, signals: StopSignals) -> dict:
    console = Console(quiet=not is_writer())
    placement = place_run(config)
    check_init_from(config, placement)
    data = load_data(config, placement)
    workdir = open_workdir(config)
    program = make_program(config, placement)
    checkpoints = Checkpoints(workdir / "checkpoints", program, config, data.digest, report)
    start = checkpoints.newest_whole() or 0
    for difference in checkpoints.check(start) if start else []:
        console.print(f"resuming with a difference: {difference}", highlight=False, soft_wrap=True)
    if start >= config.steps and (workdir / "summary.json").exists():
        return _already_complete(config, start, console)

    write_whole(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    with console.status("compiling the training step"):
        shape = (config.accumulate, config.batch // config.accumulate, config.seq_len)
        lowered = program.step.lower(program.abstract_state, program.abstract_batch(shape))
        compiled = lowered.compile(compiler_options(jax.devices()[0]))
    console.print(
        f"restored step {start}" if start else "starting afresh", f"on {describe(placement)}", highlight=False
    )
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(MetricsFile(workdir / "metrics.jsonl", start, report)))
        progress = stack.enter_context(TrainProgress(start, config.steps, console))
        watchdog = stack.enter_context(Watchdog(config.faults.hang_s))
        state = checkpoints.restore(start) if start else initial_state(config, program, placement)
        run = _Run(config, program, compiled, data, metrics, checkpoints, progress, signals, watchdog)
        try:
            run.go(state, start)
        except RunStopped:
            checkpoints.wait()  # what is being saved is whole, whatever came after
            raise
    if not is_writer():
        return {}
    lines = read_metrics(metrics.path)
    if not plot_losses(lines, workdir / "loss.png"):
        console.print('no loss.png: pip install "tsp-jax[viz]" brings matplotlib', highlight=False, soft_wrap=True)
    summary = summarise(config, name, placement, compiled, lines)
    write_whole(workdir / "summary.json", json.dumps(summary, indent=1))
    print_summary(summary, console)
    return summary


def _already_complete(config: Config, step: int, console: Console) -> dict:
    text = f"workdir={Path(config.workdir)} is complete at step {step}; --steps {2 * step} trains on"
    console.print(text, highlight=False, soft_wrap=True)
    summary = json.loads((Path(config.workdir) / "summary.json").read_text())
    print_summary(summary, console)
    return summary


@dataclasses.dataclass
class _Run:
    """A compiled run under way."""

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
        if start and self._due(start, self.config.eval_every) and start not in self.metrics.evaluations:
            self._evaluate(state, start)  # which a signal had cut short
        for step, batch in self._batches(start):
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


def summarise(config: Config, name: str, placement: Placement, compiled: Any, lines: list[dict]) -> dict:
    """Last losses, median speed, and what the compiled step holds and moves per device."""
    steps = [line for line in lines if "loss" in line]
    moved = collectives(parse(compiled.as_text()), dict(placement.mesh.shape))
    return {
        "config": name,
        "layout": placement.layout.name,
        "mesh": ",".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items()),
        "step": steps[-1]["step"],
        "loss": next(line["loss"] for line in reversed(steps) if not is_skipped(line)),
        "eval_loss": next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line),
        "skipped_steps": sum(map(is_skipped, steps)),
        "tokens_per_s": float(np.median([line["tokens_per_s"] for line in steps])),
        "peak_bytes": memory_report(compiled).peak_bytes,
        "bytes_per_step": int(sum(c.total_bytes for c in moved)),
        "num_params": config.model.num_params,
    }
