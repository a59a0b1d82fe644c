"""Train: batch, step, log, evaluate, save."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import collectives, memory_report, parse
from tsp_jax.layout import Placement, check_fits, get_layout, make_mesh, parse_mesh
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.corpus import load_corpus
from tsp_jax.training.data import Batches, prefetch
from tsp_jax.training.initial import check_init_from, initial_state
from tsp_jax.training.metrics import MetricsFile, StepClock, TrainProgress, plot_losses, print_summary, read_metrics
from tsp_jax.training.optimizer import make_schedule
from tsp_jax.training.step import StepMetrics, TrainProgram, TrainState, make_program


def train(config: Config, name: str = "run") -> dict:
    """Trains, or resumes, the run of a configuration; returns its summary (see `print_summary`).

    Everything that can be refused is refused before anything compiles or is written.

    Raises:
      ConfigError: the configuration does not fit the machine, the data or the working directory.
    """
    console = Console()
    placement = place_run(config)
    check_init_from(config, placement)
    data = _load_data(config, placement)
    workdir = _open_workdir(config)
    program = make_program(config, placement)
    checkpoints = Checkpoints(workdir / "checkpoints", program, config, data.digest)
    start = checkpoints.latest_step() or 0
    for difference in checkpoints.check(start) if start else []:
        console.print(f"resuming with a difference: {difference}", highlight=False, soft_wrap=True)
    if start >= config.steps and (workdir / "summary.json").exists():
        console.print(
            f"workdir={workdir} is complete at step {start}; --steps {2 * start} trains on",
            highlight=False,
            soft_wrap=True,
        )
        summary = json.loads((workdir / "summary.json").read_text())
        print_summary(summary, console)
        return summary

    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    with console.status("compiling the training step"):
        shape = (config.accumulate, config.batch // config.accumulate, config.seq_len)
        compiled = program.step.lower(program.abstract_state, program.abstract_batch(shape)).compile()
    console.print(
        f"restored step {start}" if start else "starting afresh", f"on {describe(placement)}", highlight=False
    )
    state = checkpoints.restore(start) if start else initial_state(config, program, placement)

    metrics = MetricsFile(workdir / "metrics.jsonl", start)
    run = _Run(config, program, compiled, data, metrics, checkpoints)
    with TrainProgress(start, config.steps, console) as progress:
        run.go(state, start, progress)
    metrics.close()
    checkpoints.close()
    lines = read_metrics(metrics.path)
    if not plot_losses(lines, workdir / "loss.png"):
        console.print('no loss.png: pip install "tsp-jax[viz]" brings matplotlib', highlight=False, soft_wrap=True)
    summary = summarise(config, name, placement, compiled, lines)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    print_summary(summary, console)
    return summary


def place_run(config: Config) -> Placement:
    """The layout of a configuration on the devices of this machine; checks that everything divides."""
    layout = get_layout(config.layout)
    sizes = parse_mesh(config.mesh, layout, jax.device_count())
    check_fits(config, layout, sizes)
    make_schedule(config.optimizer, config.steps)
    return Placement(layout, make_mesh(sizes))


def describe(placement: Placement) -> str:
    """``tsp, data=1 x tsp=8, cpu``."""
    mesh = " x ".join(f"{name}={size}" for name, size in placement.mesh.shape.items())
    return f"{placement.layout.name}, {mesh}, {jax.devices()[0].device_kind}"


@dataclasses.dataclass(frozen=True)
class _Data:
    train: Batches
    held_out: Batches
    digest: str


def _load_data(config: Config, placement: Placement) -> _Data:
    def batches(split: Any, shuffle: bool):
        corpus = load_corpus(config.data, config.model.vocab_size, split)
        return corpus, Batches(
            corpus, batch=config.batch, seq_len=config.seq_len, seed=config.seed, order=config.data.order,
            sequence_shards=placement.size("sequence"), shuffle=shuffle,
        )  # fmt: skip

    corpus, train_batches = batches("train", shuffle=True)
    return _Data(train_batches, batches("heldout", shuffle=False)[1], corpus.digest)


def _open_workdir(config: Config) -> Path:
    workdir = Path(config.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be written ({error.strerror}); use --workdir runs/NAME") from error
    return workdir


@dataclasses.dataclass(frozen=True)
class _Run:
    """A compiled run under way."""

    config: Config
    program: TrainProgram
    compiled: Any
    data: _Data
    metrics: MetricsFile
    checkpoints: Checkpoints

    def go(self, state: TrainState, start: int, progress: TrainProgress) -> None:
        """Steps `start` to the end. A step's numbers are fetched while the next one runs."""
        clock, unseen = StepClock(), None
        for step, batch in self._batches(start):
            state, numbers = self.compiled(state, batch)
            self._log(unseen, clock, progress)
            unseen = step + 1, numbers
            evaluates = self._due(step + 1, self.config.eval_every)
            saves = self._due(step + 1, self.config.checkpoint_every)
            if evaluates or saves:
                self._log(unseen, clock, progress)
                unseen = None
                if evaluates:
                    self._evaluate(state, step + 1, progress)
                if saves:
                    self.checkpoints.save(state, step + 1)
                clock.skip()
        self._log(unseen, clock, progress)

    def _due(self, done: int, every: int) -> bool:
        return done == self.config.steps or (every > 0 and done % every == 0)

    def _batches(self, start: int) -> Iterator:
        def make(step: int):
            return self.data.train.place(step, self.program.batch_sharding, accumulate=self.config.accumulate)

        return prefetch(make, start, self.config.steps, self.config.data.prefetch)

    def _log(self, unseen: tuple[int, StepMetrics] | None, clock: StepClock, progress: TrainProgress) -> None:
        if unseen is None:
            return
        step, numbers = unseen
        values = {name: float(value) for name, value in numbers._asdict().items()}
        line = {"step": step, **values, "tokens_per_s": clock.rate(self.config.batch * self.config.seq_len)}
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(f"loss is {line['loss']} at step {step}; the newest checkpoint is whole")
        self.metrics.write(line)
        progress.show(line)

    def _evaluate(self, state: TrainState, step: int, progress: TrainProgress) -> None:
        total = count = 0.0
        for index in range(min(self.config.eval_batches, max(1, self.data.held_out.num_windows // self.config.batch))):
            batch = self.data.held_out.place(index, self.program.batch_sharding, accumulate=1)
            nll, labels = self.program.evaluate(state.params, batch)
            total, count = total + float(nll), count + float(labels)
        loss = total / max(count, 1.0)
        self.metrics.write({"step": step, "eval_loss": loss})
        progress.say(f"step {step}: held-out loss {loss:.4f} nats/token")


def summarise(config: Config, name: str, placement: Placement, compiled: Any, lines: list[dict]) -> dict:
    """Last losses, median speed, and what the compiled step holds and moves per device."""
    steps = [line for line in lines if "loss" in line]
    moved = collectives(parse(compiled.as_text()), dict(placement.mesh.shape))
    return {
        "config": name,
        "layout": placement.layout.name,
        "mesh": ",".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items()),
        "step": steps[-1]["step"],
        "loss": steps[-1]["loss"],
        "eval_loss": next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line),
        "tokens_per_s": float(np.median([line["tokens_per_s"] for line in steps])),
        "peak_bytes": memory_report(compiled).peak_bytes,
        "bytes_per_step": int(sum(c.total_bytes for c in moved)),
        "num_params": config.model.num_params,
    }
